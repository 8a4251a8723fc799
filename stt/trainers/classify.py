"""Training a classifier: the loop of every recipe with a loss over the examples of the whole accumulated batch."""
from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerState, TrainingArguments
from transformers.utils import ModelOutput

from stt.dataset.classification.encode import Encoder
from stt.surgery import head_parameters, override_forward, restore_forward
from stt.trainers import loop
from stt.trainers.shard import trainable

# Shapes: B examples, C classes (1 for a quantity).


def classification_loss(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Cross entropy, or the squared error of a quantity: summed over the batch and divided by `count` (default: by its
    B examples), in float32. The loss of a model's own class ignores how many examples an accumulated batch has."""
    logits = logits.float()  # (B, C)
    summed = (F.mse_loss(logits.squeeze(-1), labels, reduction="sum") if labels.is_floating_point() else
              F.cross_entropy(logits, labels, reduction="sum"))
    return summed / (len(labels) if count is None else count)


def with_loss(model: nn.Module) -> None:
    """Let `model(labels=..., **inputs)` compute `classification_loss`, until `restore_forward`."""
    override_forward(model, _forward)


def _forward(model: nn.Module, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None,
             **inputs: Tensor) -> ModelOutput:
    outputs = type(model).forward(model, **inputs)
    if labels is not None:
        outputs.loss = classification_loss(outputs.logits, labels, num_items_in_batch)
    return outputs


def train(model: nn.Module, encoder: Encoder, rows: Sequence[object], arguments: TrainingArguments,
          log: Callable[..., None], validate: Callable[[], float] | None = None, resume: bool = False,
          seconds_before: float = 0.0, make_optimizer: loop.MakeOptimizer | None = None) -> TrainerState:
    """`loop.train` with `classification_loss`, of a model with a new head; afterwards the model's forward is its own
    again."""
    with trainable(model, arguments) as trained:
        with_loss(trained)
        try:
            return loop.train(trained, rows, encoder.batch, arguments, log, validate, resume, seconds_before,
                              make_optimizer, head_parameters(trained))
        finally:
            restore_forward(trained)
