"""The tables of an ablation: accuracy by mode over the seeds, and paired differences with what they can detect."""
from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from stt.ablation.arms import Arm
from stt.ablation.cells import Cells
from stt.statistics import Difference, paired_difference
from stt.words import amount, markdown_table, mean_of, percent, spread

LATEX = str.maketrans({"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$", "−": "$-$", "–": "--"})


@dataclass(frozen=True)
class Line:
    """A mode: the step size that its trials chose, one accuracy per seed, what was kept and trained, and how it differs
    from its reference (None: it is the reference)."""

    label: str
    mode: str
    lr: float
    accuracy: tuple[float, ...]
    numbers: Mapping[str, tuple[float, ...]]
    against: str | None
    difference: Difference | None


def lines_of(cells: Cells, arms: Sequence[Arm], references: Mapping[str, Arm]) -> list[Line]:
    """One line an arm that has rows; the difference to its reference over the seeds that both have."""
    return [_line(cells, arm, references[arm.label]) for arm in arms if cells.of(arm)]


def _line(cells: Cells, arm: Arm, reference: Arm) -> Line:
    rows, difference = cells.of(arm), None
    theirs = {row["seed"]: i for i, row in enumerate(cells.of(reference))}
    common = [(i, theirs[row["seed"]]) for i, row in enumerate(rows) if row["seed"] in theirs]
    if arm.label != reference.label and common:
        ours, others = zip(*common, strict=True)
        difference = paired_difference(cells.correct(arm)[list(ours)], cells.correct(reference)[list(others)])
    names = ("kept", "kept_heads", "trained", "trained_without_head", "perplexity", "accuracy_cut", "seconds")
    numbers = {name: tuple(row[name] for row in rows if name in row) for name in names}
    accuracy = tuple(row["accuracy"] for row in rows)
    return Line(arm.label, arm.name, rows[0]["lr"], accuracy, numbers, difference and reference.label, difference)


def table(lines: Sequence[Line]) -> list[list[str]]:
    """Head and rows, in words. Columns that nothing has are left out."""
    columns = {
        "mode": [line.label for line in lines],
        "step size": [f"{line.lr:g}" for line in lines],
        "seeds": [str(len(line.accuracy)) for line in lines],
        "test accuracy": [spread(line.accuracy, 100, " %") for line in lines],
        "difference": [_points(line.difference) for line in lines],
        "95 % interval": [_interval(line.difference) for line in lines],
        "detectable": [_detectable(line.difference) for line in lines],
        "against": [line.against or "–" for line in lines],
        "just cut": [spread(line.numbers["accuracy_cut"], 100, " %") for line in lines],
        "kept": [mean_of(line.numbers["kept"], percent) for line in lines],
        "heads kept": [mean_of(line.numbers["kept_heads"], percent) for line in lines],
        "trained": [mean_of(line.numbers["trained"], amount) for line in lines],
        "without head": [mean_of(line.numbers["trained_without_head"], amount) for line in lines],
        "general perplexity": [spread(line.numbers["perplexity"]) for line in lines],
    }
    used = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
    return [list(used), *(list(row) for row in zip(*used.values(), strict=True))]


def _points(difference: Difference | None) -> str:
    return "–" if difference is None else f"{100 * difference.mean:+.1f}".replace("-", "−")


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return "–"
    return f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}".replace("-", "−")


def _detectable(difference: Difference | None) -> str:
    return "–" if difference is None or not difference.detectable else f"{100 * difference.detectable:.1f}"


def notes(lines: Sequence[Line]) -> list[str]:
    """What the table can detect, and what it found."""
    compared = [line for line in lines if line.difference is not None]
    if not compared:
        return ["One mode: there is nothing to compare it with."]
    sizes = sorted({float(_detectable(line.difference)) for line in compared if line.difference.detectable})
    if not sizes:
        return ["Every mode gave the same answers as its reference: nothing is known about what can be detected."]
    detectable = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    seeds = min(len(line.accuracy) for line in lines)
    over = "the test items alone (one seed says nothing about other seeds)" if seeds == 1 else "seeds and test items"
    found = [f"{line.label} {_points(line.difference)}" for line in compared
             if line.difference.low > 0 or line.difference.high < 0]
    return [f"Differences and intervals are in points of accuracy, paired by seed and item; bootstrap over {over}. "
            f"**Minimum detectable difference: {detectable} points** (95 % intervals, found in 4 of 5 repetitions); "
            "smaller ones cannot be told from none.",
            f"Intervals that leave out 0: {', '.join(found) or 'none'}, of {len(compared)}. Each is right 95 times in "
            f"100 by itself; {0.05 * len(compared):.2g} of {len(compared)} would leave out 0 on average "
            "if nothing differed."]


def at_edge(lines: Sequence[Line], lrs: Sequence[float]) -> list[str]:
    """Modes whose best step size is the smallest or largest tried, so that a better one may lie outside."""
    if len(lrs) < 2:
        return []
    found = [line.label for line in lines if line.lr in (lrs[0], lrs[-1])]
    return [f"The best step size lies at the edge of those tried for: {', '.join(found)}."] if found else []


# ---------------------------------------------------------------- files


def markdown(lines: Sequence[Line]) -> list[str]:
    """The table's lines."""
    return markdown_table(table(lines))


def latex(lines: Sequence[Line]) -> str:
    """A plain tabular."""
    head, *body = ([cell.translate(LATEX) for cell in row] for row in table(lines))
    rows = [f"{' & '.join(row)} \\\\" for row in body]
    return "\n".join([f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", "\\hline", f"{' & '.join(head)} \\\\",
                      "\\hline", *rows, "\\hline", "\\end{tabular}", ""])


def comma_separated(lines: Sequence[Line]) -> str:
    """CSV with every number unrounded; shares are fractions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(lines[0].numbers)
    writer.writerow(["mode", "lr", "seeds", "accuracy", "accuracy_sd", "against", "difference", "low", "high",
                     "detectable", *names])
    for line in lines:
        gap = line.difference
        sd = statistics.stdev(line.accuracy) if len(line.accuracy) > 1 else ""
        writer.writerow([line.label, line.lr, len(line.accuracy), statistics.mean(line.accuracy), sd,
                         line.against or "", *(astuple(gap) if gap else ("",) * 4),
                         *(statistics.mean(values) if values else "" for values in line.numbers.values())])
    return text.getvalue()
