"""Patch: what training changed of a model, as a selection of weights and the difference of each from the base model.

A patch is a value: it can be kept in a file (docs/patch_file.md), put on the base model at any scale, taken off again,
and added to other patches of the same base.
"""
from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from stt.errors import InputError, unknown_name
from stt.selection import Selection
from stt.selective_optimizers import patch_file, patch_sum
from stt.selective_optimizers.deltas import (
    Exact,
    Start,
    blended,
    difference,
    digest,
    read_units,
    same_bits,
    shape_of,
)
from stt.selective_optimizers.weights import ALONG, axis_of, check_fits, fingerprint, named_tensors, width, write

# Shapes: k selected units of a tensor; a delta is shaped as weights.read returns it: (k,), or k whole rows or columns.

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # buffers that training moves without a gradient
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Patch:
    """A selection of weights and `deltas`: trained minus start, float32 (float64 for such tensors), on the CPU.

    `exact` is what the sum start + delta misses at scale 1; `extras` are whole buffers that training moved (batch-norm
    statistics); `new` are tensors that the base model has no values of (a head drawn at random): their start is 0, so
    that the delta is the value. `rounded` is the dtype the deltas were rounded to, if they were: such a patch is no
    longer exact.
    """

    selection: Selection
    deltas: dict[str, Tensor]
    starts: dict[str, list[Start]]
    exact: dict[str, Exact] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    new: tuple[str, ...] = ()
    rounded: str | None = None

    def __repr__(self) -> str:
        return f"Patch({len(self.deltas)} tensors, {self.budget_used} weights)"

    @property
    def budget_used(self) -> int:
        """The number of weights."""
        return sum(delta.numel() for delta in self.deltas.values())

    # ------------------------------------------------------------ making one

    @classmethod
    def from_values(cls, model: nn.Module, selection: Selection, start: Tensors, trained: Tensors,
                    new: Collection[str] = (), extras: Tensors | None = None) -> Patch:
        """The patch from what the selected weights of `model` were and are, each shaped as weights.read returns it.

        `new` names the tensors that the base model has no values of. `extras` defaults to the running statistics of the
        model as they are. Raises InputError for a selection of another model.
        """
        tensors = named_tensors(model)
        check_fits(selection, tensors)
        selection = _cleaned(selection, tensors)
        deltas, exact, starts = {}, {}, {}
        for name in selection:
            _check_values(name, start[name], trained[name], shape_of(selection, name, tensors[name]))
            if name not in new:
                starts[name] = [Start(digest(start[name]))]
            before = torch.zeros_like(start[name]) if name in new else start[name]
            deltas[name], missed = difference(before, trained[name])
            exact |= {name: missed} if len(missed.at) else {}
        extras = statistics_of(model) if extras is None else extras
        extras = {name: value.detach().cpu().clone() for name, value in extras.items()}
        return cls(selection, deltas, starts, exact, extras, tuple(name for name in selection if name in new))

    @classmethod
    def between(cls, base: nn.Module | Tensors, tuned: nn.Module, selection: Selection,
                new: Collection[str] = ()) -> Patch:
        """The patch that turns the selected weights of `base` (a model or its state dict) into those of `tuned`; the
        buffers that differ travel along.

        What differs elsewhere is not looked at: `verify` does. Raises InputError for models of different tensors.
        """
        before, after = (base if isinstance(base, Mapping) else named_tensors(base)), named_tensors(tuned)
        check_fits(selection, after)
        trained = {name: read_units(after[name], selection, name) for name in selection}
        start = {name: values for name, values in trained.items() if name in new}  # their start is 0 whatever is here
        for name in selection.keys() - start.keys():
            _check_same_shape(name, before, after[name])
            start[name] = read_units(before[name], selection, name)
        held, moved = (base if isinstance(base, Mapping) else buffers_of(base)), buffers_of(tuned)
        return cls.from_values(tuned, selection, start, trained, new, differing(held, moved))

    # ------------------------------------------------------------ putting it on a model

    def apply(self, model: nn.Module, scale: float = 1.0) -> Applied:
        """Add `scale` times the deltas to the base model, in place; what is needed to take them off again.

        At scale 1 the weights are the trained ones, bit for bit (unless the patch is `rounded`). New tensors are
        written whole at any scale; of `extras`, whole numbers too. Raises InputError, before anything changes, for a
        model that is not the base: other tensors, or other values where the patch lies (it was applied already, say).
        """
        if not math.isfinite(scale):
            raise InputError(f"the scale of a patch must be a finite number, got {scale}")
        tensors, buffers = named_tensors(model), buffers_of(model)
        self.check_shapes(tensors, buffers)
        before = {name: read_units(tensors[name], self.selection, name).cpu() for name in self.deltas}
        self.check_start(before)
        held = {name: buffers[name].cpu().clone() for name in self.extras}
        for name, value in before.items():
            write(tensors[name], axis_of(self.selection, name), self.selection[name], self.values(name, value, scale))
        for name, value in held.items():
            buffers[name].copy_(blended(value, self.extras[name], scale))
        written = {name: digest(read_units(tensors[name], self.selection, name)) for name in before}
        return Applied(model, self.selection, before, held, written)

    def values(self, name: str, start: Tensor, scale: float = 1.0) -> Tensor:
        """What the selected weights of a tensor become if they hold `start`; float32 or wider."""
        if name in self.new:
            start, scale = torch.zeros_like(start), 1.0
        delta = self.deltas[name]
        wide = torch.promote_types(torch.promote_types(start.dtype, delta.dtype), torch.float32)
        values = start.to(wide) + scale * delta.to(wide)
        if scale == 1 and name in self.exact:
            values.view(-1)[self.exact[name].at] = self.exact[name].values.to(wide)
        return values

    def check_shapes(self, tensors: Tensors, buffers: Tensors) -> None:
        """Raises InputError if the patch is not of a model with these tensors and buffers, whatever their values."""
        check_fits(self.selection, tensors)
        if self.selection.meta.get("fingerprint") != fingerprint(tensors):
            raise InputError("the patch was made for a model with other tensors: give the model it was trained from")
        for name, delta in self.deltas.items():
            expected = shape_of(self.selection, name, tensors[name])
            if delta.shape != expected:
                raise InputError(f"the patch holds {tuple(delta.shape)} values of {name}, and its selection takes "
                                 f"{tuple(expected)}: make the patch again")
        for name, value in self.extras.items():
            if name not in buffers or buffers[name].shape != value.shape:
                raise InputError(f"the patch holds a buffer {name!r} of shape {tuple(value.shape)}, which this model "
                                 "does not have: give the model it was trained from")

    def check_start(self, start: Tensors) -> None:
        """Raises InputError, naming the tensor, if the base model's values where the patch lies are not these."""
        for name, checks in self.starts.items():
            _check_start(name, start[name], axis_of(self.selection, name), checks)

    # ------------------------------------------------------------ several, and the file

    @classmethod
    def compose(cls, patches: Sequence[Patch], scales: Sequence[float] | None = None) -> Patch:
        """One patch that adds what all of them add, each times its scale: the union of the entries, the deltas summed.

        Patches that do not overlap compose exactly. Raises InputError for patches of different base models, and for two
        values of one new tensor or buffer.
        """
        return cls(**patch_sum.added(patches, scales))

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """One safetensors file (docs/patch_file.md): 8 bytes per weight, 4 where whole rows or columns are selected,
        and 8 more for each of `exact`. With `dtype` float32 or bfloat16 the deltas alone are kept, rounded to it: 8 or
        6 bytes, and the weights come back to rounding. Raises InputError for another dtype."""
        patch_file.written(self, dtype).save(path)

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Raises InputError for a file that is missing, truncated, no patch, or from a newer version of the format."""
        return cls(**patch_file.parsed(Selection.load(path), path))


@dataclass(frozen=True, eq=False)
class Applied:
    """A patch on a model, and what it took the place of."""

    model: nn.Module
    selection: Selection
    before: dict[str, Tensor]
    buffers: dict[str, Tensor]
    written: dict[str, str]

    def revert(self) -> None:
        """Put back what was there, bit for bit. Raises InputError if the weights have changed since, by training or by
        another patch: take patches off in the reverse order."""
        tensors, buffers = named_tensors(self.model), buffers_of(self.model)
        for name in self.before:
            if digest(read_units(tensors[name], self.selection, name)) != self.written[name]:
                raise InputError(f"{name} has changed since the patch was applied: take off later patches first")
        for name, value in self.before.items():
            write(tensors[name], axis_of(self.selection, name), self.selection[name], value)
        for name, value in self.buffers.items():
            buffers[name].copy_(value)


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The buffers in the model's state dict, which share its memory."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items()
            if name not in parameters and isinstance(value, Tensor)}


def differing(before: Tensors, after: Tensors) -> dict[str, Tensor]:
    """Those of `after` that are not, to the last bit, what `before` has under their names."""
    return {name: value for name, value in after.items() if name not in before or not same_bits(before[name], value)}


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of the model's norms."""
    return {name: value for name, value in buffers_of(model).items() if name.rpartition(".")[2] in STATISTICS}


def _cleaned(selection: Selection, tensors: Tensors) -> Selection:
    """The selection without tensors of which nothing is selected, without what a patch adds to its meta, and with the
    widths and the fingerprint."""
    units = {name: ids for name, ids in selection.items() if len(ids)}
    meta = {key: value for key, value in selection.meta.items() if key not in patch_file.ENTRIES}
    meta["widths"] = {name: width(tensors[name], axis_of(selection, name)) for name in units}
    meta[ALONG] = {name: axis for name in units if (axis := axis_of(selection, name)) is not None}
    return Selection(units, {"fingerprint": fingerprint(tensors), **meta})


def _check_same_shape(name: str, before: Tensors, after: Tensor) -> None:
    if name not in before:
        raise unknown_name("tensor of the base model", name, before)
    if before[name].shape != after.shape:
        raise InputError(f"{name} is {tuple(before[name].shape)} in the base model and {tuple(after.shape)} in the "
                         "tuned one: give two models of one kind")


def _check_values(name: str, start: Tensor, trained: Tensor, expected: torch.Size) -> None:
    if not start.shape == trained.shape == expected:
        raise InputError(f"the values of {name} are {tuple(start.shape)} before and {tuple(trained.shape)} after, and "
                         f"the selection takes {tuple(expected)}: read both with weights.read")
    if not trained.is_floating_point():
        raise InputError(f"{name} holds {trained.dtype}, and a patch is of floating-point weights: leave it out of the "
                         "selection")


def _check_start(name: str, before: Tensor, axis: int | None, checks: Sequence[Start]) -> None:
    for check in checks:
        part = before if check.where is None else before.index_select(axis or 0, check.where.nonzero().flatten())
        if digest(part) != check.digest:
            raise InputError(f"{name} does not hold what it held when the patch was made: the model is another one, is "
                             "loaded in fewer bits, or has a patch on it; give the model it was trained from")
