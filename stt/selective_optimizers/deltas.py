"""The numbers of a patch: differences that lead back to the trained values bit for bit, and digests of the start."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from stt.selection import Selection
from stt.selective_optimizers.weights import axis_of, read

# Shapes: k selected units of a tensor; a delta is shaped as weights.read returns it: (k,), or k whole rows or columns.


@dataclass(frozen=True)
class Exact:
    """Trained values that start + delta misses in the last bits, and their flat positions in the delta."""

    at: Tensor  # (c,)
    values: Tensor  # (c,)


@dataclass(frozen=True)
class Start:
    """A digest of what the base model holds where a delta lies: at all its units, or at those where `where` is true."""

    digest: str
    where: Tensor | None = None  # (k,)


def difference(start: Tensor, trained: Tensor) -> tuple[Tensor, Exact]:
    """trained - start, rounded, and the values that start + difference misses."""
    wide = torch.promote_types(trained.dtype, torch.float32)
    start, trained = (value.detach().cpu().to(wide).contiguous() for value in (start, trained))
    delta = trained - start
    at = (bits(start + delta) != bits(trained)).flatten().nonzero().flatten()
    return delta, Exact(at, trained.flatten()[at])


def digest(values: Tensor) -> str:
    """sha256 of the values as float64, so that a model loaded in a wider dtype has the same."""
    found = hashlib.sha256()
    for chunk in values.detach().flatten().split(1 << 22):
        found.update(chunk.cpu().double().numpy())
    return found.hexdigest()


def bits(values: Tensor) -> Tensor:
    """The same memory as whole numbers, so that -0.0 differs from 0.0 and NaN equals itself."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.view(sizes[values.itemsize]) if values.is_floating_point() else values


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the last bit, wherever they are."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a.cpu()), bits(b.cpu()))


def blended(start: Tensor, value: Tensor, scale: float) -> Tensor:
    """start + scale * (value - start); `value` itself at scale 1, and where it is a whole number."""
    return value if scale == 1 or not value.is_floating_point() else start + scale * (value.to(start) - start)


def read_units(tensor: Tensor, selection: Selection, name: str) -> Tensor:
    """What the selection takes of the tensor."""
    return read(tensor.detach(), axis_of(selection, name), selection[name])


def shape_of(selection: Selection, name: str, tensor: Tensor) -> torch.Size:
    """The shape of what the selection takes of the tensor."""
    axis, k = axis_of(selection, name), len(selection[name])
    return torch.Size((k,)) if axis is None else torch.Size((*tensor.shape[:axis], k, *tensor.shape[axis + 1:]))


def flat_positions(shape: torch.Size, axis: int | None, ids: Tensor) -> Tensor:
    """Flat positions of the selected weights of a tensor, ascending: the order in which `read` returns them."""
    return ids if axis is None else torch.arange(shape.numel()).view(shape).index_select(axis, ids).flatten()
