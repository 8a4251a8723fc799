"""torch.compile traces sliced models whole: what it makes of them, in training and inference, equals eager mode."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch
from tiny_text import build_decoder
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import stt
from stt.mlps.fused import Fused, unfuse_block
from stt.sites import find_sites
from stt.surgery import pad_sites

WIDTHS = [5, 8, 11, 7]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sliced(name: str, multiple: int = 1, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Tensor]]:
    """Another width in every site, padded to a multiple."""
    model, batch = tiny.build(name, dtype)
    stt.apply(model, {site: range(width) for site, width in zip(find_sites(model), WIDTHS, strict=False)})
    pad_sites(model, multiple)
    return model, batch


def assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


def gradients(model: nn.Module, batch: dict[str, Tensor], called: nn.Module) -> list[Tensor]:
    """Outputs of `called`, and gradients that they leave in `model`."""
    model.zero_grad()
    outputs = tiny.outputs(called, batch)
    outputs[0].square().mean().backward()
    return [*outputs, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("name", "multiple"), [("llama", 8), ("phi", 1), ("bert", 8)])
def test_training_has_no_graph_break(name: str, multiple: int) -> None:
    """aot_eager traces backward too."""
    model, batch = sliced(name, multiple)
    expected = gradients(model, batch, model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(gradients(model, batch, compiled), expected)


@pytest.mark.parametrize("name", ["llama", "phi3", "t5"])
def test_inference_has_no_graph_break_and_compiles_once(name: str) -> None:
    model, batch = sliced(name, 8)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        expected = tiny.outputs(model, batch)
        for _ in range(3):
            assert_equal(tiny.outputs(compiled, batch), expected)
    assert counter.frame_count == 1


def test_training_steps_compile_once() -> None:
    model, batch = sliced("llama", dtype=torch.float32)
    stt.train_only(model)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        tiny.outputs(compiled, batch)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1


@pytest.mark.parametrize("with_gradients", [False, True])
def test_layers_of_one_width_share_what_is_compiled(with_gradients: bool) -> None:
    """Compiled layer by layer, as accelerate does: once if all widths are padded to one, else once a width."""
    for multiple, compilations in ((16, 1), (1, 2)):
        model, batch = sliced("llama", multiple)
        assert all(isinstance(layer.mlp, Fused) for layer in model.model.layers)
        expected = tiny.outputs(model, batch)
        counter = CompileCounter()
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend=counter)
        with torch.set_grad_enabled(with_gradients):
            assert_equal(tiny.outputs(model, batch), expected)
        assert counter.frame_count == compilations


@pytest.mark.parametrize(("width", "shapes"), [("free", 4), ("buckets:1", 1), ("buckets:3", 3)])
def test_buckets_are_as_many_shapes_as_asked_for(width: str, shapes: int) -> None:
    """Compiled layer by layer: as often as there are widths. Of a free selection every layer has one of its own."""
    model, counter = build_decoder(60, 4), CompileCounter()
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    counts = dict(zip(find_sites(model), (9, 40, 21, 22), strict=True))
    stt.apply(model, stt.select(model, [ids], keep=counts, width=width))
    with torch.no_grad():
        expected = tiny.outputs(model, {"input_ids": ids})
        for layer in model.model.layers:
            layer.compile(fullgraph=True, dynamic=False, backend=counter)
        assert_equal(tiny.outputs(model, {"input_ids": ids}), expected, 1e-6)
    assert counter.frame_count == shapes


def test_modes_may_change_after_compiling() -> None:
    """Padding, scatter mode, another forward: each is seen, and so is going back."""
    model, _ = sliced("llama")
    block, x = model.model.layers[0].mlp, torch.randn(3, tiny.HIDDEN, dtype=torch.float64)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    expected = [block(x).detach()]

    def scatter(asked: bool) -> None:
        block.gate_proj.inference_time = not asked

    for change in (lambda: None, lambda: pad_sites(model, 8), lambda: scatter(True), lambda: pad_sites(model, 1),
                   lambda: scatter(False), lambda: unfuse_block(block)):
        change()
        y = compiled(x)
        assert_equal([y], expected)
        y.sum().backward()
        assert all(p.grad.shape == p.shape for p in block.parameters())
        block.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "phi", "bert"])
def test_inductor(name: str) -> None:
    """The backend that writes C++; its sines of the rotary angles, which are float32, differ by 1e-7."""
    model, batch = sliced(name, 8)
    expected = gradients(model, batch, model)
    compiled = torch.compile(model, fullgraph=True)
    assert_equal(gradients(model, batch, compiled), expected, 1e-6)
    with torch.no_grad():
        assert_equal(tiny.outputs(compiled, batch), tiny.outputs(model, batch), 1e-6)
