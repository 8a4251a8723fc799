"""All runs of a grid on this machine, some at a time."""
from __future__ import annotations

import logging
import os
import queue
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from stt.errors import InputError
from util.grid import Grid, Run
from util.sweep import FAILED, STOPPED, Children, Environment, Record, attempt
from util.sweep_table import counted, troubles

logger = logging.getLogger(__name__)


def run_all(grid: Grid, jobs: int, retry_failed: bool) -> int:
    """Runs what is not done, `jobs` at a time; runs that failed before only with `retry_failed`.

    0 = all are done; 3 = some failed; 75 = stopped on request, 130 = by Ctrl-C: the runs saved, the same command goes
    on with them.
    """
    states = [Record(run).state() for run in grid.runs]
    left_out = {"done", "running"} | (set() if retry_failed else {"failed"})
    todo = [run for run, state in zip(grid.runs, states, strict=True) if state not in left_out]
    logger.info("%s", grid.question)
    logger.info("%d runs: %s; %d to run, %d at a time, their output in %s", len(states), counted(states), len(todo),
                jobs, grid.output_dir / ".sweep")
    children = Children()
    with children.stopped_by_signals():
        _run(todo, jobs, children, len(states) - len(todo))
    states = [Record(run).state() for run in grid.runs]
    logger.info("%s", counted(states))
    for line in troubles(grid.runs, "failed") + troubles(grid.runs, "partial"):
        logger.info("%s", line)
    if children.request is not None:
        logger.info("stopped; the same command goes on")
        return 130 if children.request == signal.SIGINT else STOPPED
    return FAILED if {"failed", "partial"} & set(states) else 0


def _run(todo: Sequence[Run], jobs: int, children: Children, finished: int) -> None:
    """Every run has one of the places that `environments` describes to itself."""
    places: queue.SimpleQueue[Environment] = queue.SimpleQueue()
    for environment in environments(jobs):
        places.put(environment)

    def act(run: Run) -> int:
        place = places.get()
        try:
            return attempt(run, children, place, own_log=True)
        except InputError as error:  # started by someone else meanwhile, or its record cannot be read
            logger.error("error: %s", error)
            return 2
        finally:
            places.put(place)

    with (logging_redirect_tqdm(), ThreadPoolExecutor(jobs) as pool,
          tqdm(total=finished + len(todo), initial=finished, unit="run", disable=not sys.stderr.isatty()) as bar):
        pending = {pool.submit(act, run): run for run in todo}
        for future in as_completed(pending):
            code = future.result()
            if code == STOPPED:
                continue
            bar.update()
            if code:
                logger.info("exit code %d: %s", code, pending[future].folder)


def environments(jobs: int) -> list[Environment]:
    """The variables of each of `jobs` places: its share of the cores, and one of the GPUs in CUDA_VISIBLE_DEVICES."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    devices = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    return [{"OMP_NUM_THREADS": threads, **({"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} if devices else {})}
            for i in range(jobs)]
