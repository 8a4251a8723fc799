#!/usr/bin/env python
"""A recipe of seconds that starts, stops, resumes and fails as the real ones do, without torch: for tests of sweeps."""
from __future__ import annotations

from stt import stopping

if __name__ == "__main__":  # before anything that takes time is imported
    stopping.listen()

import hashlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated, Literal  # noqa: E402

from tyro.conf import arg  # noqa: E402

from stt import cli  # noqa: E402
from stt.errors import InputError, TrainingFailed  # noqa: E402
from util.sinks import wandb_sink  # noqa: E402
from util.utils import RunFolder, write_json_atomic  # noqa: E402


@dataclass(frozen=True)
class SmallArgs:
    """A random walk that is saved after every step."""

    mode: Literal["stt", "random"] = "stt"
    """changes the result"""
    lr: Annotated[float, arg(aliases=("--learning_rate",))] = 0.1
    """changes the result"""
    schedule: bool = False
    """changes the result"""
    seed: int = 0
    """of the walk"""
    steps: int = 5
    """of the walk"""
    step_seconds: float = 0.0
    """a step takes"""
    fails: Literal["never", "input", "training", "silently", "killed"] = "never"
    """how it ends after two steps"""
    note: str | None = None
    """changes the result"""
    output_dir: str = "outputs"
    """folder of the run folders"""
    run_name: str = "run"
    """folder under output_dir"""
    use_wandb: bool = False
    """log"""
    resume: bool = False
    """go on"""
    overwrite: bool = False
    """start again"""

    def __post_init__(self) -> None:
        if self.mode == "random" and self.schedule:
            raise InputError("schedule does not go with mode 'random'; leave it out.")


def main(args: SmallArgs) -> int:
    """The exit code that a recipe has."""
    folder = Path(args.output_dir) / args.run_name
    if args.resume and (folder / "results.json").exists():
        return 0
    run = RunFolder(folder, args.overwrite, args.resume)
    run.start(asdict(args), wandb_sink("project", None, args.run_name, asdict(args)) if args.use_wandb else None)
    (folder / "pid").write_text(str(os.getpid()))
    step, walk, generator = restored(folder, args)
    due = time.monotonic()
    while step < args.steps:
        due += args.step_seconds
        time.sleep(max(0.0, due - time.monotonic()))
        with stopping.deferred():
            step, walk = step + 1, [0.9 * value + args.lr * generator.gauss(0, 1) for value in walk]
            save(folder, step, walk, generator)
            run.log(step=step)
        if step == 2:
            end_early(args.fails)
            if args.fails == "silently":
                return 0
    digest = hashlib.sha256(json.dumps([walk, args.mode, args.schedule, args.note]).encode()).hexdigest()
    run.finish({"mode": args.mode, "seed": args.seed, "sha": digest,
                "devices": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": os.environ.get("OMP_NUM_THREADS")})
    return 0


def restored(folder: Path, args: SmallArgs) -> tuple[int, list[float], random.Random]:
    """Step, values and generator: of the checkpoint, or at the start."""
    generator = random.Random(args.seed)
    if not args.resume:
        return 0, [0.0] * 8, generator
    saved = json.loads((folder / "checkpoint-1" / "state.json").read_text())
    generator.setstate((saved["state"][0], tuple(saved["state"][1]), saved["state"][2]))
    return saved["step"], saved["walk"], generator


def save(folder: Path, step: int, walk: list[float], generator: random.Random) -> None:
    (folder / "checkpoint-1").mkdir(exist_ok=True)
    write_json_atomic(folder / "checkpoint-1" / "state.json",
                      {"step": step, "walk": walk, "state": generator.getstate()})


def end_early(how: str) -> None:
    if how == "input":
        raise InputError("this cannot be used.")
    if how == "training":
        raise TrainingFailed("the loss became NaN.")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(cli.run(main, SmallArgs, prog="sweep_recipe.py"))
