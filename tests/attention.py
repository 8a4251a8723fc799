"""What slicing attention does to one model type. The oracle is the dense model whose output projections have zeros
where they would read a removed unit."""
from __future__ import annotations

import copy
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel

import stt
from stt.errors import InputError
from stt.heads import discover_heads, find_heads
from stt.sites import Site, Sites
from tests.architectures.build import Built, build
from tests.architectures.matrix import difference
from tests.architectures.overrides import NOT_BUILDABLE
from tests.architectures.types import model_types
from tests.attending import silent
from tests.tiny import outputs


@dataclass
class Row:
    """One type; errors are relative to the largest output (at least 1), None where it did not get that far."""

    model_type: str
    units: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)  # query heads of a unit
    left_out: list[str] = field(default_factory=list)  # reasons
    effect: float | None = None  # of masking the removed units
    whole: float | None = None  # error with all units kept
    sliced: float | None = None  # error with random units kept, another number in every other layer
    reloaded: float | None = None  # error of the checkpoint, loaded again
    silent: list[str] = field(default_factory=list)  # modules that attend, are no site and are not named
    reason: str = ""  # why nothing is sliced

    def __str__(self) -> str:
        errors = (self.effect, self.whole, self.sliced, self.reloaded)
        errors = "" if self.sliced is None else " ".join(f"{error:.1e}" for error in errors)
        sizes = "+".join(map(str, self.units)) + " of " + "+".join(map(str, self.heads)) if self.units else "-"
        silent = [f"SILENT: {name}" for name in self.silent]
        reasons = "; ".join(sorted({reason for reason in (self.reason, *self.left_out, *silent) if reason}))
        return f"{self.model_type:14} {sizes:28} {errors:32} {reasons}"


def measured(model_type: str) -> Row:
    """The row of one type."""
    built, row = build(model_type), Row(model_type)
    try:
        sites = find_heads(built.model)
    except InputError as error:
        row.reason = str(error)
        row.silent = silent(built, {tensor for entry in discover_heads(built.model)[1] for tensor in entry.tensors})
        return row
    row.units = [site.width for site in sites.values()]
    row.heads = [site.heads for site in sites.values()]
    row.left_out = [f"{entry.name}: {entry.reason}" for entry in sites.left_out]
    row.silent = silent(built, {member.tensor for site in sites.values() for member in site.members}.union(
        *(entry.tensors for entry in sites.left_out)))
    units = random_units(sites)
    row.kept = [len(ids) for ids in units.values()]
    everything = {name: torch.arange(site.width) for name, site in sites.items()}
    try:
        whole = stt.apply(copy.deepcopy(built.model), everything)
        sliced = stt.apply(copy.deepcopy(built.model), units)
    except InputError as error:
        row.reason = str(error)
        return row
    expected = run(built, masked(built.model, sites, units))
    row.effect = difference(run(built, built.model), expected)
    row.whole = difference(run(built, whole), run(built, built.model))
    row.sliced = difference(run(built, sliced), expected)
    with TemporaryDirectory() as folder:
        stt.save(sliced, folder)
        row.reloaded = difference(run(built, stt.load(folder)), run(built, sliced))
    return row


def random_units(sites: Sites, seed: int = 0) -> dict[str, Tensor]:
    """1 to all but one of every site, another number in each of two that follow one another where there is a choice."""
    draw, units, last = random.Random(seed), {}, 0
    for name, site in sites.items():
        count = draw.choice([count for count in range(1, site.width) if count != last] or [1])
        units[name] = torch.tensor(sorted(draw.sample(range(site.width), count)))
        last = count
    return units


def masked(model: PreTrainedModel, sites: Sites, units: dict[str, Tensor]) -> PreTrainedModel:
    """A dense copy with zeros in the columns of the output projections that read a removed unit."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, kept in units.items():
            down = sites[name].members[-1]
            model.get_parameter(down.tensor).index_fill_(down.axis, columns(sites[name], kept), 0.0)
    return model


def columns(site: Site, kept: Tensor) -> Tensor:
    """What the output projection reads of the units that are not kept: they follow one another, equally wide."""
    width = site.members[-1].channels.numel() // site.width
    return torch.tensor([unit * width + i for unit in range(site.width) if unit not in kept.tolist()
                         for i in range(width)])


def run(built: Built, model: PreTrainedModel) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return outputs(model, built.inputs)


def main(chosen: Sequence[str]) -> None:
    """Print the rows of the chosen types, or of all: type, units of every site, query heads of a unit, the effect of
    the mask, the errors (all units kept, sliced, reloaded), what is left out and why, and what attends SILENTly."""
    for model_type in chosen or [name for name in model_types() if name not in NOT_BUILDABLE]:
        print(measured(model_type), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
