"""The matrix of all types as a file: CSV, or the page docs/architectures.md."""
from __future__ import annotations

import csv
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from .matrix import Row, measured
from .worker import Worker

EXACT = 1e-5
HEADER = ("type", "class", "blocks", "kinds", "left out", "effect", "error", "error, loaded", "error, exported",
          "why not")


def write(path: Path, names: Iterable[str]) -> int:
    """Measure every type and write the table; 1 if a sliced model is not exact."""
    with Worker() as worker, tempfile.TemporaryDirectory() as folder:
        rows = [measured(name, worker, Path(folder) / "files") for name in names]
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(asdict(rows[0])))
            table.writeheader()
            table.writerows(asdict(row) for row in rows)
    else:
        path.write_text(markdown(rows), encoding="utf-8")
    return int(any(row.sliced is not None and not row.sliced <= EXACT for row in rows))


def summary(rows: list[Row]) -> list[str]:
    """What the table comes to, a line each."""
    sliced = [row for row in rows if row.blocks]
    exact = [row for row in sliced if row.sliced <= EXACT]
    reloaded = [row for row in sliced if row.reloaded is not None and row.reloaded <= EXACT]
    shipped = [row for row in sliced if row.exported is not None and row.exported <= EXACT]
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
            "By the most complex kind of block: "
            + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()) + "."]


def markdown(rows: list[Row]) -> str:
    """The page."""
    lines = ["# Every architecture", "",
             f"transformers {transformers.__version__}, torch {torch.__version__}. One tiny random model of every "
             "type; `effect` is what masking 20 to 80 % of the neurons does to its outputs, `error` what slicing "
             "them off differs from that, both relative to the largest output. Written by",
             "", "```bash", "python -m tests.architectures --out docs/architectures.md", "```", "",
             *(f"- {line}" for line in summary(rows)), "", "| " + " | ".join(HEADER) + " |",
             "|" + "---|" * len(HEADER)]
    for row in rows:
        numbers = ("" if value is None else f"{value:.1e}"
                   for value in (row.effect, row.sliced, row.reloaded, row.exported))
        cells = (row.model_type, row.model_class, row.blocks, row.kinds, row.left_out, *numbers,
                 row.reason.replace("|", "/"))
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"
