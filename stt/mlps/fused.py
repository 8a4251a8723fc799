"""A feed-forward block that keeps, for backward, only what its projections read and return.

Ordinary autograd also keeps activation(gate) and the product that the down projection reads. Both are elementwise in
what is kept anyway, so backward makes them again: of a gated block 2 K instead of 4 K numbers a token stay in memory,
of a plain one K instead of 2 K, and no matrix product is done twice.

Shapes: N tokens, D model width, K kept neurons.
"""
from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from stt.errors import InputError
from stt.mlps.stt_linear import STTLinear
from stt.sites import Site

ORDINARY = (Tensor, nn.Parameter, FakeTensor)  # with or without data; tensors of any other class may do anything
CASTABLE = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes autocast casts
UNFIT = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)  # of a block that reads other inputs
TWIN_NEURONS = 6


# ---------------------------------------------------------------- the arithmetic


class _FeedForward(torch.autograd.Function):
    """down(middle(*[layer(x) for layer in feeding])), multiplied in `dtype`. `layers` are the weight and the bias of
    every feeding layer, then of down. Raises InputError for a second derivative."""

    @staticmethod
    def forward(ctx: FunctionCtx, middle: Callable[..., Tensor], dtype: torch.dtype, x: Tensor,
                *layers: Tensor | None) -> Tensor:
        *feeding, down = zip(layers[::2], layers[1::2], strict=True)
        ctx.middle, ctx.dtype, ctx.dtype_of_x = middle, dtype, x.dtype
        ctx.is_autocast = torch.is_autocast_enabled(x.device.type)
        x = x.to(dtype)
        fed = [_linear(x, *layer) for layer in feeding]  # (N, K) each
        reads_x = any(ctx.needs_input_grad[3:-2:2])  # a feeding weight trains
        ctx.save_for_backward(x if reads_x else None, *layers[::2], *fed)
        return _linear(middle(*fed).to(dtype), *down)  # (N, D)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise InputError("a fused feed-forward block has no second derivative: undo it with "
                             "stt.mlps.fused.unfuse_block(block) first")
        with torch.autocast(grad.device.type, ctx.dtype, enabled=ctx.is_autocast):
            return None, None, *_gradients(ctx, grad)


def _gradients(ctx: FunctionCtx, grad: Tensor) -> list[Tensor | None]:
    """Of x, then of the weight and the bias of every layer; None for what needs none. `grad` (N, D)."""
    wants_x, *wanted = ctx.needs_input_grad[2:]
    x, *kept = ctx.saved_tensors
    layers = len(wanted) // 2
    weights, fed = kept[:layers], [value.detach().requires_grad_() for value in kept[layers:]]
    with torch.enable_grad():
        product = ctx.middle(*fed)  # (N, K)
    of_down = _of_layer(grad, product.detach().to(ctx.dtype), wanted[-2:])
    if not wants_x and not any(wanted[:-2]):
        return [None] * (len(wanted) - 1) + of_down
    of_product = (grad @ weights[-1].to(ctx.dtype)).to(product.dtype)  # (N, D) @ (D, K) -> (N, K)
    of_x, of_feeding = None, []
    for i, of_fed in enumerate(torch.autograd.grad(product, fed, of_product)):
        of_feeding += _of_layer(of_fed, x, wanted[2 * i:2 * i + 2])
        if wants_x:
            part = (of_fed @ weights[i].to(ctx.dtype)).to(ctx.dtype_of_x)  # (N, K) @ (K, D) -> (N, D)
            of_x = part if of_x is None else of_x.add_(part)
    return [of_x, *of_feeding, *of_down]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _of_layer(grad: Tensor, x: Tensor | None, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of the weight and the bias of a layer that read `x` (N, in), from that of its output (N, out)."""
    return [grad.T @ x if wanted[0] else None, grad.sum(0) if wanted[1] else None]


# ---------------------------------------------------------------- in place of a block's own forward


@dataclass(frozen=True)
class FeedForward:
    """What a block computes, down(activation(gate)) or down(activation(gate) * up), by the names of its children.
    `gate` is the first or the second half (every other channel if `is_interleaved`) of a fused gate-up layer."""

    feeding: tuple[str, ...]
    activation: str
    down: str
    gate: int | None = None
    is_interleaved: bool = False

    def run(self, block: nn.Module, dtype: torch.dtype, x: Tensor) -> Tensor:
        middle = functools.partial(self.middle, getattr(block, self.activation))
        layers = [getattr(block, name) for name in (*self.feeding, self.down)]
        values = [value for layer in layers for value in (layer.weight, layer.bias)]
        y = _FeedForward.apply(middle, dtype, x.reshape(-1, x.shape[-1]), *values)  # (N, D)
        return y.view(*x.shape[:-1], y.shape[-1])  # not inside: what returns a view forbids adding to it in place

    def middle(self, activation: Callable[[Tensor], Tensor], *fed: Tensor) -> Tensor:
        """What the down projection reads, from what the feeding projections return."""
        if self.gate is not None:
            halves = (fed[0][..., ::2], fed[0][..., 1::2]) if self.is_interleaved else fed[0].chunk(2, -1)
            fed = halves[self.gate], halves[1 - self.gate]
        return activation(fed[0]) * fed[1] if len(fed) == 2 else activation(fed[0])

    def dtype(self, block: nn.Module, x: Tensor) -> torch.dtype | None:
        """The dtype to multiply in; None if the block is not now what it was found to be."""
        values = [x]
        for name, child in block._modules.items():
            if name in self.feeding or name == self.down:
                if type(child) is not STTLinear or not child.is_compact or not _is_bare(child):
                    return None
                values += [value for value in (child.weight, child.bias) if value is not None]
            elif not (_is_elementwise(child) if name == self.activation else _is_idle(child)):
                return None
        device, dtypes = x.device.type, {value.dtype for value in values}
        if any(type(value) not in ORDINARY for value in values) or not torch.amp.is_autocast_available(device):
            return None  # on the meta device, for one
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device) if dtypes.issubset(CASTABLE) else None
        return x.dtype if len(dtypes) == 1 else None


class Fused:
    """What the class of a fused block has before its own class: `fuse_block` makes such classes, one of a kind, so that
    layers share what torch.compile makes of them and copies of a block are blocks of their own.

    Whatever it does not know of (a wrapped, hooked or scatter-mode layer, an active dropout, a compiler or any other
    observer, a pass without gradients) is left to the forward of the block's own class.
    """

    def forward(self, *args: Tensor, **kwargs: object) -> object:
        if torch.is_grad_enabled() and not _is_observed() and len(args) == 1 and not kwargs:
            dtype = self.computes.dtype(self, *args)
            if dtype is not None:
                return self.computes.run(self, dtype, *args)
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        """By the block's own class: the one made here has no name to be imported by."""
        return _remade, (type(self).__bases__[1],), self.__getstate__()


@functools.cache
def _fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (Fused, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _remade(kind: type[nn.Module]) -> nn.Module:
    return object.__new__(_fused_class(kind))


def _is_observed() -> bool:
    """True if something follows the operations: a compiler, a tracer, torch.func, a function mode, a global hook."""
    return bool(torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
                or _has_any_global_hook()
                or any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()))


def _is_bare(module: nn.Module) -> bool:
    """True if calling it is nothing but its class's forward."""
    return not ("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
                or module._backward_hooks or module._backward_pre_hooks)


def _is_elementwise(module: nn.Module) -> bool:
    """True if nothing but its forward decides what it computes."""
    return _is_bare(module) and not (module._parameters or module._buffers or module._modules)


def _is_idle(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and not (module.training and module.p > 0) and _is_bare(module)


# ---------------------------------------------------------------- which blocks compute that


def fuse_block(model: nn.Module, site: Site) -> None:
    """Let the block of a sliced site keep less for backward, if a FeedForward is exactly what it computes."""
    block = model.get_submodule(site.name)
    *feeding, down = [member.module.removeprefix(site.name + ".") for member in site.members]
    others = [name for name, child in block.named_children()
              if name not in (*feeding, down) and not isinstance(child, nn.Dropout)]
    own = [*block.parameters(recurse=False), *block.buffers(recurse=False)]
    if not {*feeding, down} <= block._modules.keys() or len(others) != 1 or own:
        return
    gate = int(site.gate[0] != site.members[0].channels[0, 0]) if site.kind == "glu_fused" else None
    computes = FeedForward(tuple(feeding), others[0], down, gate, getattr(block, feeding[0]).interleaved > 1)
    if _is_elementwise(getattr(block, others[0])) and _agrees(block, computes):
        block.computes, block.__class__ = computes, _fused_class(type(block))


def unfuse_block(block: nn.Module) -> None:
    """Undo `fuse_block`; nothing happens to a block that is not fused."""
    if type(block).__bases__[0] is Fused:
        block.__class__ = type(block).__bases__[1]
        del block.computes


@torch.inference_mode(False)  # which turns gradients on, too
@torch.autocast("cpu", enabled=False)
def _agrees(block: nn.Module, computes: FeedForward) -> bool:
    """True if a few random neurons in the place of the block's own, whose values may not be loaded yet, give the same
    output and gradients either way: in float64 on the CPU, in training mode."""
    with torch.random.fork_rng(devices=[]):
        twin, x = _twin(block, computes)
        try:
            theirs = _with_gradients(type(block).forward(twin, x), [x, *twin.parameters()])
            ours = _with_gradients(computes.run(twin, torch.float64, x), [x, *twin.parameters()])
            return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9)
                       for a, b in zip(ours, theirs, strict=True))
        except UNFIT:
            return False


def _twin(block: nn.Module, computes: FeedForward) -> tuple[nn.Module, Tensor]:
    """A copy of the block with layers of its own, a few neurons wide, and an input for it."""
    twin = copy.copy(block)
    twin.training = True
    twin._modules = {name: nn.Dropout(0.0) if isinstance(child, nn.Dropout) else copy.copy(child).train()
                     for name, child in block.named_children()}
    layers = [getattr(block, name) for name in (*computes.feeding, computes.down)]
    like = {"dtype": torch.float64, "device": "cpu"}
    fed = TWIN_NEURONS if computes.gate is None else 2 * TWIN_NEURONS
    for name, layer in zip(computes.feeding, layers, strict=False):
        twin._modules[name] = nn.Linear(layer.in_features, fed, layer.bias is not None, **like)
    twin._modules[computes.down] = nn.Linear(TWIN_NEURONS, layers[-1].out_features, layers[-1].bias is not None, **like)
    return twin, torch.randn(2, 3, layers[0].in_features, **like, requires_grad=True)


def _with_gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [y, *torch.autograd.grad(y.square().sum(), inputs)]
