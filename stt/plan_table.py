"""The answer of `stt plan` as a table."""
from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from stt.arguments import InPlaceMode
from stt.plan_arguments import PUBLISHED_RATIO
from stt.words import amount, duration, percent


def size_of(number: int) -> str:
    """1234567890 -> 1.23 GB"""
    return f"{amount(number)}B"


# (row, what in a plan, which of it, in words)
ROWS = (
    ("neurons kept", "kept_fraction_of_units", None, percent),
    ("heads kept", "kept_fraction_of_heads", None, percent),
    ("parameters of the dense model", "parameters", "dense", amount),
    ("parameters kept", "parameters", "kept", amount),
    ("parameters trained", "parameters", "trained", amount),
    ("    without the head", "parameters", "trained_without_head", amount),
    ("FLOPs of training on an example", "flops", "training_example", amount),
    ("FLOPs of selecting on an example", "flops", "selection_example", amount),
    ("FLOPs of training", "flops", "training", amount),
    ("FLOPs of selection", "flops", "selection", amount),
    ("time of training", "seconds", "training", duration),
    ("time of selection", "seconds", "selection", duration),
    ("memory of a GPU: weights", "memory", "weights", size_of),
    ("    gradients", "memory", "gradients", size_of),
    ("    AdamW state", "memory", "optimizer", size_of),
    ("    places of the chosen weights", "memory", "chosen", size_of),
    ("    activations saved for backward", "memory", "activations", size_of),
    ("    communication", "memory", "communication", size_of),
    ("    most at any time of a step", "memory", "peak", size_of),
    ("disk: the patch", "disk", "patch", size_of),
    ("    a checkpoint while it trains", "disk", "checkpoint", size_of),
)
# where what is chosen stays among the rest
TRAINED = {"neurons kept": "neurons trained", "heads kept": "heads trained"}
OTHER_SIZES = "a smaller --keep or --max_length, --mode stt_lora, or more --gpus with --shard"
OTHER_MODES = "a smaller --max_length, or a mode that removes neurons (--mode stt or stt_lora)"


def table(found: Mapping[str, object]) -> str:
    """`found` as stt.plan.planned makes it."""
    plans, mode = found["plans"], found["arguments"]["mode"]
    names = TRAINED if mode == "train_in_place" else {}
    rows = [(names.get(name, name), *[words(_value(plan, group, key)) for plan in plans])
            for name, group, key, words in ROWS if _value(plans[0], group, key) not in (None, 0)]
    if len(plans) > 1:
        rows.insert(0, ("", "least", "most"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([_title(found), "", *lines, "", *_cards(found["cards"], mode), "", *_notes(found)]) + "\n"


def _value(plan: Mapping[str, object], group: str, key: str | None) -> float | None:
    values = plan[group]
    return values if key is None else None if values is None else values[key]


def _title(found: Mapping[str, object]) -> str:
    args = found["arguments"]
    gpus = "1 GPU" if args["gpus"] == 1 else (f"{args['gpus']} GPUs, the model "
                                              f"{'divided between them' if args['shard'] else 'on each of them'}")
    steps = f"; {found['steps']:,} steps" if found["steps"] else ""
    mode = f"{args['mode']} with a budget of {args['budget']}" if args["budget"] else args["mode"]
    return (f"{args['model']} ({found['architecture']}), mode {mode}, {args['precision']}, {gpus}; "
            f"{args['train_batch']} x {args['max_length']} tokens a GPU and step{steps}")


def _cards(cards: Mapping[str, Mapping[str, object]], mode: str) -> list[str]:
    lines, others = [], OTHER_MODES if mode in get_args(InPlaceMode) else OTHER_SIZES
    for size, card in cards.items():
        if card["fits"]:
            lines.append(f"a GPU of {size} GB: fits")
        elif card["change"]:
            lines.append(f"a GPU of {size} GB: does not fit; {card['change']} does, with {size_of(card['peak'])}")
        else:
            lines.append(f"a GPU of {size} GB: does not fit; take a larger one, {others}")
    return lines


def _notes(found: Mapping[str, object]) -> list[str]:
    args, notes = found["arguments"], []
    if len(found["plans"]) > 1:
        ratio = PUBLISHED_RATIO if args["topk_ratio"] is None else args["topk_ratio"]
        notes.append(f"STT keeps the union of two sets of {percent(ratio)} of the neurons each: what the data decides, "
                     "between the least and the most; --keep plans one share. The lines on GPUs are about the most.")
    notes.append("Fits: a tenth of the GPU is left over for CUDA and for gaps between tensors.")
    if args["measure"]:
        notes.append(f"Time: at {found['tflops']:.3g} TFLOP/s a GPU, which a single product reaches here; a training "
                     "step reaches less, so it takes longer.")
    elif found["tflops"]:
        notes.append(f"Time: at {found['tflops']:g} TFLOP/s a GPU, without loading, evaluation and saving.")
    return notes
