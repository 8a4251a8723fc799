"""Budgets against sorting in plain Python: exact counts, ties to the lower id, the published counting of the union."""
from __future__ import annotations

import math

import numpy
import pytest
import tiny
import torch
from torch import Tensor

import stt
from stt import budget
from stt.errors import InputError
from stt.selecting import Budget, composition, kept, measure
from stt.stt_tracker import STTTracker

WIDTHS = [1, 2, 9, 10, 44, 101]
RATIOS = [0.001, 0.1, 0.29, 0.3, 1 / 3, 0.5, 0.999, 1.0]
WRONG_RATIOS = [0, -1, 1.5, math.nan, math.inf, "0.3", None]


def score(width: int, seed: int = 0) -> Tensor:
    """Few distinct values, so that most places are tied."""
    return torch.randint(0, 4, (width,), generator=torch.Generator().manual_seed(seed)).float() - 1.5


def best(values: Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i].item(), i))[:count])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_top_fraction_and_union(width: int, ratio: float) -> None:
    a, b = score(width, 1), score(width, 2)
    count = max(1, int(ratio * width))
    assert budget.top_fraction(a, ratio).tolist() == best(a, count)
    union = budget.stt_union([a, b], ratio)
    assert union.tolist() == sorted({*best(a, count), *best(b, count)})
    assert count <= len(union) <= 2 * count
    assert budget.stt_union([a, a], ratio).tolist() == best(a, count)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_interleaved_takes_the_best_of_each_in_turn(width: int, ratio: float) -> None:
    count = budget.exact_count(width, ratio)
    assert count == max(1, round(ratio * width))
    scores = [score(width, 1), score(width, 2), torch.rand(width, generator=torch.Generator().manual_seed(3))]
    kept: list[int] = []
    queues = [sorted(range(width), key=lambda i, s=s: (-s[i].item(), i)) for s in scores]
    while len(kept) < count:
        for queue in queues:
            best_left = queue.pop(0)
            if best_left not in kept and len(kept) < count:
                kept.append(best_left)
    ids = budget.interleaved(scores, count)
    assert ids.tolist() == sorted(kept)
    assert ids.dtype == torch.int64
    assert budget.interleaved(scores[:1], count).tolist() == best(scores[0], count)


def test_ties_go_to_the_lower_id() -> None:
    same = torch.zeros(5000)  # long enough that an unstable sort would show
    assert budget.ranking(same).tolist() == list(range(5000))
    assert budget.top(same, 7).tolist() == list(range(7))
    assert budget.ranking(torch.tensor([0.0, -0.0, 1.0, math.inf, -math.inf])).tolist() == [3, 2, 0, 1, 4]


@pytest.mark.parametrize("keep_ratio", [0.06, 0.3, 0.5, 1.0])
def test_global_top(keep_ratio: float) -> None:
    scores = {"b": score(10, 1) + 5, "a": score(30, 2), "c": score(20, 3) - 9}
    kept = budget.global_top(scores, keep_ratio)
    count = max(1, round(keep_ratio * 60))
    owed = {(site, best(values, 1)[0]) for site, values in scores.items()}
    flat = [(site, i) for site, values in scores.items() for i in range(len(values))]
    order = sorted(flat, key=lambda entry: (-scores[entry[0]][entry[1]].item(), flat.index(entry)))
    expected = owed | set([entry for entry in order if entry not in owed][:count - 3])
    assert {(site, i) for site, ids in kept.items() for i in ids.tolist()} == expected
    assert list(kept) == ["b", "a", "c"]
    assert all(ids.tolist() == sorted(ids.tolist()) for ids in kept.values())
    assert sum(map(len, kept.values())) == count


def test_global_top_keeps_one_in_every_site_or_says_why_not() -> None:
    with pytest.raises(InputError, match="keep_ratio 0.02 keeps 1 units, fewer than the 2 sites"):
        budget.global_top({"a": torch.rand(20), "b": torch.rand(30)}, 0.02)


def test_nan_is_refused() -> None:
    with pytest.raises(InputError, match="a score holds NaN"):
        budget.ranking(torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize("ratio", WRONG_RATIOS)
def test_wrong_ratios(ratio: object) -> None:
    with pytest.raises(InputError, match=r"topk_ratio must be in \(0, 1\], got"):
        Budget(topk_ratio=ratio)
    with pytest.raises(InputError, match=r"topk_ratio must be in \(0, 1\], got"):
        budget.top_fraction(torch.rand(4), ratio)
    if ratio is not None:
        with pytest.raises(InputError, match=r"keep_ratio must be in \(0, 1\], got"):
            Budget(keep_ratio=ratio)


def test_ratio_may_be_any_real_number() -> None:
    assert [budget.exact_count(10, ratio) for ratio in (1, numpy.float64(0.3), 0.3)] == [10, 3, 3]


# ---------------------------------------------------------------- from scores to a selection


@pytest.fixture(scope="module")
def measured():
    model, batch = tiny.build("qwen2")
    return measure(model, [batch], None, ["stt", "magnitude"])


def test_keep_by_each_budget(measured) -> None:
    mean, rate = measured.scores["activation_mean"], measured.scores["activation_rate"]
    for site in measured.sites:
        expected = sorted({*best(mean[site], 13), *best(rate[site], 13)})  # int(0.3 * 44)
        assert kept(measured, "stt", Budget())[site].tolist() == expected
        magnitude = measured.scores["magnitude"][site]
        assert kept(measured, "magnitude", Budget())[site].tolist() == best(magnitude, 13)
        assert len(kept(measured, "stt", Budget(keep_ratio=0.3))[site]) == 13
        counts = {name: 5 + i for i, name in enumerate(measured.sites)}
        matched = kept(measured, "magnitude", Budget(counts=counts))
        assert matched[site].tolist() == best(magnitude, counts[site])
    assert all(ids.tolist() == list(range(44)) for ids in kept(measured, "stt", Budget(topk_ratio=1.0)).values())


def test_one_ranking_over_all_sites(measured) -> None:
    selection = kept(measured, "magnitude", Budget(keep_ratio=0.25, across_sites=True))
    scored = [(-float(value), i, site, unit) for i, (site, score) in enumerate(measured.scores["magnitude"].items())
              for unit, value in enumerate(score)]
    expected = sorted((site, unit) for _, _, site, unit in sorted(scored)[:round(0.25 * len(scored))])
    assert sorted((site, int(unit)) for site, ids in selection.items() for unit in ids) == expected
    with pytest.raises(InputError, match="needs one score, 'stt' has 2"):
        kept(measured, "stt", Budget(keep_ratio=0.25, across_sites=True))
    with pytest.raises(InputError, match="give keep_ratio"):
        Budget(across_sites=True)


@pytest.mark.parametrize("count", [0, -1, 45])
def test_impossible_counts(measured, count: int) -> None:
    counts = dict.fromkeys(measured.sites, 3) | {"model.layers.1.mlp": count}
    with pytest.raises(InputError, match=f"the budget keeps {count} units of model.layers.1.mlp, which has 44"):
        kept(measured, "stt", Budget(counts=counts))


def test_counts_of_other_sites(measured) -> None:
    with pytest.raises(InputError, match="the budget misses 'model.layers.1.mlp', which is a site.*its 2 sites"):
        kept(measured, "stt", Budget(counts={"model.layers.0.mlp": 3}))
    with pytest.raises(InputError, match="the budget names 'elsewhere', which is no site of this model"):
        kept(measured, "stt", Budget(counts=dict.fromkeys(measured.sites, 3) | {"elsewhere": 3}))


@pytest.mark.parametrize("size", [Budget(), Budget(0.05), Budget(keep_ratio=0.3), Budget(keep_ratio=0.01)])
def test_composition_adds_up(measured, size: Budget) -> None:
    selection = kept(measured, "stt", size)
    for site, parts in composition(measured, selection).items():
        assert sum(parts.values()) == len(selection[site])
        if size.keep_ratio is None:
            k = max(1, int(size.topk_ratio * 44))
            by_mean = set(best(measured.scores["activation_mean"][site], k))
            by_rate = set(best(measured.scores["activation_rate"][site], k))
            assert parts == {"mean_only": len(by_mean - by_rate), "both": len(by_mean & by_rate),
                             "rate_only": len(by_rate - by_mean)}


def test_select_is_the_tracker() -> None:
    model, batch = tiny.build("phi")
    by_default = stt.select(model, [batch])
    assert by_default == STTTracker(model, topk_ratio=0.3).get_active_indices([batch])
    for threshold in (-0.5, 1.5):
        selection = stt.select(model, [batch], topk_ratio=0.2, threshold=threshold)
        assert selection == STTTracker(model, None, threshold, 0.2).get_active_indices([batch])
        assert selection != stt.select(model, [batch], topk_ratio=0.2)
    padded = stt.select(model, [batch], count_padding=True)
    assert padded != by_default
    assert padded.meta["count_padding"] is True


def test_select_like_another_selection() -> None:
    model, batch = tiny.build("phi")
    by_stt = stt.select(model, [batch], topk_ratio=0.2)
    at_random = stt.select(model, score="random", keep=by_stt)
    assert [len(ids) for ids in at_random.values()] == [len(ids) for ids in by_stt.values()]
    assert at_random != by_stt
    assert at_random == stt.select(model, score="random", keep=by_stt)
    assert at_random == stt.select(model, score="random", keep={site: len(ids) for site, ids in by_stt.items()})
    with pytest.raises(InputError, match="the budget misses 'model.layers.0.mlp'"):
        stt.select(model, score="random", keep={})
    assert at_random != stt.select(model, score="random", keep=by_stt, seed=1)
    with pytest.raises(InputError, match="unknown score 'magnitud'. Did you mean 'magnitude'"):
        stt.select(model, score="magnitud")
