"""Which modules of a model attend: seen in a forward pass of the dense model below the functions of PyTorch, by nothing
that finds sites."""
from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.architectures.build import Built
from tests.tiny import outputs

PRODUCTS = {torch.ops.aten.bmm.default: (0, 1), torch.ops.aten.baddbmm.default: (1, 2)}  # places of the factors
ONE_LAYER = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


class _Watch(TorchDispatchMode):
    """Notes the innermost module with weights of its own at every fused attention, and at every product of a batch of
    matrices with rows that are positive and sum to one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}
        self._inside: list[str] = []

    def enter(self, name: str, *_: object) -> None:
        """A forward pre-hook."""
        self._inside.append(name)

    def leave(self, *_: object) -> None:
        """A forward hook."""
        self._inside.pop()

    def __torch_dispatch__(self, func: Callable, types: Sequence[type], args: tuple = (),
                           kwargs: dict | None = None) -> object:
        if "scaled_dot_product" in str(func) or any(map(_is_softmax, (args[i] for i in PRODUCTS.get(func, ())))):
            self.found[self._inside[-1] if self._inside else ""] = None
        return func(*args, **(kwargs or {}))


def _is_softmax(values: Tensor) -> bool:
    """(B, T, S): of more than one column, with zeros where nothing is attended to. A one-hot matrix is none."""
    if values.shape[-1] < 2 or not values.is_floating_point() or bool((values < 0).any()):
        return False
    sums = values.sum(-1)
    is_one = (sums - 1).abs() < 1e-4
    return bool((is_one | (sums == 0)).all() and is_one.any() and ((values > 0) & (values < 1)).any())


@contextmanager
def _watching(model: nn.Module) -> Iterator[_Watch]:
    watch, hooks = _Watch(), []
    for name, module in model.named_modules():
        if not isinstance(module, ONE_LAYER) and any(p.ndim > 1 for p in module.parameters()):
            hooks.append(module.register_forward_pre_hook(functools.partial(watch.enter, name)))
            hooks.append(module.register_forward_hook(watch.leave, always_call=True))
    try:
        with watch:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


def attending(built: Built) -> list[str]:
    """The modules that attend in the forward pass of its batch: the innermost with weights of their own."""
    model = copy.deepcopy(built.model)  # a forward pass may leave something behind
    with torch.no_grad(), _watching(model) as watch:
        outputs(model, built.inputs)
    return list(watch.found)


def silent(built: Built, tensors: set[str]) -> list[str]:
    """Of the modules that attend those that hold none of the tensors."""
    names = {id(p): name for name, p in built.model.named_parameters()}
    modules = ((name, built.model.get_submodule(name)) for name in attending(built))
    return [name for name, module in modules if not tensors & {names[id(p)] for p in module.parameters()}]
