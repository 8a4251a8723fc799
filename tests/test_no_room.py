"""A full disk, and folders that may not be written: one sentence, and the last checkpoint stays.

Root may write everywhere, so that these run in a child with another user id or with a limit on the size of its files.
"""
from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_stopping import Flags, at_step, recipe, stopped
from training import assert_equal, exit_code, rows, run

import train_llm
from stt import cli
from stt.evaluate.llm import Judge
from stt.llm_arguments import LLMArgs
from stt.trainers import checkpoints
from util.utils import RunFolder

NOBODY = 65534


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def no_larger_than(size: int) -> None:
    """Of this process's files, from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def as_nobody(work: Callable[[Flags], object]) -> int:
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    return recipe(work)


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user, and mount")


@pytest.mark.parametrize("size", [3000, 30000], ids=["JSON and RNG", "tensors"])
def test_a_checkpoint_that_does_not_fit(size: int, tmp_path: Path) -> None:
    def train(_: Flags) -> None:
        at_step(2, lambda: no_larger_than(size))
        run(tmp_path / "run", save_steps=1)

    assert exit_code(lambda: recipe(train), tmp_path / "said") == 3
    line = stopped(tmp_path / "said")
    assert line.startswith(f"error: cannot write {tmp_path}/run/checkpoint-3: ")
    assert line.endswith("checkpoint-2 is the last good checkpoint. Make room or access, and go on with --resume")
    assert checkpoints.newest(tmp_path / "run") == (tmp_path / "run" / "checkpoint-2", {})
    assert not (tmp_path / "run" / ".saving").exists()
    assert_equal(run(tmp_path / "run", resume=True), run(tmp_path / "whole"))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_record_that_does_not_fit(tmp_path: Path) -> None:
    def main(_: Flags) -> None:
        record = RunFolder(tmp_path / "run").start({})
        record.log(step=1, loss=1.0)
        no_larger_than(5000)
        record.log(step=2, note="x" * 5000)

    assert exit_code(lambda: recipe(main), tmp_path / "said") == 3
    assert "cannot write" in (line := stopped(tmp_path / "said"))
    assert "metrics.jsonl: File too large; the last checkpoint is kept" in line


def test_any_other_file_that_does_not_fit(tmp_path: Path) -> None:
    def main(_: Flags) -> None:
        no_larger_than(5000)
        with open(tmp_path / "figure.png", "wb", buffering=0) as file:
            file.write(b"x" * 5000)
            file.write(b"x")

    assert exit_code(lambda: recipe(main), tmp_path / "said") == 3
    assert "File too large; make room" in stopped(tmp_path / "said")


def test_a_model_that_does_not_fit_is_one_sentence(tmp_path: Path, small: list[str]) -> None:
    """After training: --resume repeats only the measurement."""
    real = train_llm.ship

    def ship(*args: object) -> None:
        no_larger_than(100_000)
        real(*args)

    def program() -> int:
        sys.argv = ["train_llm.py", *small, "--output_dir", str(tmp_path), "--run_name", "run", "--no_eval_epochs",
                    "--num_epoch", "1", "--train_size", "8"]
        train_llm.ship = ship
        Judge.test = Judge.throughput = lambda *_, **__: {}
        return cli.run(train_llm.main, LLMArgs)

    assert exit_code(program, tmp_path / "said") == 3
    assert stopped(tmp_path / "said").startswith(f"error: cannot write {tmp_path}/run/checkpoint: ")
    assert checkpoints.newest(tmp_path / "run")[0].name == "checkpoint-2"
    assert not (tmp_path / "run" / "results.json").exists()


@needs_root
def test_a_folder_that_may_not_be_written(open_folder: Path, tmp_path: Path) -> None:
    (open_folder / "closed").mkdir(mode=0o755)

    def main(_: Flags) -> None:
        RunFolder(open_folder / "closed" / "run").start({})

    assert exit_code(lambda: as_nobody(main), tmp_path / "said") == 2
    line = stopped(tmp_path / "said")
    assert line == f"error: cannot write {open_folder}/closed/run: Permission denied; choose another folder."
    assert list((open_folder / "closed").iterdir()) == []


@needs_root
def test_a_run_folder_that_may_not_be_written(open_folder: Path, tmp_path: Path) -> None:
    """It is somebody else's unfinished run."""
    run(open_folder / "run")
    before = {path: path.stat().st_mtime_ns for path in open_folder.rglob("*")}

    def main(_: Flags) -> None:
        RunFolder(open_folder / "run", resume=True).start({}, resume_step=10)

    assert exit_code(lambda: as_nobody(main), tmp_path / "said") == 2
    assert "Permission denied; choose another folder" in stopped(tmp_path / "said")
    assert {path: path.stat().st_mtime_ns for path in open_folder.rglob("*")} == before


@needs_root
def test_a_run_folder_that_is_closed_while_training(open_folder: Path, tmp_path: Path) -> None:
    def train(_: Flags) -> None:
        at_step(2, lambda: (open_folder / "run").chmod(0o555))
        run(open_folder / "run", save_steps=1)

    assert exit_code(lambda: as_nobody(train), tmp_path / "said") == 3
    assert "checkpoint-3: Permission denied; " in stopped(tmp_path / "said")
    assert checkpoints.newest(open_folder / "run")[0].name == "checkpoint-2"


@needs_root
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    (disk := tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        assert exit_code(lambda: recipe(lambda _: run(disk / "run", save_steps=1)), tmp_path / "said") == 3
        assert "No space left on device" in (line := stopped(tmp_path / "said"))
        assert "is the last good checkpoint" in line
        assert checkpoints.newest(disk / "run")[0].name in line
    finally:
        subprocess.run(["umount", str(disk)], check=True)
