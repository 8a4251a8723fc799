"""What the removed neurons contributed, folded into the kept ones.

The block computes y = W h + b. With the kept neurons S and the removed ones R:
  none    y ~ W_S h_S + b                                        (published)
  mean    y ~ W_S h_S + b + W_R E[h_R]                           (FLAP, arxiv.org/abs/2312.11983, its bias compensation)
  lstsq   y ~ (W_S + D) h_S + b', the D and b' that minimise E|W_R h_R - D h_S - (b' - b)|^2 + ridge |D|^2:
          D = W_R C_RS (C_SS + ridge I)^-1 with the covariance C of h, and b' = b + W_R E[h_R] - D E[h_S]
  lstsq_weights   y ~ (W_S + D) h_S + b: the same through the origin, with the second moments E[h h^T] in place of C. No
          bias is made, so that the model still fits into a class without one

Shapes: F neurons, K kept, D model width. Everything here is float64.
"""
from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from stt.errors import InputError, unknown_name
from stt.scores.base import Seen, Statistic

COMPENSATIONS = ("none", "mean", "lstsq", "lstsq_weights")
LEAST_SQUARES = ("lstsq", "lstsq_weights")
ROUNDING = 1e-12  # a variance below this part of the mean square is none
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
    """The kept columns (D, K) of the down projection and its bias (D,) after compensation; None: the bias stays."""

    weight: Tensor
    bias: Tensor | None
    ridge: float | None  # as in RIDGES; None: not used, at most the mean is folded in


def moments_for(compensate: str) -> list[Moments]:
    """What has to be measured. Raises InputError for an unknown name."""
    if compensate not in COMPENSATIONS:
        raise unknown_name("compensation", compensate, COMPENSATIONS)
    return [] if compensate == "none" else [Moments(with_products=compensate in LEAST_SQUARES)]


def check_memory(compensate: str, widths: Sequence[int], device: torch.device) -> None:
    """Raises InputError if the products of all sites, two F x F float64 matrices each, do not fit into what is free."""
    needed = sum(2 * 8 * width**2 for width in widths) if compensate in LEAST_SQUARES else 0
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else \
        os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise InputError(f"compensate={compensate!r} keeps {needed / 1e9:.0f} GB of products of neurons on "
                         f"{device.type}, and {free / 1e9:.0f} GB are free: use 'mean' or 'none', or a device with "
                         "more memory")


def fold(weight: Tensor, bias: Tensor | None, kept: Tensor, halves: tuple[dict[str, Tensor], dict[str, Tensor]],
         compensate: str) -> Folded:
    """Compensate one site: `weight` (D, F) and `bias` (D,) of its dense down projection, sums of `Moments` by half.

    The ridge is the one of RIDGES with the smallest error on tokens it was not fitted on (each half in turn is held
    out), or none of them if no update at all is better there or if a half holds no token.
    """
    weight = weight.double()
    kept = kept.to(weight.device)
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device).index_fill(0, kept, False)
    removed = removed.nonzero().flatten()
    of_removed = weight[:, removed]  # (D, F - K)
    if compensate == "lstsq_weights":  # through the origin: as if the mean were 0
        halves = tuple({**sums, "sum": torch.zeros_like(sums["sum"])} for sums in halves)
    a, b = halves
    both = {name: a[name] + b[name] for name in a}
    mean = _mean(both)
    ridge, update = None, torch.zeros_like(weight[:, kept])
    if compensate in LEAST_SQUARES and a["count"] and b["count"]:
        ridge = _best_ridge(of_removed, kept, removed, a, b)
    if ridge is not None:
        update = _solved(_System.of(of_removed, kept, removed, _covariance(both)), ridge)
    if compensate == "lstsq_weights":
        return Folded(weight[:, kept] + update, None, ridge)
    dense = torch.zeros(len(weight), dtype=torch.float64, device=weight.device) if bias is None else bias.double()
    return Folded(weight[:, kept] + update, dense + of_removed @ mean[removed] - update @ mean[kept], ridge)


class _System(NamedTuple):
    """The normal equations of W_R h_R on h_S: C_SS (K, K), W_R C_RS (D, K), and tr(W_R C_RR W_R^T)."""

    within: Tensor
    across: Tensor
    total: Tensor

    @classmethod
    def of(cls, of_removed: Tensor, kept: Tensor, removed: Tensor, covariance: Tensor) -> _System:
        rows = of_removed @ covariance[removed]  # (D, F)
        return cls(covariance[kept][:, kept], rows[:, kept], (rows[:, removed] * of_removed).sum())


def _solved(system: _System, ridge: float) -> Tensor | None:
    """D = W_R C_RS (C_SS + ridge I)^-1: (D, K); None if the kept neurons do not vary enough to solve it."""
    scale = system.within.diagonal().mean()
    identity = torch.eye(len(system.within), dtype=torch.float64, device=system.within.device)
    factor, failed = torch.linalg.cholesky_ex(system.within + ridge * scale * identity)
    return None if failed else torch.cholesky_solve(system.across.T, factor).T


def _best_ridge(of_removed: Tensor, kept: Tensor, removed: Tensor, a: dict[str, Tensor],
                b: dict[str, Tensor]) -> float | None:
    """The ridge with the smallest held-out error, summed over both ways; None if no update at all is better, or if the
    kept neurons are constant up to rounding.

    The error of D is E|W_R h_R - D h_S|^2 on the other half, h around the mean of the half that D was fitted on.
    """
    errors: dict[float | None, float] = dict.fromkeys((None, *RIDGES), 0.0)
    for fit, held_out in ((a, b), (b, a)):
        offset = _mean(held_out) - _mean(fit)
        learnt = _System.of(of_removed, kept, removed, _covariance(fit))
        if learnt.within.diagonal().mean() <= ROUNDING * _mean_square(fit)[kept].mean():
            return None
        tried = _System.of(of_removed, kept, removed, _covariance(held_out) + torch.outer(offset, offset))
        errors[None] += float(tried.total)
        for ridge in RIDGES:
            update = _solved(learnt, ridge)
            errors[ridge] += math.inf if update is None else float(
                tried.total - 2 * (update * tried.across).sum() + ((update @ tried.within) * update).sum())
    return min(errors, key=errors.__getitem__)


def _mean_square(sums: dict[str, Tensor]) -> Tensor:
    return sums["products"].diagonal() / sums["count"]


def _mean(sums: dict[str, Tensor]) -> Tensor:
    return sums["sum"] / sums["count"]


def _covariance(sums: dict[str, Tensor]) -> Tensor:
    mean = _mean(sums)
    return sums["products"] / sums["count"] - torch.outer(mean, mean)
