"""A slow selective optimizer to compare with: full-size state, a mask per tensor, and what is not chosen put back."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Batches = Sequence[tuple[Tensor, Tensor]]


def build(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A small classifier with biases, a norm and 511 weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 20), nn.LayerNorm(20), nn.Tanh(), nn.Linear(20, 12), nn.Tanh(),
                         nn.Linear(12, 3)).to(dtype)


def batches(count: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 8, generator=generator).to(dtype), torch.randint(0, 3, (16,), generator=generator))
            for _ in range(count)]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def train(model: nn.Module, optimizer: Optimizer | Masked, data: Batches) -> list[float]:
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> Tensor:
    """All weights of a model, end to end."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class Masked:
    """`base` on whole tensors, of which only what `choose(step, masks)` has marked moves."""

    def __init__(self, model: nn.Module, base: type[Optimizer], choose: Callable[[int, list[Tensor]], None],
                 **arguments: object):
        self.tensors = list(model.parameters())
        self.masks = [torch.zeros_like(tensor, dtype=torch.bool) for tensor in self.tensors]
        self.base, self.choose, self.steps = base(self.tensors, **arguments), choose, 0

    def zero_grad(self) -> None:
        self.base.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        self.choose(self.steps, self.masks)
        before = [tensor.clone() for tensor in self.tensors]
        for tensor, mask in zip(self.tensors, self.masks, strict=True):
            tensor.grad = torch.where(mask, tensor.grad, 0.0)
        self.base.step()
        for tensor, mask, value in zip(self.tensors, self.masks, before, strict=True):
            tensor.copy_(torch.where(mask, tensor, value))
        self.steps += 1

    @property
    def chosen(self) -> Tensor:
        return torch.cat([mask.flatten() for mask in self.masks])


def growing(model: nn.Module, budget: int, steps: int, exp: float = 1.0,
            eps: float = 1e-8) -> Callable[[int, list[Tensor]], None]:
    """ID3's choice by sorting everything: floor(B / T) weights a step, one more in the first B mod T, none after T."""
    tensors = list(model.parameters())

    def choose(step: int, masks: list[Tensor]) -> None:
        count = 0 if step >= steps else budget // steps + (step < budget % steps)
        score = torch.cat([(t.grad.abs() / (eps + t.detach().abs()) ** exp).flatten() for t in tensors])
        taken = torch.cat([mask.flatten() for mask in masks])
        score[taken] = -1
        new = torch.zeros_like(taken)
        new[score.sort(descending=True, stable=True).indices[:count]] = True
        for mask, part in zip(masks, new.split([mask.numel() for mask in masks]), strict=True):
            mask |= part.view(mask.shape)
    return choose


def smallest(model: nn.Module, budget: int) -> Callable[[int, list[Tensor]], None]:
    """PaFI's choice, made at the first step."""
    tensors = list(model.parameters())
    order = torch.cat([tensor.detach().abs().flatten() for tensor in tensors]).sort(stable=True).indices

    def choose(step: int, masks: list[Tensor]) -> None:
        new = torch.zeros(len(order), dtype=torch.bool)
        new[order[:budget]] = True
        for mask, part in zip(masks, new.split([mask.numel() for mask in masks]), strict=True):
            mask |= part.view(mask.shape)
    return choose
