"""SIGTERM and SIGUSR1: the step is finished and saved, the exit code is 75, --resume ends as if nothing had been."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from small_runs import SHIPPED
from training import assert_equal, exit_code, forked, prepared, rows, run

import train_llm
from stt import cli, errors, stopping
from stt.arguments import CHECKOUT
from stt.llm_arguments import LLMArgs, resolved
from stt.trainers import checkpoints
from stt.trainers.callbacks import Record
from util.utils import RunFolder

PER_EPOCH = 5  # steps


@dataclass(frozen=True)
class Flags:
    """A recipe of the tests."""

    resume: bool = False


def signalled(number: int = signal.SIGTERM) -> None:
    """This process gets a signal, now."""
    os.kill(os.getpid(), number)


def at_step(step: int, act: Callable[[], None]) -> None:
    """In a child: `act` at the beginning of the step after `step`."""
    def before(self: Record, args: object, state: object, control: object, **_: object) -> None:
        if state.global_step == step:
            act()

    Record.on_step_begin = before


def recipe(main: Callable[[Flags], int | None]) -> int:
    """The exit code of a program of its own."""
    sys.argv = ["recipe"]
    return cli.run(main, Flags)


@pytest.fixture
def said(tmp_path: Path) -> Path:
    """stderr of the children."""
    return tmp_path / "said"


def stopped(said: Path) -> str:
    """The line about it, which is the last one."""
    lines = [line for line in said.read_text().splitlines() if line.startswith(("stopped", "error"))]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("step", [1, 4, 7], ids=["a first step", "the last of an epoch", "a later one"])
def test_a_signal_while_training(step: int, tmp_path: Path, said: Path) -> None:
    """It is noticed after the step in which it came: that step is saved, and no other."""
    changes = {"eval_strategy": "epoch", "logging_steps": 2}

    def train(_: Flags) -> None:
        at_step(step, lambda: signalled(signal.SIGUSR1 if step == 4 else signal.SIGTERM))
        run(tmp_path / "run", model=prepared(dropout=0.1), validate=lambda: 0.5, **changes)

    assert exit_code(lambda: recipe(train), said) == 75
    name = "SIGUSR1" if step == 4 else "SIGTERM"
    assert stopped(said) == f"stopped by {name}: the same command with --resume goes on"
    assert (tmp_path / "run" / "STOPPED").read_text() == f"{name}\n"
    assert checkpoints.newest(tmp_path / "run") == (tmp_path / "run" / f"checkpoint-{step + 1}", {})
    assert not any("validation_accuracy" in row for row in rows(tmp_path / "run") if row["step"] == step + 1)
    found = run(tmp_path / "run", resume=True, model=prepared(dropout=0.1), validate=lambda: 0.5, **changes)
    assert_equal(found, run(tmp_path / "whole", model=prepared(dropout=0.1), validate=lambda: 0.5, **changes))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert not (tmp_path / "run" / "STOPPED").exists()


def test_more_signals_while_saving(tmp_path: Path, said: Path) -> None:
    real = checkpoints.seal

    def seal(staged: Path, target: Path) -> None:
        signalled()
        signalled(signal.SIGUSR1)
        real(staged, target)
        signalled()

    def train(_: Flags) -> None:
        at_step(2, signalled)
        checkpoints.seal = seal
        run(tmp_path / "run")

    assert exit_code(lambda: recipe(train), said) == 75
    assert checkpoints.newest(tmp_path / "run") == (tmp_path / "run" / "checkpoint-3", {})
    assert len(rows(tmp_path / "run")) == 3


def test_a_signal_while_validating(tmp_path: Path, said: Path) -> None:
    """At once: the epoch's last step is saved. The validation is repeated."""
    def train(_: Flags) -> None:
        run(tmp_path / "run", validate=signalled, eval_strategy="epoch")

    assert exit_code(lambda: recipe(train), said) == 75
    assert "--resume" in stopped(said)
    assert checkpoints.newest(tmp_path / "run")[0].name == f"checkpoint-{PER_EPOCH}"
    run(tmp_path / "run", resume=True, validate=lambda: 0.5, eval_strategy="epoch")
    assert [row["step"] for row in rows(tmp_path / "run") if "validation_accuracy" in row] == [PER_EPOCH, 2 * PER_EPOCH]


def test_a_signal_while_measuring_after_training(tmp_path: Path, said: Path) -> None:
    def main(_: Flags) -> None:
        run(tmp_path / "run")
        signalled()
        os.write(2, b"error: went on\n")

    assert exit_code(lambda: recipe(main), said) == 75
    assert "--resume" in stopped(said)
    before = rows(tmp_path / "run")
    run(tmp_path / "run", resume=True, log=lambda **_: pytest.fail("trained again"))
    assert rows(tmp_path / "run") == before


def test_a_signal_before_anything_is_written(tmp_path: Path, said: Path) -> None:
    def main(_: Flags) -> None:
        RunFolder(tmp_path / "run")
        signalled()

    assert exit_code(lambda: recipe(main), said) == 75
    assert stopped(said) == "stopped by SIGTERM: the same command starts again"
    assert not (tmp_path / "run").exists()


def test_a_signal_while_the_record_begins(tmp_path: Path, said: Path) -> None:
    """The file that is being written is whole; without a checkpoint the run starts again."""
    real = os.replace

    def main(_: Flags) -> None:
        os.replace = lambda *names: (signalled(), real(*names))
        RunFolder(tmp_path / "run").start({"a": 1})
        os.write(2, b"error: went on\n")

    assert exit_code(lambda: recipe(main), said) == 75
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"args.json", "STOPPED"}
    assert json.loads((tmp_path / "run" / "args.json").read_text())["arguments"] == {"a": 1}
    RunFolder(tmp_path / "run")


@pytest.mark.parametrize("late", ["while results.json is written", "after it", "at the very end"])
def test_a_late_signal_makes_no_failure(late: str, tmp_path: Path, said: Path) -> None:
    real = os.replace

    def replace(*names: Path) -> None:
        signalled()
        real(*names)

    def main(_: Flags) -> None:
        record = RunFolder(tmp_path / "run").start({})
        if late == "while results.json is written":
            os.replace = replace
        record.finish({"done": True})
        if late == "after it":
            signalled(signal.SIGUSR1)

    def program() -> int:
        code = recipe(main)
        signalled()
        signalled(signal.SIGUSR1)
        return code

    assert exit_code(program, said) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["done"]
    assert said.read_text() == ""


@pytest.mark.parametrize(("raised", "code"), [("InputError", 2), ("TrainingFailed", 3), ("KeyboardInterrupt", 130)])
def test_a_signal_after_a_failure_changes_nothing(raised: str, code: int, said: Path) -> None:
    def main(_: Flags) -> None:
        raise getattr(errors, raised, KeyboardInterrupt)("why")

    def program() -> int:
        code = recipe(main)
        signalled()
        return code

    assert exit_code(program, said) == code


def test_a_failure_after_a_signal_is_the_failure(tmp_path: Path, said: Path) -> None:
    """A NaN in the step in which the signal came: nothing good to save."""
    def main(_: Flags) -> None:
        model = prepared()

        def act() -> None:
            signalled()
            with torch.no_grad():
                next(iter(model.parameters())).fill_(float("nan"))

        at_step(2, act)
        run(tmp_path / "run", model=model, save_steps=1)

    assert exit_code(lambda: recipe(main), said) == 3
    assert "step 3" in stopped(said)
    assert checkpoints.newest(tmp_path / "run")[0].name == "checkpoint-2"


def test_only_programs_that_resume_listen(tmp_path: Path, said: Path) -> None:
    @dataclass(frozen=True)
    class Verb:
        """Writes something."""

    def program() -> int:
        sys.argv = ["verb"]
        return cli.run(lambda _: signalled(), Verb)

    assert exit_code(program, said) == -signal.SIGTERM
    assert exit_code(lambda: cli.run(lambda _: signalled(), Flags, []), said) == -signal.SIGTERM  # called, not run
    assert not stopping.requested()


# ---------------------------------------------------------------- two processes


def rank(number: int, folder: Path) -> int:
    """One of two processes that train together; the second one is signalled while it takes its third step."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "LOCAL_WORLD_SIZE": "2"}
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=number, world_size=2,
                                         timeout=timedelta(seconds=30))

    def train(_: Flags) -> None:
        if number == 1:
            at_step(2, signalled)
        run(folder / "run", per_device_train_batch_size=2)

    return recipe(train)


def test_all_processes_stop_after_the_same_step(tmp_path: Path, said: Path) -> None:
    children = [forked(lambda number=number: rank(number, tmp_path), said) for number in (0, 1)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [75, 75], said.read_text()
    path, faults = checkpoints.newest(tmp_path / "run")
    assert (path.name, faults) == ("checkpoint-3", {})
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in path.iterdir()}
    assert (tmp_path / "run" / "STOPPED").read_text() in ("SIGTERM\n", "another process\n")


# ---------------------------------------------------------------- the recipe itself


def test_the_recipe_stops_during_its_imports_and_finishes_at_once_when_it_is_complete(tmp_path: Path) -> None:
    command = [sys.executable, str(CHECKOUT / "train_llm.py"), "--output_dir", str(tmp_path), "--run_name", "run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline().startswith("defaults for stt-tiny")  # the flags are read; now torch is
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75
    assert process.stderr.read() == "stopped by SIGUSR1: the same command starts again\n"
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(SHIPPED), "--output_dir", str(tmp_path), "--run_name", "run"]
    folder = RunFolder(tmp_path / "run").start(asdict(resolved(cli.read_args(LLMArgs, flags))))
    folder.finish({"made": "up"})
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    assert cli.run(train_llm.main, LLMArgs, [*flags, "--resume", "--save_steps", "3"]) == 0
    assert capsys.readouterr().out == f"already finished: {folder.path / 'report.html'}\n"
    assert cli.run(train_llm.main, LLMArgs, [*flags, "--resume", "--lr", "1"]) == 2
    assert "was started with lr" in capsys.readouterr().err
    assert cli.run(train_llm.main, LLMArgs, flags) == 2
    assert "already holds a finished run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before
