"""What a score of weights is made from."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What the data shows of one tensor, summed over it; None where a score does not need it."""

    gradient: Tensor | None = None  # of the loss summed over labels, shaped as the tensor
    squares: Tensor | None = None  # of the gradients of single examples, likewise
    inputs: Tensor | None = None  # (D,) squares of what a linear layer reads; None also for other tensors


@dataclass(frozen=True)
class WeightScore:
    """`needs` are fields of Seen; a score without any looks at the tensor alone."""

    needs: ClassVar[tuple[str, ...]] = ()

    def result(self, name: str, tensor: Tensor, seen: Seen) -> Tensor:
        """A number for every weight, shaped as the tensor, higher = train; -inf: never."""
        raise NotImplementedError
