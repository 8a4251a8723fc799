"""Weights as units: what a selection of weights says of a model's tensors, and reading and writing just those.

The sites of such a selection are parameter names, a tied tensor once under its first name. Unit ids are flat positions
in the tensor, row-major; of tensors in `meta["along"]` they are rows (axis 0) or columns (axis 1).
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from stt.errors import InputError, unknown_name
from stt.selection import Selection

# Shapes: P weights of a tensor, k selected units of it.

ALONG = "along"  # in the meta of a selection: the axis that a tensor's units lie along
LEAF = "_selected"  # after the name of a tensor, of an attached model: the module that holds what of it trains


def named_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, under its first name."""
    return dict(model.named_parameters())


def tensor_of(parameter: str) -> str:
    """The name of the tensor that the values of a leaf belong to; that of another parameter is its own."""
    return parameter.removesuffix(f"{LEAF}.values")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and shapes."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def axis_of(selection: Selection, name: str) -> int | None:
    """0 if the ids of the tensor called `name` are rows, 1 for columns, None for flat positions."""
    return selection.meta.get(ALONG, {}).get(name)


def width(tensor: Tensor, axis: int | None) -> int:
    """How many units the tensor has."""
    return tensor.numel() if axis is None else tensor.shape[axis]


def read(tensor: Tensor, axis: int | None, ids: Tensor) -> Tensor:
    """The selected part of a tensor: (k,), or whole rows or columns."""
    ids = ids.to(tensor.device)
    return torch.take(tensor, ids) if axis is None else tensor.index_select(axis, ids)


@torch.no_grad()
def write(tensor: Tensor, axis: int | None, ids: Tensor, values: Tensor) -> None:
    """Put `values`, shaped as `read` returns them, in their place; rounded to the tensor's dtype."""
    ids, values = ids.to(tensor.device), values.to(tensor)
    if axis is None:
        tensor.put_(ids, values)
    else:
        tensor.index_copy_(axis, ids, values)


def is_whole(tensor: Tensor, axis: int | None, ids: Tensor) -> bool:
    """Whether every weight of the tensor is selected."""
    return len(ids) == width(tensor, axis)


def sizes(selection: Selection, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many weights of each tensor are selected. Raises InputError if the selection is of another model."""
    check_fits(selection, tensors)
    return {name: len(ids) * tensors[name].numel() // width(tensors[name], axis_of(selection, name))
            for name, ids in selection.items()}


def is_of_weights(selection: Selection) -> bool:
    """Whether the units are weights, and not neurons or heads of sites."""
    return ALONG in selection.meta


def check_fits(selection: Selection, tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError, naming the tensor, if the selection is not one of these tensors' weights."""
    if not is_of_weights(selection):
        raise InputError("this is a selection of neurons or heads, not of weights: turn it into one with "
                         "stt.selective_optimizers.in_place(model, selection)")
    for name, ids in selection.items():
        if name not in tensors:
            raise unknown_name("tensor", name, tensors)
        axis, tensor = axis_of(selection, name), tensors[name]
        if axis is not None and not (isinstance(axis, int) and 0 <= axis < tensor.dim()):
            raise InputError(f"the selection takes {name} along axis {axis}, and it has {tensor.dim()}: it was made "
                             "for another model")
        expected = selection.widths.get(name, width(tensor, axis))
        if expected != width(tensor, axis) or (len(ids) and int(ids[-1]) >= width(tensor, axis)):
            raise InputError(f"the selection is of {expected} units of {name}, which has {width(tensor, axis)} in this "
                             "model: it was made for another one")


def selection_of(units: Mapping[str, Tensor], along: Mapping[str, int], tensors: Mapping[str, Tensor],
                 meta: Mapping[str, object]) -> Selection:
    """A selection of weights; tensors without any are left out. Raises InputError if nothing is selected."""
    chosen = {name: ids for name, ids in units.items() if len(ids)}
    if not chosen:
        raise InputError("no weight is selected: raise the budget, or exclude fewer tensors")
    axes = {name: axis for name, axis in along.items() if name in chosen}
    widths = {name: width(tensors[name], axes.get(name)) for name in chosen}
    return Selection(chosen, {ALONG: axes, "widths": widths, "fingerprint": fingerprint(tensors), **meta})


def with_whole(selection: Selection, tensors: Mapping[str, Tensor], names: Iterable[str]) -> Selection:
    """The selection and, whole, the tensors of these names."""
    units, along = dict(selection), dict(selection.meta[ALONG])
    for name in names:
        axis, units[name] = all_of(tensors[name])
        along.pop(name, None)
        along |= {} if axis is None else {name: axis}
    return selection_of({name: units[name] for name in tensors if name in units}, along, tensors,
                        {key: value for key, value in selection.meta.items() if key not in (ALONG, "widths")})


def all_of(tensor: Tensor) -> tuple[int | None, Tensor]:
    """The axis and ids of every weight of a tensor: its rows, or the only position of a number."""
    return (0, torch.arange(len(tensor))) if tensor.dim() else (None, torch.arange(1))
