"""Uniform random scores, the baseline every other has to beat. The seed and the site's name decide, nothing else."""
from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from stt.scores.base import Score, Weights


@dataclass
class Random(Score):
    needs: tuple[str, ...] = ("weights",)
    seed: int = 0

    def result(self, site: str, weights: Weights) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {site}".encode()))  # 32 bits is all it uses
        return torch.rand(len(weights.gate), generator=generator).double()


make = Random
