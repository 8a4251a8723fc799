"""A patch as a selection file with values, and back. The format is described in docs/patch_file.md."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stt.errors import InputError
from stt.selection import Selection
from stt.selective_optimizers.deltas import Exact, Start
from stt.selective_optimizers.weights import ALONG

if TYPE_CHECKING:
    from stt.selective_optimizers.patch import Patch

KIND = "patch"
ENTRIES = ("kind", "patch")  # what a patch adds to the JSON of its selection
EXACT_AT, EXACT, EXTRAS, WHERE = "exact_at/", "exact/", "extras/", "where/"  # before a name, after "values/"
ROUNDED = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
FLOATS = (torch.float32, torch.float64, torch.bfloat16)


def written(patch: Patch, dtype: torch.dtype | None) -> Selection:
    """What goes into the file. With a dtype the deltas are rounded to it and stand alone: nothing is exact any more.
    Raises InputError for a dtype that it cannot be."""
    if dtype is not None and dtype not in ROUNDED:
        raise InputError(f"a patch is saved as it is, or in torch.float32 or torch.bfloat16, got {dtype}")
    deltas = patch.deltas if dtype is None else {name: delta.to(dtype) for name, delta in patch.deltas.items()}
    parts = [(name, delta) for name, delta in deltas.items()]
    for name, exact in patch.exact.items() if dtype is None else ():
        parts += [(EXACT_AT + name, _narrow(exact.at)), (EXACT + name, exact.values)]
    parts += [(EXTRAS + name, value) for name, value in patch.extras.items()]
    parts += [(f"{WHERE}{i}/{name}", start.where) for name, starts in patch.starts.items()
              for i, start in enumerate(starts) if start.where is not None]
    values = dict(parts)
    if len(values) < len(parts):
        raise InputError(f"a parameter's name begins with one of {EXACT_AT} {EXACT} {EXTRAS} {WHERE}, which the file "
                         "keeps for itself: leave it out of the selection")
    starts = {name: [start.digest for start in found] for name, found in patch.starts.items()}
    more = {"starts": starts, "new": list(patch.new), "rounded": patch.rounded if dtype is None else ROUNDED[dtype]}
    return Selection(patch.selection, {**patch.selection.meta, "kind": KIND, "patch": more}, values)


def parsed(whole: Selection, path: str | Path) -> dict[str, object]:
    """The fields of the patch in a file that Selection.load has read. Raises InputError if it is none, or broken."""
    more = whole.meta.get("patch")
    if whole.meta.get("kind") != KIND or not isinstance(more, dict):
        raise InputError(f"{path} is a selection and not a patch: it says which weights, not what they became")
    meta = {key: value for key, value in whole.meta.items() if key not in ENTRIES}
    values = whole.new_values
    fields = {"selection": Selection(whole, meta),
              "deltas": {name: values[name] for name in whole if name in values},
              "exact": {name: Exact(values[EXACT_AT + name].long(), values[EXACT + name]) for name in whole
                        if EXACT_AT + name in values and EXACT + name in values},
              "extras": {name.removeprefix(EXTRAS): value for name, value in values.items() if name.startswith(EXTRAS)},
              "starts": _starts(more.get("starts"), values), "new": _names(more.get("new")),
              "rounded": more.get("rounded")}
    if not _is_whole(fields):
        raise InputError(f"{path} is a patch whose parts do not go together: make it again")
    return fields


def _starts(given: object, values: Mapping[str, Tensor]) -> dict[str, list[Start]] | None:
    if not isinstance(given, dict) or not all(isinstance(digests, list) for digests in given.values()):
        return None
    return {name: [Start(digest, values.get(f"{WHERE}{i}/{name}")) for i, digest in enumerate(digests)]
            for name, digests in given.items()}


def _names(given: object) -> tuple[str, ...] | None:
    return tuple(given) if isinstance(given, list) and all(isinstance(name, str) for name in given) else None


def _is_whole(fields: Mapping[str, object]) -> bool:
    """Whether every tensor has a delta of its length, a start unless it is new, and exact values inside the delta."""
    selection, starts, new = fields["selection"], fields["starts"], fields["new"]
    along = selection.meta.get(ALONG)
    if starts is None or new is None or not isinstance(along, dict) or not set(along.values()) <= {0, 1}:
        return False
    if fields["deltas"].keys() != selection.keys() or starts.keys() | set(new) != selection.keys():
        return False
    return all(_fits(delta, len(selection[name]), along.get(name), starts.get(name, ()), fields["exact"].get(name))
               for name, delta in fields["deltas"].items())


def _fits(delta: Tensor, k: int, axis: int | None, starts: list[Start], exact: Exact | None) -> bool:
    if delta.dtype not in FLOATS or delta.dim() <= (axis or 0) or delta.shape[axis or 0] != k:
        return False
    if axis is None and delta.dim() != 1:
        return False
    if not all(start.where is None or (start.where.dtype == torch.bool and start.where.shape == (k,))
               for start in starts):
        return False
    return exact is None or (exact.at.dim() == 1 and exact.at.shape == exact.values.shape
                             and bool(((exact.at >= 0) & (exact.at < delta.numel())).all()))


def _narrow(positions: Tensor) -> Tensor:
    """int32 where it holds them."""
    return positions.to(torch.int32) if not len(positions) or int(positions.max()) < 2**31 else positions
