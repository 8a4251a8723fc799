"""What is measured of a site: sums over the rows that flow through it; a score makes one number per unit of them.

Shapes: N rows (every position of a batch, padding included), D model width, F neurons.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What one batch shows of one site. Only what some statistic `needs` is filled in."""

    is_token: Tensor | None = None  # (N,) 1.0 for rows that count, 0.0 for padding; None: all count
    inputs: Tensor | None = None  # (N, D) what the gate projection reads
    outputs: Tensor | None = None  # (N, F) what it returns: the pre-activation, bias included
    hidden: Tensor | None = None  # (N, F) what the down projection reads
    gradients: Tensor | None = None  # (N, F) of the loss, summed over labelled tokens, with respect to `hidden`


class Weights:
    """The projections of one site, one row or column per unit; float64, made when first asked for."""

    def __init__(self, gate: Callable[[], Tensor], down: Callable[[], Tensor]):
        self._gate, self._down = gate, down

    @functools.cached_property
    def gate(self) -> Tensor:
        """(F, D)"""
        return self._gate().detach().double()

    @functools.cached_property
    def down(self) -> Tensor:
        """(D, F)"""
        return self._down().detach().double()


@dataclass
class Statistic:
    """Base of all that is measured. `needs` names fields of Seen ("weights" if it needs no data at all).

    `units` says of which sites: those of "neurons" or those of attention "heads".

    Everything a statistic remembers is a sum in `sums`, float64 and on the model's device, so that it adds up over
    batches, halves of the data and ranks, and does not depend on how the data is split.
    """

    units: ClassVar[str] = "neurons"
    needs: tuple[str, ...] = ()
    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def update(self, site: str, seen: Seen) -> None:
        """Add one batch to the sums of `site`."""

    def add(self, site: str, name: str, value: Tensor) -> None:
        sums = self.sums.setdefault(site, {})
        sums[name] = sums[name] + value if name in sums else value.double()

    def add_moments(self, site: str, values: Tensor, is_token: Tensor | None, with_squares: bool = False) -> None:
        """Add rows (N, F) and their number, for `mean` and, with squares, `variance` and `mean_square`."""
        values = wide(values)
        self.add(site, "sum", over_tokens(values, is_token))
        if with_squares:
            self.add(site, "squares", over_tokens(values.square(), is_token))
        count = is_token.sum() if is_token is not None else torch.tensor(float(len(values)), device=values.device)
        self.add(site, "count", count)

    def mean(self, site: str) -> Tensor:
        """(F,)"""
        return self.sums[site]["sum"] / self.sums[site]["count"]

    def mean_square(self, site: str) -> Tensor:
        """(F,)"""
        return self.sums[site]["squares"] / self.sums[site]["count"]

    def variance(self, site: str) -> Tensor:
        """(F,) of the rows themselves (divided by their number), never negative."""
        return (self.mean_square(site) - self.mean(site).square()).clamp(min=0)


@dataclass
class Score(Statistic):
    """A statistic that ranks units."""

    def result(self, site: str, weights: Weights) -> Tensor:
        """(F,) float64, higher = keep."""
        raise NotImplementedError


def over_tokens(values: Tensor, is_token: Tensor | None) -> Tensor:
    """Sum over the rows that count, in float32 or wider: (N, F) -> (F,). A product with the mask: nothing leaves the
    device."""
    values = wide(values)
    return values.sum(0) if is_token is None else is_token.to(values.dtype) @ values


def wide(values: Tensor) -> Tensor:
    """The values in float32, or in float64 if they come so."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
