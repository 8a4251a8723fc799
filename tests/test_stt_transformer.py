"""The oracle: a sliced model equals the dense one with the dropped neurons multiplied by 0 where the down projection
reads. Over every architecture, with a different random width in every site, in every layout.
"""
from __future__ import annotations

import copy
import json
import logging
import pickle
import random
from collections.abc import Callable

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import stt
from stt.errors import InputError
from stt.mlps.stt_linear import STTLinear
from stt.sites import find_sites
from stt.stt_transformer import STTTransformer

FEW = ["qwen2", "phi3", "gpt2", "bert", "t5", "vit"]
Kept = dict[str, list[int]]


def random_units(model: nn.Module, seed: int = 0) -> Kept:
    draw = random.Random(seed)
    return {name: sorted(draw.sample(range(site.width), draw.randint(site.width // 5, site.width * 4 // 5)))
            for name, site in find_sites(model).items()}


def masked(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy that multiplies what the down projections read by 0 or 1."""
    model = copy.deepcopy(model)
    for name, ids in kept.items():
        mask = torch.zeros(find_sites(model)[name].width, dtype=torch.long)
        mask[ids] = 1
        model.get_submodule(find_sites(model)[name].down_module).register_forward_pre_hook(
            lambda module, args, mask=mask: (args[0] * mask.to(args[0].dtype), *args[1:]))
    return model


def layers_of(model: nn.Module) -> list[STTLinear]:
    return [module for module in model.modules() if isinstance(module, STTLinear)]


def assert_outputs(model: nn.Module, batch: dict[str, Tensor], expected: list[Tensor],
                   tolerance: float = 1e-12) -> None:
    with torch.no_grad():
        actual = tiny.outputs(model, batch)
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        error = (ours - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())
        assert error <= tolerance, f"off by {error:.1e}"


# ---------------------------------------------------------------- the oracle


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_sliced_equals_masked_dense(name: str) -> None:
    """float64; scatter, then random calls of inference_time and pad_weights on random layers, then compact."""
    model, batch = tiny.build(name, torch.float64)
    kept = random_units(model)
    with torch.no_grad():
        untouched, expected = tiny.outputs(model, batch), tiny.outputs(masked(model, kept), batch)
    effect = max((a - b).abs().max().item() for a, b in zip(untouched, expected, strict=True))
    assert effect > 1e-3  # else the oracle proves nothing
    assert STTTransformer(model, kept).transform() is model
    assert_outputs(model, batch, expected)
    draw = random.Random(1)
    for _ in range(4):
        for layer in draw.sample(layers_of(model), 3 if len(layers_of(model)) > 3 else 1):
            layer.inference_time = draw.random() < 0.7
            layer.pad_weights(draw.choice([1, 8, 13, 32]))
        assert_outputs(model, batch, expected)
    for layer in layers_of(model):
        layer.inference_time = True
    assert all(layer.is_compact for layer in layers_of(model))
    assert_outputs(model, batch, expected)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_sliced_equals_masked_dense_in_float32(name: str) -> None:
    model, batch = tiny.build(name)
    kept = random_units(model, seed=1)
    with torch.no_grad():
        expected = tiny.outputs(masked(model, kept), batch)
    assert_outputs(stt.apply(model, kept), batch, expected, 1e-5)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_keeping_everything_changes_nothing(name: str) -> None:
    """Bitwise; but a Conv1D becomes a Linear, which adds in another order."""
    has_conv1d = any(isinstance(module, Conv1D) for module in tiny.build(name)[0].modules())
    for inference_time in (False, True):
        model, batch = tiny.build(name, torch.float64 if has_conv1d else torch.float32)
        with torch.no_grad():
            expected = tiny.outputs(model, batch)
        everything = {site.name: range(site.width) for site in find_sites(model).values()}
        model = STTTransformer(model, everything, inference_time=inference_time).transform()
        assert_outputs(model, batch, expected, 1e-12 if has_conv1d else 0.0)


def up_first(x: Tensor, fused: nn.Linear) -> Tensor:
    up, gate = fused(x).chunk(2, -1)
    return up * F.silu(gate)


def pairs(x: Tensor, fused: nn.Linear) -> Tensor:
    y = fused(x)
    return y[..., ::2] * F.sigmoid(y[..., 1::2])


@pytest.mark.parametrize(("linears", "middle"), [
    (1, up_first), (1, pairs), (2, lambda x, a, b: a(x) * F.sigmoid(b(x))), (1, lambda x, a: F.softplus(a(x))),
], ids=["up-first", "pairs", "sigmoid", "softplus"])
def test_unusual_blocks(linears: int, middle: Callable) -> None:
    """Also activations that are not 0 at 0, so that padding could leak."""
    out = tiny.NEURONS * (2 if middle in (up_first, pairs) else 1)
    model, batch = tiny.toy([(tiny.HIDDEN, out)] * linears + [(tiny.NEURONS, tiny.HIDDEN)], middle)
    model, kept = model.double(), random_units(model)
    with torch.no_grad():
        expected = tiny.outputs(masked(model, kept), batch)
    STTTransformer(model, kept).transform()
    draw = random.Random(0)
    for _ in range(20):
        layer = draw.choice(layers_of(model))
        layer.inference_time = draw.random() < 0.5
        draw.choice(layers_of(model)).pad_weights(draw.choice([1, 4, 16]))
        assert_outputs(model, batch, expected)


@pytest.mark.parametrize("name", FEW)
def test_one_unit_and_one_site_are_enough(name: str) -> None:
    model, batch = tiny.build(name, torch.float64)
    kept = {list(find_sites(model))[-1]: [7]}
    with torch.no_grad():
        expected = tiny.outputs(masked(model, kept), batch)
    before = dict(model.named_modules())
    assert_outputs(stt.apply(model, kept), batch, expected)
    changed = {key for key, module in model.named_modules() if module is not before.get(key)}
    assert changed == {key for key, module in model.named_modules() if isinstance(module, STTLinear)}
    assert list(model.stt_selection) == list(kept)


# ---------------------------------------------------------------- what is left behind


@pytest.mark.parametrize("inference_time", [False, True])
def test_layers_are_the_rows_and_columns_of_the_dense_ones(inference_time: bool) -> None:
    model, _ = tiny.build("llama-bias", torch.bfloat16)
    model.model.layers[0].mlp.up_proj.requires_grad_(False)
    dense, kept = copy.deepcopy(model), random_units(model)
    model.train()
    STTTransformer(model, kept, inference_time=inference_time).transform()
    for name, ids in kept.items():
        old, new = dense.get_submodule(name), model.get_submodule(name)
        for projection in ("gate_proj", "up_proj"):
            assert torch.equal(getattr(new, projection).weight, getattr(old, projection).weight[ids])
            assert torch.equal(getattr(new, projection).bias, getattr(old, projection).bias[ids])
            assert getattr(new, projection).out_indices.tolist() == ids
            assert getattr(new, projection).weight.requires_grad is getattr(old, projection).weight.requires_grad
        assert torch.equal(new.down_proj.weight, old.down_proj.weight[:, ids])
        assert torch.equal(new.down_proj.bias, old.down_proj.bias)
        assert new.down_proj.in_indices.tolist() == ids
    for layer in layers_of(model):
        assert layer.training
        assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
        assert layer.inference_time is layer.is_compact is inference_time
    assert model.state_dict().keys() == dense.state_dict().keys()


def test_reports() -> None:
    model, _ = tiny.build("llama")
    dense = sum(p.numel() for p in model.parameters())
    transformer = STTTransformer(model, {"model.layers.0.mlp": [5, 1, 9], "model.layers.1.mlp": range(22)})
    assert transformer.get_parameter_stats()["overall_model_reduction_perc"] == 0
    transformer.transform()
    stats = transformer.get_parameter_stats()
    removed = (2 * 44 - 25) * 3 * tiny.HIDDEN
    assert stats == {"original_parameters": dense, "parameters": dense - removed, "kept_fraction_of_units": 25 / 88,
                     "overall_model_reduction_perc": pytest.approx(100 * removed / dense)}
    blocks = {f"model.layers.{i}.mlp": model.model.layers[i].mlp for i in (0, 1)}
    assert transformer.get_transformed_mlp_blocks() == blocks
    assert transformer.record_original_active_indices() == {"model.layers.0.mlp": [1, 5, 9],
                                                            "model.layers.1.mlp": list(range(22))}
    assert json.loads(model.config.to_json_string())["stt"] == {
        "format_version": 1, "base": None, "sites": {"model.layers.0.mlp": [3, 44], "model.layers.1.mlp": [22, 44]}}
    assert model.stt_selection.widths == {"model.layers.0.mlp": 44, "model.layers.1.mlp": 44}


def test_verbose_says_how_much_is_left(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = tiny.build("llama")
    kept = {site: range(11) for site in find_sites(model)}
    with caplog.at_level(logging.INFO, "stt"):
        STTTransformer(copy.deepcopy(model), kept).transform()
        assert caplog.messages == []
        STTTransformer(model, kept, verbose=True, device="cpu").transform()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("sliced 2 sites: 25.0 % of their neurons kept, ")


def test_slicing_twice_is_refused() -> None:
    model, batch = tiny.build("qwen2")
    transformer = STTTransformer(model, dict.fromkeys(find_sites(model), [0, 1, 2]))
    transformer.transform()
    with torch.no_grad():
        expected = tiny.outputs(model, batch)
    for again in (transformer.transform, lambda: stt.apply(model, {"model.layers.0.mlp": [0]}),
                  lambda: stt.apply(model, model.stt_selection)):
        with pytest.raises(InputError, match="sliced already|made for another model"):
            again()
    assert_outputs(model, batch, expected, 0.0)


@pytest.mark.parametrize("name", FEW)
def test_copies_files_and_state_dicts(name: str) -> None:
    model, batch = tiny.build(name)
    dense, kept = copy.deepcopy(model), random_units(model)
    stt.apply(model, kept)
    with torch.no_grad():
        expected = tiny.outputs(model, batch)
    assert_outputs(pickle.loads(pickle.dumps(model)), batch, expected, 0.0)
    copied = copy.deepcopy(model)
    for layer in layers_of(copied):
        layer.inference_time = False
        layer.pad_weights(16)
    assert_outputs(copied, batch, expected, 1e-6)
    assert_outputs(model, batch, expected, 0.0)
    other = stt.apply(tiny.randomised(dense), kept)
    assert not torch.equal(tiny.outputs(other, batch)[0], expected[0])
    other.load_state_dict(model.state_dict())
    assert_outputs(other, batch, expected, 0.0)


# ---------------------------------------------------------------- training


def trained(model: nn.Module, batch: dict[str, Tensor], names: list[str], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    for _ in range(steps):
        tiny.outputs(model, batch)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("head", ["train", "freeze"])
@pytest.mark.parametrize("name", [*FEW, "albert", "modernbert"])
def test_only_the_selected_parameters_move(name: str, head: str) -> None:
    model, batch = tiny.build(name)
    stt.apply(model, random_units(model))
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    chosen = stt.train_only(model, head=head)
    narrow = {f"{key}.{part}" for key, module in model.named_modules() if isinstance(module, STTLinear)
              for part in ("weight", "bias") if getattr(module, part) is not None}
    assert narrow <= set(chosen)
    assert (set(chosen) == narrow) is (head == "freeze")
    model.train()
    trained(model, batch, chosen)
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved == set(chosen)


@pytest.mark.parametrize("name", FEW)
def test_gradients_are_those_of_the_masked_dense_model(name: str) -> None:
    model, batch = tiny.build(name, torch.float64)
    kept = random_units(model)
    dense = masked(model, kept)
    stt.apply(model, kept)
    for either in (dense, model):
        tiny.outputs(either, batch)[0].square().sum().backward()
    for key, parameter in model.named_parameters():
        expected = dense.get_parameter(key).grad
        if parameter.grad is None:
            assert expected is None
            continue
        owner = model.get_submodule(key.rpartition(".")[0])
        if isinstance(owner, STTLinear):
            expected = expected.T if isinstance(dense.get_submodule(key.rpartition(".")[0]), Conv1D) \
                and expected.ndim == 2 else expected
            expected = expected if owner.out_indices is None else expected[owner.out_indices]
            expected = expected if owner.in_indices is None or expected.ndim == 1 else expected[:, owner.in_indices]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bert"])
def test_gradient_checkpointing(name: str, compact: bool) -> None:
    model, batch = tiny.build(name, torch.float64)
    STTTransformer(model, random_units(model), inference_time=compact).transform()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gradients = []
    for enable in (model.activation_checkpointing_disable, model.activation_checkpointing_enable):
        enable()
        model.zero_grad()
        tiny.outputs(model, batch)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert model.is_activation_checkpointing
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("compact", [False, True])
def test_bf16_autocast_with_float32_trained_weights(compact: bool) -> None:
    model, batch = tiny.build("qwen2", torch.bfloat16)
    STTTransformer(model, random_units(model), inference_time=compact).transform()
    chosen = set(stt.train_only(model))
    assert {p.dtype for key, p in model.named_parameters() if key in chosen} == {torch.float32}
    assert {p.dtype for key, p in model.named_parameters() if key not in chosen} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        logits = tiny.outputs(model, batch)[0]
        logits.float().square().mean().backward()
    assert torch.isfinite(logits).all()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) is (key in chosen)
        assert parameter.grad is None or (parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft
@pytest.mark.parametrize("name", FEW)
def test_peft_sees_ordinary_linears(name: str) -> None:
    model, batch = tiny.build(name)
    stt.apply(model, random_units(model))
    with torch.no_grad():
        expected = tiny.outputs(model, batch)
    targets = [key for key, module in model.named_modules() if isinstance(module, STTLinear)]
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, lora_dropout=0.0))
    assert_outputs(model, batch, expected, 0.0)
    for step in range(2):  # B is 0 at first, so A gets its gradient in the second step
        tiny.outputs(model, batch)[0].square().mean().backward()
        with torch.no_grad():
            adapters = {key: p for key, p in model.named_parameters() if "lora_" in key}
            assert len(adapters) == 2 * len(targets)
            for key, parameter in adapters.items():
                assert parameter.grad is not None
                assert parameter.grad.abs().sum() > 0 or (step == 0 and "lora_A" in key)
                parameter -= 0.1 * parameter.grad / parameter.grad.norm().clamp(min=1e-9)
                parameter.grad = None
    with torch.no_grad():
        adapted = tiny.outputs(model, batch)
    assert not torch.allclose(adapted[0], expected[0], atol=1e-4)
    merged = peft_model.merge_and_unload()
    assert len(layers_of(merged)) == len(targets)
    assert_outputs(merged, batch, adapted, 1e-5)
    for layer in layers_of(merged):
        layer.inference_time = False
        layer.pad_weights(8)
    assert_outputs(merged, batch, adapted, 1e-5)


def test_generation_with_a_cache() -> None:
    model, batch = tiny.build("qwen2", torch.float64)
    kept = random_units(model)
    dense = masked(model, kept)
    stt.apply(model, kept)
    prompt = {"input_ids": batch["input_ids"][1:], "attention_mask": batch["attention_mask"][1:]}
    expected = dense.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("compact", [False, True])
def test_compile(compact: bool) -> None:
    model, batch = tiny.build("qwen2", torch.float64)
    STTTransformer(model, random_units(model), inference_time=compact).transform()
    with torch.no_grad():
        expected = tiny.outputs(model, batch)
    assert_outputs(torch.compile(model, backend="aot_eager"), batch, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FEW)
def test_on_a_gpu_all_is_as_on_the_cpu(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model, batch = tiny.build(name, torch.float64)
    batch |= {"labels": torch.tensor([0, 1])} if name in ("bert", "vit") else {}
    scores = ("stt", "wanda", "gate_product", "taylor", "random") if name != "t5" else ("stt", "wanda", "random")
    expected = [stt.select(model, [batch], score=score, topk_ratio=0.3) for score in scores]
    on_gpu = copy.deepcopy(model).to("cuda")
    assert [stt.select(on_gpu, [batch], score=score, topk_ratio=0.3) for score in scores] == expected
    both = [STTTransformer(each, expected[0]).transform() for each in (model, on_gpu)]
    for each in both:
        for layer in layers_of(each):
            layer.inference_time = True
            layer.pad_weights(16)
    with torch.no_grad():
        on_cpu = tiny.outputs(both[0], batch)
        actual = tiny.outputs(both[1], {key: value.to("cuda") for key, value in batch.items()})
    for ours, theirs in zip(actual, on_cpu, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-10)
