"""Signed mean of what the down projection reads: activation(gate) * up of a GLU, activation(first) of a plain MLP."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stt.scores.base import Score, Seen, Weights


@dataclass
class GateProduct(Score):
    needs: tuple[str, ...] = ("hidden",)

    def update(self, site: str, seen: Seen) -> None:
        self.add_moments(site, seen.hidden, seen.is_token)

    def result(self, site: str, weights: Weights) -> Tensor:
        return self.mean(site)


make = GateProduct
