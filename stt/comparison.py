"""Many finished runs side by side: one table per comparable group, one row per configuration, seeds averaged."""
from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stt import plots
from stt.errors import InputError
from stt.runs import Run, load_run
from stt.words import amount, decimal, duration, markdown_table, mean_of, model_name, paired_interval, percent, spread

MODE_ORDER = tuple(plots.MODE_COLOURS)
# arguments that make two runs neither better nor worse, and the head policy, which has columns of its own: not part of
# what tells configurations apart
NOT_CONFIGURATION = ("seed", "head", "run_name", "output_dir", "overwrite", "resume", "use_wandb", "wandb_project",
                     "wandb_entity", "wandb_run_name", "log_interval", "eval_batch", "ppl_text")
HEADS = {"train": "trained", "freeze": "frozen", "untie": "untied and trained"}


@dataclass
class Row:
    """One configuration of a comparison: its runs over the seeds and the head policies."""

    configuration: dict[str, object]
    runs: list[Run] = field(default_factory=list)

    def of(self, head: str) -> list[Run]:
        """The runs with one head policy."""
        return [run for run in self.runs if run.results["head"] == head]

    def numbers(self, head: str, *keys: str) -> list[float]:
        """The value at results[key][key]... of every run with this head policy that has it."""
        found = [_at(run.results, *keys) for run in self.of(head)]
        return [value for value in found if value is not None]

    def measured(self, head: str) -> list[float]:
        """What every run with this head policy is compared by."""
        return [measured(run.results) for run in self.of(head)]


def compare(run_dirs: Sequence[str | Path], figure: str | Path | None = None) -> str:
    """Markdown tables of the runs, seeds of one configuration in one row (mean ± standard deviation over the seeds).

    Runs on another recipe, task, model or number of test examples stand in a table of their own, and every head policy
    has an accuracy column of its own: their numbers must not be compared. `figure` = where to draw the accuracies.
    Raises InputError for a run that is not complete or given twice.
    """
    if not run_dirs:
        raise InputError("there is nothing to compare; give at least one run folder.")
    tables: dict[str, list[Row]] = {}
    for run in map(load_run, run_dirs):
        _add(tables.setdefault(_title(run), []), run)
    for rows in tables.values():
        rows.sort(key=lambda row: (_rank(row.configuration["mode"]), json.dumps(row.configuration, sort_keys=True)))
    if figure is not None:
        plots.comparison({f"{title} · head {HEADS[head]}": _bars(rows, head)
                          for title, rows in tables.items() for head in _policies(rows)}, figure)
    return "\n".join(_comparison_table(title, rows) for title, rows in tables.items())


def split_name(results: Mapping[str, object]) -> str:
    """What the accuracy was measured on: the test data, or what --dev_mode held out of the training data."""
    return "held-out" if results.get("dev_mode") else "test"


def main_metric(results: Mapping[str, object]) -> str:
    """The name of the number that runs are compared by."""
    return results.get("main", "accuracy")


def measured(results: Mapping[str, object]) -> float:
    """That number, on the test data."""
    return results["metrics"][results["main"]] if "main" in results else results["accuracy"]["test"]


def _title(run: Run) -> str:
    results = run.results
    return (f"{results['recipe']} · {results['task']} · {model_name(results['model'])} · "
            f"{results['accuracy']['n']} {split_name(results)} examples")


def _policies(rows: Sequence[Row]) -> list[str]:
    """The head policies that occur, the trained head first."""
    return [head for head in HEADS if any(row.of(head) for row in rows)]


def _add(rows: list[Row], run: Run) -> None:
    configuration = {name: value for name, value in run.arguments.items() if name not in NOT_CONFIGURATION}
    configuration |= {"mode": run.results["mode"], "model": model_name(run.results["model"])}  # not where it lies
    row = next((row for row in rows if row.configuration == configuration), None)
    if row is None:
        row = Row(configuration)
        rows.append(row)
    twin = next((other for other in row.of(run.results["head"]) if other.results["seed"] == run.results["seed"]), None)
    if twin is not None:
        raise InputError(f"{twin.path} and {run.path} are the same configuration with the same seed; give one of them.")
    row.runs.append(run)


def _rank(mode: str) -> int:
    return MODE_ORDER.index(mode) if mode in MODE_ORDER else len(MODE_ORDER)


def _labels(rows: Sequence[Row]) -> list[str]:
    """The mode of each row, with what sets it apart from other rows of the same mode."""
    labels = []
    for row in rows:
        peers = [other.configuration for other in rows if other.configuration["mode"] == row.configuration["mode"]]
        names = sorted({name for peer in peers for name in peer})
        differing = [name for name in names if len({json.dumps(peer.get(name)) for peer in peers}) > 1]
        details = ", ".join(f"{name} {row.configuration.get(name)}" for name in differing)
        labels.append(f"{row.configuration['mode']} ({details})" if details else str(row.configuration["mode"]))
    return labels


def _bars(rows: Sequence[Row], head: str) -> tuple[list[plots.Bar], float | None]:
    """A bar for every row that has runs with this head policy, and the majority class's accuracy (None: free text)."""
    bars = [plots.Bar(label, str(row.configuration["mode"]), tuple(row.measured(head)),
                      tuple(value / 1e6 for value in row.numbers(head, "parameters", "trained")))
            for row, label in zip(rows, _labels(rows), strict=True) if row.of(head)]
    return bars, next((value for row in rows for value in row.numbers(head, "accuracy", "majority")), None)


def _comparison_table(title: str, rows: Sequence[Row]) -> str:
    policies = _policies(rows)
    results = rows[0].runs[0].results
    score = f"{split_name(results)} {main_metric(results)}"
    head = ("mode", "seeds", *(f"{score}, head {HEADS[policy]}" for policy in policies), "trained",
            "without head", "neurons kept", "perplexity sliced", "perplexity trained", "training FLOPs",
            "training time")
    cells = [_cells(row, label, policies) for row, label in zip(rows, _labels(rows), strict=True)]
    dense, majority = ([value for row in rows for value in row.numbers(policies[0], *keys)]
                       for keys in (("perplexity", "dense"), ("accuracy", "majority")))
    notes = [f"Majority class: {mean_of(majority, percent)}. Perplexity of the dense model before training: "
             f"{mean_of(dense, decimal)}. ± is the standard deviation over the seeds. All columns but the accuracies "
             f"are of the runs with the head {HEADS[policies[0]]}."]
    differences = [line for policy in policies for line in _differences(rows, policy)]
    return "\n".join([f"### {title}", "", *markdown_table([head, *cells]), "", *notes, *differences, ""])


def _cells(row: Row, label: str, policies: Sequence[str]) -> tuple[str, ...]:
    shown = policies[0]
    return (label, str(max(len(row.of(policy)) for policy in policies)),
            *(spread(row.measured(policy), 100, " %") for policy in policies),
            mean_of(row.numbers(shown, "parameters", "trained"), amount),
            mean_of(row.numbers(shown, "parameters", "trained_without_head"), amount),
            _kept(row, shown),
            spread(row.numbers(shown, "perplexity", "sliced")), spread(row.numbers(shown, "perplexity", "trained")),
            mean_of(row.numbers(shown, "flops", "training"), amount),
            mean_of(row.numbers(shown, "seconds", "training"), duration))


def _kept(row: Row, head: str) -> str:
    """The share of the neurons, and of the attention heads where they were chosen from."""
    neurons, heads = (row.numbers(head, "parameters", f"kept_fraction_of_{units}") for units in ("units", "heads"))
    return ", heads ".join(mean_of(shares, percent) for shares in (neurons, heads) if shares or shares is neurons)


def _differences(rows: Sequence[Row], head: str) -> list[str]:
    """STT minus random, paired by seed, where the two differ in nothing but the mode."""
    lines = []
    for stt in (row for row in rows if row.configuration["mode"] == "stt"):
        for other in (row for row in rows if row.configuration == stt.configuration | {"mode": "random"}):
            ours, theirs = (_by_seed(row.of(head)) for row in (stt, other))
            gaps = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
            if len(gaps) >= 2:
                low, high = paired_interval(gaps)
                lines.append(f"stt minus random, head {HEADS[head]}, over {len(gaps)} common seeds: "
                             f"{100 * statistics.mean(gaps):+.1f} points, 95 % interval {100 * low:+.1f} to "
                             f"{100 * high:+.1f} (paired t).")
    return lines


def _by_seed(runs: Sequence[Run]) -> dict[object, float]:
    return {run.results["seed"]: measured(run.results) for run in runs}


def _at(values: Mapping[str, object], *keys: str) -> float | None:
    for key in keys:
        values = (values or {}).get(key)
    return values
