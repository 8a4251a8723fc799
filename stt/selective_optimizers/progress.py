"""What training in place has changed so far, and going back to it: the model's file of a checkpoint."""
from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from stt.selection import Selection
from stt.selective_optimizers.deltas import read_units
from stt.selective_optimizers.leaf import ATTACHED, own_tensors, put_patch, trained_values
from stt.selective_optimizers.optimizer import SelectiveOptimizer
from stt.selective_optimizers.patch import Patch, buffers_of, differing
from stt.selective_optimizers.schedules import Rotate
from stt.selective_optimizers.weights import axis_of, named_tensors, with_whole, write

PATCH = "patch.safetensors"  # in a run folder and in a checkpoint: what was trained, and by how much


class Progress:
    """The changes of a model from now on, while weights of it train: those attached, or what an optimizer chooses.

    `new` names tensors that the base model has no values of (a head drawn at random). They are in every patch, whether
    they train or not; so is a buffer once it has changed.
    """

    def __init__(self, model: nn.Module, new: Collection[str] = ()):
        self.model = model
        self.new = [name for name in own_tensors(model) if name in new]
        self._buffers = {name: value.to("cpu", copy=True) for name, value in buffers_of(model).items()}

    def is_part(self, optimizer: SelectiveOptimizer | None) -> bool:
        """Whether a known part of the model trains: not if all of it does, be it block after block, nor before an
        optimizer has chosen any."""
        if ATTACHED in self.model.__dict__:
            return True
        return optimizer is not None and optimizer.get_budget_used() > 0 and not isinstance(optimizer.schedule, Rotate)

    def patch(self, optimizer: SelectiveOptimizer | None) -> Patch:
        """What has changed, where `is_part`."""
        extras = differing(self._buffers, buffers_of(self.model))
        if ATTACHED in self.model.__dict__:
            attached, trained = getattr(self.model, ATTACHED), trained_values(self.model)
            return changed(self.model, attached.selection, attached.start, self.new, extras, trained)
        selection, start = optimizer.selection(self.model), optimizer.start_values(self.model)
        return changed(self.model, selection, start, self.new, extras)

    def go_back(self, patch: Patch, optimizer: SelectiveOptimizer | None) -> None:
        """The model as it was when the patch was made; of the optimizer nothing changes. Raises InputError if the model
        did not start from the patch's base."""
        buffers = buffers_of(self.model)
        for name, value in self._buffers.items():
            buffers[name].copy_(value)
        if ATTACHED in self.model.__dict__:
            put_patch(self.model, patch)
            return
        if optimizer is not None:
            tensors, selection = named_tensors(self.model), optimizer.selection(self.model)
            for name, start in optimizer.start_values(self.model).items():
                write(tensors[name], axis_of(selection, name), selection[name], start)
        patch.apply(self.model)


def changed(model: nn.Module, selection: Selection, start: Mapping[str, Tensor], new: Collection[str],
            extras: Mapping[str, Tensor] | None = None, trained: Mapping[str, Tensor] | None = None) -> Patch:
    """The patch of the selected weights, and of all of `new`; `trained` are values that are wider than the tensors.
    `extras` are as for Patch.from_values."""
    tensors = named_tensors(model)
    selection = with_whole(selection, tensors, [name for name in new if name not in selection])
    now = {name: read_units(tensors[name], selection, name) for name in selection} | dict(trained or {})
    return Patch.from_values(model, selection, {**now, **start}, now, new, extras)
