"""The smallest weights: score = -|w|. PaFI, arxiv.org/abs/2305.16742."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stt.selective_optimizers.scores.base import Seen, WeightScore


@dataclass(frozen=True)
class Smallest(WeightScore):
    def result(self, name: str, tensor: Tensor, seen: Seen) -> Tensor:
        return -tensor.abs()


make = Smallest
