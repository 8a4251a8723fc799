"""Did training change anything but what was selected? Every weight of two models compared, bit for bit."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stt.errors import InputError, unknown_name
from stt.loading import load_unrounded
from stt.selection import Selection
from stt.selective_optimizers.deltas import bits
from stt.selective_optimizers.in_place import in_place
from stt.selective_optimizers.weights import axis_of, check_fits, is_of_weights, named_tensors, sizes

CHUNK = 1 << 22  # weights compared at a time


@dataclass(frozen=True)
class Report:
    """How many weights there are, were selected, and changed: of the selected ones, and of the others by tensor."""

    weights: int
    selected: int
    changed: int
    outside: dict[str, int]

    @property
    def is_exact(self) -> bool:
        """Whether nothing changed but selected weights."""
        return not self.outside


def verify(base: nn.Module | Mapping[str, Tensor], tuned: nn.Module | Mapping[str, Tensor],
           selection: Selection) -> Report:
    """What changed from `base` to `tuned` (models, or their tensors by the names of model.named_parameters()), inside
    and outside of the selection. -0.0 and 0.0 are different; a NaN is the same as itself.

    Tensors of two dtypes are compared in the wider one. Of a tensor that `base` does not have every weight has changed.
    Raises InputError for models of other shapes, or that the selection is not of.
    """
    before, after = (model if isinstance(model, Mapping) else named_tensors(model) for model in (base, tuned))
    lost = sorted(before.keys() - after.keys())
    if lost:
        raise unknown_name("tensor of the base model", lost[0], after)
    check_fits(selection, after)
    inside, outside = 0, {}
    for name, tensor in after.items():
        ids = selection.get(name, torch.empty(0, dtype=torch.long))
        chosen, others = _changed(name, before.get(name), tensor, axis_of(selection, name), ids)
        inside += chosen
        outside |= {name: others} if others else {}
    return Report(sum(tensor.numel() for tensor in after.values()), sum(sizes(selection, after).values()), inside,
                  outside)


def verify_folders(base: str, tuned: str, path: str | Path) -> Report:
    """`verify` of two folders or hub ids and a selection or patch file; neurons and heads stand for their weights.

    Both are built as the class that `tuned` names and read in float32 or wider; weights that `base` lacks (a new head)
    count as changed. Raises InputError for what cannot be read, or is of several kinds of model.
    """
    selection = Selection.load(path)
    after, lacking = load_unrounded(tuned)
    if lacking:
        raise InputError(f"{tuned} lacks {len(lacking)} tensors of a {type(after).__name__}, the first "
                         f"{min(lacking)!r}: give the whole tuned model")
    before, new = load_unrounded(base, like=after)
    selection = selection if is_of_weights(selection) else in_place(after, selection)
    held = {name: tensor for name, tensor in named_tensors(before).items() if name not in new}
    return verify(held, after, selection)


def table(report: Report) -> str:
    """What `stt verify` prints."""
    head = f"{report.weights:,} weights, {report.selected:,} selected, {report.changed:,} of them changed\n"
    if report.is_exact:
        return head + "every other weight is the same, bit for bit\n"
    width = len(f"{max(report.outside.values()):,}")
    rows = [f"  {count:>{width},}  {name}\n" for name, count in report.outside.items()]
    return head + f"{sum(report.outside.values()):,} weights changed that are not selected:\n" + "".join(rows)


@torch.no_grad()
def _changed(name: str, before: Tensor | None, after: Tensor, axis: int | None, ids: Tensor) -> tuple[int, int]:
    """How many weights of a tensor changed: selected ones, and others."""
    if before is not None and before.shape != after.shape:
        raise InputError(f"{name} is {tuple(before.shape)} in the base model and {tuple(after.shape)} in the tuned "
                         "one: give two models of one kind")
    chosen = others = 0
    for start, new in enumerate(after.flatten().split(CHUNK)):
        old = None if before is None else before.flatten()[start * CHUNK:start * CHUNK + len(new)]
        position = _differing(old, new.cpu()) + start * CHUNK  # (changed,)
        stride = 1 if axis is None else math.prod(after.shape[axis + 1:])
        unit = position // stride % (after.numel() if axis is None else after.shape[axis])
        selected = int(torch.isin(unit, ids).sum()) if len(ids) else 0
        chosen, others = chosen + selected, others + len(position) - selected
    return chosen, others


def _differing(old: Tensor | None, new: Tensor) -> Tensor:
    """Positions where two flat tensors differ; all of them if there is no old one."""
    if old is None:
        return torch.arange(len(new))
    wide = torch.promote_types(old.dtype, new.dtype)
    return (bits(old.cpu().to(wide)) != bits(new.to(wide))).nonzero().flatten()
