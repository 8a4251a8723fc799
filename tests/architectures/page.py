"""The matrix of all types as a file: CSV, or the page docs/architectures.md."""
from __future__ import annotations

import csv
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from .expected import NOT_RELOADED, failures
from .matrix import EXACT, Row, measured
from .worker import Worker

HEADER = ("type", "class", "blocks", "kinds", "coverage", "left out", "effect", "error", "error, loaded",
          "error, exported", "why not")


def write(path: Path, names: Iterable[str]) -> int:
    """Measure every type and write the table; 1 if anything is wrong with one, and what, on the standard error."""
    started = time.perf_counter()
    with Worker() as worker, tempfile.TemporaryDirectory() as folder:
        rows = [measured(name, worker, Path(folder) / "files") for name in names]
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(asdict(rows[0])))
            table.writeheader()
            table.writerows(asdict(row) | {"coverage": row.coverage or ""} for row in rows)
    else:
        path.write_text(markdown(rows, time.perf_counter() - started), encoding="utf-8")
    wrong = {row.model_type: failures(row) for row in rows}
    for model_type, sentences in wrong.items():
        for sentence in sentences:
            print(f"{model_type}: {sentence}", file=sys.stderr)
    return int(any(wrong.values()))


def summary(rows: list[Row]) -> list[str]:
    """What the table comes to, a line each."""
    sliced = [row for row in rows if row.blocks]
    exact = [row for row in sliced if row.sliced is not None and row.sliced <= EXACT]
    reloaded = [row for row in sliced if row.reloaded is not None and row.reloaded <= EXACT]
    shipped = [row for row in sliced if row.exported is not None and row.exported <= EXACT]
    covered = [row.coverage for row in sliced if row.coverage is not None and row.coverage.axes]
    kinds = Counter("experts" if "experts" in row.kinds else "convolutions" if "conv" in row.kinds else
                    "fused GLU" if "glu_fused" in row.kinds else "GLU" if "glu" in row.kinds else "plain"
                    for row in sliced)
    return [f"{len(rows)} model types; {len(sliced)} have blocks that are sliced, {len(exact)} of them exactly "
            f"(error at most {EXACT:.0e}), {len(sliced) - len(exact)} wrongly.",
            f"{sum(row.whole == 0 for row in sliced)} are bitwise unchanged with all neurons kept.",
            f"{len(reloaded)} reload with widths of their own in every layer; {len(shipped)} are exported to a plain "
            "folder that `from_pretrained` loads without stt.",
            f"{sum(bool(row.left_out) for row in sliced)} leave out a block that looks like a feed-forward block, and "
            "say so.",
            f"Of {sum(one.axes for one in covered)} parameter axes of feed-forward width in {len(covered)} types "
            f"{sum(one.narrower for one in covered)} are narrower afterwards, "
            f"{sum(len(one.stated) for one in covered)} parameters are named as left out, "
            f"{sum(len(one.unstated) for one in covered)} are neither.",
            "By the most complex kind of block: "
            + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()) + "."]


def markdown(rows: list[Row], seconds: float) -> str:
    """The page."""
    lines = ["# Every architecture", "",
             f"transformers {transformers.__version__}, torch {torch.__version__}. One tiny random model of every "
             "type, cut to 20 to 80 % of its neurons, another number in every block.", "",
             "- `coverage`: the parameter axes that are as long as a feed-forward width of the configuration, and how "
             "many of them are shorter in the sliced model. It is counted from the shapes alone, by nothing that finds "
             "blocks; a dash where the configuration names no width (convolutional networks).",
             "- `effect`: what masking one block's removed neurons does to the outputs, the smallest over all blocks "
             "that the batch runs.",
             "- `error`: what slicing differs from masking all blocks. Both are relative to the largest output.", "",
             f"Written in {seconds / 60:.0f} minutes on two shared CPU cores, one thread, by", "",
             "```bash", "python -m tests.architectures --out docs/architectures.md", "```", "",
             *(f"- {line}" for line in summary(rows)), "", "| " + " | ".join(HEADER) + " |",
             "|" + "---|" * len(HEADER)]
    for row in rows:
        numbers = ("" if value is None else f"{value:.1e}"
                   for value in (row.effect, row.sliced, row.reloaded, row.exported))
        covered = None if row.coverage is None else str(row.coverage) if row.coverage.axes else "-"
        reason = row.error or NOT_RELOADED.get(row.model_type) or row.reason
        cells = (row.model_type, row.model_class, row.blocks, row.kinds, covered, row.left_out, *numbers,
                 reason.replace("|", "/"))
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"
