"""Biases, all alike: the first of the model up to the budget. BitFit, arxiv.org/abs/2106.10199."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stt.selective_optimizers.scores.base import Seen, WeightScore


@dataclass(frozen=True)
class Bias(WeightScore):
    """A bias is what is called one (`in_proj_bias`, too). `include_norm` takes every other tensor of one dimension:
    the scales of norms."""

    include_norm: bool = False

    def takes(self, name: str, tensor: Tensor) -> bool:
        """Whether the tensor's weights can be chosen."""
        return name.endswith("bias") or (self.include_norm and tensor.dim() == 1)

    def result(self, name: str, tensor: Tensor, seen: Seen) -> Tensor:
        return torch.full_like(tensor, 0.0 if self.takes(name, tensor) else -torch.inf)


make = Bias
