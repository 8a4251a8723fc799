"""Training in less memory: the same update from smaller micro-batches, or with activations computed a second time."""
from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from stt.errors import InputError


def size(batch: Mapping[str, Tensor]) -> int:
    """How many examples it holds."""
    return len(batch["labels"])


def split(batch: Mapping[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """The examples of `batch` in order, in at most `parts` batches of about the same size."""
    examples = size(batch)
    chunks = {name: values.chunk(parts) for name, values in batch.items() if len(values) == examples}
    return [dict(batch) | dict(zip(chunks, part, strict=True)) for part in zip(*chunks.values(), strict=True)]


def check_can_recompute(model: PreTrainedModel) -> None:
    """Raises InputError for a model that cannot compute its activations a second time."""
    if not model.supports_gradient_checkpointing:
        raise InputError(f"{type(model).__name__} knows no activation checkpointing: leave it out")


def recompute(model: PreTrainedModel) -> None:
    """Until `model.activation_checkpointing_disable()` training keeps what enters a layer and computes the rest of it
    again in the backward pass, with the same dropout.   arxiv.org/abs/1604.06174"""
    model.activation_checkpointing_enable({"use_reentrant": False})
