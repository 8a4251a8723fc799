"""The figures of a report: matplotlib without a window, one look, one colour per mode everywhere."""
from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT, GRID = "#1e293b", "#64748b", "#cbd5e1", "#e2e8f0"
BLUE, TEAL, AMBER = "#2563eb", "#0d9488", "#f59e0b"
MODE_COLOURS = {"baseline": "#475569", "lora": "#8b5cf6", "stt": BLUE, "stt_lora": "#0891b2",
                "magnitude_pruning": "#d97706", "wanda_adapt": "#16a34a", "random": "#db2777",
                "train_in_place": "#1e3a8a", "id3": "#dc2626", "pafi": "#65a30d", "bitfit": "#a16207",
                "random_weights": "#f472b6"}
COMPOSITION = (("mean_only", "by the mean alone", BLUE), ("both", "by both", "#1e3a8a"),
               ("rate_only", "by the rate alone", TEAL))
WIDTH = 8.0  # inches; saved at 200 dots per inch = 1600 pixels
VALIDATION = "validation_"  # begins the name of a metric in metrics.jsonl
MOST_LABELLED = 20  # classes of a confusion matrix with its counts written in
SMOOTHING = 0.05  # the smoothed loss averages this share of the run on either side

STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.edgecolor": FAINT,
         "axes.labelcolor": MUTED, "axes.titlecolor": INK, "axes.titlesize": 11, "axes.titleweight": "bold",
         "axes.titlelocation": "left", "axes.titlepad": 12, "axes.linewidth": 0.8, "axes.spines.top": False,
         "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True, "axes.axisbelow": True,
         "grid.color": GRID, "grid.linewidth": 0.7, "xtick.color": MUTED, "ytick.color": MUTED,
         "xtick.major.size": 0, "ytick.major.size": 0, "figure.facecolor": "white", "savefig.facecolor": "white",
         "lines.solid_capstyle": "round"}


@dataclass(frozen=True)
class Bar:
    """One row of a comparison: `accuracy` and `trained` are one value per seed, as fractions and as millions."""

    label: str
    mode: str
    accuracy: tuple[float, ...]
    trained: tuple[float, ...]


@contextlib.contextmanager
def figure(path: str | Path, height: float, **layout: object) -> Iterator[tuple[Figure, object]]:
    """A figure and its axes in our style, saved to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        canvas, axes = pyplot.subplots(figsize=(WIDTH, height), layout="constrained", **layout)
        canvas.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # inches
        try:
            yield canvas, axes
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            canvas.savefig(path, dpi=200)
        finally:
            pyplot.close(canvas)


def training_curve(rows: Sequence[Mapping[str, float | None]], path: str | Path, mode: str,
                   loss: str = "loss per answer token") -> None:
    """Loss per step, and below it the validation metric if there is any."""
    losses = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    metric = next((name for row in rows for name in row if name.startswith(VALIDATION)), VALIDATION)
    scores = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    colour = MODE_COLOURS.get(mode, INK)
    panels = [losses, scores] if scores else [losses]
    with figure(path, 2.6 * len(panels), nrows=len(panels), sharex=True, squeeze=False) as (_, axes):
        _loss(axes[0, 0], losses, colour, loss)
        if scores:
            _validation(axes[1, 0], scores, colour, metric.removeprefix(VALIDATION).replace("_", " "))
        axes[-1, 0].set_xlabel("optimizer step")
        axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)


def kept_units(sites: Sequence[Mapping[str, object]], path: str | Path, units: str = "neurons",
               verb: str = "kept") -> None:
    """Units ("neurons" or "heads") of every site that are kept (or "trained"), on top of its dense width."""
    widths, kept = [site["width"] for site in sites], [site["kept"] for site in sites]
    with figure(path, 2.8) as (_, axes):
        places = _site_axis(axes, sites)
        axes.bar(places, widths, width=0.72, color="#eef2f7")
        bars = axes.bar(places, kept, width=0.72, color=BLUE)
        if len(sites) <= 16:
            labels = [f"{count}\n{count / width:.0%}" for count, width in zip(kept, widths, strict=True)]
            axes.bar_label(bars, labels, padding=3, fontsize=8, color=INK, linespacing=1.15)
        axes.set_title(f"{verb.capitalize()} {units}: {sum(kept):,} of {sum(widths):,} ({sum(kept) / sum(widths):.1%})")
        axes.set_ylabel(units)
        axes.set_ylim(0, max(widths) * 1.02)


def chosen_weights(tensors: Sequence[Mapping[str, object]], path: str | Path) -> None:
    """The share of every tensor's weights that train, in the order of the model."""
    shares = [100 * each["kept"] / each["width"] for each in tensors]
    total = sum(each["kept"] for each in tensors)
    with figure(path, 2.8) as (_, axes):
        axes.bar(_site_axis(axes, tensors), shares, width=0.72, color=BLUE)
        axes.set_title(f"Trained weights: {total:,} in {len(tensors)} tensors")
        axes.set_ylabel("% of the tensor")


def composition(sites: Sequence[Mapping[str, object]], path: str | Path) -> None:
    """Which of the two scores chose a site's neurons: shares of the kept ones, stacked."""
    with figure(path, 2.8) as (_, axes):
        places, floor, label_at = _site_axis(axes, sites), [0.0] * len(sites), 0.0
        axes.set_xlim(places[0] - 0.6, places[-1] + 0.6)
        for key, words, colour in COMPOSITION:
            shares = [site[key] / max(site["kept"], 1) for site in sites]
            bars = axes.bar(places, shares, bottom=floor, width=0.72, color=colour, edgecolor="white", linewidth=0.6)
            if len(sites) <= 16:
                axes.bar_label(bars, [f"{share:.0%}" if share > 0.08 else "" for share in shares],
                               label_type="center", fontsize=8, color="white")
            label_at = max(floor[-1] + shares[-1] / 2, label_at + 0.1 if label_at else 0)  # one line apart
            axes.annotate(words, (1.01, label_at), xycoords=("axes fraction", "data"), va="center",
                          color=colour, fontsize=9, fontweight="bold")
            floor = [low + share for low, share in zip(floor, shares, strict=True)]
        axes.set_title("What chose the kept neurons")
        percent_axis(axes.yaxis)
        axes.set_ylim(0, 1)


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str], path: str | Path) -> None:
    """A matrix of shares of each row: true classes down, predicted ones across."""
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    with figure(path, WIDTH * 0.8) as (_, axes):
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=90 if len(max(names, key=len)) > 2 else 0)
        axes.set_yticks(range(len(names)), names)
        axes.grid(visible=False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title("Confusion")
        for place, row in enumerate(counts) if len(names) <= MOST_LABELLED else ():
            for other, count in enumerate(row):
                if count:
                    axes.annotate(str(count), (other, place), ha="center", va="center", fontsize=8,
                                  color="white" if shares[place][other] > 0.5 else INK)


def comparison(tables: Mapping[str, tuple[Sequence[Bar], float | None]], path: str | Path) -> None:
    """`tables`: title -> (rows, majority if any). One dot per seed, a bar to the mean; trained parameters beside it."""
    heights = [0.4 * len(rows) + 1.3 for rows, _ in tables.values()]
    with figure(path, sum(heights), nrows=len(tables), ncols=2, squeeze=False, sharey="row",
                width_ratios=(3, 1), height_ratios=heights) as (_, axes):
        for (title, (rows, majority)), (left, right) in zip(tables.items(), axes, strict=True):
            _accuracies(left, rows, majority)
            _trained(right, rows)
            left.set_title(title, pad=22)


# ---------------------------------------------------------------- parts of a figure


def _loss(axes: Axes, points: Sequence[tuple[float, float]], colour: str, name: str) -> None:
    axes.set_title("Training loss")
    axes.set_ylabel(name)
    if not points:
        return
    steps, losses = zip(*points, strict=True)
    smooth = _smoothed(losses)
    axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
    axes.plot(steps, smooth, color=colour, linewidth=2, marker="o" if len(steps) == 1 else None)
    axes.set_ylim(0, max(losses) * 1.05)
    _end_label(axes, steps[-1], smooth[-1], f"{smooth[-1]:.3g}", colour)


def _validation(axes: Axes, points: Sequence[tuple[float, float]], colour: str, metric: str) -> None:
    steps, scores = zip(*points, strict=True)
    axes.plot(steps, scores, color=colour, linewidth=2, marker="o", markersize=5, markeredgecolor="white")
    _end_label(axes, steps[-1], scores[-1], f"{scores[-1]:.1%}", colour)
    axes.set_title(f"Validation {metric}")
    percent_axis(axes.yaxis)
    axes.set_ylim(min(0, *scores), min(1.0, max(scores) * 1.2 + 0.05))


def _smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving average, so that it does not lag behind; at the ends over what there is."""
    reach = int(SMOOTHING * len(values))
    windows = [values[max(0, place - reach):place + reach + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _end_label(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    axes.annotate(text, (x, y), xytext=(6, 0), textcoords="offset points", va="center", color=colour,
                  fontweight="bold", annotation_clip=False)


def percent_axis(axis: object) -> None:
    """Shares as whole percentages along the axis."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _site_axis(axes: Axes, sites: Sequence[Mapping[str, object]]) -> list[int]:
    names = [str(site["name"]) for site in sites]
    numbers = [re.findall(r"\d+", name) for name in names]
    are_layers = all(len(found) == 1 for found in numbers) and len({found[0] for found in numbers}) == len(names)
    places = list(range(len(names)))
    every = max(1, len(names) // 16)
    axes.set_xticks(places[::every], [found[0] for found in numbers][::every] if are_layers else names[::every],
                    rotation=0 if are_layers else 30, ha="center" if are_layers else "right")
    axes.set_xlabel("layer" if are_layers else "")
    axes.grid(axis="x", visible=False)
    return places


def _accuracies(axes: Axes, rows: Sequence[Bar], majority: float | None) -> None:
    if majority is not None:
        axes.axvline(majority, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate("majority class", (majority, 1.0), xycoords=("data", "axes fraction"), xytext=(4, 1),
                      textcoords="offset points", va="bottom", color=MUTED, fontsize=8)
    for place, row in enumerate(rows):
        mean, colour = sum(row.accuracy) / len(row.accuracy), MODE_COLOURS.get(row.mode, INK)
        axes.barh(place, mean, height=0.56, color=colour, alpha=0.22)
        axes.plot([mean, mean], [place - 0.28, place + 0.28], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot(row.accuracy, [place] * len(row.accuracy), "o", color=colour, markersize=4.5, alpha=0.8,
                  markeredgewidth=0)
        axes.annotate(f"{mean:.1%}", (max(row.accuracy), place), xytext=(8, 0), textcoords="offset points",
                      va="center", color=colour, fontweight="bold")
    axes.set_yticks(range(len(rows)), [row.label for row in rows], color=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, min(1.12, max(max(row.accuracy) for row in rows) * 1.18) or 1)
    axes.set_xlabel("accuracy")
    axes.grid(axis="y", visible=False)
    percent_axis(axes.xaxis)


def _trained(axes: Axes, rows: Sequence[Bar]) -> None:
    for place, row in enumerate(rows):
        mean, colour = sum(row.trained) / len(row.trained), MODE_COLOURS.get(row.mode, INK)
        axes.barh(place, mean, height=0.56, color=colour, alpha=0.75)
        axes.annotate(f"{mean:.3g} M", (mean, place), xytext=(4, 0), textcoords="offset points", va="center", color=INK)
    axes.set_xlim(0, max(max(row.trained) for row in rows) * 1.45 or 1)
    axes.set_xlabel("trained parameters")
    axes.set_xticks([])
    axes.tick_params(labelleft=False)
    axes.grid(visible=False)
