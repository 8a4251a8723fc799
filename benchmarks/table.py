"""Tables in Markdown: for the terminal and for the file alike."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.timing import Ratio

Cell = str | float | None


@dataclass
class Table:
    """`rows` of cells under `columns`; `notes` are sentences below it."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The table, its columns padded to the same width in every line."""
        cells = [[str(column) for column in self.columns], *([shown(cell) for cell in row] for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(self.columns))]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
                 for line in cells]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([f"## {self.title}", "", *lines, *(f"\n{note}" for note in self.notes), ""])


def shown(cell: Cell) -> str:
    """Three significant digits; a dash for what was not measured."""
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:#.3g}"


def with_interval(ratio: Ratio) -> str:
    """0.983 [0.97, 1.00]"""
    return f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
