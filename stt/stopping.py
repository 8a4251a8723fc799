"""Stopping on request: after SIGTERM or SIGUSR1 a recipe ends with exit code 75, and --resume goes on with it.

Schedulers send them before a time limit or a preemption. While something is being written or trained the signal is only
noted: the training loop finishes its step, saves and stops. Everywhere else nothing would be lost, and the process ends
where it stands. Imports nothing heavy, so that the handlers are there before torch is.
"""
from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
MARKER = "STOPPED"  # in the run folder, for whoever cannot see the exit code (torchrun's own is 1)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class _State:
    is_listening: bool = False
    is_deferred: bool = False
    reason: str | None = None  # what asked for the stop
    folder: Path | None = None  # the run's, once it is there


_state = _State()


def listen() -> None:
    """From now on the signals stop this process as said above. Belongs to the main thread."""
    _state.is_listening, _state.reason, _state.folder = True, None, None
    for number in SIGNALS:
        signal.signal(number, _on_signal)


def ignore() -> None:
    """From now on the signals do nothing: the run is complete, or its end is decided. Also while Python shuts down."""
    if _state.is_listening:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def resumable_in(folder: Path) -> None:
    """The run folder exists: a stop leaves its marker there, and none is left from an earlier one."""
    _state.folder = folder
    (folder / MARKER).unlink(missing_ok=True)


def request(reason: str) -> None:
    """Ask for a stop, as a signal does."""
    _state.reason = _state.reason or reason


def requested() -> bool:
    """Whether somebody asked for a stop."""
    return _state.reason is not None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within it a signal is only noted; the process ends after it, unless an outer one goes on or something failed."""
    outer, _state.is_deferred = _state.is_deferred, True
    try:
        yield
    finally:
        _state.is_deferred = outer
    if requested() and not outer:
        _end()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Within it, also inside `deferred`, a signal ends the process where it stands: everything is saved."""
    outer, _state.is_deferred = _state.is_deferred, False
    try:
        if requested():
            _end()
        yield
    finally:
        _state.is_deferred = outer


def _on_signal(number: int, _: FrameType | None) -> None:
    request(signal.Signals(number).name)
    if not _state.is_deferred:
        _end()


def _end() -> None:
    """Says how to go on, and ends the process without unwinding: the signal may have come anywhere, even during an
    import, where an exception would be swallowed or become another one."""
    ignore()
    checkpoints = list(_state.folder.glob("checkpoint-*")) if _state.folder else []
    how = "the same command with --resume goes on" if checkpoints else "the same command starts again"
    with contextlib.suppress(OSError):
        if _state.folder:
            (_state.folder / MARKER).write_text(f"{_state.reason}\n", encoding="utf-8")
        os.write(2, f"stopped by {_state.reason}: {how}\n".encode())
    os._exit(CODE)
