"""Signed mean of the gate pre-activation over real tokens (Select-Then-Train, its first criterion)."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stt.scores.base import Score, Seen, Weights


@dataclass
class ActivationMean(Score):
    needs: tuple[str, ...] = ("outputs",)

    def update(self, site: str, seen: Seen) -> None:
        self.add_moments(site, seen.outputs, seen.is_token)

    def result(self, site: str, weights: Weights) -> Tensor:
        return self.mean(site)


make = ActivationMean
