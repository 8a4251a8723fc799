"""First-order Taylor: score_i = sum over tokens of |a_i * dL/da_i| at the down projection's input.

L is the loss summed over labelled tokens, so the score does not depend on how the data is batched.
arxiv.org/abs/1906.10771 (importance of a neuron as the squared first-order change; here its absolute value).
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stt.scores.base import Score, Seen, Weights, over_tokens, wide


@dataclass
class Taylor(Score):
    needs: tuple[str, ...] = ("hidden", "gradients")

    def update(self, site: str, seen: Seen) -> None:
        self.add(site, "sum", over_tokens((wide(seen.hidden) * wide(seen.gradients)).abs(), seen.is_token))

    def result(self, site: str, weights: Weights) -> Tensor:
        return self.sums[site]["sum"]


make = Taylor
