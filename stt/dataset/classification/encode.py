"""From items to batches of tensors: texts by a tokenizer, pictures by an image processor.   B batch, T tokens."""
from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from stt.dataset.classification.base import Item
from stt.errors import InputError
from stt.loading import check_vocabulary

logger = logging.getLogger(__name__)

Rows = Sequence[object]  # what `batch` makes tensors of: token ids, or the items themselves
PADDING = {"token_type_ids": 0, "attention_mask": 0}


def labels_of(labels: Sequence[int | float]) -> Tensor:
    """(B,): int64 numbers of classes, or float32 quantities."""
    return torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64)


@dataclass(frozen=True)
class TextEncoder:
    """One or two texts as token ids, at most `max_length` of them and at most what the tokenizer knows as its limit;
    inputs that the model does not take (`accepted` names those it does) are left out."""

    reader: PreTrainedTokenizerBase
    max_length: int
    accepted: Collection[str]

    def rows(self, items: Sequence[Item]) -> list[dict[str, object]]:
        """Token ids of every item, and its label. Raises InputError if `max_length` leaves no room for a
        text."""
        limit = self.reader.model_max_length
        length = min(self.max_length, limit) if limit < VERY_LARGE_INTEGER else self.max_length
        columns = list(zip(*(item.content for item in items), strict=True))
        needed = self.reader.num_special_tokens_to_add(pair=len(columns) == 2) + len(columns)
        if length < needed:
            raise InputError(f"max_length {length} leaves no room for {len(columns)} text(s) beside the special tokens:"
                             f" give {needed} or more.")
        found = self.reader(*map(list, columns), truncation=True, max_length=length, verbose=False)
        n_cut = sum(bool(each.overflowing) for each in found.encodings or ())
        if n_cut:
            logger.warning("%d of %d texts are cut on the right to fit %d tokens", n_cut, len(items), length)
        names = [name for name in found if name in self.accepted]
        return [{**{name: found[name][number] for name in names}, "labels": item.label}
                for number, item in enumerate(items)]

    def batch(self, rows: Rows) -> dict[str, Tensor]:
        """Padded on the right: (B, T) each, and labels (B,)."""
        padding = {**PADDING, "input_ids": self.reader.pad_token_id}
        made = {name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True,
                                                      padding_value=padding[name])
                for name in rows[0] if name != "labels"}
        return {**made, "labels": labels_of([row["labels"] for row in rows])}

    def length(self, row: dict[str, object]) -> int:
        """Its tokens."""
        return len(row["input_ids"])


@dataclass(frozen=True)
class ImageEncoder:
    """Pictures as the model's own processor prepares them, decoded when they are needed."""

    reader: BaseImageProcessor

    def rows(self, items: Sequence[Item]) -> list[Item]:
        """The items."""
        return list(items)

    def batch(self, rows: Rows) -> dict[str, Tensor]:
        """What the processor makes (pixel_values (B, 3, height, width)), and labels (B,)."""
        made = self.reader([row.content.open() for row in rows], return_tensors="pt")
        return {**made, "labels": labels_of([row.label for row in rows])}

    def length(self, row: Item) -> int:
        """All pictures are of one size."""
        return 1


Encoder = TextEncoder | ImageEncoder


def encoder_of(reader: PreTrainedTokenizerBase | BaseImageProcessor, model: PreTrainedModel,
               max_length: int) -> Encoder:
    """What makes batches for the model. Raises InputError for a tokenizer of another vocabulary."""
    if isinstance(reader, BaseImageProcessor):
        return ImageEncoder(reader)
    check_vocabulary(model, reader)
    return TextEncoder(reader, max_length, inspect.signature(model.forward).parameters)
