"""Wanda, summed per neuron: score_i = sum_j |W_gate[i, j]| * ||x_j||.   arxiv.org/abs/2306.11695, equation 1.

`norm="l2"` is the paper's; `norm="l1"` is what the published Select-Then-Train adaptation computes.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stt.errors import unknown_name
from stt.scores.base import Score, Seen, Weights, over_tokens, wide


@dataclass
class Wanda(Score):
    needs: tuple[str, ...] = ("inputs",)
    norm: str = "l2"

    def __post_init__(self) -> None:
        if self.norm not in ("l1", "l2"):
            raise unknown_name("norm", self.norm, ("l1", "l2"))

    def update(self, site: str, seen: Seen) -> None:
        x = wide(seen.inputs)
        self.add(site, "sum", over_tokens(x.square() if self.norm == "l2" else x.abs(), seen.is_token))

    def result(self, site: str, weights: Weights) -> Tensor:
        total = self.sums[site]["sum"]
        return weights.gate.abs() @ (total.sqrt() if self.norm == "l2" else total)  # (F, D) @ (D,) -> (F,)


make = Wanda
