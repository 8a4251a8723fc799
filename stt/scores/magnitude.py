"""Magnitude: score_i = sum_j |W_gate[i, j]|. Needs no data."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stt.scores.base import Score, Weights


@dataclass
class Magnitude(Score):
    needs: tuple[str, ...] = ("weights",)

    def result(self, site: str, weights: Weights) -> Tensor:
        return weights.gate.abs().sum(1)  # (F, D) -> (F,)


make = Magnitude
