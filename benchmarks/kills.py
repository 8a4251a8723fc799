#!/usr/bin/env python
"""Kills training again and again, and says whether anything was lost.

    python benchmarks/kills.py --work kills --out benchmarks/KILLS.md       200 kills; stopped, it goes on where it was

A run that saves after every step is ended by SIGKILL and started again, until it is complete; then the next one begins.
The moment is drawn uniformly from the first 1.5 normal durations, or, where steps are left and at most half of the
kills so far hit the training, from the time those steps take, counted from when the training began. "forked": processes
forked from one that has everything imported, which train a tiny decoder, neurons selected, dropout 0.1. "fresh":
`train_llm.py` on the shipped model as a process of its own, imports, selection, evaluation and report included. Where a
kill hit is read off what it left: "before training", no record of this start; "after training", a whole checkpoint of
the last step. After every kill the newest checkpoint that is whole must be of the last step but one in the record, or
later, and of no earlier step than after the kill before; in the end the weights must be, bitwise, those of the run that
nobody killed.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KILLS = {"forked": 180, "fresh": 20}
PHASES = ("before training", "training", "after training")
STEPS = 12
SHIPPED_RUN = ("--train_size", "64", "--train_batch", "4", "--num_epoch", "2", "--save_steps", "1", "--log_interval",
               "1", "--no_eval_epochs", "--active_sample_ratio", "1")


# ---------------------------------------------------------------- what is killed


def warm_up() -> None:
    """Import what the forked children need, before they are forked."""
    import stt.selecting
    import stt.stt_transformer
    import stt.trainers.sft  # noqa: F401


def train_tiny(folder: Path) -> None:
    """A recipe in small: select, record, train, save after every step; goes on where `folder` stands."""
    import torch
    import transformers

    import stt
    from stt.trainers.checkpoints import newest, step_of
    from stt.trainers.sft import train
    from util.utils import RunFolder, set_seed

    set_seed(0)
    resume = has_checkpoint(folder)
    step = step_of(newest(folder)[0]) if resume else 0
    run = RunFolder(folder, resume=resume)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=0.1))
    stt.apply(model, stt.select(model, score="magnitude", keep=0.5))
    stt.train_only(model)
    run.start({}, resume_step=step)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (4 * STEPS // 2, 9)).tolist()]
    train(model, rows, 0, transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=2, learning_rate=1e-3, use_cpu=True,
        logging_steps=1, save_strategy="epoch", save_steps=1, save_total_limit=2, report_to=[], disable_tqdm=True,
        remove_unused_columns=False, label_names=["labels"], seed=1, data_seed=1), run.log, None, resume)
    run.finish({"weights": digest(model.state_dict())})


def forked(folder: Path) -> int:
    """The process id of a child that trains the tiny decoder."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        train_tiny(folder)
        code = 0
    finally:  # whatever happened, the child must not go on as its parent does
        if code:
            traceback.print_exc()
        os._exit(code)


def fresh(folder: Path) -> int:
    """The process id of a recipe on the shipped model."""
    command = [sys.executable, str(ROOT / "train_llm.py"), *SHIPPED_RUN, "--output_dir", str(folder.parent),
               "--run_name", folder.name, *(["--resume"] if has_checkpoint(folder) else [])]
    with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=log).pid


START: dict[str, Callable[[Path], int]] = {"forked": forked, "fresh": fresh}


# ---------------------------------------------------------------- killing, and looking at what is left


def has_checkpoint(folder: Path) -> bool:
    """What a person or a job script looks at before adding --resume."""
    return any(folder.glob("checkpoint-*"))


def saved_step(folder: Path) -> int:
    """The step of the newest whole checkpoint; 0 = none."""
    from stt.trainers.checkpoints import fault, in_order, step_of

    return max((step_of(path) for path in in_order(folder) if fault(path) is None), default=0)


def recorded_step(folder: Path) -> int:
    """The last step whose row in the record is whole."""
    record = folder / "metrics.jsonl"
    lines = record.read_text(encoding="utf-8").split("\n")[:-1] if record.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def weights(kind: str, folder: Path) -> str:
    """sha256 of what a complete run trained."""
    from safetensors.torch import load_file

    if kind == "forked":
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))["weights"]
    return digest(load_file(folder / "checkpoint" / "model.safetensors"))


def digest(tensors: dict[str, object]) -> str:
    """sha256 over names and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def has_begun(folder: Path, started: float) -> bool:
    """Whether a process that was started at `started` (seconds since 1970) has come to its training."""
    record = folder / "args.json"
    return record.exists() and record.stat().st_mtime >= started


def phase(folder: Path, started: float, saved: int, steps: int) -> str:
    """How far a process came that was started at `started` to train `steps` steps."""
    if not has_begun(folder, started):
        return "before training"
    return "training" if saved < steps else "after training"


@dataclass(frozen=True)
class Moment:
    """When to kill: after so many seconds, from the start or from when the training has begun."""

    seconds: float
    in_training: bool = False


def attempt(kind: str, folder: Path, moment: Moment, steps: int = STEPS) -> dict[str, object]:
    """Start, wait, kill; what happened."""
    before, started = saved_step(folder), time.time()
    child = START[kind](folder)
    until = math.inf if moment.in_training else time.monotonic() + moment.seconds
    ended = 0
    while not ended and time.monotonic() < until:
        time.sleep(min(0.005, max(0.0, until - time.monotonic())))
        ended, status = os.waitpid(child, os.WNOHANG)
        if until == math.inf and has_begun(folder, started):
            until = time.monotonic() + moment.seconds
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    saved = saved_step(folder)
    return {"kind": kind, "killed": is_killed, "dead": not is_killed and status != 0,
            "complete": (folder / "results.json").exists(), "saved": saved,
            "lost": max(0, recorded_step(folder) - 1 - saved), "backwards": max(0, before - saved),
            "phase": phase(folder, started, saved, steps) if is_killed else None,
            "while_saving": is_killed and any((folder / ".saving").glob("*"))}


@dataclass(frozen=True)
class Clock:
    """Seconds that a run takes which nobody kills, and its training alone; its steps."""

    whole: float
    training: float
    steps: int

    @classmethod
    def of(cls, folder: Path, started: float) -> Clock:
        """Of a complete run, started at `started` (seconds since 1970)."""
        steps = saved_step(folder)
        trained = (folder / f"checkpoint-{steps}" / "manifest.json").stat().st_mtime
        return cls(time.time() - started, trained - (folder / "args.json").stat().st_mtime, steps)

    def moment(self, rows: Sequence[dict[str, object]], saved: int, chance: random.Random) -> Moment:
        """When to kill the next start, of a run of which `saved` steps are saved, after the attempts `rows`."""
        hits = sum(row["phase"] == "training" for row in rows)
        if saved < self.steps and 2 * hits <= sum(row["killed"] for row in rows):
            return Moment(chance.uniform(0, self.training * (1 - saved / self.steps)), in_training=True)
        return Moment(chance.uniform(0, 1.5 * self.whole))


def battery(kind: str, kills: int, work: Path, seed: int) -> list[dict[str, object]]:
    """What happened in each attempt until `kills` of them were killed; goes on with what is noted in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    notes, reference = work / f"{kind}.jsonl", work / f"{kind}-reference"
    clock, expected = reference_clock(kind, reference), weights(kind, reference)
    rows = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    while sum(row["killed"] for row in rows) < kills:
        folder = work / f"{kind}-{sum(row['complete'] for row in rows)}"
        chance = random.Random(f"{seed} {kind} {len(rows)}")
        row = attempt(kind, folder, clock.moment(rows, saved_step(folder), chance), clock.steps)
        if row["complete"]:
            row["equal"] = weights(kind, folder) == expected
            shutil.rmtree(folder)
        rows.append(row)
        with open(notes, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return rows


def reference_clock(kind: str, folder: Path) -> Clock:
    """The clock of the run that nobody kills, which is run if it is not there yet."""
    measured = folder.with_name(f"{folder.name}.json")
    if not measured.exists():
        shutil.rmtree(folder, ignore_errors=True)
        started = time.time()
        if attempt(kind, folder, Moment(600))["dead"]:
            raise SystemExit(f"the training in {folder} fails without being killed")
        measured.write_text(json.dumps(asdict(Clock.of(folder, started))))
    return Clock(**json.loads(measured.read_text()))


# ---------------------------------------------------------------- the table


def summary(kind: str, rows: Sequence[dict[str, object]]) -> dict[str, object]:
    """The numbers of one row of the table. What an earlier kill left half saved is there until training begins."""
    complete = [row for row in rows if row["complete"]]
    return {"": kind, "kills": sum(row["killed"] for row in rows),
            **{f"of these {name}": sum(row["phase"] == name for row in rows) for name in PHASES},
            "of these while saving": sum(row["while_saving"] and row["phase"] == "training" for row in rows),
            "starts": len(rows), "dead starts": sum(row["dead"] for row in rows),
            "steps lost beyond the last save": sum(row["lost"] for row in rows),
            "steps backwards": sum(row["backwards"] for row in rows), "complete runs": len(complete),
            "bitwise equal": sum(row["equal"] for row in complete)}


def page(batteries: dict[str, list[dict[str, object]]], command: str) -> str:
    """KILLS.md."""
    from benchmarks.machine import software

    table = [summary(kind, rows) for kind, rows in batteries.items()]
    lines = [" | ".join(map(str, values)) for values in (table[0], ["---"] * len(table[0]), *(
        row.values() for row in table))]
    told = ", ".join(f"{name} {version}" for name, version in software().items() if version)
    return "\n".join(["# Kills", "", f"    {command}", "", told, "", __doc__.split("\n\n", 2)[2].strip(), "",
                      *(f"| {line} |" for line in lines), ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs and for what was seen so far")
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument("--forked", type=int, default=KILLS["forked"], help="kills of forked processes")
    parser.add_argument("--fresh", type=int, default=KILLS["fresh"], help="kills of train_llm.py")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    import torch
    import transformers

    warm_up()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    batteries = {kind: battery(kind, kills, args.work, args.seed)
                 for kind, kills in (("forked", args.forked), ("fresh", args.fresh)) if kills}
    text = page(batteries, "python benchmarks/kills.py --work kills --out benchmarks/KILLS.md")
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return 0 if all(is_clean(kind, rows) for kind, rows in batteries.items()) else 1


def is_clean(kind: str, rows: Sequence[dict[str, object]]) -> bool:
    """Nothing died, nothing was lost, every complete run is equal."""
    found = summary(kind, rows)
    return not (found["dead starts"] or found["steps lost beyond the last save"] or found["steps backwards"]) \
        and found["complete runs"] == found["bitwise equal"]


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # the checkout, instead of this folder
    sys.exit(main())
