"""Killed at random moments: the short form of benchmarks/kills.py, and that it sees what it looks for."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import kills
from stt.trainers import checkpoints


def test_nothing_is_lost(tmp_path: Path) -> None:
    rows = kills.battery("forked", 4, tmp_path, seed=1)
    found = kills.summary("forked", rows)
    assert found["kills"] == 4
    assert kills.is_clean("forked", rows), found
    assert kills.battery("forked", 4, tmp_path, seed=1) == rows  # goes on with what it noted
    assert "| forked | 4 |" in kills.page({"forked": rows}, "command")
    last = tmp_path / f"forked-{found['complete runs']}"  # nobody kills it any more
    assert kills.attempt("forked", last, 60)["complete"]
    assert kills.weights("forked", last) == kills.weights("forked", tmp_path / "forked-reference")


def test_what_it_would_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is not written in one piece, a start that dies, other weights."""
    folder = tmp_path / "run"
    kills.attempt("forked", folder, 60)
    assert (kills.saved_step(folder), kills.recorded_step(folder)) == (kills.STEPS, kills.STEPS)
    newest = checkpoints.path_of(folder, kills.STEPS)
    (newest / "optimizer.pt").write_bytes(b"half")
    (folder / "results.json").unlink()
    monkeypatch.setitem(kills.START, "forked", lambda folder: os.posix_spawn("/bin/false", ["false"], {}))
    row = kills.attempt("forked", folder, 60)
    assert row == {"kind": "forked", "killed": False, "dead": True, "complete": False, "saved": kills.STEPS - 1,
                   "lost": 0, "backwards": 0, "while_saving": False}
    (checkpoints.path_of(folder, kills.STEPS - 1) / "manifest.json").unlink()
    assert kills.attempt("forked", folder, 60)["lost"] == kills.STEPS - 1
    assert not kills.is_clean("forked", [row])
    clean = row | {"dead": False}
    assert kills.is_clean("forked", [clean, clean | {"complete": True, "equal": True}])
    for bad in ({"lost": 1}, {"backwards": 1}, {"complete": True, "equal": False}):
        assert not kills.is_clean("forked", [clean | bad])
