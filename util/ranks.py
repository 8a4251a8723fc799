"""Several processes (ranks) that do one run together, as torchrun starts them: who is the first, and what all know.

A process alone is the first of one. Imports nothing heavy: torch comes when torchrun's variables are set.
"""
from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from stt.errors import InputError, TrainingFailed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Value = TypeVar("Value")
Item = TypeVar("Item")

PATIENCE = timedelta(hours=1)  # with a process that measures or writes while the others wait
LAST_WORDS = timedelta(seconds=10)  # how long a process that fails waits for the others to fail, too
ENDS = (InputError, TrainingFailed, OSError)  # what ends a run in one sentence


@dataclass
class _State:
    apart: ProcessGroup | None = None  # for last words, which nothing else waits for


_state = _State()


@contextmanager
def joined() -> Iterator[None]:
    """Within it the processes of torchrun are one group; all but the first are quiet. Nothing for a process alone.

    Raises InputError if there are fewer GPUs than processes on this machine.
    """
    if not _is_launched() or _is_distributed():
        yield
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        _take_gpu(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    _state.apart = distributed.new_group(backend="gloo")
    if not is_first():
        logging.disable(logging.WARNING)
    yield
    if _state.apart is not None:  # else some process is not at its end
        distributed.destroy_process_group()


def _take_gpu(number: int, processes: int) -> None:
    import torch

    if processes > torch.cuda.device_count():
        raise InputError(f"{processes} processes and {torch.cuda.device_count()} GPUs on this machine: give "
                         "--nproc_per_node at most the number of GPUs")
    torch.cuda.set_device(number)


def rank() -> int:
    """The number of this process, from 0."""
    return sys.modules["torch"].distributed.get_rank() if _is_distributed() else 0


def world() -> int:
    """How many processes there are."""
    return sys.modules["torch"].distributed.get_world_size() if _is_distributed() else 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def gather(value: Value) -> list[Value]:
    """What every process gave, in their order, on every process."""
    if not _is_distributed():
        return [value]
    found: list[Value] = [value] * world()
    sys.modules["torch"].distributed.all_gather_object(found, value)
    return found


def broadcast(value: Value) -> Value:
    """What the first process gave, on every process."""
    if not _is_distributed():
        return value
    found = [value]
    sys.modules["torch"].distributed.broadcast_object_list(found, src=0)
    return found[0]


def wait_for_all() -> None:
    """Until every process is here."""
    if _is_distributed():
        sys.modules["torch"].distributed.barrier()


def on_first(work: Callable[[], Value]) -> Value:
    """What `work()` gives on the first process, on every process; what ends the run there ends it on every one."""
    value, error = None, None
    if is_first():
        try:
            value = work()
        except ENDS as caught:
            error = caught
    value, error = broadcast((value, error))
    if error is not None:
        raise error
    return value


@contextmanager
def together() -> Iterator[None]:
    """Around what every process does by itself, without the others: an error that ends one of them ends all, with the
    sentence of the first that has one."""
    error = None
    try:
        yield
    except ENDS as caught:
        error = caught
    for one in gather(error):
        if one is not None:
            raise one


def share(items: Sequence[Item]) -> Sequence[Item]:
    """The items that are this process's: every world()-th."""
    return items[rank()::world()]


def shared_out(items: Sequence[Item], work: Callable[[Item], Value], said: str) -> list[Value]:
    """`work(item)` of every item in their order, on every process; each is done by one of them. The first shows a bar
    on a terminal, called what is `said`."""
    from tqdm import tqdm

    hidden = None if is_first() else True  # None: shown on a terminal
    mine = [work(item) for item in tqdm(share(items), desc=said, unit="batch", leave=False, disable=hidden)]
    found = gather(mine)
    return [found[number % world()][number // world()] for number in range(len(items))]


def speaks() -> bool:
    """Whether this process, which fails, is to say why: the first if all fail, else whoever does."""
    if _state.apart is None:
        return not _is_launched() or os.environ["RANK"] == "0"
    try:
        sys.modules["torch"].distributed.monitored_barrier(_state.apart, timeout=LAST_WORDS)
    except RuntimeError:  # the others go on, and torchrun will end them
        _state.apart = None
        return True
    return is_first()


def _is_launched() -> bool:
    return os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR"}


def _is_distributed() -> bool:
    """A process that has not imported torch is alone."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
