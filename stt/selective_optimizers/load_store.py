"""The published calls that keep what a selective optimizer trained: a summary is our Patch, in our own file format.

Summaries that the public package wrote are read too, without running anything they hold; they know tensors by their
order in the model, so they become a Patch once the model is at hand.
"""
from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from stt.errors import InputError
from stt.selective_optimizers.deltas import read_units
from stt.selective_optimizers.patch import Applied, Patch
from stt.selective_optimizers.weights import named_tensors, selection_of

PUBLISHED_CLASS = "selective_optimizers.load_store.SelectivePeftSummary"
BROKEN = (UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError,
          AssertionError, OverflowError, MemoryError, struct.error)  # what torch.load raises for a file it cannot read
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # whose statistics such a summary holds


@dataclass
class PublishedSummary:
    """What a file of the public package holds, not yet checked: per parameter of the model, in order, the values of its
    chosen entries, their coordinates (n, dimensions) and its shape; the statistics of each batch norm."""

    values: list[Tensor | None]
    pointers: list[Tensor | None]
    shapes: list[torch.Size]
    bn_metadata: list[dict[str, Tensor]]
    budget_used: int


def write_summary_to_disk(path: str | Path, summary: Patch) -> None:
    """Patch.save: a safetensors file, whatever the path ends in."""
    summary.save(path)


def load_summary_from_disk(path: str | Path) -> Patch | PublishedSummary:
    """The patch in a file, or the summary in one that the public package wrote. Raises InputError for anything else."""
    if not Path(path).is_file():
        raise InputError(f"no summary at {path}: give a file that write_summary_to_disk wrote")
    with open(path, "rb") as file:
        head = file.read(9)
        if head[:4] != b"PK\x03\x04" and (head[:1] != b"\x80" or head[8:] == b"{"):  # no zip and no pickle
            return Patch.load(path)
        content = io.BytesIO(head + file.read())  # in memory, so that an OSError is one of the disk
    try:
        with torch.serialization.safe_globals([(PublishedSummary, PUBLISHED_CLASS)]):
            summary = torch.load(content, map_location="cpu", weights_only=True)
    except BROKEN as error:
        raise InputError(f"{path} is no summary of the public package, is damaged, or holds more than tensors: nothing "
                         "of it was run; write it again") from error
    if type(summary) is not PublishedSummary or not _is_whole(summary):
        raise InputError(f"{path} is not a summary of the public package: give a file that write_summary_to_disk wrote")
    return summary


def load_weights_from_summary(model: nn.Module, summary: Patch | PublishedSummary) -> Applied:
    """Put the trained values into the base model, in place, bit for bit; what takes them off again.

    Raises InputError, before anything changes, if the model is not the one the summary was made for.
    """
    patch = summary if isinstance(summary, Patch) else from_published(model, summary)
    return patch.apply(model)


def from_published(model: nn.Module, summary: PublishedSummary) -> Patch:
    """The patch that puts the values of a public summary on this model, which has its start values.

    Raises InputError unless the model has the tensors of the summary, in its order and shapes; names it holds none.
    """
    tensors = named_tensors(model)
    if len(tensors) != len(summary.values):
        raise InputError(f"the summary is of {len(summary.values)} tensors and the model has {len(tensors)}: give the "
                         "model it was made from")
    units, trained = {}, {}
    for (name, tensor), values, pointers, shape in zip(tensors.items(), summary.values, summary.pointers,
                                                       summary.shapes, strict=True):
        if tuple(shape) != tuple(tensor.shape):
            raise InputError(f"the summary holds {tuple(shape)} where the model has {name} of {tuple(tensor.shape)}: "
                             "give the model it was made from")
        if values is not None and len(values):
            units[name], trained[name] = _flat(name, tensor, values, pointers)
    selection = selection_of(units, {}, tensors, {"unit": "weight", "method": "published summary"})
    start = {name: read_units(tensors[name], selection, name) for name in selection}
    return Patch.from_values(model, selection, start, trained, extras=_statistics(model, summary.bn_metadata))


def _flat(name: str, tensor: Tensor, values: Tensor, pointers: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted flat positions and their values, in the tensor's dtype."""
    sizes = torch.tensor(tensor.shape, dtype=torch.long)
    if pointers.shape != (len(values), tensor.dim()) or len(values) > tensor.numel() \
            or not bool(((pointers >= 0) & (pointers < sizes)).all()):
        raise InputError(f"the summary's entries of {name} are not inside {tuple(tensor.shape)}: it is damaged, write "
                         "it again")
    strides = torch.tensor([sizes[i + 1:].prod() for i in range(tensor.dim())], dtype=torch.long)
    positions, order = (pointers * strides).sum(1).sort()
    return positions, values[order].to(tensor.dtype)


def _statistics(model: nn.Module, given: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Name in the state dict -> buffer."""
    names = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
    if len(names) != len(given):
        raise InputError(f"the summary has the statistics of {len(given)} batch norms and the model {len(names)}: give "
                         "the model it was made from")
    return {".".join(filter(None, (name, buffer))): value for name, buffers in zip(names, given, strict=True)
            for buffer, value in buffers.items()}


def _is_whole(summary: PublishedSummary) -> bool:
    """Whether the lists are as long as each other and hold what they should."""
    found = vars(summary)
    lists = [found.get(field) for field in ("values", "pointers", "shapes", "bn_metadata")]
    if not all(isinstance(one, list) for one in lists) or len({len(one) for one in lists[:3]}) > 1:
        return False
    values, pointers, shapes, statistics = lists
    return all(map(_is_pair, values, pointers)) and all(isinstance(shape, (torch.Size, tuple)) for shape in shapes) \
        and all(isinstance(buffers, dict) and all(isinstance(name, str) and _is_plain(value) for name, value in
                                                  buffers.items()) for buffers in statistics)


def _is_pair(values: object, pointers: object) -> bool:
    """Values (n,) and their coordinates (n, dimensions), or None twice."""
    if values is None or pointers is None:
        return values is pointers
    return _is_plain(values) and _is_plain(pointers) and values.dim() == 1 and values.is_floating_point() \
        and pointers.dim() == 2 and pointers.dtype == torch.int64


def _is_plain(tensor: object) -> bool:
    """A dense tensor in memory, of its own size (a few bytes can be expanded to any)."""
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu" \
        and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()
