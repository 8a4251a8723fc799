"""A selective optimizer in a plain training loop: a ViT learns to read digits that lie on their side.

python examples/vit_no_trainer.py --method id3 --budget 4000
"""
from __future__ import annotations

import torch
from digits import (
    accuracy,
    arguments,
    by_name,
    groups_of,
    kept_and_loaded,
    own_arguments,
    pretrained_vit,
    turned_digits,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stt.selective_optimizers.optimizer import SelectiveOptimizer
from stt.selective_optimizers.wrap import get_selective_optimizer


def fit(model: nn.Module, train: TensorDataset, test: TensorDataset, method: str, budget: int, epochs: int,
        lr: float) -> SelectiveOptimizer:
    """Train `model`; the optimizer that did."""
    loader = DataLoader(train, batch_size=64, shuffle=True, collate_fn=by_name,
                        generator=torch.Generator().manual_seed(0))
    optimizer_class = get_selective_optimizer(torch.optim.AdamW, method)
    optimizer = optimizer_class(params=groups_of(model), lr=lr, budget=budget,
                                **own_arguments(method, epochs * len(loader)))
    for epoch in range(epochs):
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {accuracy(model, test):.1%}")
    return optimizer


def main(argv: list[str] | None = None) -> float:
    """The accuracy of the base model with the trained weights put into it."""
    args = arguments(__doc__, argv, budget=4000)
    train, test = turned_digits()
    model = pretrained_vit()
    optimizer = fit(model, train, test, args.method, args.budget, args.epochs, args.lr)
    return kept_and_loaded(optimizer, model, pretrained_vit, args.summary, test)


if __name__ == "__main__":
    main()
