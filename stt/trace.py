"""Weightless trace: which channel of which projection feeds which channel of which other, without reading a weight.

Every product with a parameter of the model (a linear layer, one expert of a stack, a 1x1 convolution) is answered with
a fresh random leaf tensor of the right shape. So nothing is multiplied (a 7B model costs as little as its activations,
and may live on the meta device), and autograd graphs end at the nearest projections: whatever lies between two
projections is exactly what the graph holds.
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from stt.dummy import UNFIT
from stt.errors import InputError
from stt.products import DEPTHWISE, PRODUCTS, Layout, Product, is_copy, is_view, standing

DTYPE, DEVICE, DATA = torch.Tensor.dtype.__get__, torch.Tensor.device.__get__, torch.Tensor.data.__get__  # use ==
GET = "__get__"  # of a property of a tensor: shape, requires_grad, T ...
NORMS = (F.batch_norm, torch.batch_norm)


@dataclass
class Source:
    """A leaf of the trace: what a projection returns, or a parameter, a lookup or a convolution used in another way."""

    parameter: str
    value: Tensor
    axis: int = -1  # of the channels of `value`
    layout: Layout | None = None  # of a projection: where its weight stands in the parameter
    input: Tensor | None = None  # what the projection read, with its graph
    input_axis: int = -1
    is_parameter: bool = False  # `value` is the parameter itself
    is_depthwise: bool = False  # a parameter that convolves every channel by itself
    reads: int = 0  # bit set of the sources its input depends on
    consumers: set[int] = field(default_factory=set)  # positions of the sources that read it; -1 is the model's output


class WeightlessTrace(TorchFunctionMode):
    """Records one forward pass as a list of Source; parameters and buffers are float32 on the CPU to all who look.

    A parameter is followed through views by a stand-in on the meta device: its strides tell which part is meant.
    """

    def __init__(self, model: nn.Module, seed: int = 0):
        super().__init__()
        self.sources: list[Source] = []
        self._random = torch.Generator().manual_seed(seed)
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._own = dict(model.named_parameters())
        self._buffers = {id(b): name for name, b in model.named_buffers()}
        self._shadows: dict[int, Tensor] = {}  # id of a parameter -> its stand-in on the meta device
        self._shadowed: dict[int, str] = {}  # storage of such a stand-in -> parameter
        self._leaves: dict[int, Tensor] = {}  # id of a parameter or buffer -> its stand-in on the CPU

    def __torch_function__(self, func: Callable, types: Sequence[type], args: tuple = (),
                           kwargs: dict | None = None) -> object:
        with torch.enable_grad():  # also where the model asks for none: the graph is what is looked at
            return self._computed(func, args, kwargs or {})

    def _computed(self, func: Callable, args: tuple, kwargs: dict) -> object:
        if func == DTYPE and self._is_ours(args[0]):
            return torch.float32 if args[0].is_floating_point() else func(*args)
        if func == DEVICE and self._is_ours(args[0]):
            return torch.device("cpu")
        if func in PRODUCTS:
            product = PRODUCTS[func](args, kwargs)
            weight = product and self._shadow(product.weight)
            if weight is not None:
                return self._answer(func, args, kwargs, product, weight)
        if func is F.embedding:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            ids = args[0] if args else kwargs["input"]
            if id(weight) in self._parameters:
                return self._leaf(self._parameters[id(weight)], (*ids.shape, weight.shape[1])).value.clone()
        if func in NORMS:
            return self._batch_norm(*args, **kwargs)
        if func == DATA or is_copy(func) or is_view(func):
            viewed = self._viewed(func, args, kwargs)
            if viewed is not None:
                return viewed
        elif getattr(func, "__name__", "") == GET:
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map(self._real, (args, kwargs))
        return func(*args, **kwargs)

    # ------------------------------------------------------------ parameters, and views of them

    def _is_ours(self, value: object) -> bool:
        return id(value) in self._parameters or id(value) in self._buffers or self._name_of(value) is not None

    def _name_of(self, value: object) -> str | None:
        """The parameter a tensor on the meta device stands for."""
        is_shadow = isinstance(value, Tensor) and value.is_meta and id(value) not in self._parameters
        return self._shadowed.get(value.untyped_storage()._cdata) if is_shadow else None

    def _shadow(self, value: object) -> Tensor | None:
        """The stand-in on the meta device of a parameter or of a view of one; None for anything else."""
        if id(value) not in self._parameters:
            return value if self._name_of(value) is not None else None
        if id(value) not in self._shadows:
            shadow = torch.empty(value.shape, device="meta", dtype=torch.float32)
            self._shadows[id(value)] = shadow
            self._shadowed[shadow.untyped_storage()._cdata] = self._parameters[id(value)]
        return self._shadows[id(value)]

    def _viewed(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """A view of a parameter, as a view of its stand-in; None if that is not what is asked for."""
        shadow = self._shadow(args[0]) if args else None
        if shadow is None:
            return None
        if func == DATA or is_copy(func):
            return shadow
        args, kwargs = pytree.tree_map(_plain_index, (args[1:], kwargs))
        views = func(shadow, *args, **kwargs)
        same = (view.untyped_storage()._cdata == shadow.untyped_storage()._cdata for view in pytree.tree_leaves(views))
        return views if all(same) else None

    def _real(self, value: object) -> object:
        """A float32 CPU copy in place of a parameter (a leaf of the trace) or of a buffer; anything else as it is."""
        name = self._name_of(value)
        if name is not None:
            return self._real(self._own[name]).as_strided(value.shape, value.stride(), value.storage_offset())
        if id(value) not in self._parameters and id(value) not in self._buffers:
            return value
        if id(value) not in self._leaves:
            if id(value) in self._parameters:
                return self._stand_in(value, 0.5, 1.5)
            copy = torch.ones_like(value, device="cpu") if value.is_meta else value.detach().to("cpu", copy=True)
            self._leaves[id(value)] = copy.float() if copy.is_floating_point() else copy
        return self._leaves[id(value)]

    def _stand_in(self, parameter: Tensor, low: float, high: float) -> Tensor:
        """The leaf of the trace in place of a parameter."""
        leaf = self._leaves[id(parameter)] = self._between(low, high, parameter)
        self.sources.append(Source(self._parameters[id(parameter)], leaf, is_parameter=True))
        return leaf

    def _between(self, low: float, high: float, value: Tensor) -> Tensor:
        """A leaf of such values in place of the tensor, whatever it holds: a model that is not loaded yet has the same
        sites."""
        return (torch.rand(value.shape, generator=self._random) * (high - low) + low).requires_grad_()

    # ------------------------------------------------------------ answers

    def _answer(self, func: Callable, args: tuple, kwargs: dict, product: Product, weight: Tensor) -> object:
        """A random leaf instead of the product; its shape is computed on the meta device. A convolution of every
        channel by itself is computed."""
        if product.kind == DEPTHWISE:
            self._convolve_lightly(self._own[self._name_of(weight)])
            args, kwargs = pytree.tree_map(self._real, (args, kwargs))
            return func(*args, **kwargs)
        name = self._name_of(weight)
        x = self._real(product.x)
        shape = func(*pytree.tree_map(self._on_meta, args), **pytree.tree_map(self._on_meta, kwargs)).shape
        layout = standing(weight, self._own[name].shape, product)
        source = self._leaf(name, shape, product.out_axis, layout)
        source.input, source.input_axis = x, product.x_axis
        return source.value.clone()  # models may add to it in place, which a leaf forbids

    def _convolve_lightly(self, weight: Tensor) -> None:
        """Marks a weight that convolves every channel by itself. Its values are as small as there are many, so that
        what it returns is no larger than what it reads: a ReLU6 behind it would be flat."""
        count = weight.shape[1:].numel()
        leaf = self._leaves[id(weight)] if id(weight) in self._leaves else \
            self._stand_in(weight, 0.5 / count, 1.5 / count)
        next(source for source in self.sources if source.value is leaf).is_depthwise = True

    def _on_meta(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        shadow = self._shadow(value)
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        return value.detach().to("meta", dtype) if shadow is None else shadow

    def _leaf(self, name: str, shape: tuple[int, ...], axis: int = -1, layout: Layout | None = None) -> Source:
        """Values in ±[0.5, 1.5]: positive in the first half of the rows (no activation is dead there), random signs
        in the second half (which tells a gate from the factor it multiplies)."""
        shape = list(shape)
        channels = shape.pop(axis)
        value = torch.rand((*shape, channels), generator=self._random) + 0.5
        rows = value.view(-1, channels)
        half = rows[(len(rows) + 1) // 2:]
        half *= torch.randint(0, 2, half.shape, generator=self._random) * 2 - 1
        value = value.movedim(-1, axis).contiguous().requires_grad_()
        self.sources.append(Source(name, value, axis, layout))
        return self.sources[-1]

    def _batch_norm(self, x: Tensor, mean: Tensor | None, variance: Tensor | None, weight: Tensor | None = None,
                    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
                    *_: object) -> Tensor:
        """In evaluation mode, with the statistics as leaves: they belong to the channels as the weight does. What is
        positive stays positive, and below 6."""
        x, weight, bias = (self._real(value) for value in (x, weight, bias))
        if mean is None or training:
            return F.batch_norm(x, None, None, weight, bias, True, momentum, eps)
        mean, variance = self._statistic(mean, 0.0, 0.1), self._statistic(variance, 1.0, 2.0)
        shape = (-1, *[1] * (x.ndim - 2))
        x = (x - mean.view(shape)) * (variance.view(shape) + eps).rsqrt()
        x = x if weight is None else x * weight.view(shape)
        return x if bias is None else x + bias.view(shape)

    def _statistic(self, buffer: Tensor, low: float, high: float) -> Tensor:
        if id(buffer) not in self._leaves:
            self._leaves[id(buffer)] = self._between(low, high, buffer)
            self.sources.append(Source(self._buffers[id(buffer)], self._leaves[id(buffer)], is_parameter=True))
        return self._leaves[id(buffer)]


# ---------------------------------------------------------------- one pass


def trace(model: nn.Module, inputs: Mapping[str, object]) -> list[Source]:
    """One weightless forward pass, with gradients enabled by the caller; every Source knows what it reads and who reads
    it. The model is left as it was. Raises InputError if the model does not take these inputs."""
    recorder = WeightlessTrace(model)
    try:
        outputs = run_under(recorder, model, (), inputs)
    except UNFIT as error:
        raise InputError(f"a batch of {', '.join(inputs)} does not fit {type(model).__name__} ({error}): "
                         "pass a batch of your data as find_sites(model, example=...)") from error
    _connect(recorder.sources, outputs)
    return recorder.sources


def run_under(recorder: WeightlessTrace, module: nn.Module, args: Sequence[object],
              kwargs: Mapping[str, object]) -> object:
    """What the module returns while `recorder` answers for its weights; the module is left as it was."""
    with warnings.catch_warnings(action="ignore"), _put_back(module), evaluating(module), eager_experts(module), \
            torch.random.fork_rng(devices=[]), recorder:
        return module(*args, **kwargs)


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has the attributes it had: a forward that assigns one has assigned a stand-in."""
    before = [(module, dict(vars(module)), {name: dict(value) for name, value in vars(module).items()
                                            if isinstance(value, dict) and name != "_modules"})
              for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in before:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                vars(module)[name].clear()
                vars(module)[name].update(content)


def _plain_index(value: object) -> object:
    """An index that is a tensor of one whole number, as that number: it selects, where a tensor would copy."""
    is_number = isinstance(value, Tensor) and value.ndim == 0 and value.dtype in (torch.int32, torch.int64)
    return int(value) if is_number and not value.is_meta else value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is back in the mode it was in by itself."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Mixtures of experts compute one expert after the other, so that each can be looked at; afterwards as before."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    with ExitStack() as stack:
        for config in configs.values():
            if hasattr(config, "_experts_implementation"):
                stack.callback(setattr, config, "_experts_implementation", config._experts_implementation)
                config._experts_implementation = "eager"
        yield


def _connect(sources: list[Source], outputs: object) -> None:
    """Fill in `reads` and `consumers` by walking each input's graph down to the leaves once."""
    bits = {id(source.value): 1 << i for i, source in enumerate(sources)}
    known: dict[object, int] = {}
    for position, source in enumerate(sources):
        if source.input is not None:
            source.reads = _leaves(source.input, bits, known)
            for i in bit_positions(source.reads):
                sources[i].consumers.add(position)
    for tensor in _tensors(outputs):
        for i in bit_positions(_leaves(tensor, bits, known)):
            sources[i].consumers.add(-1)


def _leaves(tensor: Tensor, bits: dict[int, int], known: dict[object, int]) -> int:
    """Bit set of the sources a tensor depends on (depth first, each graph node visited once)."""
    if tensor.grad_fn is None:
        return bits.get(id(tensor), 0)
    stack = [tensor.grad_fn]
    while stack:
        node = stack[-1]
        pending = [child for child, _ in node.next_functions if child is not None and child not in known]
        if pending:
            stack.extend(pending)
            continue
        stack.pop()
        found = bits.get(id(node.variable), 0) if hasattr(node, "variable") else 0
        for child, _ in node.next_functions:
            found |= known[child] if child is not None else 0
        known[node] = found
    return known[tensor.grad_fn]


def bit_positions(bits: int) -> Iterator[int]:
    """Positions of the set bits, lowest first."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def _tensors(outputs: object) -> list[Tensor]:
    leaves = pytree.tree_leaves(list(outputs.values()) if isinstance(outputs, Mapping) else outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
