"""The runs of an ablation, one row each in cells.jsonl: trials of the step size, then seeds with the best one."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.typing import NDArray
from tqdm import tqdm

from stt.ablation.arms import Arm
from stt.ablation.flags import TRIAL_SEED
from stt.errors import InputError, TrainingFailed

Row = dict[str, object]


@dataclass(frozen=True)
class Cell:
    """One training: of a mode, with a step size and a seed. A trial is measured on the validation data alone, any other
    cell on the test data alone."""

    arm: Arm
    lr: float
    seed: int

    @property
    def is_trial(self) -> bool:
        return self.seed == TRIAL_SEED

    @property
    def key(self) -> tuple[str, float, int]:
        """What tells it from all others."""
        return self.arm.label, self.lr, self.seed


class Cells:
    """The rows there are. A row that was being written when the process was killed is left out, and written over."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        self.rows: dict[tuple[str, float, int], Row] = {}
        for number, line in enumerate(whole, start=1):
            row = _parsed(line, f"line {number} of {path}")
            self.rows[row["mode"], row["lr"], row["seed"]] = row
        self._is_cut_short = len(whole) < len(lines)

    def add(self, cell: Cell, numbers: Mapping[str, object]) -> None:
        """Writes the row of a cell."""
        row = {"mode": cell.arm.label, "lr": cell.lr, "seed": cell.seed, **numbers}
        self.rows[cell.key] = row
        if self._is_cut_short:
            self.path.write_text("".join(_line(each) for each in self.rows.values()), encoding="utf-8")
            self._is_cut_short = False
        else:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(row))

    def trials(self, arm: Arm) -> dict[float, float | None]:
        """Step size -> validation accuracy, None where training failed, of the trials there are."""
        return {row["lr"]: row["accuracy"] for row in self.rows.values()
                if row["mode"] == arm.label and row["seed"] == TRIAL_SEED}

    def of(self, arm: Arm) -> list[Row]:
        """The rows of the mode that were tested, by seed."""
        found = [row for row in self.rows.values() if row["mode"] == arm.label and row["seed"] != TRIAL_SEED]
        return sorted(found, key=lambda row: row["seed"])

    def correct(self, arm: Arm) -> NDArray:
        """(S, N) whether the answer of each seed to each test item is right."""
        return numpy.stack([unpacked(row["correct"], row["n"]) for row in self.of(arm)])


def best(trials: Mapping[float, float | None], arm: Arm) -> float:
    """The step size with the best validation accuracy; of equals, the smallest. Raises TrainingFailed if there is
    none."""
    worked = {lr: accuracy for lr, accuracy in trials.items() if accuracy is not None}
    if not worked:
        raise TrainingFailed(f"mode {arm.label!r} could not be trained with any of --lrs: give smaller ones")
    return min(worked, key=lambda lr: (-worked[lr], lr))


def fill(cells: Cells, arms: Sequence[Arm], lrs: Sequence[float], seeds: Sequence[int],
         run: Callable[[Cell], Row]) -> None:
    """Every cell that has no row yet: all trials, then seed by seed all modes, so that an ablation that is stopped is
    balanced. A single step size needs no trial."""
    trials = [Cell(arm, lr, TRIAL_SEED) for arm in arms for lr in lrs] if len(lrs) > 1 else []
    labels, total = {arm.label for arm in arms}, len(trials) + len(arms) * len(seeds)
    done = sum(mode in labels and (seed in seeds or seed == TRIAL_SEED) for mode, _, seed in cells.rows)
    with tqdm(total=total, initial=done, desc="cells", unit="cell", disable=None) as bar:
        for cell in _in_order(cells, arms, lrs, seeds, trials):
            if cell.key in cells.rows:
                continue
            bar.set_postfix_str(f"{cell.arm.label} lr {cell.lr:g} {'trial' if cell.is_trial else f'seed {cell.seed}'}")
            cells.add(cell, _trial(run, cell) if cell.is_trial else run(cell))
            bar.update()


def _in_order(cells: Cells, arms: Sequence[Arm], lrs: Sequence[float], seeds: Sequence[int],
              trials: Sequence[Cell]) -> Iterator[Cell]:
    yield from trials
    chosen = {arm.label: best(cells.trials(arm), arm) if trials else lrs[0] for arm in arms}
    for seed in seeds:
        yield from (Cell(arm, chosen[arm.label], seed) for arm in arms)


def _trial(run: Callable[[Cell], Row], cell: Cell) -> Row:
    """The row of a trial; a step size that is too large for a mode is a result, too."""
    try:
        return run(cell)
    except TrainingFailed as failure:
        return {"accuracy": None, "failure": str(failure)}


def packed(correct: Sequence[bool]) -> str:
    """One bit an item, as hexadecimal digits."""
    return numpy.packbits(numpy.array(correct, dtype=bool)).tobytes().hex()


def unpacked(digits: str, n: int) -> NDArray:
    """(N,) bool: what `packed` was given."""
    return numpy.unpackbits(numpy.frombuffer(bytes.fromhex(digits), dtype=numpy.uint8), count=n).astype(bool)


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _parsed(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error}): --overwrite starts the ablation again.") from error
    if not isinstance(row, dict) or not {"mode", "lr", "seed", "accuracy"} <= row.keys():
        raise InputError(f"{where} is no row of an ablation: --overwrite starts it again.")
    return row
