"""The largest gradients: score = |dL/dw|, as SPEFT found best of eight, arxiv.org/abs/2412.13488."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stt.selective_optimizers.scores.base import Seen, WeightScore


@dataclass(frozen=True)
class Gradient(WeightScore):
    needs: ClassVar[tuple[str, ...]] = ("gradient",)

    def result(self, name: str, tensor: Tensor, seen: Seen) -> Tensor:
        return seen.gradient.abs()


make = Gradient
