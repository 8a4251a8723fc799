"""Differences between two ways to train, over the seeds and the test items both share.   S seeds, N items."""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from stt.words import Z, student

DRAWS = 10_000
POWER = 0.841621  # 80 % point of the normal distribution


@dataclass(frozen=True)
class Difference:
    """Mean difference, its 95 % interval, and the true difference whose interval would leave out 0 in 4 of 5 repeated
    experiments of this size."""

    mean: float
    low: float
    high: float
    detectable: float


def paired_difference(ours: NDArray, theirs: NDArray, seed: int = 0) -> Difference:
    """Of two tables (S, N) of what the same seeds made of the same items, by a bootstrap over seeds and items.

    Seeds and items are drawn with replacement, apart from each other, and their deviations from the mean add up. A draw
    of S seeds varies by (S - 1) / S too little, and so few say little of how much they vary: its deviation is stretched
    by sqrt(S / (S - 1)) t / z (Hesterberg 2015, arxiv.org/abs/1411.5279, section 3). What is left over once seed and
    item are known counts with both, so the interval is a little too wide, never too narrow. One seed varies by nothing:
    then the interval is about the items alone.

    >>> paired_difference(correct["stt"], correct["random"]).detectable
    """
    gaps = ours.astype(float) - theirs.astype(float)  # (S, N)
    generator = numpy.random.default_rng(seed)
    deviation = _drawn(gaps.mean(axis=0), generator)
    if len(gaps) > 1:
        deviation += _stretch(len(gaps)) * _drawn(gaps.mean(axis=1), generator)
    low, high = numpy.quantile(deviation, (0.025, 0.975))
    mean = float(gaps.mean())
    return Difference(mean, mean + float(low), mean + float(high), (1 + POWER / Z) * float(high - low) / 2)


def _stretch(seeds: int) -> float:
    return math.sqrt(seeds / (seeds - 1)) * student(seeds - 1) / Z


def _drawn(values: NDArray, generator: numpy.random.Generator) -> NDArray:
    """(DRAWS,) deviations of the mean of as many values, drawn with replacement, from their mean. Equal values are
    drawn together: how often is multinomial."""
    distinct, counts = numpy.unique(values, return_counts=True)
    drawn = generator.multinomial(len(values), counts / len(values), size=DRAWS)  # (DRAWS, distinct)
    return drawn @ distinct / len(values) - values.mean()
