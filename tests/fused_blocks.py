"""Blocks of tiny sliced models, and the same blocks with the forward of their own class, which is the oracle."""
from __future__ import annotations

import copy
from collections.abc import Callable

import tiny
import torch
from torch import Tensor, nn

import stt
from stt.mlps import fused
from stt.sites import find_sites

KINDS = {"llama-bias": 2, "phi3": 2, "vit": 1, "modernbert": 2}  # block -> what it feeds its middle, in units of K
UNITS = [0, 3, 4, 17, 34]
TOKENS = 6


def sliced(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Tensor]]:
    """Another width in every site."""
    model, batch = tiny.build(name, dtype)
    return stt.apply(model, {site: UNITS + list(range(20, 22 + i)) for i, site in enumerate(find_sites(model))}), batch


def block_of(model: nn.Module) -> nn.Module:
    return model.get_submodule(next(iter(model.stt_selection)))


def ordinary(module: nn.Module) -> nn.Module:
    """A copy in which every block has the forward of its class."""
    module = copy.deepcopy(module)
    for part in module.modules():
        fused.unfuse_block(part)
    return module


def is_fused(module: nn.Module) -> bool:
    return isinstance(module, fused.Fused)


def took(y: Tensor) -> str:
    """Which path of one block made y."""
    nodes = [y.grad_fn]
    for node in nodes:
        nodes += [before for before, _ in node.next_functions if before is not None]
    return "fused" if any(type(node).__name__ == "_FeedForwardBackward" for node in nodes) else "own"


def block_and_input(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    return block_of(sliced(name, dtype)[0]), torch.randn(2, TOKENS // 2, tiny.HIDDEN, dtype=dtype, requires_grad=True)


def derived(block: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    """The output, and the gradients of x and of the parameters."""
    y = block(x)
    wanted = [value for value in (x, *parameters) if value.requires_grad]
    grads = iter(torch.autograd.grad(y.square().sum(), wanted))
    return [y, *(next(grads) if value.requires_grad else None for value in (x, *parameters))]


def assert_same(block: nn.Module, x: Tensor, tolerance: float = 1e-12) -> None:
    """Output and gradients of a block are those of its class's forward."""
    other = ordinary(block)
    ours, theirs = (derived(each, x, list(each.parameters())) for each in (block, other))
    assert took(theirs[0]) == "own"
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))
