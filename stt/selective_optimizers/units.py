"""Parts of a model that are chosen whole: attention heads, blocks and layers, scored by the mean of their weights."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stt.errors import InputError
from stt.heads import find_heads
from stt.narrow import parts_of
from stt.selective_optimizers.choose import check_numbers
from stt.selective_optimizers.in_place import places
from stt.selective_optimizers.weights import all_of, read

UNITS = ("weight", "row", "head", "block", "layer")
Part = tuple[int | None, Tensor]  # the axis and ids of a unit in one tensor


@dataclass
class Unit:
    """A part of the model: what of which tensors is its own."""

    name: str
    parts: dict[str, Part] = field(default_factory=dict)
    size: int = 0
    total: float = 0.0

    def add(self, name: str, tensor: Tensor, part: Part) -> None:
        self.parts[name] = part
        self.size += read(tensor.detach(), *part).numel()

    @property
    def score(self) -> float:
        return self.total / self.size


def heads(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[Unit]:
    """A key/value head with its query heads: its rows of the projections, its columns of the output projection. Raises
    InputError for a model whose heads cannot be told apart."""
    units = []
    for site in find_heads(model).values():
        for number in range(site.width):
            unit = Unit(f"{site.name}[{number}]")
            for name, parts in parts_of(model, [site], {site.name: torch.tensor([number])}).items():
                if name in tensors:
                    unit.add(name, tensors[name], places(tensors[name], parts))
            units.append(unit)
    return [unit for unit in units if unit.parts]


def layers(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[Unit]:
    """Every repeated layer: the members of the outermost module lists."""
    return _prefixed(tensors, [f"{stack}.{number}" for stack, layer_list in _stacks(model)
                               for number in range(len(layer_list))])


def blocks(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[Unit]:
    """What every repeated layer is made of: its attention, its feed-forward block, its norms."""
    return _prefixed(tensors, [f"{stack}.{number}.{child}" for stack, layer_list in _stacks(model)
                               for number, layer in enumerate(layer_list) for child, _ in layer.named_children()])


def _stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [(name, module) for name, module in lists
            if not any(name.startswith(other + ".") for other, _ in lists)]


def _prefixed(tensors: Mapping[str, Tensor], prefixes: Sequence[str]) -> list[Unit]:
    units = {prefix: Unit(prefix) for prefix in prefixes}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix + ".")), None)
        if prefix is not None:
            units[prefix].add(name, tensor, all_of(tensor))
    found = [unit for unit in units.values() if unit.parts]
    if not found:
        raise InputError("the model has no repeated layers to choose from: choose weights, rows or heads")
    return found


def add_scores(units: Iterable[Unit], scores: Iterable[tuple[str, Tensor]]) -> None:
    """Sum the scores of every unit's weights, one tensor in memory at a time."""
    by_tensor: defaultdict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        for name in unit.parts:
            by_tensor[name].append(unit)
    for name, score in scores:
        check_numbers(score)
        for unit in by_tensor[name]:
            unit.total += float(read(score, *unit.parts[name]).sum(dtype=torch.float64))


def fill(units: Sequence[Unit], budget: int) -> list[Unit]:
    """Units in the order of their score, ties in that of the model, each that still fits into the budget of weights.
    Raises InputError if none does."""
    chosen, left = [], budget
    for unit in sorted((unit for unit in units if unit.score > -torch.inf), key=lambda unit: -unit.score):
        if unit.size <= left:
            chosen.append(unit)
            left -= unit.size
    if not chosen:
        raise InputError(f"budget {budget:,} is less than the smallest part to choose, of "
                         f"{min(unit.size for unit in units):,} weights: raise it")
    return chosen


def merged(units: Iterable[Unit], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The ids of these units by tensor, and the axes they lie along."""
    found: defaultdict[str, list[Part]] = defaultdict(list)
    for unit in units:
        for name, part in unit.parts.items():
            found[name].append(part)
    axes = {name: parts[0][0] for name, parts in found.items() if parts[0][0] is not None}
    return {name: torch.cat([ids for _, ids in found[name]]).unique() for name in tensors if name in found}, axes
