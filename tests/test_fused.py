"""What a fused block computes and keeps, against the same block with the forward of its own class."""
from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import tiny
import torch
from fused_blocks import KINDS, TOKENS, UNITS, assert_same, block_and_input, derived, is_fused, ordinary, sliced, took
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import stt
from stt.errors import InputError
from stt.mlps import fused

FUSED = {"llama", "llama-bias", "llama-relu", "qwen2", "qwen2-tied", "qwen3", "mistral", "gemma", "gemma2",
         "gemma3_text", "phi", "phi3", "gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "falcon", "olmo2",
         "starcoder2", "cohere", "glm4", "granite", "smollm3", "stablelm", "distilbert", "modernbert", "t5", "mt5",
         "vit", "deit", "beit", "dinov2", "dinov2-swiglu", "swin", "clip_vision", "siglip_vision"}
NOT_FUSED = {"bloom",  # its block adds the residual
             # activation and projections lie in different modules:
             "opt", "bert", "bert-mlm", "roberta", "xlm-roberta", "camembert", "albert", "electra", "deberta-v2",
             "mpnet", "esm", "longformer", "bart", "marian", "m2m_100"}


# ---------------------------------------------------------------- every architecture


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_which_blocks_are_fused_and_that_nothing_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(tiny.ARCHITECTURES) == FUSED | NOT_FUSED
    model, batch = sliced(name, torch.float32)
    calls = []
    run = fused.FeedForward.run
    monkeypatch.setattr(fused.FeedForward, "run", lambda *args: calls.append(1) or run(*args))
    sites = len(model.stt_selection)
    assert [is_fused(model.get_submodule(site)) for site in model.stt_selection] == [name in FUSED] * sites
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
        ours = model.to(dtype)
        theirs = ordinary(ours)
        calls.clear()
        outputs = [tiny.outputs(ours, inputs), tiny.outputs(theirs, inputs)]
        assert len(calls) == (sites if name in FUSED else 0)
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))
        for result in outputs:
            result[0].square().mean().backward()
        for key, parameter in ours.named_parameters():
            expected = theirs.get_parameter(key).grad
            assert (parameter.grad is None) == (expected is None), key
            if expected is not None:
                scale = max(1.0, expected.abs().max().item())
                torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=tolerance * scale)
        model.zero_grad()


# ---------------------------------------------------------------- one block: exact, in less memory, nothing needless


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("multiple", [1, 8])
def test_gradients_by_finite_differences(name: str, multiple: int) -> None:
    block, x = block_and_input(name)
    next(layer for layer in block.modules() if isinstance(layer, stt.STTLinear)).pad_weights(multiple)
    names = [key for key, _ in block.named_parameters()]
    x = x.detach()[:1, :2].requires_grad_()

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    assert took(block(x)) == "fused"
    assert torch.autograd.gradcheck(call, (x, *block.parameters()), fast_mode=True)
    assert_same(block, x)


@pytest.mark.parametrize("name", ["llama-bias", "phi3"])
def test_every_subset_of_what_trains(name: str) -> None:
    block, x = block_and_input(name)
    values = [x, *block.parameters()]
    for flags in itertools.product([False, True], repeat=len(values)):
        if not any(flags):
            continue
        for value, flag in zip(values, flags, strict=True):
            value.requires_grad_(flag)
        assert took(block(x)) == "fused"
        assert_same(block, x)


def saved_bytes(block: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages autograd keeps, parameters not counted."""
    kept, known = {}, {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert block(x).requires_grad
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in known)


@pytest.mark.parametrize("name", KINDS)
def test_saved_bytes(name: str) -> None:
    block, x = block_and_input(name)
    kept, fed = len(UNITS) + 2, KINDS[name]  # K, and what is fed to the middle: 2 K of a gated block, K of a plain one
    assert saved_bytes(block, x) == TOKENS * (tiny.HIDDEN + fed * kept) * 8
    assert saved_bytes(ordinary(block), x) == TOKENS * (tiny.HIDDEN + 2 * fed * kept) * 8
    block.requires_grad_(False)  # and x: it was kept for the gradients of weights alone
    assert saved_bytes(block, x) == TOKENS * fed * kept * 8


def test_saved_bytes_under_autocast() -> None:
    """Ordinary autograd casts x once for every layer that reads it, and keeps every cast, of weights too."""
    block, x = block_and_input("llama-bias", torch.float32)
    x = x.clone()  # autocast keeps the cast of a leaf for the next layer
    kept = len(UNITS) + 2
    weights = 3 * kept * tiny.HIDDEN
    with torch.autocast("cpu", torch.bfloat16):
        assert saved_bytes(block, x) == TOKENS * (tiny.HIDDEN + 2 * kept) * 2
        assert saved_bytes(ordinary(block), x) == (TOKENS * (2 * tiny.HIDDEN + 4 * kept) + weights) * 2


class Products(TorchDispatchMode):
    """Dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def products(block: nn.Module, x: Tensor) -> list[torch.dtype]:
    with Products() as counted:
        block(x).sum().backward()
    return counted.dtypes


@pytest.mark.parametrize(("trains", "reads", "expected"), [
    ("gate_proj up_proj down_proj", True, 3 + 3 + 3), ("gate_proj up_proj down_proj", False, 3 + 3 + 1),
    ("", True, 3 + 0 + 3), ("up_proj", True, 3 + 1 + 3), ("up_proj", False, 3 + 1 + 1), ("down_proj", True, 3 + 1 + 3),
    ("down_proj", False, 3 + 1 + 0)])
def test_no_needless_product(trains: str, reads: bool, expected: int) -> None:
    """Products of forward, of the weights' gradients and of the gradients of what the layers read."""
    block, x = block_and_input("llama")
    x.requires_grad_(reads)
    for key, parameter in block.named_parameters():
        parameter.requires_grad_(key.split(".")[0] in trains.split())
    assert len(products(block, x)) == expected
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in block.parameters())
    assert len(products(ordinary(block), x)) == expected


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtypes", [*itertools.product([torch.float32, torch.bfloat16], repeat=2)])
def test_autocast(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Weights and inputs in float32 or bfloat16: bitwise what ordinary autograd gives, from products in bfloat16."""
    block, x = block_and_input(name, torch.float32)
    block, x = block.to(dtypes[0]), x.detach().to(dtypes[1]).requires_grad_().clone()  # no leaf: see above
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
        assert (took(y), y.dtype) == ("fused", torch.bfloat16)
        assert_same(block, x, 0.0)
        counted = products(block, x), products(ordinary(block), x)
    assert counted[0] == [torch.bfloat16] * len(counted[1])
    assert {parameter.grad.dtype for parameter in block.parameters()} == {dtypes[0]}


def test_backward_inside_and_outside_of_autocast() -> None:
    block, x = block_and_input("llama-bias", torch.float32)
    y = block(x)
    expected = torch.autograd.grad(y.sum(), [x, *block.parameters()], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        for actual, grad in zip(torch.autograd.grad(y.sum(), [x, *block.parameters()]), expected, strict=True):
            assert torch.equal(actual, grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    block, x = block_and_input(name)
    expected = derived(ordinary(block), x, [])
    block.zero_grad()
    y = checkpoint(block, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, expected[1], rtol=0, atol=1e-12)
    grads = [parameter.grad.clone() for parameter in block.parameters()]
    block.zero_grad()
    block(x).square().sum().backward()
    for parameter, grad in zip(block.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-12)


def test_a_second_derivative_is_refused() -> None:
    block, x = block_and_input("llama")
    with pytest.raises(InputError, match="no second derivative: undo it with"):
        torch.autograd.grad(block(x).sum(), x, create_graph=True)
    fused.unfuse_block(block)
    torch.autograd.grad(block(x).sum(), x, create_graph=True)[0].sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu(name: str, autocast: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    block, x = block_and_input(name, torch.float32 if autocast else torch.float64)
    block, x = block.to("cuda"), x.detach().to("cuda").requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        assert took(block(x)) == "fused"
        assert_same(block, x, 2e-2 if autocast else 1e-12)
