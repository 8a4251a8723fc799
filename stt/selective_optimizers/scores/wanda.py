"""Wanda: score = |w_oi| * ||x_i||, the norm over tokens of what the weight reads; linear layers only.
arxiv.org/abs/2306.11695, eq. 1."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stt.selective_optimizers.scores.base import Seen, WeightScore


@dataclass(frozen=True)
class Wanda(WeightScore):
    needs: ClassVar[tuple[str, ...]] = ("inputs",)

    def result(self, name: str, tensor: Tensor, seen: Seen) -> Tensor:
        if seen.inputs is None:
            return torch.full_like(tensor, -torch.inf)
        return tensor.abs() * seen.inputs.sqrt().to(tensor)  # broadcast along the inputs


make = Wanda
