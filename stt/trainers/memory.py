"""What to do when a micro-batch does not fit: the same update from smaller ones."""
from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def size(batch: Mapping[str, Tensor]) -> int:
    """How many examples it holds."""
    return len(batch["labels"])


def split(batch: Mapping[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """The examples of `batch` in order, in at most `parts` batches of about the same size."""
    examples = size(batch)
    chunks = {name: values.chunk(parts) for name, values in batch.items() if len(values) == examples}
    return [dict(batch) | dict(zip(chunks, part, strict=True)) for part in zip(*chunks.values(), strict=True)]
