"""sites -> scores -> budget -> Selection: the one place where a method's name becomes a choice of units."""
from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from stt import budget, head_scores, scores, serving
from stt import compensate as compensation
from stt.batches import Batch
from stt.calibrate import MIN_TOKENS, Calibration, calibrate
from stt.errors import InputError, unknown_name
from stt.heads import find_heads, with_heads
from stt.selection import Selection
from stt.sites import Site, Sites, find_sites, projection_weight

logger = logging.getLogger(__name__)

STT = ("activation_mean", "activation_rate")
UNITS = ("neurons", "heads", "both")  # what is chosen from
HEADS = "attention heads"  # what their score is filed under, beside those of neurons under their names


@dataclass(frozen=True)
class Budget:
    """How many units a site keeps: the best `topk_ratio` by each score (STT keeps the union of two such sets), exactly
    `keep_ratio` of the site, or exactly `counts[site]`. `across_sites` keeps `keep_ratio` of all sites together, by one
    ranking of one score. `width` and `multiple_of` then move these numbers to widths that serve (serving.served), and
    every site keeps its best so many. All this is about neurons; of the heads of every attention site it is the share
    `heads_keep`, by default keep_ratio or topk_ratio. Raises InputError for a ratio outside (0, 1]."""

    topk_ratio: float = 0.3
    keep_ratio: float | None = None
    counts: Mapping[str, int] | None = None
    across_sites: bool = False
    width: str = "free"
    multiple_of: int = 1
    heads_keep: float | None = None

    def __post_init__(self) -> None:
        budget.check_ratio("topk_ratio", self.topk_ratio)
        serving.most_widths(self.width)
        serving.check_multiple(self.multiple_of)
        for name in ("keep_ratio", "heads_keep"):
            if getattr(self, name) is not None:
                budget.check_ratio(name, getattr(self, name))
        if self.across_sites and (self.keep_ratio is None or self.counts is not None):
            raise InputError("across_sites ranks all units of the model together: give keep_ratio, no sizes to match")

    @property
    def share_of_heads(self) -> float:
        """The first of heads_keep, keep_ratio and topk_ratio that is given."""
        return next(share for share in (self.heads_keep, self.keep_ratio, self.topk_ratio) if share is not None)


@dataclass(frozen=True)
class Measured:
    """Scores by name and site, the same from each half of the examples (None if one is empty), what each of them needs,
    and the model and data they were measured on. `head_score` is the one of its attention sites, if it has any."""

    model: nn.Module
    sites: Sites
    needs: dict[str, tuple[str, ...]]
    scores: dict[str, dict[str, Tensor]]
    halves: tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]] | None
    calibration: Calibration
    options: dict[str, object]
    head_score: str | None = None


def select(model: nn.Module, data: Iterable[Batch] = (), tokenizer: PreTrainedTokenizerBase | None = None, *,
           score: str = "stt", keep: float | Mapping[str, Tensor | int] | None = None, topk_ratio: float = 0.3,
           across_sites: bool = False, compensate: str = "none", select_on: str = "all", threshold: float = 0.01,
           seed: int = 42, count_padding: bool = False, width: str = "free", multiple_of: int = 1,
           min_tokens: int = MIN_TOKENS, units: str = "neurons", heads_keep: float | None = None) -> Selection:
    """The units of `model` worth keeping, judged on `data` (an iterable of batches, or a list of strings).

    `score` is "stt" (the union of the best by mean activation and by activation rate) or the name of one score.
    `keep` is the share of every site to keep, or a selection (or counts by site) whose sizes to match; None keeps the
    best `topk_ratio` by each score, as published. `across_sites` ranks all units of the model together, by one score
    whose values compare between sites. `compensate` ("none", "mean", "lstsq", "lstsq_weights") folds what the removed
    neurons contributed into the kept ones; the new values travel with the selection. `select_on` counts "all" tokens,
    those of the "prompt" or of the "answer". `width` is how many different widths the sites may have (per dense width):
    "free", "uniform" or "buckets:N"; each is rounded up to `multiple_of`. The experts of one stack keep equally many, a
    multiple of 8; one that fewer than `min_tokens` tokens reach is ranked by magnitude. How far the two halves of the
    data agree, and how clear the cut is, stands in `meta["reliability"]`.

    `units` are "neurons", attention "heads" (a key/value head with its query heads is one) or "both". Heads are ranked
    by the score of the same name, or by the norm of what they make (head_scores.matching). Every attention keeps the
    share `heads_keep` (None: `keep`, or `topk_ratio`), or as many as the selection to match. `across_sites`,
    `compensate`, `width` and `multiple_of` are about neurons.

    Raises InputError for an unknown name, a ratio outside (0, 1], `min_tokens` below 0, empty data, or a model without
    sites.

    >>> selection = stt.select(model, batches, tokenizer, score="contribution", keep=0.3)
    """
    counts = None
    if isinstance(keep, Mapping):
        counts = {site: ids if isinstance(ids, int) else len(ids) for site, ids in keep.items()}
    size = Budget(topk_ratio, keep if counts is None else None, counts, across_sites, width, multiple_of, heads_keep)
    _check_units(units, size, compensate)
    methods, of_heads = measured_for([score], units)
    measured = measure(model, data, tokenizer, methods, threshold=threshold, seed=seed, count_padding=count_padding,
                       select_on=select_on, compensate=compensate, min_tokens=min_tokens, head_score=of_heads)
    return kept(measured, score, size)


def _check_units(units: str, size: Budget, compensate: str) -> None:
    if units not in UNITS:
        raise unknown_name("units", units, UNITS)
    if units == "neurons" and size.heads_keep is not None:
        raise InputError("heads_keep is a share of attention heads, and only neurons are selected: leave it out, or "
                         "give units=\"heads\" or \"both\"")
    if units == "heads" and (size.across_sites or compensate != "none" or size.width != "free" or size.multiple_of > 1):
        raise InputError("across_sites, compensate, width and multiple_of are about neurons, and only heads are "
                         "selected: leave them out, or give units=\"both\"")


def measured_for(methods: Sequence[str], units: str) -> tuple[list[str], str | None]:
    """What `measure` is told for a selection of these units: methods for neurons, and the score of heads that goes with
    the last of them. Raises InputError for an unknown method."""
    for method in methods:
        for name in scores_of(method):
            scores.make(name)
    return ([] if units == "heads" else list(dict.fromkeys(methods)),
            None if units == "neurons" else head_scores.matching(methods[-1]))


def measure(model: nn.Module, data: Iterable[Batch], tokenizer: PreTrainedTokenizerBase | None, methods: list[str], *,
            threshold: float = 0.01, seed: int = 42, count_padding: bool = False, progress: bool = True,
            select_on: str = "all", compensate: str = "none", min_tokens: int = MIN_TOKENS,
            options: Mapping[str, Mapping[str, object]] | None = None, head_score: str | None = None) -> Measured:
    """All scores of neurons that `methods` need, the moments that `compensate` needs, and the `head_score` of attention
    sites, in one pass over `data`. `options` are keyword arguments by score name."""
    if type(min_tokens) is not int or min_tokens < 0:
        raise InputError(f"min_tokens must be a whole number of 0 or more, got {min_tokens}")
    names = list(dict.fromkeys(name for method in methods for name in scores_of(method)))
    given = {"activation_rate": {"threshold": threshold}, "random": {"seed": seed}, **(options or {})}
    made = [scores.make(name, **given.get(name, {})) for name in names]
    moments = compensation.moments_for(compensate)
    sites = sites_of(model, bool(methods), head_score is not None)
    neurons = [site for site in sites.values() if site.units == "neurons"]
    if moments:
        _check_can_compensate(neurons)
    compensation.check_memory(compensate, [site.width for site in neurons], next(model.parameters()).device)
    if head_score is not None:
        names.append(HEADS)
        widths = {site.name: site.width for site in sites.values() if site.units == "heads"}
        made.append(head_scores.make(head_score, widths, seed))
    calibration = calibrate(model, sites, made, data, tokenizer, count_padding, progress, select_on, moments,
                            min_tokens)
    said = {"threshold": threshold, "seed": seed, "count_padding": count_padding, "select_on": select_on,
            "compensate": compensate, **(options or {})}
    if calibration.routed:
        said |= {"min_tokens": min_tokens, "routed_tokens": calibration.routed}
    halves = calibration.halves and tuple(dict(zip(names, half, strict=True)) for half in calibration.halves)
    needs = {name: score.needs for name, score in zip(names, made, strict=True)}
    return Measured(model, sites, needs, dict(zip(names, calibration.scores, strict=True)), halves, calibration, said,
                    head_score)


def sites_of(model: nn.Module, has_neurons: bool, has_heads: bool) -> Sites:
    """Those that a selection of neurons, of heads or of both chooses from."""
    if not has_heads:
        return find_sites(model)
    heads = find_heads(model)
    return with_heads(model, find_sites(model), heads) if has_neurons else heads


def _check_can_compensate(neurons: Sequence[Site]) -> None:
    other = [site for site in neurons if site.form != "linear"]
    if other:
        raise InputError(f"the removed neurons of {other[0].name} cannot be compensated ({other[0].form}, not linear "
                         "layers of its own): select with compensate=\"none\"")


def scores_of(method: str) -> tuple[str, ...]:
    """Names of the scores a method ranks by: two for "stt", else the one it is named after."""
    return STT if method == "stt" else (method,)


def kept(measured: Measured, method: str, size: Budget, compensate: str | None = None) -> Selection:
    """The selection that `method` makes of what was measured. `compensate` is what was asked of `measure`, or less."""
    compensate = measured.options["compensate"] if compensate is None else compensate
    units = _units(measured.sites, measured.scores, method, size)
    values, ridges = _compensated(measured, units, compensate)
    meta = {"method": method, "topk_ratio": size.topk_ratio, "keep_ratio": size.keep_ratio,
            "across_sites": size.across_sites, "width": size.width, "multiple_of": size.multiple_of,
            **measured.options, "compensate": compensate, **_about_heads(measured, size),
            "calibration": {"digest": measured.calibration.digest, "tokens": measured.calibration.tokens,
                            "examples": measured.calibration.examples},
            "reliability": _reliability(measured, method, size, units),
            "widths": {site.name: site.width for site in measured.sites.values()},
            "fingerprint": measured.sites.fingerprint,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    return Selection(units, meta | ({"ridge": ridges} if ridges else {}), values)


def _about_heads(measured: Measured, size: Budget) -> dict[str, object]:
    """What the meta of a selection says of the units: which, and of attention sites the score, the share kept, and the
    query heads of one unit."""
    heads = {site.name: site.heads for site in measured.sites.values() if site.units == "heads"}
    if not heads:
        return {"units": "neurons"}
    return {"units": "heads" if len(heads) == len(measured.sites) else "both", "head_score": measured.head_score,
            "heads_keep": size.share_of_heads, "heads": heads}


def _units(sites: Sites, by_name: Mapping[str, Mapping[str, Tensor]], method: str, size: Budget) -> dict[str, Tensor]:
    """The units `method` keeps of every site, by the scores given."""
    neurons = {name: site for name, site in sites.items() if site.units == "neurons"}
    if size.counts is not None:
        for name in sorted((size.counts.keys() - sites.keys()) | (neurons.keys() - size.counts.keys())):
            is_extra = name in size.counts
            wrong = f"names {name!r}, which is no" if is_extra else f"misses {name!r}, which is a"
            raise InputError(f"the budget {wrong} site of this model: "
                             f"give the number of units of each of its {len(sites)} sites")
    of_heads = replace(size, keep_ratio=size.share_of_heads)
    return (_neurons(neurons, by_name, method, size) if neurons else {}) | {
        name: _of_site([by_name[HEADS][name]], of_heads, name) for name in sites if name not in neurons}


def _neurons(sites: Mapping[str, Site], by_name: Mapping[str, Mapping[str, Tensor]], method: str,
             size: Budget) -> dict[str, Tensor]:
    names = scores_of(method)
    if size.across_sites and len(names) > 1:
        raise InputError(f"across_sites needs one score, {method!r} has {len(names)}: use {' or '.join(names)}")
    of_site = {site: [by_name[name][site] for name in names] for site in sites}
    units = (budget.global_top(by_name[method], size.keep_ratio) if size.across_sites else
             {site: _of_site(found, size, site) for site, found in of_site.items()})
    dense = {site: len(found[0]) for site, found in of_site.items()}
    counts = serving.served({site: len(ids) for site, ids in units.items()}, dense, size.width, size.multiple_of)
    counts = serving.equal_in_groups(counts, {site: sites[site].group or site for site in units}, dense)
    return {site: ids if len(ids) == counts[site] else budget.interleaved(of_site[site], counts[site])
            for site, ids in units.items()}


def _reliability(measured: Measured, method: str, size: Budget,
                 units: Mapping[str, Tensor]) -> dict[str, dict[str, float | None]]:
    """Of every site: the Jaccard overlap of what each half of the examples would keep (None without two halves, or if
    the data does not decide), and the margin at the cut (budget.margin, the smaller one of two scores; None if nothing
    is cut)."""
    names = {site: (HEADS,) if measured.sites[site].units == "heads" else scores_of(method) for site in units}
    jaccard: dict[str, float] = {}
    if measured.halves:
        a, b = (Selection(_units(measured.sites, half, method, size)) for half in measured.halves)
        jaccard = {site: overlap for site, overlap in a.jaccard(b).items()
                   if any(measured.needs[name] != ("weights",) for name in names[site])}
    margins = {site: min(budget.margin(measured.scores[name][site], ids) for name in names[site])
               for site, ids in units.items()}
    return {site: {"jaccard": jaccard.get(site), "margin": margin if math.isfinite(margin) else None}
            for site, margin in margins.items()}


def _compensated(measured: Measured, units: Mapping[str, Tensor],
                 compensate: str) -> tuple[dict[str, Tensor], dict[str, float | None]]:
    """New values of the down projections by parameter name, and the ridge of every site."""
    values, ridges = {}, {}
    removing = {name: ids for name, ids in units.items()
                if len(ids) < measured.sites[name].width and measured.sites[name].units == "neurons"}
    for name, ids in removing.items() if compensation.moments_for(compensate) else ():
        down = measured.sites[name].down_module
        module = measured.model.get_submodule(down)
        halves = tuple(half[0].sums[name] for half in measured.calibration.apart)
        folded = compensation.fold(projection_weight(module).detach(), module.bias, ids, halves, compensate)
        dtype = torch.promote_types(module.weight.dtype, torch.float32)
        values[f"{down}.weight"] = folded.weight.to("cpu", dtype)
        if folded.bias is not None:
            values[f"{down}.bias"] = folded.bias.to("cpu", dtype)
        ridges[name] = folded.ridge
    if compensate in compensation.LEAST_SQUARES and measured.calibration.halves is None:
        logger.warning("no least squares: there are not two halves of the data to choose the ridge with, so %s is "
                       "compensated; select on more examples (--active_sample_ratio)",
                       "only the mean" if compensate == "lstsq" else "nothing")
    return values, ridges


def _of_site(of_site: list[Tensor], size: Budget, site: str) -> Tensor:
    if size.counts is not None and site in size.counts:
        if not 1 <= size.counts[site] <= len(of_site[0]):
            raise InputError(f"the budget keeps {size.counts[site]} units of {site}, which has {len(of_site[0])}: "
                             "keep at least one and at most all")
        return budget.interleaved(of_site, size.counts[site])
    if size.keep_ratio is not None:
        return budget.interleaved(of_site, budget.exact_count(len(of_site[0]), size.keep_ratio))
    return budget.stt_union(of_site, size.topk_ratio)


def routed_to(selection: Selection, site: str) -> dict[str, int]:
    """The tokens an expert was judged on and the least that count; nothing for any other site."""
    tokens = selection.meta.get("routed_tokens", {})
    return {"tokens": tokens[site], "min_tokens": selection.meta["min_tokens"]} if site in tokens else {}


def composition(measured: Measured, selection: Selection) -> dict[str, dict[str, int]]:
    """Of the kept neurons of each site: how many are there for their mean only, for both scores, for their rate only.

    A neuron is there for a score if it is among its best k: the k of the published top-k union, or, for an exact budget
    or a width that is not free, the smallest k at which the two sets cover the selection.
    """
    counted = {}
    for site, ids in selection.items():
        if measured.sites[site].units == "heads":
            continue
        places = [budget.ranking(measured.scores[name][site]).argsort()[ids] for name in STT]
        k = int(torch.stack(places).amin(0).max()) + 1
        size = selection.meta["keep_ratio"], selection.meta["width"], selection.meta["multiple_of"]
        if size == (None, "free", 1) and measured.sites[site].form != "experts":
            k = max(1, int(selection.meta["topk_ratio"] * measured.sites[site].width))
        by_mean, by_rate = (place < k for place in places)
        counted[site] = {"mean_only": int((by_mean & ~by_rate).sum()), "both": int((by_mean & by_rate).sum()),
                         "rate_only": int((by_rate & ~by_mean).sum())}
    return counted
