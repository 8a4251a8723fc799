"""What two processes of one group make of a piece of work. They are forked from this one, which has imported all."""
from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from training import forked

from util import ranks


def in_two(work: Callable[..., object], folder: Path, *args: object) -> tuple[object, object]:
    """What `work(rank, *args)` gives in each; fails with what they said if one of them does. They write in `folder`."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    said = folder / "said.txt"
    said.touch()
    children = [forked(lambda rank=rank: _one(rank, port, work, folder, args), said) for rank in (0, 1)]
    assert _codes(children) == [0, 0], said.read_text()
    return tuple(torch.load(folder / f"{rank}.pt") for rank in (0, 1))


def _one(rank: int, port: int, work: Callable[..., object], folder: Path, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the process it was forked from
    with ranks.joined():
        torch.save(work(rank, *args), folder / f"{rank}.pt")


def _codes(children: Sequence[int]) -> list[int]:
    """The exit codes; if one fails, the others are not waited for."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in children:
            ended, status = os.waitpid(child, os.WNOHANG) if child not in codes else (0, 0)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]
