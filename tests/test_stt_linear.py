"""One STTLinear against the dense layer it was cut from; a site of them against the masked dense site."""
from __future__ import annotations

import copy
import itertools
import pickle
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import stt
from stt.errors import InputError
from stt.mlps.stt_linear import SiteLayout, STTLinear

IN, OUT = 9, 14
ROWS, COLUMNS = [1, 4, 5, 12], [0, 2, 7]


def dense(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- one layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("columns", "rows"), [(None, ROWS), (COLUMNS, None), (COLUMNS, ROWS), (None, None)])
def test_forward_in_both_modes(bias: bool, columns: list | None, rows: list | None) -> None:
    linear, x = dense(bias), torch.randn(2, 5, IN, dtype=torch.float64)
    layer = STTLinear.from_linear(linear, in_indices=columns, out_indices=rows)
    kept_in, kept_out = torch.zeros(IN).double(), torch.zeros(OUT).double()
    kept_in[slice(None) if columns is None else columns] = 1
    kept_out[slice(None) if rows is None else rows] = 1
    expected = linear(x * kept_in) * kept_out
    close(layer(x), expected)
    layer.inference_time = True
    compact = layer(x if columns is None else x[..., columns])
    close(compact, expected if rows is None else expected[..., rows])
    layer.inference_time = False
    close(layer(x), expected)


def test_sizes_names_and_kinship() -> None:
    linear = dense().requires_grad_(False)
    layer = STTLinear.from_linear(linear, in_indices=COLUMNS, out_indices=ROWS)
    assert isinstance(layer, nn.Linear)
    assert layer.linear is layer
    assert (layer.original_in_features, layer.original_out_features) == (IN, OUT)
    assert (layer.active_in_features, layer.active_out_features) == (layer.in_features, layer.out_features) == (3, 4)
    assert layer.weight.shape == (4, 3)
    assert torch.equal(layer.weight, linear.weight[ROWS][:, COLUMNS])
    assert torch.equal(layer.bias, linear.bias[ROWS])
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert layer.weight.data_ptr() != linear.weight.data_ptr()
    assert layer.weight.is_contiguous()
    assert layer.inference_time is False
    assert "original=(9, 14), scatter" in repr(layer)
    assert all(parameter.requires_grad for parameter in STTLinear.from_linear(dense(), out_indices=ROWS).parameters())
    everything = STTLinear.from_linear(linear)
    assert {everything.weight.data_ptr(), everything.bias.data_ptr()}.isdisjoint(
        {linear.weight.data_ptr(), linear.bias.data_ptr()})
    assert STTLinear.from_weights(linear.weight.T, None, in_indices=ROWS).weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_constructor_takes_original_sizes(dtype: torch.dtype) -> None:
    layer = STTLinear(IN, OUT, in_indices=COLUMNS, out_indices=torch.tensor(ROWS), bias=False, dtype=dtype,
                      inference_time=True)
    assert (layer.weight.shape, layer.weight.dtype, layer.bias) == ((4, 3), dtype, None)
    assert layer(torch.randn(2, 3, dtype=dtype)).shape == (2, 4)
    assert STTLinear(IN, OUT)(torch.randn(2, IN)).shape == (2, OUT)
    assert STTLinear(IN, OUT, out_indices=ROWS, device="meta").weight.is_meta


@pytest.mark.parametrize("ids", [[], [0, IN], [-1], [3, 3]])
def test_bad_channels(ids: list[int]) -> None:
    with pytest.raises(InputError, match=r"in_indices must be distinct channels in 0\.\.8, at least one, got"):
        STTLinear(IN, OUT, in_indices=ids)
    with pytest.raises(InputError, match="in_indices must be distinct channels"):
        STTLinear.from_linear(dense(), in_indices=ids)


def test_wrong_width_of_the_input_says_what_to_do() -> None:
    layer = STTLinear.from_linear(dense(), in_indices=COLUMNS)
    with pytest.raises(InputError, match="is in scatter mode and reads 9 features, got 3: change all layers"):
        layer(torch.randn(2, 3).double())
    layer.inference_time = True
    with pytest.raises(InputError, match="is in compact mode and reads 3 features, got 9"):
        layer(torch.randn(2, IN).double())


def test_gradients_are_those_of_the_dense_layer() -> None:
    linear, x = dense(), torch.randn(6, IN, dtype=torch.float64, requires_grad=True)
    layer = STTLinear.from_linear(linear, in_indices=COLUMNS, out_indices=ROWS)
    (linear(x * F.one_hot(torch.tensor(COLUMNS), IN).sum(0))[:, ROWS].square().sum()).backward()
    expected, x.grad = x.grad, None
    layer(x).square().sum().backward()
    close(layer.weight.grad, linear.weight.grad[ROWS][:, COLUMNS])
    close(layer.bias.grad, linear.bias.grad[ROWS])
    close(x.grad, expected)


# ---------------------------------------------------------------- a site

WIDTH, HIDDEN = 22, 6
KEPT = [0, 3, 4, 9, 10, 17, 21]
SiteBuilder = Callable[[], tuple[nn.Module, Tensor, Tensor]]


class Glu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, WIDTH), nn.Linear(HIDDEN, WIDTH)
        self.down = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.sigmoid(self.gate(x)) * self.up(x))  # sigmoid(0) is not 0: padding must not leak


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.down = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.softplus(self.gate(x)))


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.down = nn.Linear(HIDDEN, 2 * WIDTH), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate(x).chunk(2, -1)
        return self.down(up * F.sigmoid(gate))


class Pairs(Chunked):
    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(x)
        return self.down(y[..., ::2] * F.sigmoid(y[..., 1::2]))


LAYOUTS = {"glu": Glu, "plain": Plain, "chunked": Chunked, "pairs": Pairs}


def site(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """A sliced block, an input, and what the dense block returns with the dropped neurons multiplied by 0."""
    torch.manual_seed(0)
    block, x = LAYOUTS[kind]().to(dtype), torch.randn(2, 5, HIDDEN, dtype=dtype)
    mask = torch.zeros(WIDTH, dtype=dtype)
    mask[KEPT] = 1
    hook = block.down.register_forward_pre_hook(lambda module, args: (args[0] * mask,))
    expected = block(x).detach()
    hook.remove()
    rows = torch.tensor(KEPT)
    of_gate = {"chunked": torch.cat([rows, rows + WIDTH]), "pairs": torch.stack([2 * rows, 2 * rows + 1], 1).flatten()}
    layers = []
    for name in [name for name in ("gate", "up", "down") if hasattr(block, name)]:
        side = {"in_indices": rows} if name == "down" else {"out_indices": of_gate.get(kind, rows)}
        layer = STTLinear.from_linear(getattr(block, name), **side)
        if name == "gate":
            layer.blocks, layer.interleaved = {"chunked": (2, 1), "pairs": (1, 2)}.get(kind, (1, 1))
        setattr(block, name, layer)
        layers.append(layer)
    SiteLayout(layers)
    return block, x, expected


def layers_of(block: nn.Module) -> list[STTLinear]:
    return [module for module in block.modules() if isinstance(module, STTLinear)]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_subset_of_inference_time_and_padding(kind: str) -> None:
    block, x, expected = site(kind)
    close(block(x), expected)
    layers = layers_of(block)
    for asks in itertools.product([False, True], repeat=len(layers)):
        for layer, ask in zip(layers, asks, strict=True):
            layer.inference_time = ask
            close(block(x), expected)
        assert [layer.inference_time for layer in layers] == list(asks)
        assert {layer.is_compact for layer in layers} == {all(asks[:-1])}  # what gate and up ask decides
        for layer, multiple in itertools.product(layers, (4, 1)):
            layer.pad_weights(multiple)
            close(block(x), expected)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_calls(kind: str, seed: int) -> None:
    block, x, expected = site(kind)
    draw = random.Random(seed)
    for _ in range(30):
        layer = draw.choice(layers_of(block))
        if draw.random() < 0.5:
            layer.inference_time = draw.random() < 0.5
        else:
            layer.pad_weights(pad_to=draw.choice([1, 2, 3, 5, 8, 128]))
        block = draw.choice([block, block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))])
        close(block(x), expected)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_padding_adds_exact_zeros_and_goes_away_bitwise(kind: str) -> None:
    block, x, expected = site(kind)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    layers_of(block)[-1].pad_weights(16)
    kept = {"chunked": 2 * 16, "pairs": 2 * 16}.get(kind, 16)
    assert block.gate.weight.shape == (kept, HIDDEN)
    assert block.gate.bias.shape == (kept,)
    assert block.down.weight.shape == (HIDDEN, 16)
    assert (block.gate.in_features, block.gate.out_features) == (HIDDEN, kept)
    assert (block.down.in_features, block.down.out_features) == (16, HIDDEN)
    assert all(int((value != 0).sum()) == before[name].numel() for name, value in block.state_dict().items())
    block.gate.pad_weights(1)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert before.keys() == block.state_dict().keys()


def test_padding_keeps_requires_grad_and_the_default_is_128() -> None:
    block, x, expected = site("glu")
    block.gate.weight.requires_grad_(False)
    block.up.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in block.named_parameters()}
    block.gate.pad_weights()
    assert {name: p.requires_grad for name, p in block.named_parameters()} == flags
    assert {layer.weight.shape for layer in layers_of(block)} == {(128, HIDDEN), (HIDDEN, 128)}
    untouched = block.gate.weight
    block.up.pad_weights(64)
    block.up.pad_weights(128)
    block.gate.pad_weights(128)
    assert torch.equal(block.gate.weight, untouched)


@pytest.mark.parametrize("multiple", [0, -3, 2.0, "8"])
def test_bad_padding(multiple: object) -> None:
    with pytest.raises(InputError, match="pad_to must be a whole number of at least 1, got"):
        site("glu")[0].gate.pad_weights(multiple)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("compact", [False, True])
def test_state_dict_round_trip(kind: str, compact: bool) -> None:
    block, x, expected = site(kind)
    other, _, _ = site(kind)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(block.state_dict())
    other.gate.inference_time = compact
    close(other(x), expected)


@pytest.mark.parametrize("kind", ["glu", "chunked"])
def test_copies_are_independent(kind: str) -> None:
    block, x, expected = site(kind)
    copied = copy.deepcopy(block)
    for layer in layers_of(copied):
        layer.inference_time = True
        layer.pad_weights(8)
    assert not any(layer.is_compact for layer in layers_of(block))
    assert all(layer.layout is copied.gate.layout for layer in layers_of(copied))
    assert copied.gate.layout is not block.gate.layout
    close(block(x), expected)
    close(copied(x), expected)


# ---------------------------------------------------------------- what PyTorch does to modules


@pytest.mark.parametrize("compact", [False, True])
def test_dtypes(compact: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        block, x, expected = site("glu", dtype)
        for layer in layers_of(block):
            layer.inference_time = compact
        actual = block(x)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol={torch.float32: 1e-6}.get(dtype, 2e-2))
        assert block.gate.out_indices.dtype == torch.int64
        assert torch.isfinite(block.float()(x.float())).all()


@pytest.mark.parametrize("compact", [False, True])
def test_float32_weights_in_a_bf16_model(compact: bool) -> None:
    """Trained parameters are float32, all else is bf16: with autocast or without it, activations stay bf16."""
    block, x, expected = site("glu", torch.float32)
    for layer in layers_of(block):
        layer.inference_time = compact
    x = x.to(torch.bfloat16)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            actual = block(x)
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.float(), expected, rtol=0, atol=2e-2)
    actual.sum().backward()
    assert all(layer.weight.grad.dtype == torch.float32 for layer in layers_of(block))


@pytest.mark.parametrize("compact", [False, True])
def test_gradient_checkpointing(compact: bool) -> None:
    block, x, expected = site("glu")
    for layer in layers_of(block):
        layer.inference_time = compact
    block(x).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in block.parameters()]
    block.zero_grad()
    checkpoint(block, x, use_reentrant=False).square().sum().backward()
    for parameter, gradient in zip(block.parameters(), gradients, strict=True):
        close(parameter.grad, gradient)


@pytest.mark.parametrize("compact", [False, True])
def test_compile(compact: bool) -> None:
    block, x, expected = site("chunked")
    for layer in layers_of(block):
        layer.inference_time = compact
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)  # traces forward and backward, no C++ compiler
    close(compiled(x), expected)
    for layer in layers_of(block):
        layer.inference_time = not compact
        layer.pad_weights(8)
    close(compiled(x), expected)
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_moving_to_another_device_takes_the_indices_along() -> None:
    block, x, expected = site("glu")
    block.to("meta")
    assert block.gate.out_indices.is_meta
    assert block(x.to("meta")).shape == expected.shape


def test_public_name() -> None:
    assert stt.STTLinear is STTLinear
