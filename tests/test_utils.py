"""Run folders, atomic files, seeds, and a W&B log that can never end a run."""
from __future__ import annotations

import json
import math
import random
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from stt.errors import InputError
from util import utils
from util.sinks import NoSink, WandbSink, wandb_sink
from util.utils import RunFolder, finite, git_commit, peak_memory_bytes, pick_device, set_seed, write_json_atomic

ARGUMENTS = {"mode": "stt", "seed": 1}


def read_rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------- run folder


def test_a_run_from_start_to_finish(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "outputs" / "run"
    run = RunFolder(folder)
    assert not folder.parent.exists()  # nothing before start
    run.start(ARGUMENTS)
    assert contents(folder) == {"args.json"}
    run.log(step=10, loss=1.23456789)
    run.log(step=20, loss=1.0, epoch=0.5)
    assert not (folder / "results.json").exists()
    run.finish({"accuracy": {"test": 0.5}})
    assert read_rows(folder) == [{"step": 10, "loss": 1.23456789}, {"step": 20, "loss": 1.0, "epoch": 0.5}]
    assert json.loads((folder / "results.json").read_text()) == {"format_version": 1, "accuracy": {"test": 0.5}}
    record = json.loads((folder / "args.json").read_text())
    assert record["arguments"] == ARGUMENTS
    assert record["versions"]["torch"] == torch.__version__
    assert "step 10  loss 1.235" in caplog.text
    assert contents(folder) == {"args.json", "metrics.jsonl", "results.json"}  # no temporary file is left


def test_nan_becomes_null_and_is_said(tmp_path, caplog):
    run = RunFolder(tmp_path / "run").start(ARGUMENTS)
    run.log(step=1, loss=math.nan)
    run.finish({"perplexity": {"dense": math.inf}, "sites": [{"x": math.nan}]})
    assert read_rows(run.path) == [{"step": 1, "loss": None}]
    results = json.loads((run.path / "results.json").read_text())
    assert results["perplexity"] == {"dense": None}
    assert results["sites"] == [{"x": None}]
    for words in ("loss is nan", "results.json.perplexity.dense is inf", "results.json.sites[0].x is nan"):
        assert words in caplog.text


def finished(folder: Path) -> Path:
    RunFolder(folder).start(ARGUMENTS).finish({"done": True})
    return folder


def test_finished_run_is_refused_unless_overwritten(tmp_path):
    folder = finished(tmp_path / "run")
    (folder / "plots").mkdir()
    for resume in (False, True):
        with pytest.raises(InputError, match="already holds a finished run; --overwrite"):
            RunFolder(folder, resume=resume)
    again = RunFolder(folder, overwrite=True)
    assert contents(folder) == {"args.json", "results.json", "plots"}  # untouched until it starts
    again.start(ARGUMENTS)
    assert contents(folder) == {"args.json"}


def test_unfinished_run(tmp_path):
    run = RunFolder(tmp_path / "run").start(ARGUMENTS)
    run.log(step=1, loss=2.0)
    RunFolder(run.path).start(ARGUMENTS)  # nothing of value in it yet: starts again
    assert contents(run.path) == {"args.json"}
    (run.path / "checkpoint-10").mkdir()
    with pytest.raises(InputError, match="unfinished run; --resume goes on"):
        RunFolder(run.path)
    RunFolder(run.path, overwrite=True).start(ARGUMENTS)
    assert contents(run.path) == {"args.json"}


def test_resume_drops_the_rows_of_later_steps(tmp_path):
    run = RunFolder(tmp_path / "run").start(ARGUMENTS)
    for step in (1, 2, 3, 4):
        run.log(step=step, loss=1.0 / step)
        run.log(step=step, validation_accuracy=0.25)
    assert len(read_rows(run.path)) == 8
    (run.path / "checkpoint-2").mkdir()
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a line
    resumed = RunFolder(run.path, resume=True).start(ARGUMENTS, resume_step=2)
    assert contents(run.path) == {"args.json", "checkpoint-2", "metrics.jsonl"}
    resumed.log(step=3, loss=0.25)
    assert read_rows(run.path) == [{"step": 1, "loss": 1.0}, {"step": 1, "validation_accuracy": 0.25},
                                   {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}]  # step 2 is validated again


def test_resume_without_an_earlier_run_starts_one(tmp_path):
    run = RunFolder(tmp_path / "run", resume=True).start(ARGUMENTS)
    run.log(step=1, loss=1.0)
    assert len(read_rows(run.path)) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folders_and_files_are_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="holds files that no run of ours wrote"):
        RunFolder(tmp_path / "thesis", overwrite=overwrite)
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "file" / "a" / "run"):
        with pytest.raises(InputError, match="is a file, so .* cannot be a run folder"):
            RunFolder(path, overwrite=overwrite)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    RunFolder(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_impossible_folder_names(tmp_path):
    for folder in (tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "run"):
        with pytest.raises(InputError, match="its name is longer than 255 bytes; choose a shorter one"):
            RunFolder(folder)
    with pytest.raises(InputError, match="as a run folder: File name too long"):
        RunFolder(Path(*["x" * 200] * 30))


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match="cannot write .*: Permission denied; choose another folder"):
        RunFolder(tmp_path / "run").start(ARGUMENTS)


# ---------------------------------------------------------------- files, seeds, facts about the machine


def test_write_json_atomic_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "results.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert contents(tmp_path) == {"results.json"}
    write_json_atomic(path, {"a": (1, 2)})
    assert json.loads(path.read_text()) == {"a": [1, 2]}


def test_finite_leaves_finite_numbers_alone():
    value = {"a": [1, 2.5, None, "x", True], "b": {"c": -1e300}}
    assert finite(value) == value


def draw() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_set_seed():
    set_seed(3)
    first = draw()
    second = draw()
    set_seed(3)
    assert draw() == first != second


def test_pick_device():
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tensors' bytes are reported")
def test_peak_memory_is_the_process_peak():
    assert peak_memory_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024)
    assert peak_memory_bytes() > 50 * 2**20  # torch alone takes more


def test_versions_leave_out_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(utils, "PACKAGES", ("torch", "no-such-package"))
    assert utils.versions() == {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__}


def test_git_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "util" / "utils.py"))
    assert git_commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_commit() is None  # no commit yet
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_commit() == head
    (tmp_path / "untracked").write_text("1")
    assert git_commit() == head
    (tmp_path / "file").write_text("2")
    assert git_commit() == head + "-dirty"


# ---------------------------------------------------------------- W&B, faked


class Failure(Exception):
    pass


def fake_wandb(monkeypatch, failing_modes=(), log_fails=False):
    rows, modes = [], []

    def init(mode, **_):
        modes.append(mode)
        if mode in failing_modes:
            raise Failure("no network")

        def log(row):
            if log_fails:
                raise Failure("gone")
            rows.append(row)

        return SimpleNamespace(log=log, finish=lambda: rows.append("finished"))

    module = SimpleNamespace(init=init, Error=Failure, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return rows, modes


def make_sink():
    return wandb_sink("project", None, "name", ARGUMENTS)


def test_wandb_gets_the_rows(monkeypatch, tmp_path):
    rows, modes = fake_wandb(monkeypatch)
    run = RunFolder(tmp_path / "run").start(ARGUMENTS, make_sink())
    run.log(step=1, loss=0.5)
    run.finish({})
    assert rows == [{"step": 1, "loss": 0.5}, "finished"]
    assert modes == [None]


def test_wandb_falls_back_to_offline(monkeypatch, caplog):
    rows, modes = fake_wandb(monkeypatch, failing_modes=(None,))
    make_sink().log({"step": 1})
    assert modes == [None, "offline"]
    assert rows == [{"step": 1}]
    assert "trying offline: no network" in caplog.text


def test_wandb_that_fails_altogether_is_no_log(monkeypatch, caplog):
    fake_wandb(monkeypatch, failing_modes=(None, "offline"))
    assert isinstance(make_sink(), NoSink)
    assert "with mode=offline: no network" in caplog.text


def test_wandb_that_dies_during_the_run(monkeypatch, caplog):
    rows, _ = fake_wandb(monkeypatch, log_fails=True)
    sink = make_sink()
    assert isinstance(sink, WandbSink)
    for step in range(3):
        sink.log({"step": step})
    sink.finish()
    assert rows == []
    assert caplog.text.count("W&B stopped: gone") == 1


def test_wandb_that_is_not_installed(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert isinstance(make_sink(), NoSink)
    assert "pip install wandb" in caplog.text


def test_wandb_is_imported_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    RunFolder(tmp_path / "run").start(ARGUMENTS).finish({})
