"""Runs of a grid, one at a time and all on one machine: how they end, stop, go on, and what is remembered of them."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from sweep_grids import ROOT, results, states, task, written

from stt import verbs
from stt.errors import InputError
from util import sweep, sweep_local
from util.grid import read_grid


def started(*command: str, **variables: str) -> subprocess.Popen[bytes]:
    """A program of ours in the background, in a process group of its own; a shell may have told us to ignore Ctrl-C."""
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env=os.environ | {"PYTHONPATH": str(ROOT)} | variables, process_group=0,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def eventually(is_true: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until, "it did not become true in time"
        time.sleep(0.02)


def test_a_record_of_other_flags_is_refused(tmp_path, capsys):
    path = written(tmp_path)
    run = read_grid(path).runs[0]
    record = sweep.Record(run)
    record.path.parent.mkdir(parents=True)
    record.path.write_text(json.dumps({"flags": {"seed": 99}, "attempts": []}))
    assert task(path, "--run", "0") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "belongs to a run with other flags" in error


def test_questions_about_a_grid(tmp_path, capsys):
    path = written(tmp_path)
    for flags, code, out, error in (
            (["--count"], 0, "0-7\n", ""), (["--show", "3"], 0, read_grid(path).runs[3].shown() + "\n", ""),
            (["--run", "8"], 2, "", f"error: run 8, but {path} has 8 runs: 0 to 7\n"),
            (["--run", "-1"], 2, "", f"error: run -1, but {path} has 8 runs: 0 to 7\n"),
            (["--run", "1", "--count"], 2, "", "error: give one of --count, --show NUMBER and --run NUMBER\n")):
        assert task(path, *flags) == code
        assert capsys.readouterr() == (out, error)
    assert not (tmp_path / "out").exists()


def test_it_is_a_program(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "util" / "sweep.py"), written(tmp_path), "--count"],
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0-7\n", "")


def test_a_finished_run_ends_at_once(tmp_path):
    path = written(tmp_path)
    run = read_grid(path).runs[2]
    assert task(path, "--run", "2") == 0
    before = (run.folder / "results.json").stat().st_mtime_ns
    assert task(path, "--run", "2") == 0
    assert (run.folder / "results.json").stat().st_mtime_ns == before
    assert len(sweep.Record(run).read()["attempts"]) == 1


@pytest.mark.parametrize(("how", "code", "state"), [("input", 2, "failed"), ("training", 3, "failed"),
                                                    ("silently", 3, "failed"), ("killed", 137, "partial")])
def test_the_exit_code_is_the_runs(tmp_path, how, code, state):
    path = written(tmp_path, fixed={"fails": how})
    assert task(path, "--run", "0") == code
    assert states(path) == [state] + ["waiting"] * 7


def test_stopped_runs_go_on_to_the_same_result(tmp_path):
    """Asked to stop again and again, by each signal in turn: the same numbers as without."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole, stopped = (written(tmp_path / name, fixed={"steps": 40, "step_seconds": 0.05})
                      for name in ("whole", "stopped"))
    assert task(whole, "--run", "5") == 0
    run = read_grid(stopped).runs[5]
    saved = run.folder / "checkpoint-1" / "state.json"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        step = json.loads(saved.read_text())["step"] if saved.exists() else 0
        process = started(str(ROOT / "util" / "sweep.py"), stopped, "--run", "5")
        eventually(lambda step=step: saved.exists() and json.loads(saved.read_text())["step"] > step + 1)
        process.send_signal(number)
        assert process.wait(20) == 75
        assert sweep.Record(run).state() == "partial"
    assert task(stopped, "--run", "5") == 0
    assert results(run)["sha"] == results(read_grid(whole).runs[5])["sha"]
    assert [attempt["exit_code"] for attempt in sweep.Record(run).read()["attempts"]] == [75, 75, 0]


def test_a_request_that_comes_while_a_run_is_being_started(tmp_path):
    """It does not hear the signal, and is stopped all the same; one that somebody else ends is not."""
    children = sweep.Children()
    with open(tmp_path / "lock", "w") as lock:
        assert children.run(["sh", "-c", "kill -TERM $$"], os.environ, None, lock) == 143
        children.request = signal.SIGTERM
        assert children.run(["sleep", "60"], os.environ, None, lock) == 75


def test_a_run_that_runs_is_not_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "PATIENCE", 0.2)
    path = written(tmp_path, fixed={"steps": 1000, "step_seconds": 0.05})
    run = read_grid(path).runs[0]
    process = started(str(ROOT / "util" / "sweep.py"), path, "--run", "0")
    try:
        eventually(lambda: (run.folder / "checkpoint-1").exists())
        assert states(path)[0] == "running"
        with pytest.raises(InputError, match="is running already"):
            sweep.attempt(run, sweep.Children())
        process.kill()  # the run itself goes on, and keeps the lock
        process.wait(20)
        assert states(path)[0] == "running"
    finally:
        os.kill(int((run.folder / "pid").read_text()), signal.SIGTERM)
    eventually(lambda: states(path)[0] == "partial")


# ---------------------------------------------------------------- all of them on one machine


def local(path: str, *flags: str) -> int:
    return verbs.main(["sweep", "run", path, *flags])


def test_all_runs_some_at_a_time(tmp_path, caplog):
    path = written(tmp_path)
    assert local(path, "--jobs", "3") == 0
    runs = read_grid(path).runs
    assert states(path) == ["done"] * 8
    assert len({results(run)["sha"] for run in runs}) == 8
    written_at = [(run.folder / "results.json").stat().st_mtime_ns for run in runs]
    assert local(path) == 0
    assert [(run.folder / "results.json").stat().st_mtime_ns for run in runs] == written_at
    assert "8 done; 0 to run" in caplog.text


def test_each_job_has_a_gpu_and_its_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert sweep_local.environments(3) == [{"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpu} for gpu in "464"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert sweep_local.environments(1) == [{"OMP_NUM_THREADS": "5"}]


def test_failed_runs_are_kept_apart_and_tried_again_only_when_asked(tmp_path, caplog):
    path = written(tmp_path, axes={"fails": ["never", "training", "killed"]})
    runs = read_grid(path).runs
    assert local(path, "--jobs", "2") == 3
    assert states(path) == ["done", "failed", "partial"]
    assert f"failed 1: exit code 3, {runs[1].folder}: error: the loss became NaN." in caplog.text
    assert f"partial 2: ended by SIGKILL, {runs[2].folder}" in caplog.text
    assert local(path) == 3
    assert [len(sweep.Record(run).read()["attempts"]) for run in runs] == [1, 1, 2]
    assert states(path) == ["done", "failed", "done"]
    assert local(path, "--retry_failed") == 0
    assert states(path) == ["done"] * 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stopped_sweep_goes_on(tmp_path, number, code):
    """Ctrl-C: both running children save and end, the third is not started; the next sweep goes on with all three."""
    path = written(tmp_path, fixed={"steps": 80, "step_seconds": 0.05}, axes={"seed": [0, 1, 2]})
    runs = read_grid(path).runs
    process = started("-m", "stt", "sweep", "run", path, "--jobs", "2")
    eventually(lambda: all((run.folder / "checkpoint-1" / "state.json").exists() for run in runs[:2]))
    process.send_signal(number)
    assert process.wait(20) == code
    assert states(path) == ["partial", "partial", "waiting"]
    assert local(path, "--jobs", "2") == 0
    assert [len(sweep.Record(run).read()["attempts"]) for run in runs] == [2, 2, 1]
    assert len({results(run)["sha"] for run in runs}) == 3


# ---------------------------------------------------------------- W&B


FAKE_WANDB = """
import json, os

class Error(Exception):
    pass

class Settings(dict):
    pass

class Run:
    def log(self, row):
        pass

    def finish(self):
        pass

def init(name, mode, **_):
    if mode is None:
        raise Error("no network")
    with open(os.environ["SEEN"], "a") as file:
        file.write(json.dumps([name, mode, os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]]) + "\\n")
    return Run()
"""


def test_a_run_that_goes_on_continues_its_wandb_run(tmp_path):
    """wandb.init takes the id from WANDB_RUN_ID where none is given, as here."""
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    seen = tmp_path / "seen"
    path = written(tmp_path, fixed={"steps": 40, "step_seconds": 0.05, "use_wandb": "true"}, axes={"seed": [0, 1]})
    variables = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "SEEN": str(seen), "WANDB_RUN_ID": "the caller's own"}
    runs = read_grid(path).runs
    for index in (0, 1):
        process = started(str(ROOT / "util" / "sweep.py"), path, "--run", str(index), **variables)
        eventually(lambda index=index: (runs[index].folder / "checkpoint-1" / "state.json").exists())
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 75
        assert started(str(ROOT / "util" / "sweep.py"), path, "--run", str(index), **variables).wait(20) == 0
    rows = [json.loads(line) for line in seen.read_text().splitlines()]
    assert [row[0] for row in rows] == [runs[0].folder.name] * 2 + [runs[1].folder.name] * 2
    ids = [row[2] for row in rows]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert {(row[1], row[3]) for row in rows} == {("offline", "allow")}


