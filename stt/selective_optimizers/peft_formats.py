"""A patch as an adapter of the PEFT library, in its Super-Tuning format: flat positions and what is added."""
from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stt.checkpoint import check_free, written_whole
from stt.errors import InputError
from stt.loading import on_meta
from stt.selective_optimizers.deltas import flat_positions
from stt.selective_optimizers.patch import Patch, buffers_of
from stt.selective_optimizers.weights import axis_of, named_tensors

# Shapes: k selected weights of a matrix of P, n entries that PEFT stores of it.

PREFIX = "base_model.model."  # PEFT's, before the name of a module


def to_peft(patch: Patch, folder: str | Path, base: str | PreTrainedModel) -> Path:
    """Write the patch as a Super-Tuning adapter for PeftModel.from_pretrained(model, folder); the folder.

    `base` is the model's name, or the model if its class is not the one its config names. PEFT keeps the same share of
    every adapted matrix, so that zeros fill the patch's up to the largest share there is; modules that are new (a head)
    are its `modules_to_save`. PEFT adds in the model's dtype: equal to the patched model but for rounding.

    Raises InputError, before anything is written, for a patch of anything but weights of nn.Linear, naming it, for one
    with running statistics, and for a folder that is not empty.

    >>> to_peft(Patch.load("task.safetensors"), "adapter", "Qwen/Qwen2.5-0.5B")
    """
    from peft import SupertuningConfig

    model = on_meta(base) if isinstance(base, str) else base
    check_free(Path(folder))
    patch.check_shapes(named_tensors(model), buffers_of(model))
    if patch.extras:
        raise InputError(f"the patch holds the buffer {min(patch.extras)!r}, which a PEFT adapter has no place for: "
                         "save the patch itself")
    heads = _new_modules(model, patch)
    sparse = _entries(model, patch, {name for names in heads.values() for name in names.values()})
    sparsity = _sparsity({module: (len(entries.at), entries.size) for module, entries in sparse.items()})
    config = SupertuningConfig(target_modules=sorted(sparse), sparsity=sparsity, modules_to_save=sorted(heads) or None,
                               base_model_name_or_path=base if isinstance(base, str) else base.name_or_path,
                               inference_mode=True)
    tensors = {PREFIX + key: value for module, entries in sparse.items()
               for key, value in entries.filled(module, _stored(entries.size, sparsity)).items()}
    tensors |= {f"{PREFIX}{module}.{attribute}": patch.deltas[name].float() for module, names in heads.items()
                for attribute, name in names.items()}
    with written_whole(Path(folder)) as part:
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(part)
    return Path(folder)


@dataclass(frozen=True)
class Entries:
    """What is added to a matrix of `size` weights."""

    at: Tensor  # (k,) flat positions
    values: Tensor  # (k,)
    size: int

    def filled(self, module: str, n: int) -> dict[str, Tensor]:
        """PEFT's two tensors of this module. What fills them up adds 0 to the first weight."""
        short = n - len(self.at)
        at, values = (torch.cat([part, part.new_zeros(short)]) for part in (self.at, self.values))
        return {f"{module}.supertuning_indices": at.to(torch.int32), f"{module}.supertuning_values": values}


def _new_modules(model: nn.Module, patch: Patch) -> dict[str, dict[str, str]]:
    """Module -> attribute -> name in the patch, of the modules whose every parameter is new. Raises InputError for a
    new tensor of another one."""
    heads: dict[str, dict[str, str]] = {}
    for name in patch.new:
        module, _, attribute = name.rpartition(".")
        heads.setdefault(module, {})[attribute] = name
    for module, names in heads.items():
        others = {name for name, _ in model.get_submodule(module).named_parameters()} - names.keys()
        partial = [name for name in names.values() if patch.deltas[name].shape != model.get_parameter(name).shape]
        if others or partial:
            raise InputError(f"{next(iter(names.values()))} is new, and a PEFT adapter takes new modules as a whole: "
                             "save the patch itself")
    return heads


def _entries(model: nn.Module, patch: Patch, taken: Collection[str]) -> dict[str, Entries]:
    """Module -> what is added to its weight, of all tensors but those `taken`. Raises InputError if they are not all
    weights of nn.Linear, or there is none."""
    found = {}
    for name, delta in patch.deltas.items():
        module, _, attribute = name.rpartition(".")
        if name in taken:
            continue
        if attribute != "weight" or not isinstance(model.get_submodule(module), nn.Linear):
            raise InputError(f"PEFT's Super-Tuning adapts weights of nn.Linear, and the patch holds {name}: leave it "
                             "out of the selection, or save the patch itself")
        shape = model.get_parameter(name).shape
        at = flat_positions(shape, axis_of(patch.selection, name), patch.selection[name])
        found[module] = Entries(at, delta.float().flatten(), shape.numel())
    if not found:
        raise InputError("the patch holds new modules alone, and PEFT's Super-Tuning needs a weight to add to: save "
                         "the patch itself")
    return found


def _stored(size: int, sparsity: float) -> int:
    """How many entries of a matrix PEFT expects at this sparsity."""
    return int(size * (1 - sparsity))


def _sparsity(entries: Mapping[str, tuple[int, int]]) -> float:
    """The highest sparsity at which PEFT has room for k of P weights of every module."""
    sparsity = 1 - max(k / size for k, size in entries.values())
    while any(_stored(size, sparsity) < k for k, size in entries.values()):
        sparsity = max(0.0, math.nextafter(sparsity, 0.0))
    return max(0.0, sparsity)
