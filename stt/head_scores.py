"""Scores of attention heads, measured where the output projection O reads them.

Shapes: U units of a site, n channels of each, F = U * n what O reads, N rows (positions), D model width.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from stt.scores.base import Score, Seen, Weights, over_tokens, wide
from stt.scores.random import Random


@dataclass
class _OfHeads(Score):
    """Base of those that fold channels into units. `widths` are the numbers of units, by site."""

    units: ClassVar[str] = "heads"
    widths: Mapping[str, int] = field(default_factory=dict)

    def folded(self, site: str, values: Tensor) -> Tensor:
        """(..., F) -> (..., U, n)"""
        return values.unflatten(-1, (self.widths[site], -1))


@dataclass
class ActivationNorm(_OfHeads):
    """score_u = sqrt(sum over the channels c of unit u of the mean over tokens of x_c^2), the norm of what it makes."""

    needs: tuple[str, ...] = ("hidden",)

    def update(self, site: str, seen: Seen) -> None:
        self.add_moments(site, seen.hidden, seen.is_token, with_squares=True)

    def result(self, site: str, weights: Weights) -> Tensor:
        return self.folded(site, self.mean_square(site)).sum(-1).sqrt()


@dataclass
class Magnitude(_OfHeads):
    """score_u = Frobenius norm of the columns of O that read unit u."""

    needs: tuple[str, ...] = ("weights",)

    def result(self, site: str, weights: Weights) -> Tensor:
        return self.folded(site, weights.down.square().sum(0)).sum(-1).sqrt()


@dataclass
class Wanda(_OfHeads):
    """score_u = sum over the channels c of unit u and the rows o of O of |W_oc| * ||x_c||.   arxiv.org/abs/2306.11695,
    equation 1, summed over the weights that the unit owns."""

    needs: tuple[str, ...] = ("hidden",)

    def update(self, site: str, seen: Seen) -> None:
        self.add(site, "squares", over_tokens(wide(seen.hidden).square(), seen.is_token))

    def result(self, site: str, weights: Weights) -> Tensor:
        return self.folded(site, weights.down.abs().sum(0) * self.sums[site]["squares"].sqrt()).sum(-1)


@dataclass
class Taylor(_OfHeads):
    """score_u = sum over tokens of |sum over the channels c of unit u of x_c * dL/dx_c|, to first order what the loss
    changes if the unit is removed at one position.   arxiv.org/abs/1905.10650, section 2.1, by position."""

    needs: tuple[str, ...] = ("hidden", "gradients")

    def update(self, site: str, seen: Seen) -> None:
        change = self.folded(site, wide(seen.hidden) * wide(seen.gradients)).sum(-1)  # (N, U)
        self.add(site, "sum", over_tokens(change.abs(), seen.is_token))

    def result(self, site: str, weights: Weights) -> Tensor:
        return self.sums[site]["sum"]


@dataclass
class RandomHeads(_OfHeads):
    """Uniform random numbers; the seed and the site's name decide."""

    needs: tuple[str, ...] = ("weights",)
    seed: int = 0

    def result(self, site: str, weights: Weights) -> Tensor:
        rows = torch.empty(self.widths[site], 0)
        return Random(seed=self.seed).result(site, Weights(lambda: rows, lambda: rows))


SCORES: dict[str, Callable[..., _OfHeads]] = {"activation_norm": ActivationNorm, "magnitude": Magnitude,
                                              "wanda": Wanda, "taylor": Taylor, "random": RandomHeads}


def matching(method: str) -> str:
    """The score of heads that goes with a method for neurons: the one of the same name, or else activation_norm."""
    return method if method in SCORES else "activation_norm"


def make(name: str, widths: Mapping[str, int], seed: int = 0) -> Score:
    """The score of heads called `name` for sites of so many units."""
    return SCORES[name](widths=widths, **({"seed": seed} if name == "random" else {}))
