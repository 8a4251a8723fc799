"""When a fused block takes the forward of its own class, which blocks are never fused, and what becomes of copies."""
from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from fused_blocks import KINDS, UNITS, assert_same, block_and_input, block_of, is_fused, ordinary, sliced, took
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import stt
from stt.mlps import fused
from stt.sites import find_sites
from stt.stt_lora import STTLoraLinear
from stt.surgery import override_forward, pad_sites

# ---------------------------------------------------------------- whatever it does not know of


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        return func(*args, **(kwargs or {}))


class Marked(Tensor):
    """As every distributed or quantized tensor, of a class of its own."""


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def wrap(block: nn.Module) -> None:
    block.gate_proj = STTLoraLinear(block.gate_proj, lora_dropout=0.0).double()


def inject(block: nn.Module) -> None:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["up_proj"]), block)


def scatter(block: nn.Module) -> None:
    block.gate_proj.inference_time = False


def override_a_layer(block: nn.Module) -> None:
    override_forward(block.up_proj, lambda layer, x: 3 * F.linear(x, layer.weight))


def replace_a_layer(block: nn.Module) -> None:
    plain = nn.Linear(block.up_proj.in_features, block.up_proj.out_features).double()
    block.up_proj = plain


def train_one_layer_in_another_dtype(block: nn.Module) -> None:
    block.down_proj.float()


DISTURBANCES = {
    "forward hook": lambda block: block.gate_proj.register_forward_hook(lambda module, args, y: 2 * y),
    "forward pre-hook": lambda block: block.down_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "backward hook": lambda block: block.up_proj.register_full_backward_hook(lambda module, ins, outs: (2 * ins[0],)),
    "backward pre-hook": lambda block: block.up_proj.register_full_backward_pre_hook(lambda module, outs: (outs[0],)),
    "hook on the activation": lambda block: block.act_fn.register_forward_hook(lambda module, args, y: 2 * y),
    "STTLoraLinear": wrap, "PEFT": inject, "scatter mode": scatter, "a layer's own forward": override_a_layer,
    "another layer": replace_a_layer, "dtypes": train_one_layer_in_another_dtype,
    "parametrization": lambda block: parametrize.register_parametrization(block.up_proj, "weight", Doubled()),
    "another activation": lambda block: setattr(block, "act_fn", nn.PReLU().double()),
    "one more child": lambda block: block.add_module("more", nn.Identity()),
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_disturbed_blocks_take_the_ordinary_path(disturbance: str) -> None:
    block, x = block_and_input("llama")
    assert took(block(x)) == "fused"
    handle = DISTURBANCES[disturbance](block)
    assert is_fused(block)
    assert took(block(x)) == "own"
    assert torch.equal(block(x), ordinary(block)(x))
    assert_same(block, x)
    if hasattr(handle, "remove"):
        handle.remove()
        assert took(block(x)) == "fused"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # of torch.jit.trace
def test_other_ways_to_take_the_ordinary_path(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = block_and_input("llama")
    expected = ordinary(block)(x).detach()
    gates = []
    with torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, y: gates.append(y) if module is block.gate_proj else None):
        assert took(block(x)) == "own"
    assert len(gates) == 1
    with Watching(), torch.device("cpu"):
        assert took(block(x)) == "own"
    with torch.device("cpu"):  # as torch.set_default_device
        assert took(block(x)) == "fused"
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(fused.FeedForward, "run", None)
        assert torch.equal(block(x), expected)
    assert took(block(x=x)) == "own"
    with pytest.raises(TypeError, match="unexpected keyword argument 'residual'"):
        block(x, residual=x)
    assert took(block(x.as_subclass(Marked))) == "own"
    block.gate_proj.inference_time = False
    assert took(block(x)) == "own"
    block.gate_proj.inference_time = True
    assert took(block(x)) == "fused"
    assert torch.equal(torch.jit.trace(block, x, check_trace=False)(x), expected)
    other = copy.deepcopy(block)
    other.up_proj.weight = nn.Parameter(other.up_proj.weight.detach().as_subclass(Marked))
    assert took(other(x)) == "own"
    meta = copy.deepcopy(block).to("meta")
    assert meta(x.to("meta")).shape == expected.shape


def test_gradients_of_each_sample() -> None:
    """torch.func has no rule for what we do."""
    block, x = block_and_input("llama")
    values = {key: value.detach() for key, value in block.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(block, values, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x.detach())
    for i, sample in enumerate(x.detach()):
        block.zero_grad()
        block(sample).square().sum().backward()
        for key, parameter in block.named_parameters():
            torch.testing.assert_close(each[key][i], parameter.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "dropout"), [("gpt2", "dropout"), ("t5", "dropout"), ("modernbert", "drop")])
def test_an_active_dropout_drops(name: str, dropout: str) -> None:
    block, x = block_and_input(name)
    block.train()
    getattr(block, dropout).p = 0.0
    assert took(block(x)) == "fused"
    assert_same(block, x)
    getattr(block, dropout).p = 0.5
    assert took(block(x)) == "own"
    torch.manual_seed(3)
    y = block(x)
    torch.manual_seed(3)
    assert torch.equal(y, ordinary(block)(x))
    assert not torch.equal(y, block.eval()(x))
    assert took(block(x)) == "fused"


# ---------------------------------------------------------------- which blocks are left alone


class Glu(nn.Module):
    """What `changed` may vary: the activation, and what else the block does."""

    def __init__(self, activation: nn.Module, changed: Callable[[nn.Module, Tensor], Tensor] | None = None):
        super().__init__()
        self.gate = nn.Linear(tiny.HIDDEN, tiny.NEURONS)
        self.up = nn.Linear(tiny.HIDDEN, tiny.NEURONS)
        self.down = nn.Linear(tiny.NEURONS, tiny.HIDDEN)
        self.activation, self.changed = activation, changed

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.activation(self.gate(x)) * self.up(x))
        return y if self.changed is None else self.changed(self, y)


class Scaled(Glu):
    """At 1, as it is when the model is sliced, the scale cannot be seen in the output."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__(nn.SiLU(), lambda block, y: block.scale * y)
        if isinstance(scale, nn.Parameter):
            self.scale = scale
        else:
            self.register_buffer("scale", scale)


class Pair(Glu):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class WithLayers(tiny.Toy):
    def forward(self, input_ids: Tensor, **_: object) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        for layer in self.layers:
            y = layer(x)
            x = F.layer_norm(x + (y[0] if isinstance(y, tuple) else y), (tiny.HIDDEN,))
        return {"logits": self.head(x)}


def fused_blocks(block: Callable[[], nn.Module]) -> list[bool]:
    model = WithLayers(block).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scale" in name:
                parameter.fill_(1)
    stt.apply(model, dict.fromkeys(find_sites(model), UNITS))
    assert len(model.stt_selection) == 2
    return [is_fused(layer) for layer in model.layers]


@pytest.mark.parametrize("activation", [nn.SiLU, nn.GELU, nn.Tanh, nn.Softplus, nn.LeakyReLU, nn.Mish])
def test_any_activation(activation: type[nn.Module]) -> None:
    assert fused_blocks(lambda: Glu(activation())) == [True, True]


class GateAndUp(nn.Module):
    """One layer makes gates and ups: two halves or every other channel, gates first or second."""

    def __init__(self, is_interleaved: bool, gate: int):
        super().__init__()
        self.gate_up = nn.Linear(tiny.HIDDEN, 2 * tiny.NEURONS)
        self.down = nn.Linear(tiny.NEURONS, tiny.HIDDEN)
        self.activation = nn.GELU()
        self.is_interleaved, self.first = is_interleaved, gate

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate_up(x)
        parts = (y[..., ::2], y[..., 1::2]) if self.is_interleaved else y.chunk(2, -1)
        return self.down(self.activation(parts[self.first]) * parts[1 - self.first])


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("gate", [0, 1])
def test_layouts_of_a_fused_gate_up_layer(is_interleaved: bool, gate: int) -> None:
    model = tiny.Toy(lambda: GateAndUp(is_interleaved, gate)).double()
    stt.apply(model, dict.fromkeys(find_sites(model), UNITS))
    for multiple in (1, 4):
        pad_sites(model, multiple)
        x = torch.randn(3, tiny.HIDDEN, dtype=torch.float64, requires_grad=True)
        assert took(model.layers[1](x)) == "fused"
        assert_same(model.layers[1], x)


LEFT_ALONE = {
    "in place": lambda: Glu(nn.SiLU(inplace=True)),
    "random": lambda: Glu(nn.RReLU()),
    "dropout in training mode": lambda: Glu(nn.SiLU(), lambda block, y: F.dropout(y, 0.1, block.training)),
    "more than that": lambda: Glu(nn.SiLU(), lambda block, y: 1.01 * y),
    "a scale": lambda: Scaled(nn.Parameter(torch.ones(tiny.HIDDEN))),
    "a scale that does not train": lambda: Scaled(torch.ones(tiny.HIDDEN)),
    "two outputs": lambda: Pair(nn.SiLU()),
}


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_blocks_that_do_something_else_are_left_alone(reason: str) -> None:
    assert fused_blocks(LEFT_ALONE[reason]) == [False, False]


def test_a_forward_of_its_own_stays() -> None:
    model, batch = tiny.build("llama")
    block = model.model.layers[0].mlp
    block.forward = mine = lambda x: 3 * block.down_proj(block.gate_proj(x))
    stt.apply(model, dict.fromkeys(find_sites(model), UNITS))
    assert block.forward is mine
    x = torch.randn(3, tiny.HIDDEN, requires_grad=True)
    assert [took(layer.mlp(x)) for layer in model.model.layers] == ["own", "fused"]


@pytest.mark.parametrize(("p", "expected"), [(0.0, True), (0.1, False)])
def test_a_dropout_that_is_no_module(p: float, expected: bool) -> None:
    model, _ = tiny.build("starcoder2")
    for layer in model.model.layers:
        layer.mlp.residual_dropout = p
    stt.apply(model, dict.fromkeys(find_sites(model), UNITS))
    assert is_fused(block_of(model)) is expected


def test_slicing_draws_no_random_number_and_needs_no_gradients() -> None:
    model, _ = tiny.build("llama")
    names = list(find_sites(model))
    before = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        stt.apply(model, dict.fromkeys(names, UNITS))
    assert torch.equal(torch.get_rng_state(), before)
    assert is_fused(block_of(model))


# ---------------------------------------------------------------- what happens to a model


def test_padding_and_scatter_mode() -> None:
    model, batch = sliced("qwen2")
    expected = tiny.outputs(ordinary(model), batch)[0]
    for multiple in (8, 1):
        pad_sites(model, multiple)
        block, x = block_of(model), torch.randn(3, tiny.HIDDEN, dtype=torch.float64, requires_grad=True)
        assert took(block(x)) == "fused"
        assert_same(block, x)
        torch.testing.assert_close(tiny.outputs(model, batch)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_copies_files_dtypes_and_modes(name: str, tmp_path: Path) -> None:
    model, batch = sliced(name, torch.float32)
    stt.save(model, tmp_path / "saved")
    names = model.state_dict().keys()
    x = torch.randn(3, tiny.HIDDEN, requires_grad=True)
    y = block_of(model)(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), stt.load(tmp_path / "saved")):
        block = block_of(other)
        assert took(block(x)) == "fused"
        assert torch.equal(block(x), y)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.mul_(2)
        assert not torch.equal(block(x), y)
        assert torch.equal(block_of(model)(x), y)  # nothing is shared
        other.load_state_dict(model.state_dict())
        assert torch.equal(block(x), y)
        assert other.state_dict().keys() == names
        for dtype in (torch.bfloat16, torch.float64):
            assert took(block.to(dtype)(x.to(dtype))) == "fused"
        assert took(block.train()(x.double())) == took(block.eval()(x.double())) == "fused"


def test_replicas_compute_with_their_own_layers() -> None:
    """As torch.nn.DataParallel makes them."""
    block, _ = block_and_input("llama")
    assert block._replicate_for_data_parallel().forward.__self__ is not block


def test_the_class_is_called_as_before() -> None:
    block, _ = block_and_input("llama")
    other = ordinary(block)
    assert repr(block) == repr(other)
    assert isinstance(block, type(other))
    assert type(block).__name__ == type(other).__name__
    assert vars(other).keys() == vars(tiny.build("llama")[0].model.layers[0].mlp).keys()


def test_sites_of_a_sliced_model_are_found_as_before() -> None:
    model, _ = tiny.build("llama")
    names = list(find_sites(model))
    stt.apply(model, dict.fromkeys(names, UNITS))
    assert {name: site.width for name, site in find_sites(model).items()} == dict.fromkeys(names, len(UNITS))
