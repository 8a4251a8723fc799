"""What slicing attention does to every model type. The oracle is the dense model whose output projections have zeros
where they would read a removed unit.

    python -m tests.attention --out docs/attention.md        the table of all types; --types bert,gpt2 prints these
"""
from __future__ import annotations

import argparse
import copy
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import stt
from stt.errors import InputError
from stt.heads import discover_heads, find_heads
from stt.sites import Site, Sites
from tests import attention_page
from tests.architectures.build import Built, build
from tests.architectures.expected import NOT_RELOADED
from tests.architectures.matrix import EXACT, FAILURES, difference, run
from tests.architectures.overrides import NO_EFFECT, NOT_BUILDABLE, NOT_RUN
from tests.architectures.types import class_name, model_types
from tests.attending import silent

VISIBLE = 1e-4  # what masking a site must change at least


@dataclass
class Row:
    """One type; errors are relative to the largest output (at least 1), None where it did not get that far."""

    model_type: str
    model_class: str
    units: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)  # query heads of a unit
    left_out: list[str] = field(default_factory=list)  # reasons, one for each
    effect: float | None = None  # of masking one site's removed units: the smallest over the sites that show any
    no_effect: list[str] = field(default_factory=list)  # sites whose mask has none
    whole: float | None = None  # error with all units kept
    sliced: float | None = None  # error with random units kept, another number in every other layer
    reloaded: float | None = None  # error of the checkpoint, loaded again
    silent: list[str] = field(default_factory=list)  # modules that attend, are no site and are not named
    reason: str = ""  # why nothing is sliced
    error: str = ""  # what was raised, and ended the row


def measured(model_type: str) -> Row:
    """The row of one type."""
    row = Row(model_type, class_name(model_type))
    try:
        _measure(row)
    except FAILURES as error:
        first, *_ = [*str(error).strip().splitlines(), ""]
        row.error = f"ERROR: {type(error).__name__}: {first}"
    return row


def _measure(row: Row) -> None:
    built = build(row.model_type)
    try:
        sites = find_heads(built.model)
        left_out = sites.left_out
    except InputError as error:
        sites, row.reason = {}, str(error)
        left_out = discover_heads(built.model)[1]
    row.left_out = [entry.reason for entry in left_out]
    row.silent = silent(built, {member.tensor for site in sites.values() for member in site.members}.union(
        *(entry.tensors for entry in left_out)))
    if sites:
        _cut(row, built, sites)


def _cut(row: Row, built: Built, sites: Sites) -> None:
    row.units = [site.width for site in sites.values()]
    row.heads = [site.heads for site in sites.values()]
    units = random_units(sites)
    row.kept = [len(ids) for ids in units.values()]
    dense = run(built, built.model)
    effects = {name: difference(run(built, masked(built.model, sites, {name: kept})), dense)
               for name, kept in units.items()}
    row.effect = min((effect for effect in effects.values() if effect), default=None)
    row.no_effect = [name for name, effect in effects.items() if not effect]
    everything = {name: torch.arange(site.width) for name, site in sites.items()}
    row.whole = difference(run(built, stt.apply(copy.deepcopy(built.model), everything)), dense)
    sliced = stt.apply(copy.deepcopy(built.model), units)
    row.sliced = difference(run(built, sliced), run(built, masked(built.model, sites, units)))
    with TemporaryDirectory() as folder:
        stt.save(sliced, folder)
        row.reloaded = difference(run(built, stt.load(folder)), run(built, sliced))


def failures(row: Row) -> list[str]:
    """What is wrong with a row, a sentence each."""
    stated = (*NOT_RUN.get(row.model_type, ()), *NO_EFFECT.get(row.model_type, ()))
    wrong = [row.error] if row.error else []
    wrong += [f"{name} attends, and is neither cut nor named" for name in row.silent]
    wrong += [f"masking {name} changes nothing" for name in row.no_effect if not name.startswith(stated)]
    if not row.units or row.error:
        return wrong
    is_reloaded, is_seen = row.reloaded <= EXACT, row.effect is None or row.effect > max(VISIBLE, 100 * row.sliced)
    return wrong + [sentence for is_wrong, sentence in (
        (not is_seen, f"masking a site changes only {row.effect}"),
        (row.whole != 0, f"with all units kept it differs by {row.whole:.1e}"),
        (not row.sliced <= EXACT, f"sliced it differs by {row.sliced:.1e}"),
        (is_reloaded == (row.model_type in NOT_RELOADED), f"reloaded it differs by {row.reloaded:.1e}")) if is_wrong]


VISIBLE = 1e-4  # what masking a site must change at least


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


def main(arguments: list[str] | None = None) -> int:
    """Prints or writes the table; 1 if anything is wrong with a type, and what, on the standard error."""
    parser = argparse.ArgumentParser(prog="python -m tests.attention", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the page here instead of printing it")
    parser.add_argument("--types", help="only these model types, separated by commas")
    chosen = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names: Iterable[str] = chosen.types.split(",") if chosen.types else buildable()
    rows = [measured(name) for name in tqdm(names, file=sys.stderr)]
    page = attention_page.markdown(rows)
    if chosen.out:
        chosen.out.write_text(page, encoding="utf-8")
    else:
        print(page)
    wrong = [f"{row.model_type}: {sentence}" for row in rows for sentence in failures(row)]
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


def buildable() -> list[str]:
    """The model types that can be built here."""
    return [name for name in model_types() if name not in NOT_BUILDABLE]


if __name__ == "__main__":
    sys.exit(main())
