"""Contribution: score_i = ||W_down[:, i]|| * rms(h_i), the typical size of what neuron i adds to the block's output.

The product of Wanda (arxiv.org/abs/2306.11695, equation 1) taken over the column of the down projection that the neuron
owns, with the root mean square of what is read there.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stt.scores.base import Score, Seen, Weights


@dataclass
class Contribution(Score):
    needs: tuple[str, ...] = ("hidden",)

    def update(self, site: str, seen: Seen) -> None:
        self.add_moments(site, seen.hidden, seen.is_token, with_squares=True)

    def result(self, site: str, weights: Weights) -> Tensor:
        return weights.down.norm(dim=0) * self.mean_square(site).sqrt()  # (F,) * (F,)


make = Contribution
