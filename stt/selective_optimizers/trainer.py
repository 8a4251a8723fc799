"""Selective optimizers in transformers.Trainer and its subclasses."""
from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers.trainer_utils import unwrap_peft_model

from stt.selective_optimizers.optimizer import SelectiveOptimizer

MakeOptimizer = Callable[[nn.Module, int], torch.optim.Optimizer]  # from the model and the number of steps


class SelectiveTrainerMixin:
    """To stand in front of Trainer among the bases of a class.

    `make_optimizer` gives Trainer the optimizer once the number of steps is known, which ID3 shares its budget over. A
    SelectiveOptimizer without a `max_grad_norm` of its own clips to that of the TrainingArguments, by the gradients it
    uses and not, as Trainer would, by those of the whole model. One that gathers in the backward pass is told of how
    many passes a step is.

    >>> class SelectiveTrainer(SelectiveTrainerMixin, Trainer): ...
    >>> SelectiveTrainer(model, args, make_optimizer=lambda model, steps: id3(
    ...     model.parameters(), lr=1e-4, budget=320_000, max_steps=steps))
    """

    def __init__(self, *args: object, make_optimizer: MakeOptimizer | None = None, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.make_optimizer = make_optimizer

    def _prepare_for_training(self, max_steps: int, *args: object) -> tuple[nn.Module, object]:
        if self.make_optimizer is not None:
            self.optimizer = self.make_optimizer(unwrap_peft_model(self.model), max_steps)
        if isinstance(self.optimizer, SelectiveOptimizer) and self.optimizer.max_grad_norm is None:
            self.optimizer.max_grad_norm = self.args.max_grad_norm or None
        return super()._prepare_for_training(max_steps, *args)

    def get_batch_samples(self, *args: object) -> tuple[list[Mapping[str, Tensor]], Tensor | int | None]:
        batches, items = super().get_batch_samples(*args)
        self.announce(len(batches))
        return batches, items

    def announce(self, passes: int) -> None:
        """Say of how many backward passes the next step is, if the optimizer wants to know."""
        if self.selective is not None:
            self.selective.announce(passes)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        return super()._clip_grad_norm(model) if self.selective is None else None

    @property
    def selective(self) -> SelectiveOptimizer | None:
        """The optimizer, if it is one that chooses weights."""
        return selective_in(self.optimizer)


def selective_in(optimizer: torch.optim.Optimizer | None) -> SelectiveOptimizer | None:
    """An optimizer that chooses weights, or the one that accelerate has put its own around."""
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return inner if isinstance(inner, SelectiveOptimizer) else None
