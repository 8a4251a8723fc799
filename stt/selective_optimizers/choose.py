"""The best entries of many tensors under one exact budget, one tensor in memory at a time.

Ties go to the earlier tensor, then to the lower position.
"""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from stt.errors import InputError

# Shapes: P scores of a tensor (flat), k the budget. -inf is a score that is never chosen.


def top_entries(score: Tensor, k: int) -> Tensor:
    """Positions of the k highest of (P,), sorted; fewer where the others are -inf. Raises InputError for a NaN."""
    if score.isnan().any():
        raise InputError("a score of weights holds NaN: the model or the data is broken; check both")
    k = min(k, int((score > -torch.inf).sum()))
    if k == 0:
        return torch.empty(0, dtype=torch.long, device=score.device)
    least = score.topk(k, sorted=True).values[-1]
    above = (score > least).nonzero().flatten()
    ties = (score == least).nonzero().flatten()[:k - len(above)]
    return torch.cat([above, ties]).sort().values


def best(scores: Iterable[tuple[str, Tensor]], k: int) -> dict[str, Tensor]:
    """The k highest of all tensors together: name -> sorted positions, of every tensor that was given.

    Scores (P,) come one tensor at a time and are let go. What is kept is at most k candidates and the current tensor.
    """
    names: list[str] = []
    values = origin = position = torch.empty(0)
    for name, score in scores:
        found = top_entries(score, k)  # also raises for a NaN
        if len(values) == k and k:
            found = found[score[found] > values.min().to(score.device)]  # a tie goes to an earlier tensor
        values = torch.cat([values, score[found].cpu()]) if names else score[found].cpu()
        origin = torch.cat([origin.long(), torch.full((len(found),), len(names))])
        position = torch.cat([position.long(), found.cpu()])
        kept = top_entries(values, k)
        values, origin, position = values[kept], origin[kept], position[kept]
        names.append(name)
    return {name: position[origin == i].sort().values for i, name in enumerate(names)}
