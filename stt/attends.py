"""Which modules of a model attend, whatever their projections look like: seen while it runs, as products of a softmax
with something that is computed too. So no attention is left out without a word."""
from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from stt.blocks import LAYERS
from stt.products import is_copy, is_view
from stt.sites import LeftOut, is_repeated
from stt.trace import Source

OUTSIDE = "outside the repeated layers"
OPAQUE = "its projections are inside one function of PyTorch (nn.MultiheadAttention)"
SINGLE_POSITION = "the dummy input gave it a single position (pass a longer batch as find_heads(model, example=...))"
IN_GROUPS = "one of its projections works in groups of channels"
STACKED = "one of its projections is a stack of matrices (experts, or one for every head)"
HIDDEN = "what feeds its output projection cannot be followed (a function without a graph stands between)"
NEVER = "never called by the dummy input (pass a batch as find_heads(model, example=...))"

ONE_LAYER = (*LAYERS, nn.Embedding, nn.modules.conv._ConvNd)
ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
SOFTMAX = {"softmax", "exp"}
PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}
SAME_WEIGHTS = {"dropout", "mul", "__mul__", "masked_fill", "cat", "where", "expand"}  # beside views and copies


@dataclass(frozen=True)
class Seen:
    """One product of attention."""

    is_opaque: bool  # its projections are inside the function as well
    positions: int  # that it attends to


class Attends(TorchFunctionMode):
    """The first product of attention in every module that holds weights of its own, by the name of the innermost."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Seen] = {}
        self._inside: list[str] = []
        self._of_softmax: dict[int, Tensor] = {}  # by id

    def enter(self, name: str, *_: object) -> None:
        """A forward pre-hook."""
        self._inside.append(name)

    def leave(self, *_: object) -> None:
        """A forward hook."""
        self._inside.pop()

    def __torch_function__(self, func: Callable, types: Sequence[type], args: tuple = (),
                           kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        given = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        weights = [value for value in given if id(value) in self._of_softmax]
        if func in ATTENTION:
            self._note(Seen(func is F.multi_head_attention_forward, given[1].shape[-2]))
        elif name in PRODUCTS and 0 < len(weights) < len(given) and not any(value.is_meta for value in given):
            self._note(Seen(False, weights[0].shape[-1]))
        elif name in SOFTMAX or weights and (name in SAME_WEIGHTS or is_view(func) or is_copy(func)):
            self._of_softmax |= {id(value): value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)}
        return result

    def _note(self, seen: Seen) -> None:
        self.seen.setdefault(self._inside[-1] if self._inside else "", seen)


@contextmanager
def noting_attention(model: nn.Module) -> Iterator[Attends]:
    """The modules that attend while it lasts."""
    attends, hooks = Attends(), []
    for name, module in model.named_modules():
        if not isinstance(module, ONE_LAYER) and any(p.ndim > 1 for p in module.parameters()):
            hooks.append(module.register_forward_pre_hook(functools.partial(attends.enter, name)))
            hooks.append(module.register_forward_hook(attends.leave, always_call=True))
    try:
        with attends:
            yield attends
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------- what no output projection stands for


def weights_of(model: nn.Module, modules: Iterable[str]) -> set[str]:
    """The parameters of the modules of these names."""
    tensors = _tensors(model)
    return set().union(*(tensors[model.get_submodule(name)] for name in modules))


def not_recognised(model: nn.Module, attends: Mapping[str, Seen], sources: Iterable[Source],
                   explained: Collection[str]) -> Iterator[LeftOut]:
    """The modules that attend and hold none of the `explained` tensors, with the reason."""
    of_tensor: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        of_tensor[source.parameter].append(source)
    tensors = _tensors(model)
    for name, seen in attends.items():
        own = tensors[model.get_submodule(name)]
        if not own & explained:
            reason = _why(model, name, seen, [source for tensor in own for source in of_tensor[tensor]])
            yield LeftOut(name, reason, reason != OUTSIDE, tuple(sorted(own)))


def _tensors(model: nn.Module) -> dict[nn.Module, set[str]]:
    """The first names in the model of the parameters of every module."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {module: {names[id(p)] for p in module.parameters()} for module in model.modules()}


def _why(model: nn.Module, name: str, seen: Seen, sources: Sequence[Source]) -> str:
    if not is_repeated(model, name):
        return OUTSIDE
    if seen.is_opaque:
        return OPAQUE
    if seen.positions == 1:
        return SINGLE_POSITION
    if any(source.layout is not None and source.layout.expert is not None or source.is_parameter
           and source.value.ndim > 2 and not _is_convolution(model, source.parameter) for source in sources):
        return STACKED
    is_lookup = (isinstance(model.get_submodule(source.parameter.rpartition(".")[0]), nn.Embedding)
                 for source in sources if source.layout is None and not source.is_parameter)
    return HIDDEN if all(is_lookup) else IN_GROUPS


def _is_convolution(model: nn.Module, parameter: str) -> bool:
    return isinstance(model.get_submodule(parameter.rpartition(".")[0]), nn.modules.conv._ConvNd)


def never_called(model: nn.Module, seen: Collection[str], attends: Iterable[str]) -> Iterator[LeftOut]:
    """The lists of layers of which no tensor has been `seen`; in the others the modules, unless they are of a class
    that was seen and does not attend (an idle expert); and elsewhere the modules of a class that attends, or that such
    a list holds."""
    tensors = _tensors(model)
    attending = {type(model.get_submodule(outer)) for name in attends for outer in (name, *_around(name))}
    idle = ({type(module) for module, own in tensors.items() if own & seen} - attending).union(ONE_LAYER)
    lists = (module for module, own in tensors.items() if isinstance(module, nn.ModuleList) and not own & seen)
    attending |= {nn.MultiheadAttention, *(type(part) for blocks in lists for part in blocks.modules())} - idle
    found: list[str] = []
    for name, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList)
        may_attend = is_list or type(module) in attending or is_repeated(model, name)
        blocks = {type(block) for block in module} if is_list else {type(module)}
        has_layers = any(isinstance(part, (*LAYERS, nn.modules.conv._ConvNd)) for part in module.modules())
        if may_attend and has_layers and not tensors[module] & seen and not blocks <= idle \
                and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
            yield LeftOut(name, NEVER, True, tuple(sorted(tensors[module])))


def _around(name: str) -> Iterator[str]:
    """The modules that a module is in, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
