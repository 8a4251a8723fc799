"""Supervised fine-tuning on answers: the training loop with a loss at the labelled positions."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import unwrap_peft_model

from stt.loss import Teach, chunked_loss
from stt.packing import Packing
from stt.surgery import restore_forward
from stt.trainers import loop
from stt.trainers.shard import trainable

# Shapes: B examples, T tokens.

Encoded = dict[str, list[int]]  # input_ids and labels (-100: not trained on) of one example


def collate(pad_id: int) -> Callable[[Sequence[Encoded]], dict[str, Tensor]]:
    """Batches padded on the right: input_ids, attention_mask and labels, all (B, T)."""
    def padded(rows: Sequence[list[int]], filler: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)

    def batch(examples: Sequence[Encoded]) -> dict[str, Tensor]:
        ids = [example["input_ids"] for example in examples]
        return {"input_ids": padded(ids, pad_id), "attention_mask": padded([[1] * len(row) for row in ids], 0),
                "labels": padded([example["labels"] for example in examples], -100)}
    return batch


def train(model: nn.Module, encoded: Sequence[Encoded], pad_id: int, arguments: TrainingArguments,
          log: Callable[..., None], validate: Callable[[], float] | None = None, resume: bool = False,
          seconds_before: float = 0.0, packing: Packing | None = None, teach: Teach | None = None,
          make_optimizer: loop.MakeOptimizer | None = None) -> TrainerState:
    """`loop.train` with the loss of `chunked_loss`, over the labelled tokens of the whole accumulated batch; afterwards
    the model's forward is its own again. `packing` lets the examples of a batch share rows, `teach` changes the loss.
    Raises what loop.train raises, and InputError for a model without such a loss."""
    batches = collate(pad_id) if packing is None else packing.collate(pad_id)
    with trainable(model, arguments) as trained:
        chunked_loss(trained, teach)
        try:
            return loop.train(trained, encoded, batches, arguments, log, validate, resume, seconds_before,
                              make_optimizer)
        finally:
            restore_forward(unwrap_peft_model(trained))
