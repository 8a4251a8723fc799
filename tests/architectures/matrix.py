"""What slicing does to one type: found, exact, reloaded, exported. The oracle is the dense model whose down projections
have zeros where they would read a removed neuron."""
from __future__ import annotations

import copy
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import stt
from stt.errors import InputError
from stt.export import export_hf
from stt.sites import Sites, find_sites, is_repeated
from tests.tiny import outputs

from .build import Built, build
from .overrides import NOT_BUILDABLE
from .types import class_name
from .worker import Worker

Units = dict[str, Tensor]


@dataclass
class Row:
    """One type; errors are relative to the largest output (at least 1), None where it did not get that far."""

    model_type: str
    model_class: str
    blocks: int | None = None
    kinds: str = ""
    left_out: int | None = None  # blocks that look like a feed-forward block and are not sliced
    effect: float | None = None  # of masking the removed neurons
    whole: float | None = None  # error with all neurons kept
    sliced: float | None = None  # error with random neurons kept, another number in every block
    reloaded: float | None = None  # error of the checkpoint, loaded again
    exported: float | None = None  # error of the plain folder, loaded where this library is not there
    uncovered: tuple[str, ...] = field(default=())  # parameters of feed-forward width that no site and no reason names
    reason: str = ""  # why not, in one sentence


def measured(model_type: str, worker: Worker, folder: Path) -> Row:
    """The row of one type. `folder` is for its files and is emptied."""
    row = Row(model_type, class_name(model_type))
    if model_type in NOT_BUILDABLE:
        row.reason = f"not built here: {NOT_BUILDABLE[model_type]}"
        return row
    built = build(model_type)
    try:
        sites = find_sites(built.model)
    except InputError as error:
        row.blocks, row.reason = 0, _reason(error)
        return row
    row.blocks, row.left_out = len(sites), len(sites.lost)
    row.kinds = " ".join(sorted({site.kind if site.form == "linear" else f"{site.form}:{site.kind}"
                                 for site in sites.values()}))
    row.uncovered = tuple(uncovered(built, sites))
    units = random_units(sites)
    expected = _run(built, masked(built.model, sites, units))
    row.effect = difference(_run(built, built.model), expected)
    everything = {name: torch.arange(site.width) for name, site in sites.items()}
    row.whole = difference(_run(built, stt.apply(copy.deepcopy(built.model), everything)), _run(built, built.model))
    sliced = stt.apply(copy.deepcopy(built.model), units)
    row.sliced = difference(_run(built, sliced), expected)
    _ship(row, built, sliced, worker, folder)
    return row


def _ship(row: Row, built: Built, sliced: PreTrainedModel, worker: Worker, folder: Path) -> None:
    """Save, load, export, load elsewhere."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    expected = _run(built, sliced)
    try:
        stt.save(sliced, folder / "sliced")
        row.reloaded = difference(_run(built, stt.load(folder / "sliced")), expected)
        export_hf(folder / "sliced", folder / "plain")
    except InputError as error:
        row.reason = _reason(error)
        return
    row.exported = difference(worker.run(folder / "plain", type(sliced).__name__, built.inputs), expected)


def random_units(sites: Sites, seed: int = 0) -> Units:
    """20 to 80 % of every site, another number in each; of stacked experts a multiple of 4, equal in a stack."""
    draw = random.Random(seed)
    counts: dict[str, int] = {}
    units = {}
    for name, site in sites.items():
        multiple = 4 if site.form == "experts" else 1
        most = max(site.width // multiple, 1)
        wanted = multiple * max(1, draw.randint(most // 5, most * 4 // 5))
        count = min(counts.setdefault(site.group, wanted), site.width)
        units[name] = torch.tensor(sorted(draw.sample(range(site.width), count)))
    return units


def masked(model: PreTrainedModel, sites: Sites, units: Units) -> PreTrainedModel:
    """A dense copy with zeros in the columns of the down projections that read a removed neuron."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, kept in units.items():
            down = sites[name].members[-1]
            weight = model.get_parameter(down.tensor)
            weight, axis = (weight, down.axis) if down.expert is None else (weight[down.expert], down.axis - 1)
            removed = torch.arange(sites[name].width)[~torch.isin(torch.arange(sites[name].width), kept)]
            weight.index_fill_(axis, down.channels[removed, 0], 0.0)
    return model


def uncovered(built: Built, sites: Sites) -> list[str]:
    """Parameters with an axis of a feed-forward width that belong to no site and to nothing that is left out."""
    known = {member.tensor for site in sites.values() for member in (*site.members, *site.along)}
    known |= {name for entry in sites.left_out for name in entry.tensors}
    known |= {re.sub(r"weight$", "bias", name) for name in known}
    widths = {size for width in built.widths.values() for size in (width, 2 * width)}
    return [name for name, parameter in built.model.named_parameters()
            if widths & set(parameter.shape) and name not in known and is_repeated(built.model, name)
            and not name.startswith(tuple(f"{tower}." for tower in built.not_run))]


def difference(given: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of all outputs, relative to the largest value of each (at least 1)."""
    assert [value.shape for value in given] == [value.shape for value in expected]
    return max(float((one - other).abs().max() / other.abs().max().clamp(min=1))
               for one, other in zip(given, expected, strict=True))


def tolerance(model: PreTrainedModel) -> float:
    """0 with all neurons kept, but where a Conv1D becomes a Linear, which adds in another order."""
    return 1e-5 if any(isinstance(module, Conv1D) for module in model.modules()) else 0.0


def _run(built: Built, model: PreTrainedModel) -> list[Tensor]:
    torch.manual_seed(0)  # some decode from noise
    with torch.no_grad():
        return outputs(model, built.inputs)


def _reason(error: InputError) -> str:
    return re.sub(r"\s+", " ", str(error)).replace(". `stt sites MODEL` shows what was looked at.", "")
