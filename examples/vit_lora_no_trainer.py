"""A selective optimizer on low-rank adapters, in a plain training loop: part of a LoRA learns to read digits that lie
on their side.

python examples/vit_lora_no_trainer.py --method pafi --budget 2000
"""
from __future__ import annotations

from digits import arguments, kept_and_loaded, turned_digits, vit_with_lora
from vit_no_trainer import fit


def main(argv: list[str] | None = None) -> float:
    """The accuracy of the base model with the trained weights put into it."""
    args = arguments(__doc__, argv, budget=2000)
    train, test = turned_digits()
    model = vit_with_lora()
    optimizer = fit(model, train, test, args.method, args.budget, args.epochs, args.lr)
    return kept_and_loaded(optimizer, model, vit_with_lora, args.summary, test)


if __name__ == "__main__":
    main()
