"""Times that can be compared on a machine that is doing other things too.

Every round runs everything once, in an order that rotates, so that whatever slows the machine down slows all of them.
What is reported is the median over the rounds of the ratio within a round, with a 95 % interval of that median.
"""
from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

FEWEST = 3  # rounds
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Work:
    """`run(prepare())` is what a round does; only `run` is timed."""

    run: Callable[[object], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Patience:
    """Rounds are taken until `seconds` are over, but `at_least` so many; only FEWEST once the `deadline`, a value of
    time.perf_counter(), has passed. The first `discard` are not counted. `clock` is a key of CLOCKS."""

    seconds: float
    at_least: int = 6  # the fewest of which the extremes are a 95 % interval of the median
    deadline: float = math.inf
    discard: int = 1
    clock: str = "wall"


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios of paired rounds and its 95 % interval."""

    median: float
    low: float
    high: float
    rounds: int


def alternate(works: Mapping[str, Work], patience: Patience, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every work in every counted round."""
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    number, started = -patience.discard, time.perf_counter()
    with without_collection():
        while _goes_on(patience, number, started):
            gc.collect()
            first = number % len(names)
            for name in names[first:] + names[:first]:
                taken = _timed(works[name], CLOCKS[patience.clock], device)
                if number >= 0:
                    seconds[name].append(taken)
            number += 1
    return seconds


def _goes_on(patience: Patience, rounds: int, started: float) -> bool:
    now = time.perf_counter()
    return rounds < FEWEST or now < patience.deadline and (
        rounds < patience.at_least or now - started < patience.seconds)


def ratio(of: Sequence[float], to: Sequence[float]) -> Ratio:
    """`of` over `to`, round by round."""
    paired = [a / b for a, b in zip(of, to, strict=True)]
    return Ratio(statistics.median(paired), *interval_of_median(paired), len(paired))


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the median that assumes nothing about the distribution: two order statistics.

    The k-th smallest and k-th largest of n, for the largest k with 2 P(Binomial(n, 1/2) < k) <= 0.05; below 6 values
    there is none, and it is the smallest and the largest.
    """
    ordered, n = sorted(values), len(values)
    k, below = 0, 0.0  # below = P(Binomial(n, 1/2) <= k)
    while 2 * (below + math.comb(n, k) / 2**n) <= 0.05:
        below += math.comb(n, k) / 2**n
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


@contextmanager
def without_collection() -> Iterator[None]:
    """Garbage is collected only when asked for, and then only what came to be in here: in milliseconds."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _timed(work: Work, clock: Callable[[], float], device: torch.device) -> float:
    prepared = work.prepare()
    _finish(device)
    start = clock()
    work.run(prepared)
    _finish(device)
    return clock() - start


def _finish(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
