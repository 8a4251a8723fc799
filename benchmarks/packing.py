#!/usr/bin/env python
"""How many more tokens a second are trained when the examples of a batch share rows (`train_llm.py --pack`).

    python benchmarks/packing.py --rounds 12

Made-up chats: lengths are log-normal around a median of 60 tokens (sigma 0.6, from 8 to 256), the second half of each
is labelled. One process, padded and packed in turn on the same batches; a ratio is the median over the rounds of the
ratio within the round, in brackets its 95 % interval. Losses and gradients are checked to be equal first.
"""
from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

Example = dict[str, list[int]]
VOCABULARY, LABELLED = 8192, 0.5


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="examples in a batch")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

    from benchmarks import machine
    from benchmarks.table import Table

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = decoder(args.hidden).to(device).train()
    rows = [compared(model, size, args.rounds) for size in args.batches]
    table = Table("Packed against padded", ["batch", "tokens a real one, padded", "packed", "packed / padded tokens/s"],
                  rows)
    print("\n".join([f"- {name}: {value}" for name, value in machine.described(device).items()]), table.markdown(),
          sep="\n\n")
    return 0


def decoder(hidden: int) -> nn.Module:
    """A random Qwen2 of two layers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=2,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, max_position_embeddings=2048))


def chats(count: int, seed: int) -> list[Example]:
    """Random tokens of the lengths of short chats."""
    generator = random.Random(seed)
    lengths = [min(256, max(8, round(generator.lognormvariate(math.log(60), 0.6)))) for _ in range(count)]
    rows = [[generator.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]
    return [{"input_ids": ids, "labels": [-100] * (half := round((1 - LABELLED) * len(ids))) + ids[half:]}
            for ids in rows]


def compared(model: nn.Module, size: int, rounds: int) -> list[object]:
    """The row of the table for batches of `size` examples."""
    from benchmarks.table import with_interval
    from benchmarks.timing import Patience, Work, alternate, ratio
    from stt.loss import chunked_loss
    from stt.packing import find_packing
    from stt.trainers.sft import collate

    data = [chats(size, seed) for seed in range(rounds + 1)]
    ways = {"padded": collate(0), "packed": find_packing(model, data[0]).collate(0)}
    chunked_loss(model)
    check_equal(model, [make(data[0]) for make in ways.values()])
    works = {name: Work(lambda batch: step(model, batch), prepared(model, data, make)) for name, make in ways.items()}
    clock = "cpu" if model.device.type == "cpu" else "wall"  # processor time: other work on the machine does not count
    seconds = alternate(works, Patience(seconds=0, at_least=rounds, clock=clock), model.device)
    real = sum(len(row["input_ids"]) for each in data for row in each)
    computed = {name: sum(make(each)["input_ids"].numel() for each in data) / real for name, make in ways.items()}
    gain = with_interval(ratio(seconds["padded"], seconds["packed"]))
    return [str(size), computed["padded"], computed["packed"], gain]


def prepared(model: nn.Module, data: Sequence[Sequence[Example]],
             make: Callable[[Sequence[Example]], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """Gives one batch after the other, on the model's device."""
    batches: Iterator[Sequence[Example]] = itertools.cycle(data)
    return lambda: {name: value.to(model.device) for name, value in make(next(batches)).items()}


def step(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()
    model.zero_grad()


def check_equal(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
    """Raises AssertionError unless all batches give one loss and one gradient."""
    import torch

    found = []
    for batch in batches:
        loss = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for first, other in zip(*found, strict=True):
        torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    sys.exit(main())
