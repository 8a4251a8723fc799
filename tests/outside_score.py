"""A score that lives outside the library, as a user would write it: mean |h| of what the down projection reads."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stt.scores.base import Score, Seen, Weights


@dataclass
class MeanSize(Score):
    needs: tuple[str, ...] = ("hidden",)

    def update(self, site: str, seen: Seen) -> None:
        self.add_moments(site, seen.hidden.abs(), seen.is_token)

    def result(self, site: str, weights: Weights) -> Tensor:
        return self.mean(site)


class Plain(Score):
    """Not a dataclass, so its `needs` are those of the base: none."""

    needs = ("hidden",)
