"""For tests of patches: small models of many kinds of tensors, random selections of their weights, and weights that
moved in every way that could be lost in a difference."""
from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from stt.selection import Selection
from stt.selective_optimizers.patch import Patch
from stt.selective_optimizers.weights import named_tensors, selection_of

FORMS = ("flat", "rows", "columns", "whole")


class Mixed(nn.Module):
    """A convolution, a norm with statistics, an embedding tied to a head, and a number."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(3, 4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.words = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.words.weight
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        images = self.norm(self.convolution(images)).mean(-1)  # (B, 4)
        return self.head(self.middle(images + self.words(words)) * self.scale)  # (B, 7)


def mixed(dtype: torch.dtype = torch.float32, seed: int = 0) -> Mixed:
    torch.manual_seed(seed)
    return Mixed().to(dtype).eval()


def drawn(model: nn.Module, seed: int = 0, form: str | None = None, share: float = 0.4) -> Selection:
    """A random part of every tensor: positions, rows, columns, or all of it; by turns unless `form` says."""
    generator = torch.Generator().manual_seed(seed)
    tensors, units, along = named_tensors(model), {}, {}
    for i, (name, tensor) in enumerate(tensors.items()):
        how = form or FORMS[(i + seed) % len(FORMS)]
        axis = {"rows": 0, "columns": 1, "whole": 0}.get(how)
        axis = None if axis is None or tensor.dim() <= axis else axis
        size = tensor.numel() if axis is None else tensor.shape[axis]
        k = size if how == "whole" else math.ceil(share * size)
        units[name] = torch.randperm(size, generator=generator)[:k].sort().values
        along |= {} if axis is None else {name: axis}
    return selection_of(units, along, tensors, {"unit": "weight", "seed": seed})


def masks(model: nn.Module, selection: Selection) -> dict[str, Tensor]:
    """Which weights of every tensor are selected, spelled out."""
    found = {}
    for name, tensor in named_tensors(model).items():
        mask = torch.zeros(tensor.shape, dtype=torch.bool)
        axis = selection.meta["along"].get(name)
        for i in selection[name].tolist() if name in selection else ():
            if axis is None:
                mask.view(-1)[i] = True
            elif axis == 0:
                mask[i] = True
            else:
                mask[:, i] = True
        found[name] = mask
    return found


def moved(model: nn.Module, selection: Selection, seed: int = 0) -> nn.Module:
    """A copy of which the selected weights moved, little, far, over zero, to -0.0, or not at all."""
    generator = torch.Generator().manual_seed(seed)
    tuned, chosen = copy.deepcopy(model), masks(model, selection)
    for name, tensor in named_tensors(tuned).items():
        kind = torch.randint(6, tensor.shape, generator=generator)
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        start = tensor.detach()
        values = torch.stack([start, start + 1e-3 * noise, -start * noise, noise * 50, start * 1e-4 * noise,
                              torch.full_like(start, -0.0)]).gather(0, kind[None])[0]
        tensor.data = torch.where(chosen[name], values, start)
    return tuned


def state_bits(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of the state dict, byte for byte."""
    return {name: value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            for name, value in model.state_dict().items()}


def made(dtype: torch.dtype = torch.float32, seed: int = 0,
         form: str | None = None) -> tuple[nn.Module, nn.Module, Patch]:
    """A base model, a tuned one, and the patch between them."""
    base = mixed(dtype)
    tuned = moved(base, drawn(base, seed, form), seed)
    return base, tuned, Patch.between(base, tuned, drawn(base, seed, form))


def dense(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
