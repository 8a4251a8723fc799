"""Several patches of one base model as one: the union of their entries, the deltas summed."""
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stt.errors import InputError
from stt.selection import Selection
from stt.selective_optimizers.deltas import Exact, Start, flat_positions, same_bits
from stt.selective_optimizers.weights import ALONG, axis_of

if TYPE_CHECKING:
    from stt.selective_optimizers.patch import Patch

NOTHING = Exact(torch.empty(0, dtype=torch.long), torch.empty(0))

# Shapes: k units of a patch, u of the union.


@dataclass(frozen=True)
class Part:
    """What one patch says of one tensor, and how much of it is added."""

    ids: Tensor  # (k,)
    delta: Tensor
    exact: Exact
    starts: list[Start]
    scale: float


def added(patches: Sequence[Patch], scales: Sequence[float] | None) -> dict[str, object]:
    """The fields of Patch.compose, which says what raises."""
    scales = [1.0] * len(patches) if scales is None else list(scales)
    _check(patches, scales)
    fields = {"deltas": {}, "exact": {}, "starts": {}}
    units, axes, widths = {}, {}, {}
    for name in dict.fromkeys(name for patch in patches for name in patch.deltas):
        axis, width, parts = _parts(name, patches, scales)
        units[name], delta, exact, starts = summed(name, axis, parts)
        fields["deltas"][name], widths[name] = delta, width
        axes |= {} if axis is None else {name: axis}
        fields["exact"] |= {name: exact} if len(exact.at) else {}
        fields["starts"] |= {name: starts} if starts else {}
    kinds = {patch.selection.meta.get("unit") for patch in patches}
    meta = {ALONG: axes, "widths": widths, "fingerprint": patches[0].selection.meta["fingerprint"],
            "unit": kinds.pop() if len(kinds) == 1 else "weight", "composed": len(patches)}
    return {**fields, "selection": Selection(units, meta), "extras": _extras(patches),
            "new": tuple(dict.fromkeys(name for patch in patches for name in patch.new)),
            "rounded": next((patch.rounded for patch in patches if patch.rounded), None)}


def _check(patches: Sequence[Patch], scales: Sequence[float]) -> None:
    if not patches or len(scales) != len(patches) or not all(map(math.isfinite, scales)):
        raise InputError(f"compose needs one patch or more and a finite scale for each, got {len(patches)} patches and "
                         f"the scales {scales}")
    if len({patch.selection.meta.get("fingerprint") for patch in patches}) > 1:
        raise InputError("the patches are of models with other tensors: compose those of one base model")


def _parts(name: str, patches: Sequence[Patch], scales: Sequence[float]) -> tuple[int | None, int, list[Part]]:
    """The axis that the units lie along (None where the patches differ), the tensor's width, and what is added."""
    holders = [(patch, scale) for patch, scale in zip(patches, scales, strict=True) if name in patch.deltas]
    axes = [axis_of(patch.selection, name) for patch, _ in holders]
    parts = [Part(patch.selection[name], patch.deltas[name], patch.exact.get(name, NOTHING),
                  patch.starts.get(name, []), scale) for patch, scale in holders]
    widths = [patch.selection.widths[name] for patch, _ in holders]
    if any(name in patch.new for patch, _ in holders):
        return axes[0], widths[0], [replace(_only(name, holders, parts), scale=1.0)]
    if len(set(axes)) == 1:
        return axes[0], widths[0], parts
    shapes = [_whole_shape(part, axis, width) for part, axis, width in zip(parts, axes, widths, strict=True)]
    flat = [part if axis is None else _flat(part, axis, shape)
            for part, axis, shape in zip(parts, axes, shapes, strict=True)]
    return None, shapes[0].numel(), flat


def _only(name: str, holders: Sequence[tuple[Patch, float]], parts: Sequence[Part]) -> Part:
    """The values of a new tensor: one patch's, or all patches the same."""
    for (patch, _), part in zip(holders, parts, strict=True):
        if name not in patch.new or not (torch.equal(part.ids, parts[0].ids) and same_bits(part.delta, parts[0].delta)):
            raise InputError(f"{name} is new in one patch and something else in another, and the two cannot be added: "
                             "leave it out of all but one")
    return parts[0]


def _whole_shape(part: Part, axis: int | None, width: int) -> torch.Size:
    return torch.Size((width,)) if axis is None else \
        torch.Size((*part.delta.shape[:axis], width, *part.delta.shape[axis + 1:]))


def _flat(part: Part, axis: int, shape: torch.Size) -> Part:
    """The same with every weight as a unit. Weights keep their order, so digests stay what they are."""
    ids = flat_positions(shape, axis, part.ids)
    along = [1] * len(shape)
    along[axis] = len(part.ids)
    starts = [Start(start.digest, None if start.where is None else
                    start.where.view(along).expand(part.delta.shape).flatten()) for start in part.starts]
    return replace(part, ids=ids, delta=part.delta.flatten(), starts=starts)


def summed(name: str, axis: int | None, parts: Sequence[Part]) -> tuple[Tensor, Tensor, Exact, list[Start]]:
    """Ids, delta, exact values and starts of the union. Values stay exact where one part alone is added, whole."""
    dim = axis or 0
    ids = torch.cat([part.ids for part in parts]).unique()  # (u,)
    dtype = functools.reduce(torch.promote_types, (part.delta.dtype for part in parts), torch.float32)
    shape = list(parts[0].delta.shape)
    shape[dim] = len(ids)
    delta, holders = torch.zeros(shape, dtype=dtype), torch.zeros(len(ids), dtype=torch.long)
    places = [torch.searchsorted(ids, part.ids) for part in parts]  # (k,) each
    for part, place in zip(parts, places, strict=True):
        delta.index_add_(dim, place, part.delta.to(dtype), alpha=part.scale)
        holders[place] += 1
    exact = [_moved(part, place, holders, delta.shape, dim) for part, place in zip(parts, places, strict=True)
             if part.scale == 1]
    missed = Exact(torch.cat([NOTHING.at, *(one.at for one in exact)]),
                   torch.cat([NOTHING.values, *(one.values for one in exact)]))
    return ids, delta, missed, _starts(name, parts, places, len(ids))


def _moved(part: Part, place: Tensor, holders: Tensor, shape: torch.Size, dim: int) -> Exact:
    """The exact values of a part where no other part is added, at their positions in the union."""
    positions = flat_positions(shape, dim, place)[part.exact.at]
    unit = positions // math.prod(shape[dim + 1:]) % shape[dim]
    alone = holders[unit] == 1
    return Exact(positions[alone], part.exact.values[alone])


def _starts(name: str, parts: Sequence[Part], places: Sequence[Tensor], u: int) -> list[Start]:
    """All digests, each with the units of the union that it is of. Raises InputError where two cannot both be true."""
    found: dict[bytes, Start] = {}
    for part, place in zip(parts, places, strict=True):
        for start in part.starts:
            where = torch.zeros(u, dtype=torch.bool)
            where[place if start.where is None else place[start.where]] = True
            known = found.setdefault(where.numpy().tobytes(), Start(start.digest, None if where.all() else where))
            if known.digest != start.digest:
                raise InputError(f"the patches start from different values of {name}: compose those of one base model")
    return list(found.values())


def _extras(patches: Sequence[Patch]) -> dict[str, Tensor]:
    extras: dict[str, Tensor] = {}
    for patch in patches:
        for name, value in patch.extras.items():
            if not same_bits(extras.setdefault(name, value), value):
                raise InputError(f"two patches hold different values of the buffer {name!r}, which cannot be added: "
                                 "compose patches of models without running statistics")
    return extras
