"""The flags that both ablations have, beside those of the training recipes they extend."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

from tyro.conf import arg

from stt.arguments import check_ranges, short_name
from stt.errors import InputError

TRIAL_SEED = 1_000_000  # of the runs that choose a step size: none of the seeds that are compared
STORIES, FEW_STORIES = 5000, 2000  # that are made to test on, with several seeds and with one
ALONE = ("calibration",)  # trains nothing

# inherited flags that mean nothing here: their default, and why
REFUSED: dict[str, tuple[object, str]] = {
    "score": (None, "--mode names the scores to compare"),
    "preset": ("published", "--mode names the scores to compare, and --compensate what is made up for"),
    "eval_epochs": (True, "a trial is validated once, after its training"),
    "select_best": (False, "every run is measured after its last epoch"),
    "save_steps": (0, "what goes on after a stop is the next training, not a part of one"),
    "eval_restored": (False, "nothing is put back"),
}

Args = TypeVar("Args", bound="AblationFlags")
Check = tuple[Callable[[float], bool], str]
IN_01: Check = (lambda x: 0 < x <= 1, "in (0, 1]")
ABOVE_0: Check = (lambda x: 0 < x < math.inf, "numbers above 0")
FINITE: Check = (math.isfinite, "finite numbers")


@dataclass(frozen=True)
class AblationFlags:
    """How many runs a mode gets, what is varied, and what it is compared with."""

    lrs: Annotated[str | None, arg(metavar="A,B,...")] = None
    """step sizes that every mode tries once, four or more to compare fairly; the best on the validation data counts"""
    seeds: int | None = None
    """runs of every mode with its best step size: seeds --seed, --seed + 1, ..."""
    reference: str | None = None
    """the mode that the others are compared with; None = the first"""
    test_size: Annotated[int | None, arg(metavar="INT")] = None
    """test on so many new stories of the shipped clutrr's kind (default: 5000, with one seed 2000); 0 = the task's own
    test data"""
    val_size: int = 0
    """validation examples that compare the trials, drawn with --seed; 0 = all"""
    keep_ratios: Annotated[str | None, arg(metavar="A,B,...")] = None
    """compare at each of these shares kept of every site (like --keep_ratio, several times)"""
    active_thresholds: Annotated[str, arg(metavar="A,B,...")] = "-0.1,0.01"
    """thresholds of mode ns_sigma; the default are those of the published decoder and encoder scripts"""
    active_sample_ratios: Annotated[str, arg(metavar="A,B,...")] = "0.01,0.02,0.05,0.1"
    """shares of the training examples that the selection looks at, in modes ns_activeset and calibration"""
    recovery_lr: Annotated[float | None, arg(aliases=("--recovery_learning_rate",), metavar="FLOAT")] = None
    """step size of the epoch after the cut, in modes mag_tp and wanda_tp (default: 1e-3 for a shipped model, 1e-5 for
    others)"""

    def check_ablation(self) -> None:
        """Raises InputError for what no ablation can be made of."""
        for name, (default, why) in REFUSED.items():
            if getattr(self, name) != default:
                raise InputError(f"{name} has no meaning in an ablation ({why}); leave it out.")
        check_ranges(self, ((("seeds",), lambda x: x >= 1, "1 or more"),
                            (("test_size",), lambda x: x >= 0, "0 (= the task's own) or more"),
                            (("val_size",), lambda x: x >= 0, "0 (= all) or more"),
                            (("recovery_lr",), *ABOVE_0)))
        for name, check in (("lrs", ABOVE_0), ("keep_ratios", IN_01), ("active_thresholds", FINITE),
                            ("active_sample_ratios", IN_01)):
            numbers(name, getattr(self, name), check)
        if self.keep_ratio is not None and self.keep_ratios is not None:
            raise InputError("keep_ratio and keep_ratios say how much is kept; give one of them.")
        self._check_transfer()
        if self.mode is not None and set(ALONE) & set(self.mode.split(",")) and self.mode not in ALONE:
            raise InputError(f"mode {ALONE[0]} trains nothing and stands alone, got {self.mode!r}")

    def _check_transfer(self) -> None:
        """No transfer without a source, and no source without a transfer."""
        transfers = self.mode is not None and "transfer" in self.mode.split(",")
        if transfers and self.source_task is None:
            raise InputError("mode transfer selects on the data of another task: say which with --source_task "
                             "NAME (and --source_dir).")
        for name in ("source_task", "source_dir", "source_ratio"):
            if getattr(self, name) is not None and not transfers:
                raise InputError(f"{name} is about the data that mode transfer selects on; add that mode, or leave it "
                                 "out.")


def numbers(name: str, text: str | None, check: Check) -> tuple[float, ...]:
    """The numbers of a flag such as "0.1,0.3", none of None. Raises InputError."""
    is_accepted, accepted = check
    try:
        found = tuple(float(part) for part in (text or "").split(",") if part.strip() or text)
    except ValueError:
        raise InputError(f"{name} takes numbers separated by commas, got {text!r}.") from None
    if not all(map(is_accepted, found)):
        raise InputError(f"{name} must be {accepted}, got {text}")
    if len(set(found)) < len(found):
        raise InputError(f"{name} names a number twice, got {text}; leave one out.")
    return found


def one_step_size(args: Args) -> Args:
    """`args` with `--lr X` as the only one of `lrs`: it is taken, not tried. Raises InputError if both are given."""
    if args.lr is not None and args.lrs is not None:
        raise InputError("lr is one step size for every mode and lrs are several to choose from; give one of them.")
    return args if args.lr is None else replace(args, lr=None, lrs=repr(args.lr))


def new_stories(args: AblationFlags) -> int:
    """How many test stories to make: `test_size`, or what stands for None. Raises InputError where there are none to
    make."""
    is_ours = args.task == "clutrr" and args.data_dir is None and not args.dev_mode
    if args.test_size and not is_ours:
        raise InputError("test_size makes new stories of the shipped clutrr's kind; another task, data_dir, train_file "
                         "or dev_mode has test data of its own, leave it out.")
    if args.test_size is not None or not is_ours:
        return args.test_size or 0
    return STORIES if args.seeds > 1 else FEW_STORIES


def run_name(args: AblationFlags) -> str:
    """The folder of an ablation."""
    modes = args.mode.replace(",", "+").replace(":", ".")
    task = args.task or Path(args.train_file).stem
    return args.run_name or f"{short_name(args.model)}-{task}-ablation-{modes}-seed{args.seed}"
