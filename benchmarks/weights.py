#!/usr/bin/env python
"""What it costs to train chosen weights: stt's two back ends, full AdamW, the public package, PEFT's LoRA and sparse
tuners.

    python benchmarks/weights.py                      # a Llama of 10.4 M weights, a budget of 32,000
    python benchmarks/weights.py --out benchmarks/WEIGHTS.md
    python benchmarks/weights.py --size 0.5B          # on a GPU, under bfloat16 autocast
    python benchmarks/weights.py --size 7B            # the same in bfloat16, what fits

One process; every round runs every row once, in an order that rotates. Times are medians; a ratio is the median over
the rounds of the ratio within the round, in brackets its 95 % interval. Rows of packages that are not installed are
left out (`pip install -e '.[bench]' -c requirements.txt`).
"""
from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, memory
from benchmarks.sizes import QWEN_05B, QWEN_7B
from benchmarks.table import Table, with_interval
from benchmarks.timing import Patience, Ratio, Work, alternate, ratio
from benchmarks.variants import precision

if TYPE_CHECKING:
    import peft

MB = 1e6
SHARE = 0.019  # of every linear layer, for what is compared with PEFT
KEEP = 0.3  # of the neurons, trained in place
STEPS = 1000  # over which ID3 spends its budget


@dataclass(frozen=True)
class Size:
    """A decoder with random weights, its batch, and how many of its weights train."""

    config: Mapping[str, object]
    batch: tuple[int, int]  # examples, tokens of each
    budget: int
    dtype: torch.dtype = torch.float32
    rows: tuple[str, ...] = ()  # keys of ROWS; empty: all


SIZES = {
    "tiny": Size({"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                  "vocab_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}, (2, 16), 1000),
    "small": Size({"model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8,
                   "vocab_size": 8192, "num_attention_heads": 4, "num_key_value_heads": 4}, (2, 128), 32_000),
    "0.5B": Size({**QWEN_05B, "model_type": "qwen2", "tie_word_embeddings": True}, (8, 512), 1_000_000),
    "7B": Size({**QWEN_7B, "model_type": "qwen2"}, (2, 512), 15_000_000, torch.bfloat16,
               ("stt leaf, PaFI", "PEFT LoRA, of about the budget", "PEFT Super-Tuning, 1.9 %")),
}


@dataclass
class Row:
    """A model ready to train, its optimizer, and what the model holds beside the dense one's weights."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    held: list[Tensor] = field(default_factory=list)


Make = Callable[[nn.Module, int], Row]


# ---------------------------------------------------------------- rows


def full(fused: bool) -> Make:
    def make(model: nn.Module, budget: int) -> Row:
        return Row(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused))
    return make


def public(method: str) -> Make:
    def make(model: nn.Module, budget: int) -> Row:
        from selective_optimizers.wrap import get_selective_optimizer

        own = {"max_steps": STEPS} if method == "id3" else {}
        return Row(model, get_selective_optimizer(torch.optim.AdamW, method)(
            params=model.parameters(), lr=1e-4, budget=budget, verify=False, **own))
    return make


def wrapper(method: str) -> Make:
    def make(model: nn.Module, budget: int) -> Row:
        from stt.selective_optimizers.wrap import get_selective_optimizer

        own = {"max_steps": STEPS} if method == "id3" else {}
        return Row(model, get_selective_optimizer(torch.optim.AdamW, method)(
            params=model.parameters(), lr=1e-4, budget=budget, weight_decay=0.0, **own))
    return make


def leaf(model: nn.Module, budget: int) -> Row:
    import stt

    return attached(model, stt.select_weights(model, score="smallest", budget=budget))


def leaf_of_largest(model: nn.Module, budget: int) -> Row:
    """The weights that Super-Tuning takes."""
    from stt.selective_optimizers.choose import top_entries
    from stt.selective_optimizers.weights import named_tensors, selection_of

    weights = {f"{name}.weight": module.weight.detach() for name, module in linears(model).items()}
    units = {name: top_entries(weight.abs().flatten(), int(SHARE * weight.numel())) for name, weight in weights.items()}
    return attached(model, selection_of(units, {}, named_tensors(model), {}))


def leaf_of_rows(model: nn.Module, budget: int) -> Row:
    import stt

    return attached(model, stt.select(model, score="magnitude", keep=KEEP))


def attached(model: nn.Module, selection: object) -> Row:
    import stt
    from stt.selective_optimizers.leaf import Leaf

    stt.attach(model, selection)
    leaves = [module for module in model.modules() if isinstance(module, Leaf)]
    held = [tensor for each in leaves for tensor in (each.values, each.ids)] + list(model.stt_attached.start.values())
    return Row(model, torch.optim.AdamW(stt.selected_parameters(model), lr=1e-4), held)


def sparse_tuner(name: str) -> Make:
    """PEFT's, on all linear layers but the head, of as many weights."""
    def make(model: nn.Module, budget: int) -> Row:
        import peft

        targets = list(linears(model))
        if name == "supertuning":
            config = peft.SupertuningConfig(target_modules=targets, sparsity=1 - SHARE)
        else:  # SHiRA gives every layer r * (D + F) weights
            shape = linears(model)[targets[0]].weight.shape
            config = peft.ShiraConfig(target_modules=targets, r=max(1, round(SHARE * shape.numel() / sum(shape))))
        return tuned(model, config)
    return make


def tuned(model: nn.Module, config: peft.PeftConfig) -> Row:
    import peft

    before = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    model = peft.get_peft_model(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in before]
    return Row(model, torch.optim.AdamW(trained, lr=1e-4), held)


def lora(model: nn.Module, budget: int) -> Row:
    """On all linear layers but the head, of the rank with which it trains about as many numbers as the budget."""
    import peft

    return tuned(model, peft.LoraConfig(target_modules=list(linears(model)), r=rank_of(model, budget)))


def rank_of(model: nn.Module, budget: int) -> int:
    """The rank at which LoRA on `linears` trains as near to the budget as can be."""
    return max(1, round(budget / sum(sum(module.weight.shape) for module in linears(model).values())))


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer but the head."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
            and module is not head}


ROWS: dict[str, tuple[str | None, Make]] = {  # the package that it needs
    "full, AdamW": (None, full(False)),
    "full, fused AdamW": (None, full(True)),
    "public package, PaFI": ("selective_optimizers", public("pafi")),
    "stt wrapper, PaFI": (None, wrapper("pafi")),
    "stt leaf, PaFI": (None, leaf),
    "public package, ID3": ("selective_optimizers", public("id3")),
    "stt wrapper, ID3": (None, wrapper("id3")),
    "PEFT LoRA, of about the budget": ("peft", lora),
    "PEFT Super-Tuning, 1.9 %": ("peft", sparse_tuner("supertuning")),
    "PEFT SHiRA, 1.9 %": ("peft", sparse_tuner("shira")),
    "stt leaf, Super-Tuning's 1.9 %": (None, leaf_of_largest),
    "stt leaf, rows of 30 % of the neurons": (None, leaf_of_rows),
}
# (words, what is measured, of which row, against which, at most)
LIMITS = (("a static step / AdamW's", "step", "stt leaf, PaFI", "full, AdamW", None),
          ("an ID3 step / the public package's", "step", "stt wrapper, ID3", "public package, ID3", 0.35),
          ("peak memory / Super-Tuning's, same weights", "peak", "stt leaf, Super-Tuning's 1.9 %",
           "PEFT Super-Tuning, 1.9 %", 1.0),
          ("forward and backward of rows / full", "pass", "stt leaf, rows of 30 % of the neurons", "full, AdamW", 0.9))
MOST_MS, MOST_STATE = 5.0, 0.3  # of a static step, and MB of its optimizer state


# ---------------------------------------------------------------- measurements


def decoder(size: Size, device: torch.device) -> nn.Module:
    """Random weights, ready to train."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**size.config), dtype=size.dtype)
    return model.train()


def passed(model: nn.Module, ids: Tensor) -> None:
    with precision(ids.device):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()


def bytes_in(value: object) -> int:
    """Of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(bytes_in(part) for part in parts)


def state_and_rest(row: Row) -> tuple[int, int]:
    """Bytes of the base optimizer's state, and of what else is held for training: masks, positions, values."""
    whole = row.optimizer.state_dict()
    state = whole["selective"]["base"]["state"] if "selective" in whole else whole["state"]
    masks = [group.get("chosen_masks", []) for group in row.optimizer.param_groups]
    pools = whole["selective"]["pools"] if "selective" in whole else []
    return bytes_in(state), bytes_in(masks) + bytes_in(pools) + bytes_in(row.held)


def peak(row: Row, ids: Tensor) -> int:
    """Most bytes above the weights of the model in one whole step."""
    def step() -> None:
        row.optimizer.zero_grad()
        passed(row.model, ids)
        row.optimizer.step()

    step()
    row.optimizer.zero_grad()
    return sum(state_and_rest(row)) + memory.extra_bytes(ids.device, step)


def timed(rows: Mapping[str, Row], ids: Tensor, patience: Patience) -> tuple[dict[str, list[float]], ...]:
    """Seconds of every optimizer step, and of every forward and backward pass."""
    def zero(row: Row) -> None:
        row.optimizer.zero_grad()

    def ready(row: Row) -> None:
        row.optimizer.zero_grad()
        passed(row.model, ids)

    steps = {name: Work(lambda _, row=row: row.optimizer.step(), lambda row=row: ready(row))
             for name, row in rows.items()}
    passes = {name: Work(lambda _, row=row: passed(row.model, ids), lambda row=row: zero(row))
              for name, row in rows.items()}
    return alternate(steps, patience, ids.device), alternate(passes, patience, ids.device)


# ---------------------------------------------------------------- the table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", choices=SIZES, help="of the model; from 0.5B on for a GPU")
    parser.add_argument("--budget", type=int, help="weights to train (default: by size, 32000 for small)")
    parser.add_argument("--seconds", type=float, default=120, help="for each of the two timings")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: on a machine that is busy")
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.clock == "cpu" and device.type == "cuda":
        parser.error("--clock cpu does not see the time of a GPU: leave it out")
    if args.budget is not None and args.budget < 1:
        parser.error(f"--budget must be 1 or more weights, got {args.budget}")
    if args.out and not args.out.resolve().parent.is_dir():
        parser.error(f"cannot write {args.out}: its folder does not exist")
    torch.set_num_threads(1)
    size = SIZES[args.size]
    args.budget = args.budget or size.budget
    ids = torch.randint(0, size.config["vocab_size"], size.batch, generator=torch.Generator().manual_seed(1)).to(device)
    base = decoder(size, device)
    held = memory.parameter_bytes(base)
    title = f"{sum(parameter.numel() for parameter in base.parameters()) / MB:.1f} M weights ({held / MB:,.0f} MB), " \
            f"budget {args.budget:,}"
    rows = {name: make(copy.deepcopy(base), args.budget) for name, (package, make) in ROWS.items()
            if (not size.rows or name in size.rows) and (package is None or importlib.util.find_spec(package))}
    del base
    peaks = {name: float(peak(row, ids)) for name, row in rows.items()}
    bytes_of = {name: state_and_rest(row) for name, row in rows.items()}
    steps, passes = timed(rows, ids, Patience(args.seconds, clock=args.clock))
    ratios = compared(steps, passes, peaks)
    if args.size == "small":
        ratios += [["a static step, ms", 1e3 * statistics.median(steps["stt leaf, PaFI"]), MOST_MS],
                   ["its optimizer state, MB", bytes_of["stt leaf, PaFI"][0] / MB, MOST_STATE]]
    page = written(args, device, [measured(title, args.clock, steps, passes, bytes_of, peaks),
                                  Table("Ratios", ["", "measured", "at most"], ratios)])
    print(page)
    if args.out:
        args.out.write_text(page, encoding="utf-8")
    return 0


def measured(title: str, clock: str, steps: Mapping[str, list[float]], passes: Mapping[str, list[float]],
             bytes_of: Mapping[str, tuple[int, int]], peaks: Mapping[str, float]) -> Table:
    """A line for every row."""
    columns = ["", "step, ms", "forward + backward, ms", "optimizer state, MB", "masks, places, values, MB",
               "peak above the model, MB"]
    lines = [[name, 1e3 * statistics.median(steps[name]), 1e3 * statistics.median(passes[name]),
              bytes_of[name][0] / MB, bytes_of[name][1] / MB, peaks[name] / MB] for name in steps]
    return Table(title, columns, lines, [
        f"Medians of {len(next(iter(steps.values())))} rounds, {clock} clock, load {machine.load()[0]}. ID3 is at the "
        f"beginning of its {STEPS} steps and has chosen a small part of the budget, in both packages."])


def written(args: argparse.Namespace, device: torch.device, tables: Sequence[Table]) -> str:
    """The page: the command, where it ran, the tables."""
    where = [f"- {name}: {value}" for name, value in {**machine.described(device), **machine.software()}.items()]
    command = (f"python benchmarks/weights.py --size {args.size} --budget {args.budget} --seconds {args.seconds:g} "
               f"--clock {args.clock}")
    return "\n".join(["# Training chosen weights", "", "```bash", command, "```", "", *where, "",
                      *(table.markdown() for table in tables)])


def compared(steps: Mapping[str, list[float]], passes: Mapping[str, list[float]],
             peaks: Mapping[str, float]) -> list[list[object]]:
    """The rows of the ratios whose both sides were measured."""
    found = []
    for words, what, ours, theirs, most in LIMITS:
        if ours in steps and theirs in steps:
            timing = {"step": steps, "pass": passes}.get(what)
            value = Ratio(peaks[ours] / peaks[theirs], *[peaks[ours] / peaks[theirs]] * 2, 1) if timing is None else \
                ratio(timing[ours], timing[theirs])
            found.append([words, f"{value.median:.3f}" if timing is None else with_interval(value), most])
    return found


if __name__ == "__main__":
    sys.exit(main())
