"""Empirical Fisher information: score = the sum over examples of (dL/dw)^2. FISH Mask, arxiv.org/abs/2111.09839, eq. 3
(with the labels of the data, not drawn ones)."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stt.selective_optimizers.scores.base import Seen, WeightScore


@dataclass(frozen=True)
class Fisher(WeightScore):
    needs: ClassVar[tuple[str, ...]] = ("squares",)

    def result(self, name: str, tensor: Tensor, seen: Seen) -> Tensor:
        return seen.squares


make = Fisher
