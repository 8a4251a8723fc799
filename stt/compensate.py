"""What the removed neurons contributed, folded into the kept ones.

The block computes y = W h + b. With the kept neurons S and the removed ones R:
  none    y ~ W_S h_S + b                                        (published)
  mean    y ~ W_S h_S + b + W_R E[h_R]                           (FLAP, arxiv.org/abs/2312.11983, its bias compensation)
  lstsq   y ~ (W_S + D) h_S + b', the D and b' that minimise E|W_R h_R - D h_S - (b' - b)|^2 + ridge |D|^2:
          D = W_R C_RS (C_SS + ridge I)^-1 with the covariance C of h, and b' = b + W_R E[h_R] - D E[h_S]

Shapes: F neurons, K kept, D model width. Everything here is float64.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stt.errors import InputError, unknown_name
from stt.scores.base import Seen, Statistic

COMPENSATIONS = ("none", "mean", "lstsq")
RIDGES = tuple(10.0**power for power in range(-7, 2))  # times the mean variance of the kept neurons


@dataclass
class Moments(Statistic):
    """Number, sum and, for least squares, sum of products of what the down projection reads: (), (F,), (F, F)."""

    needs: tuple[str, ...] = ("hidden",)
    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    with_products: bool = False

    def update(self, site: str, seen: Seen) -> None:
        rows = seen.hidden.double()  # (N, F)
        if seen.is_token is not None:
            rows = rows[seen.is_token.bool()]
        self.add(site, "count", torch.tensor(float(len(rows)), device=rows.device))
        self.add(site, "sum", rows.sum(0))
        if self.with_products:
            self.add(site, "products", rows.T @ rows)


@dataclass(frozen=True)
class Folded:
    """The kept columns (D, K) of the down projection and its bias (D,) after compensation."""

    weight: Tensor
    bias: Tensor
    ridge: float | None  # as in RIDGES; None: not used, the mean is all that is folded in


def moments_for(compensate: str) -> list[Moments]:
    """What has to be measured. Raises InputError for an unknown name."""
    if compensate not in COMPENSATIONS:
        raise unknown_name("compensation", compensate, COMPENSATIONS)
    return [] if compensate == "none" else [Moments(with_products=compensate == "lstsq")]


def fold(weight: Tensor, bias: Tensor | None, kept: Tensor, halves: tuple[dict[str, Tensor], dict[str, Tensor]],
         compensate: str) -> Folded:
    """Compensate one site: `weight` (D, F) and `bias` (D,) of its dense down projection, sums of `Moments` by half.

    The ridge is the one of RIDGES with the smallest error on tokens it was not fitted on (each half in turn is held
    out), or none of them if the mean alone is better there. Raises InputError if a half holds no token.
    """
    weight = weight.double()
    bias = torch.zeros(len(weight), dtype=torch.float64, device=weight.device) if bias is None else bias.double()
    kept = kept.to(weight.device)
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device).index_fill(0, kept, False)
    removed = removed.nonzero().flatten()
    problem = _Problem(weight[:, removed], kept, removed)
    a, b = halves
    both = {name: a[name] + b[name] for name in a}
    if compensate == "mean":
        return Folded(weight[:, kept], bias + problem.weight @ _mean(both)[removed], None)
    ridge = _best_ridge(problem, a, b)
    mean = _mean(both)
    update = torch.zeros_like(weight[:, kept]) if ridge is None else problem.fitted(_covariance(both), ridge)
    shift = problem.weight @ mean[removed] - update @ mean[kept]
    return Folded(weight[:, kept] + update, bias + shift, ridge)


@dataclass(frozen=True)
class _Problem:
    """The regression of the removed contribution W_R h_R on the kept neurons."""

    weight: Tensor  # (D, F - K)
    kept: Tensor  # (K,)
    removed: Tensor  # (F - K,)

    def fitted(self, covariance: Tensor, ridge: float) -> Tensor:
        """D = W_R C_RS (C_SS + ridge I)^-1: (D, K)."""
        within = covariance[self.kept][:, self.kept]
        scale = within.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        regular = within + ridge * scale * torch.eye(len(within), dtype=torch.float64, device=within.device)
        across = self.weight @ covariance[self.removed][:, self.kept]  # (D, K)
        return torch.cholesky_solve(across.T, torch.linalg.cholesky(regular)).T

    def error(self, update: Tensor, scatter: Tensor) -> float:
        """Mean squared error of `update`: tr(V S V^T) with V = [W_R, -D] and the scatter S of h around the means the
        update was fitted with."""
        across = self.weight @ scatter[self.removed][:, self.kept]  # (D, K)
        unexplained = ((self.weight @ scatter[self.removed][:, self.removed]) * self.weight).sum()
        within = ((update @ scatter[self.kept][:, self.kept]) * update).sum()
        return float(unexplained - 2 * (update * across).sum() + within)


def _best_ridge(problem: _Problem, a: dict[str, Tensor], b: dict[str, Tensor]) -> float | None:
    """The ridge with the smallest held-out error, summed over both ways; None if no update at all is better."""
    if not (a["count"] and b["count"]):
        raise InputError("compensate='lstsq' chooses its ridge on held-out examples, and there are not two different "
                         "ones: give more calibration data")
    errors: dict[float | None, float] = {}
    for fit, held_out in ((a, b), (b, a)):
        offset = _mean(held_out) - _mean(fit)
        scatter = _covariance(held_out) + torch.outer(offset, offset)
        for ridge, update in _candidates(problem, _covariance(fit)):
            errors[ridge] = errors.get(ridge, 0.0) + problem.error(update, scatter)
    return min(errors, key=errors.__getitem__)


def _candidates(problem: _Problem, covariance: Tensor) -> Iterator[tuple[float | None, Tensor]]:
    yield None, torch.zeros(len(problem.weight), len(problem.kept), dtype=torch.float64, device=covariance.device)
    for ridge in RIDGES:
        yield ridge, problem.fitted(covariance, ridge)


def _mean(sums: dict[str, Tensor]) -> Tensor:
    return sums["sum"] / sums["count"]


def _covariance(sums: dict[str, Tensor]) -> Tensor:
    mean = _mean(sums)
    return sums["products"] / sums["count"] - torch.outer(mean, mean)
