"""The paired bootstrap over seeds and items: known cases, how often its intervals are right, and what it detects."""
from __future__ import annotations

import math

import numpy
import pytest
from numpy.typing import NDArray

import stt.statistics
from stt.statistics import Difference, paired_difference
from stt.words import student

DELTA = 0.06


def answers(generator: numpy.random.Generator, delta: float) -> tuple[NDArray, NDArray]:
    """(S, N) right or wrong of two modes: items differ in how hard they are, seeds of each mode in how good."""
    hard = generator.normal(0, 0.1, 150)

    def of(mean: float) -> NDArray:
        chance = mean + generator.normal(0, 0.03, 5)[:, None] + hard
        return generator.random(chance.shape) < chance
    return of(0.5 + delta), of(0.5)


def test_one_seed_is_the_normal_interval_of_a_mean() -> None:
    generator = numpy.random.default_rng(0)
    ours, theirs = generator.random((1, 20_000)) < 0.6, generator.random((1, 20_000)) < 0.5
    gaps = ours.astype(float) - theirs
    half = 1.96 * gaps.std() / math.sqrt(20_000)
    found = paired_difference(ours, theirs)
    assert found.mean == pytest.approx(gaps.mean())
    assert (found.low, found.high) == pytest.approx((gaps.mean() - half, gaps.mean() + half), abs=0.04 * half)
    assert found.detectable == pytest.approx((1.96 + 0.8416) / 1.96 * half, rel=0.03)


def test_against_a_bootstrap_that_draws_one_by_one() -> None:
    ours, theirs = answers(numpy.random.default_rng(1), DELTA)
    gaps, generator = ours.astype(float) - theirs, numpy.random.default_rng(2)
    stretch = math.sqrt(5 / 4) * 2.776 / 1.96  # Student's t with 4 degrees of freedom
    drawn = [gaps[:, generator.integers(0, 150, 150)].mean() - gaps.mean()
             + stretch * (gaps[generator.integers(0, 5, 5)].mean() - gaps.mean()) for _ in range(4000)]
    low, high = numpy.quantile(drawn, (0.025, 0.975))
    found = paired_difference(ours, theirs)
    assert (found.low - found.mean, found.high - found.mean) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_intervals_are_right_as_often_as_they_say_and_find_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 experiments: the truth lies inside 95 % of the time or a little more; a difference of the size called
    detectable is found about 4 times in 5."""
    monkeypatch.setattr(stt.statistics, "DRAWS", 2000)
    generator = numpy.random.default_rng(3)
    found = [paired_difference(*answers(generator, DELTA), seed=i) for i in range(200)]
    covered = sum(each.low <= DELTA <= each.high for each in found) / 200
    assert 0.93 <= covered <= 0.99
    detectable = float(numpy.mean([each.detectable for each in found]))
    again = [paired_difference(*answers(generator, detectable), seed=i) for i in range(200)]
    assert 0.7 <= sum(each.low > 0 for each in again) / 200 <= 0.95


def test_seeds_that_differ_widen_the_interval() -> None:
    """The same number of right answers, spread over the seeds or all with one of them."""
    theirs = numpy.zeros((4, 40), dtype=bool)
    even, uneven = theirs.copy(), theirs.copy()
    even[:, :10] = True
    uneven[0, :] = True
    assert paired_difference(even, theirs).mean == paired_difference(uneven, theirs).mean == 0.25
    narrow, wide = paired_difference(even, theirs), paired_difference(uneven, theirs)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_nothing_differs() -> None:
    same = numpy.ones((3, 7), dtype=bool)
    assert paired_difference(same, same) == Difference(0.0, 0.0, 0.0, 0.0)


def test_student() -> None:
    assert [student(freedom) for freedom in (1, 4, 30)] == [12.706, 2.776, 2.042]
    assert student(100) == pytest.approx(1.984, abs=0.001)
