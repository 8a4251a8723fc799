"""What flows through a site while the model runs: hooks on its layers, or on the products with a stack of experts."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stt.errors import InputError
from stt.products import PRODUCTS, Product, standing
from stt.scores.base import Seen, Statistic
from stt.sites import Member, Site


class Done(Exception):
    """Ends a forward pass: the last site has shown all it has."""


@dataclass
class Observer:
    """Collects a Seen of one site over the calls of its gate and its down projection, for the statistics of each half
    of the examples."""

    site: Site
    halves: tuple[list[Statistic], list[Statistic]]
    needs: set[str]
    is_token: Tensor | None
    is_real: Tensor | None
    in_b: Tensor  # (B,) which examples belong to the second half
    is_last: bool
    gate_bias: Tensor | None = None  # (C,) that the model adds to what the gate projection returns
    partly: dict[str, Tensor] = field(default_factory=dict)

    def gate(self, x: Tensor, output: Tensor, axis: int = -1) -> None:
        """The gate projection has made `output` of x; `axis` is that of the channels of both."""
        if "inputs" in self.needs:
            self.partly["inputs"] = self._rows(x.detach(), axis)
        if "outputs" in self.needs:
            rows = self._rows(output.detach(), axis)
            rows = rows if self.gate_bias is None else rows + self.gate_bias
            is_fused = rows.shape[1] != self.site.width
            local = self.site.gate - self.site.members[0].channels.min()
            self.partly["outputs"] = rows[:, local.to(rows.device)] if is_fused else rows

    def down(self, x: Tensor, axis: int = -1) -> Tensor:
        """What the down projection is to read instead of x."""
        seen = {**self.partly, "hidden": self._rows(x.detach(), axis)}
        self.partly.clear()
        if "gradients" not in self.needs:
            self._update(seen)
            if self.is_last:
                raise Done
            return x
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        x.register_hook(lambda gradient: self._update({**seen, "gradients": self._rows(gradient, axis)}))
        return x

    def _rows(self, x: Tensor, axis: int) -> Tensor:
        """Example by example: (B, T, ...), (T, B, ...) or (B, C, ...) -> (N, C)"""
        x = x.movedim(axis, -1)
        return (x.transpose(0, 1) if self.site.is_time_first and x.ndim == 3 else x).flatten(0, -2)

    def _update(self, seen: dict[str, Tensor]) -> None:
        rows = seen["hidden"]
        shown = Seen(_fitted(self.is_token, self.is_real, len(rows), self.site), **seen)
        with torch.autocast(rows.device.type, enabled=False):  # sums stay float32 whatever the model computes in
            for statistics, part in zip(self.halves, _apart(shown, self._rows_in_b), strict=True):
                for statistic in statistics if part is not None else ():
                    if statistic.units == self.site.units and statistic.needs != ("weights",):
                        statistic.update(self.site.name, part)

    def _rows_in_b(self, rows: int) -> Tensor:
        """Which of the rows belong to examples of the second half: (N,). Rows are example by example; a model that
        drops the padding keeps the real ones; where neither fits, the batch belongs to the half of its first."""
        if rows % len(self.in_b) == 0 and (self.is_real is None or rows >= len(self.is_real)):
            return self.in_b.repeat_interleave(rows // len(self.in_b))
        if self.is_real is not None and rows == int(self.is_real.sum()):
            return self.in_b.repeat_interleave(len(self.is_real) // len(self.in_b))[self.is_real.bool()]
        return self.in_b[:1].expand(rows)


def _apart(seen: Seen, rows_in_b: Callable[[int], Tensor]) -> tuple[Seen | None, Seen | None]:
    """What the examples of each half show; None for a half that has no row here. A strided convolution between the
    projections leaves fewer rows behind it than before."""
    in_b = rows_in_b(len(seen.hidden))
    if not len(in_b) or in_b.all() or not in_b.any():
        return (seen if len(in_b) and not in_b.any() else None), (seen if len(in_b) and in_b.all() else None)
    parts = []
    for is_b in (False, True):
        tensors = {name: value[(rows_in_b(len(value)) == is_b).nonzero().flatten()]
                   for name, value in vars(seen).items() if value is not None}
        parts.append(replace(seen, **tensors))
    return tuple(parts)


def _fitted(is_token: Tensor | None, is_real: Tensor | None, rows: int, site: Site) -> Tensor | None:
    """The mask, if the site sees one row per position, or its real positions if the model itself has already dropped
    the padding; None if a router has chosen some of positions that all count."""
    if is_token is None or (len(is_token) == rows and not site.is_routed):
        return is_token
    if site.is_routed and is_token.all():
        return None
    if int(is_real.sum()) == rows and not site.is_routed:
        return is_token[is_real.bool()]
    raise InputError(f"{site.name} sees {rows} positions but the attention mask has {len(is_token)}: "
                     "pass a mask that fits, or count_padding=True")


# ---------------------------------------------------------------- hooks


@contextmanager
def observing(model: nn.Module, observers: Sequence[Observer]) -> Iterator[None]:
    """Everything the observed sites compute in the block is shown to them."""
    with ExitStack() as stack:
        experts = [observer for observer in observers if observer.site.form == "experts"]
        for observer in observers:
            if observer.site.form != "experts":
                for gate in _places(model, observer.site, observer.site.members[0]):
                    stack.callback(gate.register_forward_hook(_after(observer)).remove)
                for down in _places(model, observer.site, observer.site.members[-1]):
                    stack.callback(down.register_forward_pre_hook(_before(observer)).remove)
        if experts:
            stack.enter_context(_Products(model, experts))
        yield


def _places(model: nn.Module, site: Site, member: Member) -> list[nn.Module]:
    """The modules that have the weight of a member: one, or all layers that share it."""
    module = model.get_submodule(member.module)
    if site.form != "shared":
        return [module]
    return [other for other in model.modules() if getattr(other, "weight", None) is module.weight]


def _after(observer: Observer) -> Callable[..., None]:
    return lambda module, args, output: observer.gate(args[0], output, _channel_axis(module))


def _before(observer: Observer) -> Callable[..., tuple]:
    return lambda module, args: (observer.down(args[0], _channel_axis(module)), *args[1:])


def _channel_axis(module: nn.Module) -> int:
    return 1 - module.weight.ndim if isinstance(module, nn.modules.conv._ConvNd) else -1


class _Products(TorchFunctionMode):
    """Shows products with a part of a stack of experts to the observer of that expert."""

    def __init__(self, model: nn.Module, observers: Sequence[Observer]):
        super().__init__()
        self.stacks: dict[int, tuple[Tensor, dict[tuple, Observer]]] = {}  # storage -> parameter, its parts
        parameters = dict(model.named_parameters())
        for observer in observers:
            for member in (observer.site.members[0], observer.site.members[-1]):
                parameter = parameters[member.tensor]
                _, parts = self.stacks.setdefault(parameter.untyped_storage().data_ptr(), (parameter, {}))
                parts[member.expert, int(member.channels.min()), member.side] = observer

    def __torch_function__(self, func: Callable, types: Sequence[type], args: tuple = (),
                           kwargs: Mapping[str, object] | None = None) -> object:
        kwargs = kwargs or {}
        product = PRODUCTS[func](args, kwargs) if func in PRODUCTS else None
        stack = None
        if product is not None and isinstance(product.weight, Tensor):
            stack = self.stacks.get(product.weight.untyped_storage().data_ptr())
        if stack is None:
            return func(*args, **kwargs)
        parameter, parts = stack
        layout = standing(product.weight, parameter.shape, product)
        downs = {key: observer for key, observer in parts.items() if key[2] == "in"}
        x = product.x
        if downs:
            x = self._down(product, layout, downs)
            args = tuple(x if value is product.x else value for value in args)
            kwargs = {name: x if value is product.x else value for name, value in kwargs.items()}
        output = func(*args, **kwargs)
        for (expert, start, side), observer in parts.items():
            if side == "out" and layout.is_batched:
                is_routed = (x[expert] != 0).any(-1)  # the others are sent along as zeros
                observer.gate(x[expert][is_routed], output[expert][is_routed])
            elif side == "out" and (expert, start) == (layout.expert, layout.outputs.start):
                observer.gate(x, output, product.x_axis)
        return output

    @staticmethod
    def _down(product: Product, layout: object, parts: Mapping[tuple, Observer]) -> Tensor:
        if not layout.is_batched:
            observer = parts.get((layout.expert, layout.inputs.start, "in"))
            return product.x if observer is None else observer.down(product.x, product.x_axis)
        shown = []
        for expert, x in enumerate(product.x):
            is_routed = (x != 0).any(-1)
            part = parts[expert, 0, "in"].down(x[is_routed])
            shown.append(x.index_put((is_routed.nonzero().flatten(),), part))
        return torch.stack(shown)
