"""Uniform random scores, which every other has to beat. The seed and the tensor's name decide, nothing else."""
from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from stt.selective_optimizers.scores.base import Seen, WeightScore


@dataclass(frozen=True)
class Random(WeightScore):
    seed: int = 42

    def result(self, name: str, tensor: Tensor, seen: Seen) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))  # 32 bits is all it uses
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64)


make = Random
