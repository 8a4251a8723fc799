"""Killed at random moments: the short form of benchmarks/kills.py, and that it sees what it looks for."""
from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from benchmarks import kills
from stt.trainers import checkpoints

PATIENT = kills.Moment(60)


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    kills.warm_up()


def test_nothing_is_lost(tmp_path: Path) -> None:
    rows = kills.battery("forked", 4, tmp_path, seed=1)
    found = kills.summary("forked", rows)
    assert found["kills"] == 4
    assert kills.is_clean("forked", rows), found
    assert kills.battery("forked", 4, tmp_path, seed=1) == rows  # goes on with what it noted
    assert "| forked | 4 |" in kills.page({"forked": rows}, "command")
    last = tmp_path / f"forked-{found['complete runs']}"  # nobody kills it any more
    assert kills.attempt("forked", last, PATIENT)["complete"]
    assert kills.weights("forked", last) == kills.weights("forked", tmp_path / "forked-reference")


def test_what_it_would_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is not written in one piece, a start that dies, other weights."""
    folder = tmp_path / "run"
    kills.attempt("forked", folder, PATIENT)
    assert (kills.saved_step(folder), kills.recorded_step(folder)) == (kills.STEPS, kills.STEPS)
    newest = checkpoints.path_of(folder, kills.STEPS)
    (newest / "optimizer.pt").write_bytes(b"half")
    (folder / "results.json").unlink()
    monkeypatch.setitem(kills.START, "forked", lambda folder: os.posix_spawn("/bin/false", ["false"], {}))
    row = kills.attempt("forked", folder, PATIENT)
    assert row == {"kind": "forked", "killed": False, "dead": True, "complete": False, "saved": kills.STEPS - 1,
                   "lost": 0, "backwards": 0, "phase": None, "while_saving": False}
    (checkpoints.path_of(folder, kills.STEPS - 1) / "manifest.json").unlink()
    assert kills.attempt("forked", folder, PATIENT)["lost"] == kills.STEPS - 1
    assert not kills.is_clean("forked", [row])
    clean = row | {"dead": False}
    assert kills.is_clean("forked", [clean, clean | {"complete": True, "equal": True}])
    for bad in ({"lost": 1}, {"backwards": 1}, {"complete": True, "equal": False}):
        assert not kills.is_clean("forked", [clean | bad])


def test_moments() -> None:
    """In the training that is left until half of the kills hit it, and wherever all steps are saved, anywhere."""
    clock = kills.Clock(whole=40, training=20, steps=20)
    chance = random.Random(0)
    hit, missed = {"killed": True, "phase": "training"}, {"killed": True, "phase": "after training"}
    assert clock.moment([], 15, chance).in_training
    assert clock.moment([hit, missed], 15, chance).in_training
    assert not clock.moment([hit, hit, missed], 15, chance).in_training
    assert not clock.moment([missed], 20, chance).in_training
    anywhere = [clock.moment([hit], 15, chance).seconds for _ in range(2000)]
    training = [clock.moment([], 15, chance).seconds for _ in range(2000)]  # 5 of 20 steps are left: 5 of 20 seconds
    assert (min(anywhere) < 1, max(anywhere) > 59, max(anywhere) <= 60) == (True, True, True)
    assert (min(training) < 0.1, max(training) > 4.9, max(training) <= 5) == (True, True, True)


def test_phases(tmp_path: Path) -> None:
    """By the record and the checkpoints alone."""
    record = tmp_path / "args.json"
    assert kills.phase(tmp_path, 100.0, 0, 12) == "before training"
    record.write_text("{}")
    os.utime(record, (99, 99))  # of an earlier start
    assert kills.phase(tmp_path, 100.0, 3, 12) == "before training"
    os.utime(record, (101, 101))
    assert kills.phase(tmp_path, 100.0, 0, 12) == "training"
    assert kills.phase(tmp_path, 100.0, 11, 12) == "training"
    assert kills.phase(tmp_path, 100.0, 12, 12) == "after training"
