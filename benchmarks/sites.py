"""How long it takes to find the sites of large models from their configurations alone, without weights.

    python benchmarks/sites.py        two minutes; prints seconds of processor time, the median of five
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine
from benchmarks.sizes import QWEN_7B
from stt.heads import find_heads
from stt.sites import Sites, find_sites

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama 7B": lambda: LlamaForCausalLM(LlamaConfig()),
    "Qwen2 7B": lambda: Qwen2ForCausalLM(Qwen2Config(**QWEN_7B)),
    "Mixtral 8x7B": lambda: MixtralForCausalLM(MixtralConfig()),
}
KEPT_UNDER = ("_stt_sites", "_stt_heads")  # the answers a model keeps


def seconds(model: PreTrainedModel, find: Callable[[PreTrainedModel], Sites], rounds: int) -> tuple[float, int]:
    """Of processor time, and how many sites there are."""
    times, count = [], 0
    for _ in range(rounds):
        for name in KEPT_UNDER:
            model.__dict__.pop(name, None)
        started = time.process_time()
        count = len(find(model))
        times.append(time.process_time() - started)
    return statistics.median(times), count


def main(rounds: int) -> None:
    """A table of all models."""
    torch.set_num_threads(1)
    lines = ["| model | parameters | sites of neurons | s | of heads | s |", "|---|---|---|---|---|---|"]
    for name, build in MODELS.items():
        with torch.device("meta"):
            model = build()
        billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
        (of_neurons, neurons), (of_heads, heads) = (seconds(model, find, rounds) for find in (find_sites, find_heads))
        lines.append(f"| {name} | {billions:.1f} billion | {neurons} | {of_neurons:.1f} | {heads} | {of_heads:.1f} |")
    sys.stdout.write("\n".join([*lines, "", f"{machine.described(torch.device('cpu'))}, load {machine.load()}", ""]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)
