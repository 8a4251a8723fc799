"""A selective optimizer in transformers.Trainer: a ViT learns to read digits that lie on their side.

python examples/vit_trainer.py --method pafi --budget 4000
"""
from __future__ import annotations

import tempfile

import torch
from digits import arguments, by_name, groups_of, kept_and_loaded, own_arguments, pretrained_vit, turned_digits
from torch import nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments

from stt.selective_optimizers.optimizer import SelectiveOptimizer
from stt.selective_optimizers.trainer import SelectiveTrainerMixin
from stt.selective_optimizers.wrap import get_selective_optimizer


class SelectiveTrainer(SelectiveTrainerMixin, Trainer):
    """Trainer that makes its optimizer when it knows the number of steps, and clips what the optimizer uses."""


def fit(model: nn.Module, train: TensorDataset, method: str, budget: int, epochs: int,
        lr: float) -> SelectiveOptimizer:
    """Train `model`; the optimizer that did."""
    def make(trained: nn.Module, steps: int) -> SelectiveOptimizer:
        optimizer_class = get_selective_optimizer(torch.optim.AdamW, method)
        return optimizer_class(params=groups_of(trained), lr=lr, budget=budget, **own_arguments(method, steps))

    with tempfile.TemporaryDirectory() as folder:
        trainer = SelectiveTrainer(
            model, TrainingArguments(folder, num_train_epochs=epochs, per_device_train_batch_size=64, seed=0,
                                     save_strategy="no", report_to=[], logging_steps=20),
            data_collator=by_name, train_dataset=train, make_optimizer=make)
        trainer.train()
    return trainer.optimizer.optimizer  # inside accelerate's


def main(argv: list[str] | None = None) -> float:
    """The accuracy of the base model with the trained weights put into it."""
    args = arguments(__doc__, argv, budget=4000)
    train, test = turned_digits()
    model = pretrained_vit()
    optimizer = fit(model, train, args.method, args.budget, args.epochs, args.lr)
    return kept_and_loaded(optimizer, model, pretrained_vit, args.summary, test)


if __name__ == "__main__":
    main()
