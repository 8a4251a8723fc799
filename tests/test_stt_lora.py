"""LoRA on narrow layers: forward by hand, merging and taking apart in every layout, rounding, what trains."""
from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
from torch import Tensor, nn

import stt
from stt.errors import InputError
from stt.mlps.stt_linear import STTLinear
from stt.sites import find_sites
from stt.stt_lora import STTLoraLinear, add_stt_lora
from stt.stt_transformer import STTTransformer

IN, OUT = 9, 14
ROWS, COLUMNS = [1, 4, 5, 12], [0, 2, 7]
LAYOUTS = ["scatter", "compact", "padded-scatter", "padded-compact"]


def layer_in(layout: str, dtype: torch.dtype = torch.float64) -> STTLinear:
    torch.manual_seed(0)
    layer = STTLinear.from_linear(nn.Linear(IN, OUT, dtype=dtype), in_indices=COLUMNS, out_indices=ROWS)
    layer.inference_time = "compact" in layout
    layer.pad_weights(8 if "padded" in layout else 1)
    return layer


def adapted(layer: STTLinear, dropout: float = 0.0) -> STTLoraLinear:
    lora = STTLoraLinear(layer, r=2, lora_alpha=6, lora_dropout=dropout)
    with torch.no_grad():
        lora.lora_B.normal_()
    return lora.double() if layer.weight.dtype == torch.float64 else lora


def by_hand(lora: STTLoraLinear, x: Tensor) -> Tensor:
    """W x + b + (6 / 2) B A x on the kept channels, spread out where the layer is in scatter mode."""
    layer = lora.stt_linear
    x = x if layer.is_compact else nn.functional.pad(x[..., COLUMNS], (0, layer.in_features - 3))
    y = x @ layer.weight.T + layer.bias + 3 * (x @ lora.lora_A.T) @ lora.lora_B.T
    if layer.is_compact:
        return y
    wide = torch.zeros(*y.shape[:-1], OUT, dtype=y.dtype)
    wide[..., ROWS] = y[..., :4]
    return wide


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- one layer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_merge_unmerge(layout: str) -> None:
    layer = layer_in(layout)
    x = torch.randn(2, 5, layer.in_features if layer.is_compact else IN, dtype=torch.float64)
    plain = layer(x).detach()
    fresh = STTLoraLinear(layer, r=2, lora_alpha=6, lora_dropout=0.0).double()
    assert torch.equal(fresh(x), plain)  # B is 0
    lora, weight = adapted(layer), layer.weight.detach().clone()
    expected = by_hand(lora, x).detach()
    assert not torch.allclose(expected, plain)
    close(lora(x), expected)
    for _ in range(2):  # a second merge or unmerge does nothing
        lora.merge()
        assert lora.merged
        close(lora(x), expected)
        close(layer(x), expected)
    for _ in range(2):
        lora.unmerge()
        assert not lora.merged
        close(layer.weight, weight)
        close(lora(x), expected)
        close(layer(x), plain)
    close(lora.delta(), 3 * lora.lora_B @ lora.lora_A)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_adapter_trains(layout: str) -> None:
    layer = layer_in(layout)
    x = torch.randn(4, layer.in_features if layer.is_compact else IN, dtype=torch.float64)
    lora = adapted(layer)
    assert {name for name, p in lora.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    lora(x).square().sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    gradients = lora.lora_A.grad, lora.lora_B.grad
    lora.zero_grad()
    by_hand(lora, x).square().sum().backward()
    close(gradients[0], lora.lora_A.grad)
    close(gradients[1], lora.lora_B.grad)


def test_dropout_acts_on_the_adapter_in_training_only() -> None:
    lora = adapted(layer_in("compact"), dropout=0.5)
    x = torch.randn(200, 3, dtype=torch.float64)
    lora.eval()
    close(lora(x), by_hand(lora, x).detach())
    lora.train()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        actual = lora(x)
        torch.manual_seed(3)
        dropped = nn.functional.dropout(x, 0.5)
    close(actual, (lora.stt_linear(x) + 3 * dropped @ lora.lora_A.T @ lora.lora_B.T))


def test_starting_values() -> None:
    lora = STTLoraLinear(layer_in("compact", torch.bfloat16))
    assert (lora.lora_A.shape, lora.lora_B.shape, lora.scaling, lora.dropout.p) == ((16, 3), (4, 16), 2.0, 0.1)
    assert lora.lora_A.dtype == lora.lora_B.dtype == torch.float32
    assert not lora.lora_B.any()
    assert 0.5 / math.sqrt(3) < lora.lora_A.abs().max() <= 1 / math.sqrt(3)  # Kaiming uniform, a = sqrt(5)
    assert lora.weight is lora.stt_linear.weight
    merged = STTLoraLinear(layer_in("compact"), merge_weights=True)
    assert merged.merged


@pytest.mark.parametrize(("options", "message"), [
    ({"r": 0}, "r must be at least 1 and lora_dropout in"),
    ({"lora_dropout": 1.0}, "got 16 and 1.0"),
    ({"lora_dropout": -0.1}, "got 16 and -0.1"),
])
def test_bad_options(options: dict, message: str) -> None:
    layer = layer_in("compact")
    with pytest.raises(InputError, match=message):
        STTLoraLinear(layer, **options)
    assert layer.weight.requires_grad
    layer.pad_weights(8)  # still free of any adapter


def test_only_narrow_layers_are_adapted() -> None:
    with pytest.raises(InputError, match="STTLoraLinear adapts an STTLinear, got Linear: slice the model first"):
        STTLoraLinear(nn.Linear(3, 4))


@pytest.mark.parametrize("bias", [True, False])
def test_merging_a_bf16_layer_does_not_round_the_update_away(bias: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(IN, OUT, bias=bias, dtype=torch.bfloat16)
    layer = STTLinear.from_linear(dense, in_indices=COLUMNS, out_indices=ROWS, inference_time=True)
    holder = nn.Sequential(STTLoraLinear(layer, r=2, lora_alpha=2, lora_dropout=0.0))
    with torch.no_grad():
        holder[0].lora_B.fill_(1e-4)
    weight, delta = layer.weight.detach().float(), holder[0].delta().detach()
    x = torch.randn(5, 3)
    expected = x @ (weight + delta).T + (layer.bias.detach().float() if bias else 0)
    assert STTLoraLinear.merge_and_convert(holder) == 1
    assert holder[0] is layer
    close(layer.weight, weight + delta, 0)
    close(layer(x), expected, 1e-6)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(layer(x)).all()


# ---------------------------------------------------------------- a model


def lora_model(name: str, dtype: torch.dtype = torch.float64,
               inference_time: bool = True) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    model, batch = tiny.build(name, dtype)
    kept = {site.name: range(i, site.width, 3) for i, site in enumerate(find_sites(model).values())}
    STTTransformer(model, kept, inference_time=inference_time).transform()
    names = add_stt_lora(model, r=3, lora_alpha=4, lora_dropout=0.1)
    if dtype == torch.float64:
        for module in model.modules():
            if isinstance(module, STTLoraLinear):
                module.double()
    return model, batch, names


@pytest.mark.parametrize("inference_time", [False, True])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_architecture_takes_adapters_and_gives_them_back(name: str, inference_time: bool) -> None:
    model, batch, names = lora_model(name, inference_time=inference_time)
    narrow = {key.removesuffix(".stt_linear") for key, m in model.named_modules() if isinstance(m, STTLinear)}
    assert sorted(names) == sorted(f"{key}.{part}" for key in narrow for part in ("lora_A", "lora_B"))
    with torch.no_grad():
        for key in names:
            model.get_parameter(key).normal_(std=0.1)
        expected = tiny.outputs(model, batch)
        for module in model.modules():  # the layout may change while adapted
            if isinstance(module, STTLinear):
                module.inference_time = not inference_time
        close(tiny.outputs(model, batch)[0], expected[0], 1e-11)
        assert STTLoraLinear.merge_and_convert(model) == len(narrow)
        assert STTLoraLinear.merge_and_convert(model) == 0
        for module in model.modules():
            assert not isinstance(module, STTLoraLinear)
            if isinstance(module, STTLinear):
                module.pad_weights(8)
        for ours, theirs in zip(tiny.outputs(model, batch), expected, strict=True):
            close(ours, theirs, 1e-11)
    assert not any("lora" in key for key in model.state_dict())


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bert"])
def test_only_adapters_and_head_move(name: str) -> None:
    model, batch, names = lora_model(name, torch.float32)
    heads = set(stt.surgery.head_parameters(model))
    assert set(stt.train_only(model, names)) == heads | set(names)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        tiny.outputs(model, batch)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved == heads | set(names)


def test_bf16_model_under_autocast() -> None:
    model, batch, names = lora_model("qwen2", torch.bfloat16)
    stt.train_only(model, names)
    with torch.autocast("cpu", torch.bfloat16):
        tiny.outputs(model, batch)[0].float().square().mean().backward()
    assert all(model.get_parameter(key).grad.dtype == torch.float32 for key in names)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if not p.requires_grad)


def test_adapters_survive_copies_and_state_dicts() -> None:
    model, batch, names = lora_model("qwen2")
    with torch.no_grad():
        for key in names:
            model.get_parameter(key).normal_()
        expected = tiny.outputs(model, batch)[0]
        other, _, _ = lora_model("qwen2")
        other.load_state_dict(model.state_dict())
        close(tiny.outputs(other, batch)[0], expected)
        copied = copy.deepcopy(model)
        STTLoraLinear.merge_and_convert(copied)
        close(tiny.outputs(copied, batch)[0], expected, 1e-11)
        close(tiny.outputs(model, batch)[0], expected, 0)


@pytest.mark.parametrize("which", ["gate_proj", "down_proj"])
def test_padding_an_adapted_site_is_refused_whole(which: str) -> None:
    """One adapted layer is enough, and no layer of the site changes."""
    model, batch = tiny.build("qwen2")
    stt.apply(model, dict.fromkeys(find_sites(model), [1, 2, 3]))
    mlp = model.model.layers[0].mlp
    setattr(mlp, which, STTLoraLinear(getattr(mlp, which)))
    with torch.no_grad():
        expected = tiny.outputs(model.eval(), batch)[0]
        for layer in [m for m in mlp.modules() if isinstance(m, STTLinear)]:
            with pytest.raises(InputError, match="carries a LoRA: merge it"):
                layer.pad_weights(8)
            assert torch.equal(tiny.outputs(model, batch)[0], expected)
        STTLoraLinear.merge_and_convert(model)
        mlp.gate_proj.pad_weights(8)
        close(tiny.outputs(model, batch)[0], expected, 1e-5)


def test_nothing_to_adapt_is_an_error() -> None:
    model, _ = tiny.build("qwen2")
    with pytest.raises(InputError, match="no STTLinear layer to adapt .*: apply a selection of linear layers first"):
        add_stt_lora(model, 2, 4, 0.0)
    model, _, _ = lora_model("qwen2")
    with pytest.raises(InputError, match="no STTLinear layer to adapt"):
        add_stt_lora(model, 2, 4, 0.0)
