"""What an ablation leaves behind: report.md, table.csv, table.tex, overlap.csv and plots."""
from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from stt import plots
from stt.ablation import figures, tables
from stt.ablation.arms import Arm
from stt.ablation.bench import mean_over_sites
from stt.ablation.tables import Line
from stt.comparison import HEADS
from stt.selection import Selection
from stt.words import percent


def head_words(head: str, is_tied: bool, line: Line) -> str:
    """The head policy and how many parameters it trains."""
    trained, without = (max(line.numbers[name]) for name in ("trained", "trained_without_head"))
    tied = " (tied to the input embedding)" if is_tied and head != "untie" else ""
    return f"Head{tied}: {HEADS[head]} in every mode, {trained - without:,.0f} of the trained parameters."


def write(folder: Path, title: str, lines: Sequence[Line], words: Sequence[str], majority: float | None,
          selections: Mapping[str, Selection], sites: Sequence[Mapping[str, object]]) -> str:
    """Writes the tables and plots; the text of report.md."""
    pictures = folder / "plots"
    items = [f"- {each}" for each in (*words, *tables.notes(lines))]
    text = [f"# {title}", "", *tables.markdown(lines), "", *items, ""]
    (folder / "table.csv").write_text(tables.comma_separated(lines), encoding="utf-8")
    (folder / "table.tex").write_text(tables.latex(lines), encoding="utf-8")
    figures.comparison(lines, title, majority, pictures / "accuracy.png")
    figures.accuracy_by_kept(lines, pictures / "accuracy_by_kept.png")
    text += ["![Accuracy by mode](plots/accuracy.png)", "", "![Accuracy by share kept](plots/accuracy_by_kept.png)", ""]
    if len(selections) > 1:
        text += write_overlap(folder, selections, "Overlap of the selections (Jaccard, mean over sites)")
    if sites:
        plots.composition(sites, pictures / "composition.png")
        text += ["![What chose the kept neurons](plots/composition.png)", ""]
    (folder / "report.md").write_text("\n".join(text), encoding="utf-8")
    return "\n".join(text[:text.index("![Accuracy by mode](plots/accuracy.png)")])


def write_overlap(folder: Path, selections: Mapping[str, Selection], title: str) -> list[str]:
    """overlap.csv (Jaccard, and the share of each selection that the other covers) and its heat-map; their Markdown."""
    jaccard = {a: {b: mean_over_sites(selections[a].jaccard(selections[b])) for b in selections} for a in selections}
    with open(folder / "overlap.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["a", "b", "jaccard", "share_of_b_in_a"])
        for a, ours in selections.items():
            for b, others in selections.items():
                writer.writerow([a, b, jaccard[a][b], mean_over_sites(ours.directed_coverage(others))])
    figures.heat_map([list(row.values()) for row in jaccard.values()], list(selections), folder / "plots/overlap.png",
                     title)
    return ["![Overlap of the selections](plots/overlap.png)", "", chance(next(iter(selections.values()))), ""]


def chance(selection: Selection) -> str:
    """What two random selections of this size would share."""
    shares = [len(ids) / selection.widths[site] for site, ids in selection.items()]
    expected = sum(share / (2 - share) for share in shares) / len(shares)
    return f"Two random selections of this size would have a Jaccard overlap of about {expected:.2f}."


def transfer_words(selections: Mapping[str, Selection], arms: Sequence[Arm], source: str) -> list[str]:
    """Jaccard overlap and directed coverage between what the source and the task itself select."""
    moved = next((arm for arm in arms if arm.from_source and arm.label in selections), None)
    own = next((arm for arm in arms if arm.name == "stt" and moved and arm.keep_ratio == moved.keep_ratio), None)
    if moved is None or own is None:
        return []
    ours, theirs = selections[own.label], selections[moved.label]
    numbers = [mean_over_sites(values) for values in
               (ours.jaccard(theirs), theirs.directed_coverage(ours), ours.directed_coverage(theirs))]
    return [f"Selected on {source} against selected on the task: Jaccard {numbers[0]:.2f}; the source's selection "
            f"covers {percent(numbers[1])} of the task's, the task's {percent(numbers[2])} of the source's (means over "
            "sites)."]
