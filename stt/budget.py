"""How many units a site keeps, and which: pure functions from scores (F,) to sorted ids. Ties go to the lower id."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stt.errors import InputError


def check_ratio(name: str, ratio: float) -> float:
    """The ratio itself; InputError unless it is in (0, 1]."""
    if not (isinstance(ratio, int | float) and math.isfinite(ratio) and 0 < ratio <= 1):
        raise InputError(f"{name} must be in (0, 1], got {ratio}")
    return ratio


def ranking(score: Tensor) -> Tensor:
    """All unit ids, best first: (F,). Raises InputError if the score holds a NaN."""
    if score.isnan().any():
        raise InputError("a score holds NaN: the model or the calibration data is broken; check both")
    return score.sort(descending=True, stable=True).indices


def top(score: Tensor, count: int) -> Tensor:
    """Ids of the `count` best units, sorted."""
    return ranking(score)[:count].sort().values


def top_fraction(score: Tensor, ratio: float) -> Tensor:
    """Ids of the best max(1, int(ratio * F)) units, as the published code counts them."""
    return top(score, max(1, int(check_ratio("topk_ratio", ratio) * len(score))))


def stt_union(scores: Sequence[Tensor], ratio: float) -> Tensor:
    """Units among the top fraction of any of the scores, sorted. STT: by mean activation or by activation rate, which
    keeps between k and 2k."""
    return torch.cat([top_fraction(score, ratio) for score in scores]).unique()


def interleaved(rankings: Sequence[Tensor], count: int) -> Tensor:
    """Exactly `count` units: the best of each score in turn, skipping those already kept, then sorted."""
    turns = torch.stack([ranking(score) for score in rankings], dim=1).flatten().tolist()
    return torch.tensor(sorted(list(dict.fromkeys(turns))[:count]))


def exact_count(width: int, keep_ratio: float) -> int:
    """round(keep_ratio * F), at least one."""
    return max(1, round(check_ratio("keep_ratio", keep_ratio) * width))


def margin(score: Tensor, kept: Tensor) -> float:
    """How clear the cut is: the step of the score (F,) from the worst unit of its ranking above which all are kept to
    the next one, in standard deviations of the score. 0: a tie decides; infinite: nothing is cut."""
    order = ranking(score)
    is_cut = ~torch.isin(order, kept)
    if not is_cut.any():
        return math.inf
    place = int(is_cut.int().argmax())  # of the best unit that is not kept
    if place == 0 or score.std() == 0:
        return 0.0
    return float((score[order[place - 1]] - score[order[place]]) / score.std())


def global_top(scores: Mapping[str, Tensor], keep_ratio: float) -> dict[str, Tensor]:
    """One ranking over all sites: the best exact_count units of the model, at least one in every site.

    Scores of different sites must be comparable (normalise them first). Raises InputError if there are fewer units to
    keep than sites.
    """
    joined = torch.cat(list(scores.values()))
    count = exact_count(len(joined), keep_ratio)
    if count < len(scores):
        raise InputError(f"keep_ratio {keep_ratio} keeps {count} units, fewer than the {len(scores)} sites: raise it")
    site_of = torch.cat([torch.full_like(s, i, dtype=torch.long) for i, s in enumerate(scores.values())])
    order = ranking(joined)
    first_of_site = torch.stack([order[site_of[order] == i][0] for i in range(len(scores))])
    rest = order[~torch.isin(order, first_of_site)][:count - len(scores)]
    kept = torch.zeros(len(joined), dtype=torch.bool)
    kept[torch.cat([first_of_site, rest])] = True
    sizes = [len(s) for s in scores.values()]
    return {site: part.nonzero().flatten() for site, part in zip(scores, kept.split(sizes), strict=True)}
