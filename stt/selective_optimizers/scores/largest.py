"""The largest weights: score = |w|. Super-Tuning, arxiv.org/abs/2607.09287."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stt.selective_optimizers.scores.base import Seen, WeightScore


@dataclass(frozen=True)
class Largest(WeightScore):
    def result(self, name: str, tensor: Tensor, seen: Seen) -> Tensor:
        return tensor.abs()


make = Largest
