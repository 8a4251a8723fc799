"""Counts the floating-point operations of a model: 1 multiply-add = 2 FLOPs, matrix products and convolutions only.

Attention counts as its plain matrix products, 2 forward and 4 backward, over all T x T positions, whatever kernel runs
it: a fused kernel computes the scores a second time in the backward pass, and that recomputation is not counted, so the
number is the same on CPU and GPU and under eager attention. An expert counts for the tokens that are sent to it,
whichever way transformers computes experts.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

import torch
import transformers.integrations.moe  # noqa: F401 - registers the operators of FALLBACK
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# B batch, H heads, T query tokens, S key tokens, D width of a query, V width of a value, N rows, I inputs, O outputs

Batch = Mapping[str, Tensor]
aten = torch.ops.aten
KERNELS = ("efficient_attention", "flash_attention", "flash_attention_for_cpu", "cudnn_attention",
           "fused_attention_overrideable")
FALLBACK = torch.ops.transformers  # its loop over the experts, where torch has no grouped product for the device


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    B, H, T, D = query
    S, V = key[-2], value[-1]
    return 2 * B * H * T * S * (D + V)  # queries @ keys, then weights @ values


def _attention_backward(_: torch.Size, *shapes: torch.Size, **__: object) -> int:
    return 2 * _attention(*shapes)  # each product has a gradient towards both of its factors


def _grouped(left: torch.Size, right: torch.Size, *_: object, **__: object) -> int:
    """The product of every row with the matrix of its expert, (N, I) @ (experts, I, O); or the gradient of those
    matrices, (I, N) @ (N, O): a row meets one expert, so their number does not count."""
    return 2 * left[0] * left[1] * right[-1]


def _grouped_backward(rows: torch.Size, matrices: torch.Size, *_: object, **__: object) -> int:
    return 2 * _grouped(rows, matrices)


FORMULAS = {getattr(aten, f"_scaled_dot_product_{kernel}"): _attention for kernel in KERNELS}
FORMULAS |= {getattr(aten, f"_scaled_dot_product_{kernel}_backward"): _attention_backward for kernel in KERNELS}
FORMULAS |= {aten._grouped_mm: _grouped, FALLBACK.grouped_mm_fallback: _grouped,
             FALLBACK.grouped_mm_fallback_backward: _grouped_backward}


def forward_flops(model: nn.Module, batch: Batch) -> int:
    """FLOPs of `model(**batch)` without gradients."""
    with torch.no_grad():
        return flops_of(lambda: model(**batch))


def training_flops(model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Batch], Tensor] | None = None) -> int:
    """FLOPs of one forward and backward pass, as far as the trainable parameters need it.

    `loss(model, batch)` is what is differentiated (default: the model's own `.loss`). Gradients, weights and the random
    state stay as they are. The optimizer's element-wise work is not counted; what activation checkpointing computes
    twice is counted twice.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    objective = loss or (lambda model, batch: model(**batch).loss)
    with torch.enable_grad():
        return flops_of(lambda: torch.autograd.grad(objective(model, batch), trainable, allow_unused=True))


def by_length(count: Callable[[int], int]) -> Callable[[int], int]:
    """`count(length)` for every length from three counts: the FLOPs of a transformer are a polynomial of degree 2 in
    the number of tokens (projections are linear in it, attention quadratic), so this is exact."""
    first, step = 4, 4
    a, b, c = (count(first + i * step) for i in range(3))

    def at(length: int) -> int:  # Newton's forward differences
        x = Fraction(length - first, step)
        value = a + x * (b - a) + x * (x - 1) / 2 * (c - 2 * b + a)
        assert value.denominator == 1, "the counts are not a polynomial of degree 2"
        return int(value)
    return at


def flops_of(work: Callable[[], object]) -> int:
    """FLOPs of whatever `work` computes; the random state stays as it is."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with torch.random.fork_rng(range(torch.cuda.device_count())), counter:
        work()
    return counter.get_total_flops()
