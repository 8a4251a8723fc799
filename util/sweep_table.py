"""Where a sweep stands, and its results: a table, a CSV file with a row per run, a figure."""
from __future__ import annotations

import csv
import json
import re
import signal
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stt.errors import InputError, unknown_name
from stt.runs import load_run
from stt.words import duration, markdown_table
from util.grid import Grid, Run
from util.sweep import STOPPED, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 20
STATES = ("done", "running", "partial", "failed", "waiting")
Numbers = dict[str, float]
Point = tuple[tuple[str, object], ...]  # flags and values


@dataclass(frozen=True)
class Outcome:
    """A run, its state (util/sweep.py says which), and every number of its results.json if it is done."""

    run: Run
    state: str
    numbers: Numbers


def outcomes(grid: Grid) -> list[Outcome]:
    """All runs of the grid, read back."""
    found = []
    for run in grid.runs:
        state = Record(run).state()
        found.append(Outcome(run, state, dict(leaves(load_run(run.folder).results)) if state == "done" else {}))
    return found


def leaves(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested mappings under its dotted name: accuracy.test, seconds.training, ..."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


# ---------------------------------------------------------------- status


def status(grid: Grid) -> str:
    """How many runs are in which state, and a line for every run that is neither done nor waiting."""
    states = [Record(run).state() for run in grid.runs]
    left = sum(state != "done" for state in states)
    hours = f"; at most {duration(60 * grid.minutes * left)} of computing left" if left else ""
    lines = [f"{grid.question}", f"{len(states)} runs in {grid.output_dir}: {counted(states)}{hours}"]
    running = [f"running {run.index}: {run.folder}" for run, state in zip(grid.runs, states, strict=True)
               if state == "running"]
    return "\n".join([*lines, *running, *troubles(grid.runs, "partial"), *troubles(grid.runs, "failed")])


def counted(states: Sequence[str]) -> str:
    """3 done, 1 failed"""
    count = Counter(states)
    return ", ".join(f"{count[state]} {state}" for state in STATES if count[state])


def troubles(runs: Sequence[Run], state: str) -> list[str]:
    """A line for every run in this state, failed or partial: its number, how it ended, where, its last words."""
    lines = []
    for run in runs:
        record = Record(run)
        if record.state() == state:
            words = _last_words(record) if state == "failed" else ""
            lines.append(f"{state} {run.index}: {_end(record.last())}, {run.folder}{words}")
    return lines


def _end(last: Mapping[str, object]) -> str:
    """How an attempt ended, in words."""
    code, job = last.get("exit_code"), f" in job {last['job']}" if last.get("job") else ""
    if code is None:
        return f"its end was not seen{job}"
    if code == STOPPED:
        return f"stopped after saving{job}"
    by_signal = code - 128 in signal.valid_signals()
    return (f"ended by {signal.Signals(code - 128).name}" if by_signal else f"exit code {code}") + job


def _last_words(record: Record) -> str:
    """The last line of the last attempt's output, if that is ours to keep."""
    if not record.last().get("own_log") or not record.log.exists():
        return ""
    lines = [line.strip() for line in re.split(r"[\r\n]", record.log.read_text(encoding="utf-8", errors="replace"))]
    return f": {[line for line in lines if line][-1][:200]}" if any(lines) else ""


# ---------------------------------------------------------------- table


def write_table(grid: Grid, metrics: Sequence[str], axis: str | None, out: Path | None) -> str:
    """Writes table.md, table.csv and, if there is an axis to draw, table.png; returns the Markdown.

    `metrics` are dotted names in results.json, the first is drawn. Raises InputError for one that no run has.
    """
    found, out = outcomes(grid), out or grid.output_dir
    known = {name for outcome in found for name in outcome.numbers}
    if not known:
        raise InputError(f"no run of {grid.path} is done yet; `stt sweep status {grid.path}` says where they stand.")
    for metric in metrics:
        if metric not in known:
            raise unknown_name("metric", metric, known)
    if axis is not None and axis not in grid.axes:
        raise unknown_name(f"axis of {grid.path}:", axis, grid.axes)
    text = markdown(grid, found, metrics)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(text, encoding="utf-8")
        _write_csv(grid, found, out / "table.csv")
        draw(grid, found, metrics[0], axis or default_axis(grid), out / "table.png")
    except OSError as error:
        raise InputError(f"cannot write to {error.filename or out}: {error.strerror}; give another folder as --out.") \
            from None
    return text


def markdown(grid: Grid, found: Sequence[Outcome], metrics: Sequence[str]) -> str:
    """One row per configuration, seeds averaged over the runs that are done; the others are listed below."""
    names = [name for name in grid.axes if name != "seed"]
    groups: dict[Point, list[Outcome]] = {}
    for outcome in found:
        groups.setdefault(_point(outcome.run, names), []).append(outcome)
    rows = [[*(_cell(value) for _, value in point), _done_of(group),
             *(spread([outcome.numbers[metric] for outcome in group if metric in outcome.numbers])
               for metric in metrics)] for point, group in groups.items()]
    lines = [f"### {grid.question}", "", *markdown_table([[*names, "done", *metrics], *rows]), "",
             f"{counted([outcome.state for outcome in found])} of {len(found)} runs. The table is about the runs that "
             "are done; ± is the standard deviation over them."]
    for state in ("failed", "partial"):
        listed = troubles([outcome.run for outcome in found if outcome.state == state], state)
        lines += ["", *(f"- {line}" for line in listed)] if listed else []
    return "\n".join([*lines, ""])


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation to four and two digits; the mean alone of a single value."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{deviation}"


def _point(run: Run, names: Sequence[str]) -> Point:
    return tuple((name, run.flags.get(name)) for name in names)


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def _done_of(group: Sequence[Outcome]) -> str:
    return f"{sum(outcome.state == 'done' for outcome in group)} of {len(group)}"


def _write_csv(grid: Grid, found: Sequence[Outcome], path: Path) -> None:
    """A row per run whatever its state: number, folder, state, its axes, every number of its results."""
    names = sorted({name for outcome in found for name in outcome.numbers} - set(grid.axes))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["run", "folder", "state", *grid.axes, *names])
        writer.writeheader()
        for outcome in found:
            given = {"run": outcome.run.index, "folder": str(outcome.run.folder), "state": outcome.state}
            numbers = {name: value for name, value in outcome.numbers.items() if name in names}
            writer.writerow(given | {name: json.dumps(value) if isinstance(value, list) else value
                                     for name, value in _point(outcome.run, grid.axes)} | numbers)


# ---------------------------------------------------------------- figure


def default_axis(grid: Grid) -> str | None:
    """What to draw along: the first axis of numbers, else the first one, seeds and modes apart; None if there is none.
    """
    names = [name for name in grid.axes if name not in ("seed", "mode")]
    numeric = [name for name in names if all(_is_number(run.flags.get(name)) for run in grid.runs)]
    return next(iter([*numeric, *names]), None)


def draw(grid: Grid, found: Sequence[Outcome], metric: str, axis: str | None, path: Path) -> None:
    """The metric along the axis, a line per mode, a panel for each choice of the other axes. No file without an axis,
    or for more than 20 panels."""
    from stt import plots

    others = [name for name in grid.axes if name not in (axis, "mode", "seed")]
    panels: dict[Point, list[Outcome]] = {}
    for outcome in found:
        if metric in outcome.numbers:
            panels.setdefault(_point(outcome.run, others), []).append(outcome)
    if axis is None or len(panels) > MOST_PANELS:
        return
    with plots.figure(path, 2.8 * len(panels), nrows=len(panels), squeeze=False) as (_, axes):
        for panel, (point, group) in zip(axes[:, 0], panels.items(), strict=True):
            _lines(panel, group, metric, axis, plots.MODE_COLOURS)
            panel.set_title(", ".join(f"{name} {_cell(value)}" for name, value in point) or grid.question)
            panel.set_ylabel(metric)
        axes[-1, 0].set_xlabel(axis)
        axes[0, 0].legend(frameon=False)


def _lines(panel: Axes, group: Sequence[Outcome], metric: str, axis: str, colours: Mapping[str, str]) -> None:
    """A line per mode with the standard deviation of the seeds; names stand side by side, numbers where they belong."""
    values = list(dict.fromkeys(outcome.run.flags.get(axis) for outcome in group))
    is_number = all(map(_is_number, values))
    places = {value: value if is_number else place for place, value in enumerate(values)}
    for mode in dict.fromkeys(outcome.run.flags.get("mode") for outcome in group):
        means = {}
        for value in sorted(values, key=places.get):
            numbers = [outcome.numbers[metric] for outcome in group
                       if outcome.run.flags.get("mode") == mode and outcome.run.flags.get(axis) == value]
            if numbers:
                means[places[value]] = statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0
        panel.errorbar(list(means), [mean for mean, _ in means.values()], [sd for _, sd in means.values()],
                       marker="o", capsize=3, linestyle="-" if is_number else "none", label=_cell(mode) or "all runs",
                       color=colours.get(mode))
    if not is_number:
        panel.set_xticks(list(places.values()), [_cell(value) or "default" for value in values])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
