"""Share of real tokens whose gate pre-activation is at least `threshold` (Select-Then-Train, its second criterion)."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stt.scores.base import Score, Seen, Weights


@dataclass
class ActivationRate(Score):
    """`use_abs` compares |x| instead of x with the threshold."""

    needs: tuple[str, ...] = ("outputs",)
    threshold: float = 0.01
    use_abs: bool = False

    def update(self, site: str, seen: Seen) -> None:
        x = seen.outputs.abs() if self.use_abs else seen.outputs
        self.add_moments(site, x >= self.threshold, seen.is_token)

    def result(self, site: str, weights: Weights) -> Tensor:
        return self.mean(site)


make = ActivationRate
