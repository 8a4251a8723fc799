"""What slicing does to one type: found, exact, reloaded, exported. The oracle is the dense model whose down projections
have zeros where they would read a removed neuron."""
from __future__ import annotations

import copy
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import stt
from stt.errors import InputError
from stt.export import export_hf
from stt.sites import Sites, find_sites
from tests.tiny import outputs

from .build import Built, build
from .coverage import Coverage, coverage
from .overrides import NOT_BUILDABLE
from .types import class_name
from .worker import Worker

Units = dict[str, Tensor]
EXACT = 1e-5
FAILURES = (LookupError, ImportError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError,
            ArithmeticError, OSError, EOFError, StrictDataclassError)  # of one type; the others go on


@dataclass
class Row:
    """One type; errors are relative to the largest output (at least 1), None where it did not get that far."""

    model_type: str
    model_class: str
    blocks: int | None = None
    kinds: str = ""
    left_out: int | None = None  # blocks that look like a feed-forward block and are not sliced
    coverage: Coverage | None = None
    effect: float | None = None  # of masking one site's removed neurons: the smallest over the sites that have any
    silent: tuple[str, ...] = ()  # sites whose mask has none
    whole: float | None = None  # error with all neurons kept
    tolerance: float = 0.0  # of that error
    sliced: float | None = None  # error with random neurons kept, another number in every block
    reloaded: float | None = None  # error of the checkpoint, loaded again
    exported: float | None = None  # error of the plain folder, loaded where this library is not there
    reason: str = ""  # why not, in one sentence
    error: str = ""  # what was raised, and ended the row


def measured(model_type: str, worker: Worker, folder: Path) -> Row:
    """The row of one type. `folder` is for its files and is emptied."""
    row = Row(model_type, class_name(model_type))
    if model_type in NOT_BUILDABLE:
        row.reason = f"not built here: {NOT_BUILDABLE[model_type]}"
        return row
    try:
        _measure(row, worker, folder)
    except FAILURES as error:
        first, *_ = [*str(error).strip().splitlines(), ""]
        row.error = f"ERROR: {type(error).__name__}: {first}"
    return row


def _measure(row: Row, worker: Worker, folder: Path) -> None:
    built = build(row.model_type)
    try:
        sites = find_sites(built.model)
    except InputError as error:
        row.blocks, row.reason = 0, _reason(error)
        return
    row.blocks, row.left_out = len(sites), len(sites.lost)
    row.kinds = " ".join(sorted({site.kind if site.form == "linear" else f"{site.form}:{site.kind}"
                                 for site in sites.values()}))
    row.reason = "; ".join(dict.fromkeys(f"{entry.name}: {entry.reason}" for entry in sites.lost))
    units = random_units(sites)
    row.effect, row.silent = _effects(built, sites, units)
    everything = {name: torch.arange(site.width) for name, site in sites.items()}
    row.whole = difference(run(built, stt.apply(copy.deepcopy(built.model), everything)), run(built, built.model))
    row.tolerance = tolerance(built.model)
    sliced = stt.apply(copy.deepcopy(built.model), units)
    row.sliced = difference(run(built, sliced), run(built, masked(built.model, sites, units)))
    left_out = (name for entry in sites.left_out for name in entry.tensors)
    row.coverage = coverage(built, sliced, left_out, [f"{tower}." for tower in built.not_run])
    _ship(row, built, sliced, worker, folder)


def _effects(built: Built, sites: Sites, units: Units) -> tuple[float, tuple[str, ...]]:
    """Of masking every site alone: the smallest that shows in the outputs, and the sites of which none does."""
    dense = run(built, built.model)
    effects = {name: difference(run(built, masked(built.model, sites, {name: kept})), dense)
               for name, kept in units.items()}
    return (min((effect for effect in effects.values() if effect), default=0.0),
            tuple(name for name, effect in effects.items() if not effect))


def _ship(row: Row, built: Built, sliced: PreTrainedModel, worker: Worker, folder: Path) -> None:
    """Save, load, export, load elsewhere."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    expected = run(built, sliced)
    try:
        stt.save(sliced, folder / "sliced")
        row.reloaded = difference(run(built, stt.load(folder / "sliced")), expected)
        export_hf(folder / "sliced", folder / "plain")
    except InputError as error:
        row.reason = "; ".join(filter(None, (row.reason, _reason(error))))
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


def difference(given: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of all outputs, relative to the largest value of each (at least 1)."""
    assert [value.shape for value in given] == [value.shape for value in expected]
    return max(float((one - other).abs().max() / other.abs().max().clamp(min=1))
               for one, other in zip(given, expected, strict=True))


def tolerance(model: PreTrainedModel) -> float:
    """0 with all neurons kept, but where a Conv1D becomes a Linear, which adds in another order."""
    return 1e-5 if any(isinstance(module, Conv1D) for module in model.modules()) else 0.0


def run(built: Built, model: PreTrainedModel) -> list[Tensor]:
    """Everything floating-point this model returns on the batch."""
    torch.manual_seed(0)  # some decode from noise
    with torch.no_grad():
        return outputs(model, built.inputs)


def _reason(error: InputError) -> str:
    return re.sub(r"\s+", " ", str(error)).replace(". `stt sites MODEL` shows what was looked at.", "")
