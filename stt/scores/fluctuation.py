"""Fluctuation: score_i = Var(h_i) * ||W_down[:, i]||^2, what is lost if h_i is replaced by its mean.

FLAP, arxiv.org/abs/2312.11983, its weighted input feature variance. Best with `compensate="mean"`, which
does just that replacement.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stt.scores.base import Score, Seen, Weights


@dataclass
class Fluctuation(Score):
    needs: tuple[str, ...] = ("hidden",)

    def update(self, site: str, seen: Seen) -> None:
        self.add_moments(site, seen.hidden, seen.is_token, with_squares=True)

    def result(self, site: str, weights: Weights) -> Tensor:
        return self.variance(site) * weights.down.square().sum(0)  # (F,) * (F,)


make = Fluctuation
