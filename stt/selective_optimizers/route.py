"""Autograd for a tensor of which a part trains: the operation reads the frozen tensor as it is, without a copy, and the
gradient goes to the selected values alone.

Shapes: N rows of an activation, D inputs, F outputs, K selected rows or columns, k selected weights.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from stt.selective_optimizers.weights import read


def rows_of(x: Tensor) -> Tensor:
    """(..., D) -> (N, D)"""
    return x.reshape(-1, x.shape[-1])


class Route(torch.autograd.Function):
    """The frozen tensor itself; its gradient, which lives for this one operation, is read at the selected places."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, values: Tensor, axis: int | None, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.axis, ctx.dtype = axis, values.dtype
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ids, = ctx.saved_tensors
        return None, read(gradient, ctx.axis, ids).to(ctx.dtype), None, None


class LinearOfOutputs(torch.autograd.Function):
    """x W' + b with W (F, D), of which the rows `ids` train: their gradient is the only one that is multiplied out."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor,
                ids: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ids)
        ctx.dtype = values.dtype
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ids = ctx.saved_tensors
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        of_bias = rows_of(gradient).sum(0) if ctx.needs_input_grad[2] else None
        kept = rows_of(gradient).index_select(1, ids)  # (N, K)
        return of_x, None, of_bias, (kept.T @ rows_of(x)).to(ctx.dtype), None  # (K, D)


class LinearOfInputs(torch.autograd.Function):
    """x W' + b with W (F, D), of which the columns `ids` train: of x only those are kept for the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor,
                ids: Tensor) -> Tensor:
        ctx.save_for_backward(rows_of(x).index_select(1, ids), weight)  # (N, K)
        ctx.dtype = values.dtype
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        of_bias = rows_of(gradient).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias, (rows_of(gradient).T @ kept).to(ctx.dtype), None  # (F, K)
