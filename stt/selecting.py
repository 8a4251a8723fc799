"""sites -> scores -> budget -> Selection: the one place where a method's name becomes a choice of neurons."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from stt import budget, scores
from stt.calibrate import Batch, Calibration, calibrate
from stt.errors import InputError
from stt.selection import Selection
from stt.sites import Sites, find_sites

STT = ("activation_mean", "activation_rate")


@dataclass(frozen=True)
class Budget:
    """How many units a site keeps: the best `topk_ratio` by each score (STT keeps the union of two such sets), exactly
    `keep_ratio` of the site, or exactly `counts[site]`. `across_sites` keeps `keep_ratio` of all sites together, by one
    ranking of one score. Raises InputError for a ratio outside (0, 1]."""

    topk_ratio: float = 0.3
    keep_ratio: float | None = None
    counts: Mapping[str, int] | None = None
    across_sites: bool = False

    def __post_init__(self) -> None:
        budget.check_ratio("topk_ratio", self.topk_ratio)
        if self.keep_ratio is not None:
            budget.check_ratio("keep_ratio", self.keep_ratio)
        if self.across_sites and (self.keep_ratio is None or self.counts is not None):
            raise InputError("across_sites ranks all units of the model together: give keep_ratio, no sizes to match")


@dataclass(frozen=True)
class Measured:
    """Scores by name and site, and what they were measured on."""

    sites: Sites
    scores: dict[str, dict[str, Tensor]]
    calibration: Calibration
    options: dict[str, object]


def select(model: nn.Module, data: Iterable[Batch] = (), tokenizer: PreTrainedTokenizerBase | None = None, *,
           score: str = "stt", topk_ratio: float = 0.3, keep_ratio: float | None = None,
           like: Mapping[str, Tensor] | None = None, across_sites: bool = False, threshold: float = 0.01,
           seed: int = 42, count_padding: bool = False) -> Selection:
    """The neurons of `model` worth keeping, judged on `data` (an iterable of batches).

    `score` is "stt" (the union of the best by mean activation and by activation rate) or the name of one score; `like`
    is a selection whose sizes to match; `across_sites` ranks all units of the model together, by one score whose values
    compare between sites. Raises InputError for an unknown score, a ratio outside (0, 1], empty data, or
    a model without sites.

    >>> selection = stt.select(model, batches, tokenizer, keep_ratio=0.3)
    """
    counts = None if like is None else {site: len(ids) for site, ids in like.items()}
    size = Budget(topk_ratio, keep_ratio, counts, across_sites)
    measured = measure(model, data, tokenizer, [score], threshold=threshold, seed=seed, count_padding=count_padding)
    return keep(measured, score, size)


def measure(model: nn.Module, data: Iterable[Batch], tokenizer: PreTrainedTokenizerBase | None, methods: list[str], *,
            threshold: float = 0.01, seed: int = 42, count_padding: bool = False, progress: bool = True,
            options: Mapping[str, Mapping[str, object]] | None = None) -> Measured:
    """All scores that `methods` need, in one pass over `data`. `options` are keyword arguments by score name."""
    names = list(dict.fromkeys(name for method in methods for name in scores_of(method)))
    given = {"activation_rate": {"threshold": threshold}, "random": {"seed": seed}, **(options or {})}
    made = [scores.make(name, **given.get(name, {})) for name in names]
    sites = find_sites(model)
    calibration = calibrate(model, sites, made, data, tokenizer, count_padding, progress)
    said = {"threshold": threshold, "seed": seed, "count_padding": count_padding, **(options or {})}
    return Measured(sites, dict(zip(names, calibration.scores, strict=True)), calibration, said)


def scores_of(method: str) -> tuple[str, ...]:
    """Names of the scores a method ranks by: two for "stt", else the one it is named after."""
    return STT if method == "stt" else (method,)


def keep(measured: Measured, method: str, size: Budget) -> Selection:
    """The selection that `method` makes of what was measured."""
    if size.counts is not None:
        for name in sorted(size.counts.keys() ^ measured.sites.keys()):
            is_extra = name in size.counts
            wrong = f"names {name!r}, which is no" if is_extra else f"misses {name!r}, which is a"
            raise InputError(f"the budget {wrong} site of this model: "
                             f"give the number of units of each of its {len(measured.sites)} sites")
    names = scores_of(method)
    if size.across_sites:
        if len(names) > 1:
            raise InputError(f"across_sites needs one score, {method!r} has {len(names)}: use {' or '.join(names)}")
        units = budget.global_top(measured.scores[method], size.keep_ratio)
    else:
        units = {site: _kept([measured.scores[name][site] for name in names], size, site) for site in measured.sites}
    meta = {"method": method, "topk_ratio": size.topk_ratio, "keep_ratio": size.keep_ratio,
            "across_sites": size.across_sites, **measured.options,
            "calibration": {"digest": measured.calibration.digest, "tokens": measured.calibration.tokens,
                            "examples": measured.calibration.examples},
            "widths": {site.name: site.width for site in measured.sites.values()},
            "fingerprint": measured.sites.fingerprint,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    return Selection(units, meta)


def _kept(of_site: list[Tensor], size: Budget, site: str) -> Tensor:
    if size.counts is not None:
        if not 1 <= size.counts[site] <= len(of_site[0]):
            raise InputError(f"the budget keeps {size.counts[site]} units of {site}, which has {len(of_site[0])}: "
                             "keep at least one and at most all")
        return budget.interleaved(of_site, size.counts[site])
    if size.keep_ratio is not None:
        return budget.interleaved(of_site, budget.exact_count(len(of_site[0]), size.keep_ratio))
    return budget.stt_union(of_site, size.topk_ratio)


def composition(measured: Measured, selection: Selection) -> dict[str, dict[str, int]]:
    """Of the kept units of each site: how many are there for their mean only, for both scores, for their rate only.

    A unit is there for a score if it is among its best k: the k of the published top-k union, or, for an exact budget,
    the smallest k at which the two sets cover the selection.
    """
    counted = {}
    for site, ids in selection.items():
        places = [budget.ranking(measured.scores[name][site]).argsort()[ids] for name in STT]
        k = int(torch.stack(places).amin(0).max()) + 1
        if selection.meta["keep_ratio"] is None:
            k = max(1, int(selection.meta["topk_ratio"] * measured.sites[site].width))
        by_mean, by_rate = (place < k for place in places)
        counted[site] = {"mean_only": int((by_mean & ~by_rate).sum()), "both": int((by_mean & by_rate).sum()),
                         "rate_only": int((by_rate & ~by_mean).sum())}
    return counted
