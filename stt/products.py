"""Products with a weight: which operand is the weight, which of its axes are its inputs and its outputs, and which part
of a parameter a view of it is."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LINEAR, DEPTHWISE, OTHER = "linear", "depthwise", "other"


@dataclass(frozen=True)
class Product:
    """One call: `weight` (a view of any shape) and its input and output axes, the channel axes of x and of the result.

    `kind`: LINEAR (position by position), DEPTHWISE (a convolution of every channel by itself) or OTHER (a convolution
    that mixes both)."""

    x: Tensor
    weight: Tensor
    inputs: int = 1
    outputs: int = 0
    x_axis: int = -1
    out_axis: int = -1
    kind: str = LINEAR


@dataclass(frozen=True)
class Span:
    """Channels start ... start + size - 1 along `axis` of a parameter."""

    axis: int
    start: int
    size: int


@dataclass(frozen=True)
class Layout:
    """Where the weight of a projection stands in its parameter: its input and its output channels, and of a stack the
    one expert that is used, or all of them (`expert` is None and `is_batched`)."""

    inputs: Span
    outputs: Span
    expert: int | None = None
    is_batched: bool = False


def standing(weight: Tensor, shape: torch.Size, product: Product) -> Layout | None:
    """The layout of a view of a contiguous parameter of `shape`; None for what is no product position by position, or
    a view that is not a block of the parameter."""
    if product.kind != LINEAR:
        return None
    strides = torch.empty(shape, device="meta").stride()
    origin = [weight.storage_offset() // stride % size for stride, size in zip(strides, shape, strict=True)]
    axes = {}
    for dim, (size, stride) in enumerate(zip(weight.shape, weight.stride(), strict=True)):
        fitting = [a for a in range(len(shape)) if strides[a] == stride and size <= shape[a]]
        if size > 1 and not fitting:
            return None
        axes[dim] = max(fitting, key=lambda a: shape[a]) if fitting else None
    inputs, outputs = (axes[dim % weight.ndim] for dim in (product.inputs, product.outputs))
    if inputs is None or outputs is None or inputs == outputs:
        return None
    others = [a for a in range(len(shape)) if a not in (inputs, outputs) and shape[a] > 1]
    batch = [axes[dim] for dim in range(weight.ndim)
             if dim not in (product.inputs % weight.ndim, product.outputs % weight.ndim) and weight.shape[dim] > 1]
    if len(others) > 1 or batch not in ([], others):
        return None
    spans = [Span(a, origin[a], weight.shape[dim % weight.ndim])
             for a, dim in ((inputs, product.inputs), (outputs, product.outputs))]
    return Layout(*spans, expert=origin[others[0]] if others and not batch else None, is_batched=bool(batch))


# ---------------------------------------------------------------- the calls


def _named(args: tuple, kwargs: dict, *names: str) -> list[object]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _linear(args: tuple, kwargs: dict) -> Product | None:
    return Product(*_named(args, kwargs, "input", "weight"))


def _addmm(args: tuple, kwargs: dict) -> Product | None:
    _, x, weight = _named(args, kwargs, "input", "mat1", "mat2")
    return Product(x, weight, inputs=0, outputs=1)


def _addbmm(args: tuple, kwargs: dict) -> Product | None:
    _, x, weight = _named(args, kwargs, "input", "batch1", "batch2")
    return Product(x, weight, inputs=1, outputs=2)


def _matmul(args: tuple, kwargs: dict) -> Product | None:
    x, weight = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values()))
    return Product(x, weight, inputs=-2, outputs=-1) if weight.ndim in (2, 3) else None


def _einsum(args: tuple, kwargs: dict) -> Product | None:
    """Of two operands, x first, with one letter that is summed and one that only the weight has."""
    equation, *operands = args
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    (of_x, of_weight), result = equation.replace(" ", "").split("->")[0].split(","), equation.split("->")[1].strip()
    summed = [c for c in of_weight if c in of_x and c not in result]
    own = [c for c in of_weight if c not in of_x and c in result]
    if len(summed) != 1 or len(own) != 1:
        return None
    return Product(operands[0], operands[1], of_weight.index(summed[0]), of_weight.index(own[0]),
                   of_x.index(summed[0]), result.index(own[0]))


def _convolution(args: tuple, kwargs: dict) -> Product | None:
    x, weight, _, stride, padding, _, groups = _named(args, kwargs, "input", "weight", "bias", "stride", "padding",
                                                      "dilation", "groups")
    groups = groups or 1
    axis = 1 - weight.ndim  # of the channels: (B, C, ...), or (C, ...) of a single example
    is_pointwise = groups == 1 and all(size == 1 for size in weight.shape[2:])
    is_depthwise = groups == weight.shape[0] == x.shape[axis]
    return Product(x, weight, x_axis=axis, out_axis=axis,
                   kind=LINEAR if is_pointwise else DEPTHWISE if is_depthwise else OTHER)


PRODUCTS: dict[Callable, Callable[[tuple, dict], Product | None]] = {
    F.linear: _linear, torch.addmm: _addmm, torch.baddbmm: _addbmm, torch.einsum: _einsum,
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm, torch.bmm,
                     torch.Tensor.bmm), _matmul),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d), _convolution)}

VIEWS = {"__getitem__", "select", "narrow", "transpose", "t", "permute", "view", "reshape", "flatten", "unflatten",
         "unbind", "chunk", "split", "squeeze", "unsqueeze", "swapaxes", "movedim", "__iter__", "view_as", "adjoint"}
COPIES = {"contiguous", "to", "float", "type_as", "detach", "clone", "cpu", "requires_grad_", "bfloat16", "half",
          "type"}
TRANSPOSES = tuple(getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH"))


def is_view(func: Callable) -> bool:
    """True for functions of a tensor that may look at its storage in another shape."""
    return getattr(func, "__name__", "") in VIEWS or func in TRANSPOSES


def is_copy(func: Callable) -> bool:
    """True for functions that change where or in which precision a tensor is, but not what it holds."""
    return getattr(func, "__name__", "") in COPIES
