#!/usr/bin/env python
"""The runs of a grid, one at a time, as the tasks of a job array do them: `python util/sweep.py GRID --run 3`.

    --count     the array range, such as 0-29
    --show I    run number I as a command
    --run I     run it: a finished run ends at once, an unfinished one goes on from its last checkpoint

`stt sweep` does all runs of a grid on one machine (util/sweep_local.py) and shows where they stand
(util/sweep_table.py).
"""
from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, MappingProxyType
from typing import IO, Annotated

from tyro.conf import Positional, arg

from stt import cli, stopping
from stt.errors import InputError
from stt.runs import read_json
from util.grid import Run, read_grid
from util.utils import write_json_atomic

logger = logging.getLogger(__name__)

FAILED, STOPPED = 3, stopping.CODE  # exit codes; a stopped run saved, and goes on with --resume
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)  # to stop
PARTIAL_CODES = (STOPPED, *(128 + number for number in (*REQUESTS, signal.SIGKILL)))  # ended from outside
PATIENCE = 10.0  # seconds in which an earlier process of the same run may end
Environment = Mapping[str, str]


@dataclass(frozen=True)
class TaskArgs:
    """One run of a grid file, for the tasks of a job array. `stt sweep` does all of them."""

    grid: Annotated[str, Positional, arg(metavar="GRID")]
    """the grid file (docs/sweeps.md)"""
    count: bool = False
    """write the array range, such as 0-29"""
    show: int | None = None
    """write this run as a command"""
    run: int | None = None
    """run this run; a finished one ends at once, an unfinished one goes on"""

    def __post_init__(self) -> None:
        if self.count + (self.show is not None) + (self.run is not None) != 1:
            raise InputError("give one of --count, --show NUMBER and --run NUMBER")


def main(args: TaskArgs) -> int:
    """The run's exit code; 0 for the questions."""
    grid = read_grid(args.grid)
    if args.count:
        sys.stdout.write(f"{grid.array_range}\n")
    elif args.show is not None:
        sys.stdout.write(f"{grid.run(args.show).shown()}\n")
    else:
        run, children = grid.run(args.run), Children()
        with children.stopped_by_signals():
            return attempt(run, children)
    return 0


# ---------------------------------------------------------------- what is known about a run


class Record:
    """What a sweep knows of one run. It lies beside the run folder, which a new start empties: the attempts and the
    W&B id (.json), the lock that the run's processes hold (.lock), and its output where SLURM does not keep it (.log).
    """

    def __init__(self, run: Run):
        self._run = run
        place = run.folder.parent / ".sweep"
        self.path, self.lock, self.log = (place / f"{run.folder.name}.{kind}" for kind in ("json", "lock", "log"))

    def read(self) -> dict[str, object]:
        """The record; a new one before the first attempt. Raises InputError if it is of a run with other flags."""
        flags = json.loads(json.dumps(self._run.flags, default=str))
        if not self.path.exists():
            return {"flags": flags, "wandb_id": secrets.token_hex(8), "attempts": []}
        found = read_json(self.path)
        if found.get("flags") != flags:
            raise InputError(f"{self._run.folder} belongs to a run with other flags; give the grid another output_dir.")
        return found

    def is_done(self) -> bool:
        return (self._run.folder / "results.json").exists()

    def last(self) -> dict[str, object]:
        """The last attempt: started, host, job, own_log, seconds, exit_code (None = its end was not seen), or {}."""
        return (self.read()["attempts"] or [{}])[-1]

    def state(self) -> str:
        """done | running | partial (was stopped or killed, may go on) | failed (by itself) | waiting (never started)"""
        if self.is_done():
            return "done"
        if self._is_locked():
            return "running"
        last = self.last()
        code = last.get("exit_code")
        if code and code not in PARTIAL_CODES:
            return "failed"
        return "partial" if self._run.folder.exists() or (last and code != 0) else "waiting"

    @contextmanager
    def locked(self) -> Iterator[IO[str]]:
        """Holds the run's lock and yields the file. Raises InputError if another process keeps it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.lock, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"cannot write {self.lock}: {error.strerror}; give the grid another output_dir.") from None
        with file:
            until = time.monotonic() + PATIENCE
            while not _lock(file, fcntl.LOCK_EX):
                if time.monotonic() > until:
                    raise InputError(f"the run in {self._run.folder} is running already; wait for it or stop it first.")
                time.sleep(0.1)
            yield file

    def begin(self, own_log: bool) -> dict[str, object]:
        """Writes down that an attempt starts; the record."""
        record = self.read()
        record["attempts"].append({"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname(),
                                   "job": os.environ.get("SLURM_JOB_ID"), "own_log": own_log, "seconds": None,
                                   "exit_code": None})
        self._write(record)
        return record

    def end(self, record: dict[str, object], seconds: float, code: int) -> None:
        """Writes down how the attempt ended."""
        record["attempts"][-1] |= {"seconds": round(seconds, 1), "exit_code": code}
        self._write(record)

    def _write(self, record: dict[str, object]) -> None:
        """A full disk must not hide how the run ended."""
        try:
            write_json_atomic(self.path, record)
        except OSError as error:
            logger.error("error: cannot write %s: %s", self.path, error.strerror)

    def _is_locked(self) -> bool:
        if not self.lock.exists():
            return False
        with open(self.lock, encoding="utf-8") as file:
            return not _lock(file, fcntl.LOCK_SH)


def _lock(file: IO[str], kind: int) -> bool:
    """Whether the lock was free; it is held from now on until every process that has the file is gone."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("no locks on this file system (%s): nothing stops a run from being started twice", error)
    return True


# ---------------------------------------------------------------- running


class Children:
    """The processes of runs. A request to stop is passed on to all of them, once, as SIGTERM: recipes then save and end
    with exit code 75. A second Ctrl-C kills them."""

    def __init__(self) -> None:
        self.request: int | None = None  # the signal that asked to stop
        self._running: set[subprocess.Popen[bytes]] = set()
        self._told: set[subprocess.Popen[bytes]] = set()

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Signals to this process are requests to stop."""
        heard = [number for number in REQUESTS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        before = {number: signal.signal(number, self._stop) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, command: list[str], environment: Environment, output: IO[bytes] | None, lock: IO[str]) -> int:
        """The exit code of the command (128 + the signal that ended it; STOPPED if that was ours, which it did not hear
        yet).

        It has a process group of its own, so that the Ctrl-C of a terminal reaches it only through us.
        """
        child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                 pass_fds=[lock.fileno()], process_group=0)
        self._running.add(child)
        if self.request is not None:  # came while it was being started
            self._tell(child)
        code = child.wait()
        self._running.discard(child)
        if code == -signal.SIGTERM and child in self._told:
            return STOPPED
        return code if code >= 0 else 128 - code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and self.request == signal.SIGINT
        self.request = number
        for child in list(self._running):
            if again:
                child.kill()
            else:
                self._tell(child)

    def _tell(self, child: subprocess.Popen[bytes]) -> None:
        if child not in self._told:
            self._told.add(child)
            child.send_signal(signal.SIGTERM)


def attempt(run: Run, children: Children, further: Environment = MappingProxyType({}), own_log: bool = False) -> int:
    """Starts the run, or goes on with it, and returns how it ended: 0 once results.json is there.

    `further` variables of its environment. `own_log`: its output goes into the record's log instead of ours.
    Raises InputError if the run is running already.
    """
    record = Record(run)
    if not record.is_done():
        with record.locked() as lock:
            code = STOPPED if children.request is not None else _attempt(run, record, children, lock, further, own_log)
        if not record.is_done():
            return code
    logger.info("done: %s", run.folder)
    return 0


def _attempt(run: Run, record: Record, children: Children, lock: IO[str], further: Environment, own_log: bool) -> int:
    written, began = record.begin(own_log), time.monotonic()
    resume = ["--resume"] if any(run.folder.glob("checkpoint*")) else []
    command = [sys.executable, *run.command(*resume)]
    environment = {**os.environ, "WANDB_RUN_ID": written["wandb_id"], "WANDB_RESUME": "allow", **further}
    logger.info("%s %s", "going on with" if resume else "starting", run.folder)
    if own_log:
        with open(record.log, "ab") as log:
            code = children.run(command, environment, log, lock)
    else:
        code = children.run(command, environment, None, lock)
    if code == 0 and not record.is_done():
        logger.error("error: %s ended with exit code 0 and wrote no results.json", run.folder)
        code = FAILED
    record.end(written, time.monotonic() - began, code)
    return code


if __name__ == "__main__":
    sys.exit(cli.run(main, TaskArgs, prog="sweep.py"))
