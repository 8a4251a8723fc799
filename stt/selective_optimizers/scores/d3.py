"""Dynamic of two magnitudes: score = |dL/dw| / (|w| + eps)^exp, large gradients on small weights.

ID3, arxiv.org/abs/2408.14470, equation of the metric H. There it is asked at every step; here once, on the data given
(as in GaLLoP, arxiv.org/abs/2510.19778).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stt.selective_optimizers.scores.base import Seen, WeightScore


@dataclass(frozen=True)
class D3(WeightScore):
    exp: float = 1.0
    eps: float = 1e-8
    needs: ClassVar[tuple[str, ...]] = ("gradient",)

    def result(self, name: str, tensor: Tensor, seen: Seen) -> Tensor:
        return d3(tensor, seen.gradient, self.exp, self.eps)


def d3(tensor: Tensor, gradient: Tensor, exp: float, eps: float) -> Tensor:
    """|g| / (|w| + eps)^exp of every weight, in float32 or wider: half precision has no 1e-8."""
    if exp == 0:
        return gradient.abs()
    wide = torch.promote_types(torch.promote_types(tensor.dtype, gradient.dtype), torch.float32)
    divisor = tensor.to(wide).abs().add_(eps)
    return gradient.to(wide).abs().div_(divisor if exp == 1 else divisor.pow_(exp))


make = D3
