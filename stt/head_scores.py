"""Scores of attention heads, measured where the output projection O reads them, and the selection made by one.

Shapes: U units of a site, n channels of each, F = U * n what O reads, N rows (positions), D model width.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from stt import budget
from stt.batches import Batch
from stt.calibrate import calibrate
from stt.errors import unknown_name
from stt.heads import find_heads
from stt.scores.base import Score, Seen, Weights, over_tokens, wide
from stt.scores.random import Random
from stt.selection import Selection


@dataclass
class _OfHeads(Score):
    """Base of those that fold channels into units. `widths` are the numbers of units, by site."""

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


def score_heads(model: nn.Module, data: Iterable[Batch] = (), tokenizer: PreTrainedTokenizerBase | None = None, *,
                score: str = "activation_norm", seed: int = 42) -> dict[str, Tensor]:
    """The score (U,) of every attention site, float64; `data` as for `stt.select`. Padding does not count.

    Raises InputError for an unknown score, a model without attention sites, or data that is missing or does not fit.
    """
    if score not in SCORES:
        raise unknown_name("score of heads", score, SCORES)
    sites = find_heads(model)
    options = {"seed": seed} if score == "random" else {}
    made = SCORES[score](widths={name: site.width for name, site in sites.items()}, **options)
    return calibrate(model, sites, [made], data, tokenizer, progress=False).scores[0]


def select_heads(model: nn.Module, data: Iterable[Batch] = (), tokenizer: PreTrainedTokenizerBase | None = None, *,
                 score: str = "activation_norm", keep: float = 0.5, seed: int = 42) -> Selection:
    """The attention units of `model` worth keeping: the share `keep` of every site, at least one.

    Raises InputError as `score_heads` does, and for a share outside (0, 1].

    >>> stt.apply(model, select_heads(model, batches, score="wanda", keep=0.5))
    """
    budget.check_ratio("keep", keep)
    scores = score_heads(model, data, tokenizer, score=score, seed=seed)
    units = {name: budget.top(of_site, budget.exact_count(len(of_site), keep)) for name, of_site in scores.items()}
    sites = find_heads(model)
    return Selection(units, {"method": score, "keep_ratio": keep, "seed": seed,
                             "widths": {name: site.width for name, site in sites.items()},
                             "fingerprint": sites.fingerprint,
                             "versions": {"torch": torch.__version__, "transformers": transformers.__version__}})
