"""What is trained in a comparison at equal budgets, trials of the step size and then seeds, and the table of it."""
from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from stt.errors import TrainingFailed
from stt.words import markdown_table, paired_interval, spread

Row = dict[str, object]
Plan = list[tuple[str, int]]  # (arm, budget)
TRIAL_SEED = 1000  # none of those that count
FIRST_TRIALS = range(-8, -4)  # 2e-3, 5e-3, 1e-2, 2e-2
TRIED_MOST = 16  # step sizes


@dataclass(frozen=True)
class Cell:
    """One training: `budget` weights chosen by an arm, with a step size and a seed."""

    arm: str
    budget: int
    lr: float
    seed: int

    @property
    def key(self) -> tuple[str, int, float, int]:
        """What tells it from all others."""
        return self.arm, self.budget, self.lr, self.seed

    @property
    def is_trial(self) -> bool:
        return self.seed == TRIAL_SEED


UNTRAINED = Cell("none", 0, 0.0, 0)  # the model as it is


def step_size(place: int) -> float:
    """Of the series 1, 2, 5, 10, 20, ...: place 0 is 1, place -1 is 0.5."""
    return float(f"{(1, 2, 5)[place % 3]}e{place // 3}")


def next_trial(losses: Mapping[int, float]) -> int | None:
    """The place to try next, given the losses at those that were tried: all of FIRST_TRIALS, then beyond an end for as
    long as the best lies there. None: the best one has a worse neighbour on both sides. Raises TrainingFailed if it has
    not after TRIED_MOST."""
    missing = [place for place in FIRST_TRIALS if place not in losses]
    if missing:
        return missing[0]
    best = best_place(losses)
    if best - 1 in losses and best + 1 in losses:
        return None
    if len(losses) == TRIED_MOST:
        raise TrainingFailed(f"no step size from {step_size(min(losses)):g} to {step_size(max(losses)):g} is better "
                             "than its neighbours")
    return best - 1 if best - 1 not in losses else best + 1


def best_place(losses: Mapping[int, float]) -> int:
    """Of the smallest loss; of equals, the smallest step size."""
    return min(losses, key=lambda place: (losses[place], place))


class Comparison:
    """The rows of the cells there are, and what is still to do."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = {(row["arm"], row["budget"], row["lr"], row["seed"]): row for row in rows}

    def add(self, cell: Cell, numbers: Row) -> Row:
        """The whole row of a cell."""
        row = asdict(cell) | numbers
        self.rows[cell.key] = row
        return row

    def losses(self, arm: str, budget: int) -> dict[int, float]:
        """Place of the step size -> validation loss, of the trials of an arm; infinite if it was no number."""
        places = {step_size(place): place for place in range(-30, 10)}
        return {places[row["lr"]]: math.inf if row["validation"] is None else row["validation"]
                for row in self.rows.values()
                if (row["arm"], row["budget"], row["seed"]) == (arm, budget, TRIAL_SEED)}

    def next_cell(self, plan: Plan, seeds: int) -> Cell | None:
        """The first one that has no row: the model as it is, trials arm by arm, then seed by seed all arms; None if
        all have one."""
        if UNTRAINED.key not in self.rows:
            return UNTRAINED
        for arm, budget in plan:
            place = next_trial(self.losses(arm, budget))
            if place is not None:
                return Cell(arm, budget, step_size(place), TRIAL_SEED)
        for seed in range(seeds):
            for arm, budget in plan:
                cell = Cell(arm, budget, self.lr(arm, budget), seed)
                if cell.key not in self.rows:
                    return cell
        return None

    def lr(self, arm: str, budget: int) -> float:
        """The step size that the trials chose."""
        return step_size(best_place(self.losses(arm, budget)))

    def tested(self, arm: str, budget: int) -> dict[int, Row]:
        """Seed -> the row that was measured with the chosen step size."""
        lr = self.lr(arm, budget)
        return {seed: row for (name, size, rate, seed), row in sorted(self.rows.items())
                if (name, size, rate) == (arm, budget, lr) and seed != TRIAL_SEED}


# ---------------------------------------------------------------- the table


def table_of(found: Comparison, plan: Plan) -> list[str]:
    """One line for every arm and budget of the plan that was tested, by budget; the model as it is first. Losses in
    nats per token, mean over seeds ± their standard deviation; the difference to as many random weights is paired by
    seed, with its 95 % interval."""
    untrained = found.rows[UNTRAINED.key]
    head = ["budget", "what trains", "weights trained", "step size", "validation loss", "test loss", "minus random",
            "loss of stories", "forgotten"]
    first = ["–", "nothing", "0", "–", "–", f"{untrained['test']:.3f}", "–", f"{untrained['general']:.3f}", "–"]
    by_budget = sorted(plan, key=lambda each: each[1])
    return markdown_table([head, first, *(line(found, *each, untrained) for each in by_budget if found.losses(*each))])


def line(found: Comparison, arm: str, budget: int, untrained: Row) -> list[str]:
    """The cells of one line; a dash for what has no random weights to be compared with."""
    rows = found.tested(arm, budget)
    at_random = found.tested("random", budget) if arm != "random" and found.losses("random", budget) else {}
    gaps = [row["test"] - at_random[seed]["test"] for seed, row in rows.items() if seed in at_random]
    general = [row["general"] for row in rows.values()]
    trained = sorted({f"{row['trained']:,}" for row in rows.values()})
    return [f"{budget:,}", arm, ", ".join(trained), f"{found.lr(arm, budget):g}",
            f"{min(found.losses(arm, budget).values()):.3f}",
            spread([row["test"] for row in rows.values()], digits=3), with_interval(gaps),
            spread(general, digits=3), f"{statistics.mean(general) - untrained['general']:+.3f}" if general else "–"]


def with_interval(gaps: Sequence[float]) -> str:
    """Their mean and its 95 % interval; a dash for less than two."""
    if len(gaps) < 2:
        return "–"
    low, high = paired_interval(gaps)
    return f"{statistics.mean(gaps):+.3f} [{low:+.3f}, {high:+.3f}]"
