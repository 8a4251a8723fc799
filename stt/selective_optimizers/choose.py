"""The best entries of many tensors under one exact budget, one tensor in memory at a time.

Ties go to the earlier tensor, then to the lower position.
"""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from stt.errors import InputError

BLOCK = 64
NAN = "a score of weights holds NaN: the model or the data is broken; check both"

# Shapes: P scores of a tensor (flat), k the budget. -inf is a score that is never chosen.


def top_entries(score: Tensor, k: int) -> Tensor:
    """Positions of the k highest of (P,), sorted; fewer where the others are -inf. Raises InputError for a NaN.

    Few of many are looked for in the blocks that may hold them: that reads the scores once and sorts almost none.
    """
    if 0 < 4 * k * BLOCK < len(score):
        may_be = _promising(score, k)
        return may_be[_top(score[may_be], k)]
    check_numbers(score)
    return _top(score, k)


def check_numbers(score: Tensor) -> None:
    """Raises InputError for a NaN."""
    if score.isnan().any():
        raise InputError(NAN)


def _promising(score: Tensor, k: int) -> Tensor:
    """Sorted positions that hold the k highest: at most 2 k blocks.

    The k blocks with the highest maxima hold k scores that are at least the lowest of these maxima. So none of the k
    highest is in a block with a lower one; and of the scores that are equal to it, k are in blocks above and in the
    first k blocks where it is the maximum.
    """
    whole = len(score) // BLOCK * BLOCK
    maxima = score[:whole].view(-1, BLOCK).amax(1)  # (P,) -> (P / BLOCK,)
    if maxima.isnan().any() or score[whole:].isnan().any():
        raise InputError(NAN)
    least = maxima.topk(k).values[-1]
    equal = (maxima == least).nonzero()[:k]
    blocks = torch.cat([(maxima > least).nonzero(), equal]).sort(0).values  # (b, 1)
    within = (blocks * BLOCK + torch.arange(BLOCK, device=score.device)).flatten()
    return torch.cat([within, torch.arange(whole, len(score), device=score.device)])


def _top(score: Tensor, k: int) -> Tensor:
    highest = score.topk(min(k, len(score)), sorted=True).values
    k = int((highest > -torch.inf).sum())
    if k == 0:
        return torch.empty(0, dtype=torch.long, device=score.device)
    least = highest[k - 1]
    above = (score > least).nonzero().flatten()
    ties = (score == least).nonzero().flatten()[:k - len(above)]
    return torch.cat([above, ties]).sort().values


def _above(score: Tensor, least: Tensor, k: int) -> Tensor:
    """Positions of the k highest of (P,) that are above `least`: a tie goes to an earlier tensor."""
    highest = score.max() if len(score) else torch.tensor(-torch.inf)
    if highest.isnan():  # a maximum is NaN if any score is
        raise InputError(NAN)
    if highest <= least:
        return torch.empty(0, dtype=torch.long, device=score.device)
    found = (score > least.to(score.device)).nonzero().flatten()
    return found[top_entries(score[found], k)]


def best(scores: Iterable[tuple[str, Tensor]], k: int) -> dict[str, Tensor]:
    """The k highest of all tensors together: name -> sorted positions, of every tensor that was given.

    Scores (P,) come one tensor at a time and are let go. What is kept is at most k candidates and the current tensor.
    """
    names: list[str] = []
    values = origin = position = torch.empty(0)
    for name, score in scores:
        score = score.to(torch.promote_types(score.dtype, values.dtype))  # what is compared must not be rounded
        found = _above(score, values.min(), k) if 0 < k == len(values) else top_entries(score, k)
        if len(found):
            values = torch.cat([values.to(score.dtype), score[found].cpu()])
            origin = torch.cat([origin.long(), torch.full((len(found),), len(names))])
            position = torch.cat([position.long(), found.cpu()])
            kept = top_entries(values, k)
            values, origin, position = values[kept], origin[kept], position[kept]
        names.append(name)
    return {name: position[origin == i].sort().values for i, name in enumerate(names)}
