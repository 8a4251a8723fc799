"""The table of attention in all model types as a page: docs/attention.md."""
from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from tests.architectures.expected import NOT_RELOADED
from tests.architectures.matrix import EXACT

if TYPE_CHECKING:
    from tests.attention import Row

HEADER = ("type", "class", "sites", "units (query heads of each)", "effect", "error", "error, loaded", "left out",
          "why not")
COMMITTED = Path(__file__).parent.parent / "docs" / "attention.md"


def markdown(rows: list[Row]) -> str:
    """The page."""
    lines = ["# Attention in every architecture", "",
             f"transformers {transformers.__version__}, torch {torch.__version__}. One tiny random model of every type "
             "that can be built here, cut to a random number of its units, in a layer another than in the one before "
             "it. A unit is a key/value head with the query heads that read it ([how they are found](sites.md)).", "",
             "- `effect`: what masking one site's removed units does to the outputs, the smallest over all sites that "
             "the batch runs.",
             "- `error`: what cutting differs from masking all sites. Both are relative to the largest output.",
             "- `left out`: what attends, or looks like it, and is not cut, with the reason.", "",
             "Written by `python -m tests.attention --out docs/attention.md`; `pytest -m matrix` checks it.", "",
             *(f"- {line}" for line in summary(rows)), "", *reasons(rows), "",
             "| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for row in rows:
        numbers = ("" if value is None else f"{value:.1e}" for value in (row.effect, row.sliced, row.reloaded))
        cells = (row.model_type, row.model_class, len(row.units), sizes(row), *numbers, len(row.left_out), why(row))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def summary(rows: list[Row]) -> list[str]:
    """What the table comes to, a line each."""
    cut = [row for row in rows if row.units and not row.error]
    shown = [row for row in cut if row.effect is not None]
    whole = [row for row in shown if row.whole == 0 and row.sliced <= EXACT]
    return [f"{len(rows)} model types; in {len(cut)} heads are cut, in {len(whole)} of them exactly (bitwise the dense "
            f"model with all units kept, with random units the masked dense model to {EXACT:.0e}), in "
            f"{len(shown) - len(whole)} wrongly; of {len(cut) - len(shown)} the batch does not run what is cut.",
            f"{sum(row.reloaded <= EXACT for row in cut)} reload the same.",
            f"In {sum(bool(row.left_out) for row in cut)} of them some attention is left out, with the reason.",
            f"In {sum(bool(row.left_out) and not row.units for row in rows)} none can be cut, with the reason; in "
            f"{sum(not row.left_out and not row.units for row in rows)} nothing attends.",
            f"In {sum(bool(row.silent) for row in rows)} a module attends that is neither cut nor named: the check "
            "watches a forward pass of the dense model below the functions of PyTorch, for fused attention and for "
            "products with rows that are positive and sum to one.",
            *(f"{row.model_type}: {row.error}." for row in rows if row.error)]


def reasons(rows: list[Row]) -> list[str]:
    """How many types have each reason, with and without other sites."""
    without, beside = (Counter(reason for row in rows if bool(row.units) == is_cut for reason in set(row.left_out))
                       for is_cut in (False, True))
    ordered = sorted(without | beside, key=lambda reason: (-without[reason], -beside[reason], reason))
    return ["| reason | types that have no site | types with others |", "|---|---|---|",
            *(f"| {_cell(reason)} | {without[reason]} | {beside[reason]} |" for reason in ordered)]


def sizes(row: Row) -> str:
    """The units of the sites and the query heads of each, the same ones once: `2 x 4 (1)`."""
    counts = Counter(zip(row.units, row.heads, strict=True))
    return ", ".join(f"{count} x {units} ({heads})" for (units, heads), count in counts.items())


def why(row: Row) -> str:
    """The reasons, each with how often it is given."""
    counts = Counter(row.left_out)
    said = [f"{reason} ({count})" if count > 1 else reason for reason, count in sorted(counts.items())]
    if not row.units and not row.left_out:
        said = ["nothing in it attends"]
    return _cell("; ".join(filter(None, (row.error, NOT_RELOADED.get(row.model_type, ""), *said))))


def _cell(text: str) -> str:
    return text.replace("|", "/")


def committed() -> dict[str, tuple[str, str]]:
    """What docs/attention.md says of every type: its units, and why not."""
    lines = COMMITTED.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.count("|") == len(HEADER) + 1]
    return {row[0]: (row[3], row[-1]) for row in rows[2:]}  # under the header and its rule
