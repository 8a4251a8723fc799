"""What a score is: it is shown what flows through every site and adds up sums; one number per unit comes out.

Shapes: N rows (every position of a batch, padding included), D inputs of the gate projection, F neurons.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What one batch shows of one site. Only what some score `needs` is filled in."""

    is_token: Tensor | None = None  # (N,) 1.0 for real positions, 0.0 for padding; None: all are real
    inputs: Tensor | None = None  # (N, D) what the gate projection reads
    outputs: Tensor | None = None  # (N, F) what it returns: the pre-activation, bias included
    hidden: Tensor | None = None  # (N, F) what the down projection reads
    gradients: Tensor | None = None  # (N, F) of the loss, summed over labelled tokens, with respect to `hidden`


@dataclass
class Score:
    """Base of all scores. `needs` names fields of Seen ("weights" if it needs no data at all).

    Everything a score remembers is a sum in `sums`, float64 and on the model's device, so that it adds up over batches
    and over ranks, and does not depend on how the data is split.
    """

    needs: tuple[str, ...] = ()
    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def update(self, site: str, seen: Seen) -> None:
        """Add one batch to the sums of `site`."""

    def result(self, site: str, weight: Tensor) -> Tensor:
        """(F,) float32, higher = keep. `weight` (F, D) are the rows of the gate projection, float32."""
        raise NotImplementedError

    def add(self, site: str, name: str, value: Tensor) -> None:
        sums = self.sums.setdefault(site, {})
        sums[name] = sums[name] + value if name in sums else value.double()

    def add_mean(self, site: str, values: Tensor, is_token: Tensor | None) -> None:
        """Add rows (N, F) and their number, for `mean`."""
        self.add(site, "sum", over_tokens(values, is_token))
        count = is_token.sum() if is_token is not None else torch.tensor(float(len(values)), device=values.device)
        self.add(site, "count", count)

    def mean(self, site: str) -> Tensor:
        return (self.sums[site]["sum"] / self.sums[site]["count"]).float()


def over_tokens(values: Tensor, is_token: Tensor | None) -> Tensor:
    """Sum over the real rows, float32: (N, F) -> (F,). A product with the mask: nothing leaves the device."""
    values = values.float()
    return values.sum(0) if is_token is None else is_token @ values
