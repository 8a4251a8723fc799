"""The figures of an ablation: accuracy against what is kept, and how much selections overlap."""
from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from stt import plots
from stt.ablation.tables import Line

OTHERS = ("#dc2626", "#0d9488", "#a16207", "#4f46e5", "#65a30d", "#78716c", "#a21caf", "#0369a1")  # no mode's colour


def accuracy_by_kept(lines: Sequence[Line], path: str | Path) -> None:
    """A curve a mode: mean test accuracy over the share of units kept; bars are the standard deviation over seeds."""
    curves: dict[str, list[Line]] = {}
    for line in lines:
        curves.setdefault(line.mode, []).append(line)
    unnamed = [mode for mode in curves if mode not in plots.MODE_COLOURS]
    colours = plots.MODE_COLOURS | {mode: OTHERS[place % len(OTHERS)] for place, mode in enumerate(unnamed)}
    with plots.figure(path, max(3.6, 0.2 * len(curves))) as (_, axes):
        for mode, of_mode in curves.items():
            points = sorted((statistics.mean(line.numbers["kept"]), statistics.mean(line.accuracy),
                             statistics.stdev(line.accuracy) if len(line.accuracy) > 1 else 0.0) for line in of_mode)
            kept, accuracy, deviation = zip(*points, strict=True)
            axes.errorbar(kept, accuracy, yerr=deviation, color=colours[mode], marker="o", markersize=5, linewidth=1.6,
                          capsize=3, label=mode)
        axes.set_title("Test accuracy by share kept")
        axes.set_xlabel("share of units kept")
        plots.percent_axis(axes.xaxis)
        plots.percent_axis(axes.yaxis)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


def heat_map(values: Sequence[Sequence[float]], names: Sequence[str], path: str | Path, title: str) -> None:
    """A square of shares between 0 and 1, each written into its field."""
    with plots.figure(path, 1.6 + 0.5 * len(names)) as (canvas, axes):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for row, of_row in enumerate(values):
            for column, value in enumerate(of_row):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                          color="white" if value > 0.6 else plots.INK)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.grid(visible=False)
        axes.set_title(title)
        canvas.colorbar(image, ax=axes, shrink=0.8).outline.set_visible(False)


def comparison(lines: Sequence[Line], title: str, majority: float | None, path: str | Path) -> None:
    """One dot per seed and mode, and what each trains."""
    bars = [plots.Bar(line.label, line.mode, line.accuracy, tuple(n / 1e6 for n in line.numbers["trained"]))
            for line in lines]
    plots.comparison({title: (bars, majority)}, path)

