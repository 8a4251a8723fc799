"""An objective over a vocabulary at the labelled positions, in chunks, with its gradients ready before backward."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from stt.errors import InputError

# Shapes: N positions, L labelled ones, C of these in a chunk, D model width, V words.

CHUNK_ROWS = 512  # logits (CHUNK_ROWS, V) at a time: the head's matrix products are slower below 256 rows on a CPU
IGNORED = -100

# objective(logits (C, V), answers (C,), start, needs_slopes): the summed value at the labelled positions from number
# `start` on; with `needs_slopes` the logits become its derivative by them, in place.
Objective = Callable[[Tensor, Tensor, int, bool], Tensor]


class Transform(NamedTuple):
    """From the head's product x to the logits: cap * tanh(scale * x / cap), or scale * x without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = self.scale * x
        return x if self.cap is None else torch.tanh(x / self.cap) * self.cap


def cross_entropy(logits: Tensor, answers: Tensor, start: int, needs_slopes: bool) -> Tensor:
    """The objective of ordinary training: -log softmax(logits)[answer], summed."""
    logits.sub_(logits.amax(-1, keepdim=True))
    answers = answers.unsqueeze(1)  # (C, 1)
    chosen = logits.gather(1, answers)  # (C, 1)
    weights = logits.exp_().sum(-1, keepdim=True)  # (C, 1)
    if needs_slopes:  # the softmax less the answer
        logits.div_(weights).scatter_add_(1, answers, torch.full_like(chosen, -1))
    return (weights.log_() - chosen).sum()


@torch.compiler.disable
def summed(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, targets: Tensor, transform: Transform,
           objective: Objective = cross_entropy) -> tuple[Tensor, int]:
    """(sum, number) of the objective of `transform(hidden weight^T + bias)` and `targets` where these are not -100.

    hidden (..., D), weight (V, D), bias (V,), targets (...). Without a weight `hidden` holds the logits (..., V). Under
    autocast the matrix products run in its dtype; the softmax and the weight's gradient are float32 (float64 for
    float64 weights).
    """
    if hidden.shape[:-1] != targets.shape:
        raise InputError(f"the labels have shape {tuple(targets.shape)} and the model's states "
                         f"{tuple(hidden.shape[:-1])}: give one label a position")
    targets = targets.flatten().to(hidden.device)  # (N,)
    rows = (targets != IGNORED).nonzero().squeeze(1)  # (L,)
    return summed_at(hidden, weight, bias, rows, targets[rows], transform, objective), len(rows)


def summed_at(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Tensor, answers: Tensor,
              transform: Transform, objective: Objective = cross_entropy) -> Tensor:
    """The same sum, of the positions `rows` (L,) of hidden (..., D) and the words that follow them, `answers` (L,)."""
    needs = [value is not None and value.requires_grad and torch.is_grad_enabled() for value in (hidden, weight, bias)]
    return _Summed.apply(hidden.flatten(0, -2), weight, bias, rows, answers, transform, objective, needs)


class _Summed(torch.autograd.Function):
    """Differentiable by hidden, weight and bias: their gradients are ready before backward, which scales them."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Tensor,
                targets: Tensor, transform: Transform, objective: Objective, needs: list[bool]) -> Tensor:
        device = hidden.device.type
        dtype = (hidden if weight is None else weight).dtype
        if weight is not None and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            loss, ctx.gradients = _in_chunks(hidden, weight, bias, rows, targets, transform, objective, needs, dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss keeps its gradients for one backward pass: compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(upstream) for gradient in gradients), *[None] * 5


def _in_chunks(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Tensor, targets: Tensor,
               transform: Transform, objective: Objective, needs: list[bool],
               dtype: torch.dtype) -> tuple[Tensor, list[Tensor | None]]:
    """The summed objective of the positions `rows` of hidden (N, D), and the gradients that are needed."""
    exact = torch.promote_types(dtype, torch.float32)
    total = torch.zeros((), dtype=exact, device=hidden.device)
    of_hidden = torch.zeros_like(hidden) if needs[0] else None
    of_bias = torch.zeros_like(bias, dtype=exact) if needs[2] else None
    of_weight = None  # of the first chunk, which is there even if it is empty, is not added to zeros
    matrix, offset = (None if value is None else value.to(dtype) for value in (weight, bias))  # (V, D), (V,)
    for number, (at, answers) in enumerate(zip(rows.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True)):
        states = hidden[at].to(dtype)  # (C, D)
        slopes = (states if matrix is None else F.linear(states, matrix, offset)).to(exact)  # (C, V), the logits first
        of_chunk = partial(objective, answers=answers, start=number * CHUNK_ROWS, needs_slopes=any(needs))
        total += _transformed_(slopes, transform, any(needs), of_chunk)
        if of_bias is not None:
            of_bias += slopes.sum(0)
        slopes = slopes.to(dtype)
        if of_hidden is not None:
            of_hidden[at] = (slopes if matrix is None else slopes @ matrix).to(hidden.dtype)
        if needs[1]:
            of_weight = _plus_product(of_weight, slopes.T, states, exact)
    of_weight, of_bias = (None if gradient is None else gradient.to(value.dtype)
                          for gradient, value in ((of_weight, weight), (of_bias, bias)))
    return total, [of_hidden, of_weight, of_bias]


def _transformed_(x: Tensor, transform: Transform, needs_slopes: bool, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """The objective of one chunk; x (C, V), the head's product, becomes the derivative by it."""
    scale, cap = transform
    bend = None
    if scale != 1:
        x.mul_(scale)
    if cap is not None:
        x.div_(cap).tanh_()
        bend = 1 - x * x if needs_slopes else None  # (C, V), the derivative of the cap
        x.mul_(cap)
    value = objective(x)
    if bend is not None:
        x.mul_(bend)
    if scale != 1 and needs_slopes:
        x.mul_(scale)
    return value


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total (V, D), in place if there is one, plus (V, C) (C, D), summed in `dtype`."""
    if total is None:
        return (left @ right).to(dtype)
    if left.dtype == dtype:
        return torch.addmm(total, left, right, out=total)  # counters of FLOPs do not know addmm_
    return total.add_(left @ right)
