"""The flags of `stt plan`."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from tyro.conf import Positional, arg

from stt.arguments import (
    BUDGETS,
    KEEPS_EVERYTHING,
    WEIGHT_MODES,
    AnyMode,
    Head,
    InPlaceMode,
    Partial,
    Units,
    check_choices,
    check_ranges,
)
from stt.errors import InputError
from stt.selective_optimizers.amount import check_amount

PUBLISHED_RATIO = 0.3

# (fields, accepted?, in words); None is accepted where it is the default
RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("keep", "heads_ratio", "topk_ratio", "active_sample_ratio"), lambda x: 0 < x <= 1, "in (0, 1]"),
    (("gpus", "train_batch", "answer_length", "examples", "tokens", "epochs", "lora_r"), lambda x: x >= 1, "1 or more"),
    (("max_length",), lambda x: x >= 2, "2 or more"),
    (("tflops",), lambda x: 0 < x < math.inf, "a number above 0"),
)


@dataclass(frozen=True)
class PlanArgs:
    """Say what a training run will take, before it is queued: parameters, FLOPs, memory of a GPU, time, disk."""

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """folder, hub id or alias; only its config.json is read"""
    mode: AnyMode = "stt"
    """as in train_llm.py: everything is kept (baseline, lora), STT's choice (stt, stt_lora), or as much by another
    score. Or nothing is removed, and STT's choice trains where it is (train_in_place), or single weights (id3, pafi,
    bitfit, random_weights)"""
    units: Units = "neurons"
    """what is chosen: neurons, attention heads, or both, as in train_llm.py"""
    keep: Annotated[float | None, arg(aliases=("--keep_ratio",))] = None
    """share of every site's units that is kept, or trained in place"""
    heads_ratio: float | None = None
    """share of the heads of every attention that is kept; None = keep, or else topk_ratio"""
    topk_ratio: float | None = None
    """share that each of STT's two scores proposes, if --keep is not given (default 0.3): the union is between it and
    twice as much, and both ends are planned"""
    budget: Annotated[str | None, arg(metavar="N|SHARE%", help_behavior_hint=BUDGETS)] = None
    """weights to train in the modes id3, pafi, bitfit and random_weights, beside the head: a number or a share of the
    model"""
    include_norm: bool = False
    """let bitfit train the scales of norms too, which is all there is in a model without biases"""
    gpus: int = 1
    """GPUs; each has the whole model, unless --shard"""
    shard: bool = False
    """divide weights, gradients and AdamW state between the GPUs (FSDP2)"""
    train_batch: Annotated[int, arg(aliases=("--batch_size",))] = 8
    """examples of a GPU per forward pass"""
    max_length: int = 256
    """tokens of every example"""
    answer_length: int | None = None
    """tokens of an example that are trained on; None = all"""
    examples: int | None = None
    """training examples"""
    tokens: int | None = None
    """tokens of the training data, instead of --examples"""
    epochs: Annotated[int, arg(aliases=("--num_epoch", "--num_epochs"))] = 1
    """passes over the training data"""
    active_sample_ratio: Annotated[float, arg(aliases=("--sample_ratio",))] = 0.1
    """share of the training examples that the selection looks at"""
    tflops: float | None = None
    """what a GPU achieves, in 10^12 FLOPs a second: gives the time"""
    measure: bool = False
    """measure that here, by a product of two matrices: an upper limit, so the time is a lower one"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """compute type; trained weights are fp32 in every case"""
    head: Head = "train"
    """train the output head, freeze it, or untie it from the input embedding and train it alone"""
    lora_r: int = 16
    """LoRA rank"""
    activation_checkpointing: bool = False
    """keep only what enters a layer, and compute the rest a second time"""
    partial: Partial = "refuse"
    """what to do with a model of which only some feed-forward blocks (or attentions, with --units) can be sliced"""
    json: bool = False
    """write JSON instead of a table"""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        check_choices(self, {"mode": AnyMode, "head": Head, "precision": Literal["bf16", "fp32"], "partial": Partial,
                             "units": Units})
        for pair in (("keep", "topk_ratio"), ("examples", "tokens"), ("tflops", "measure")):
            if all(getattr(self, name) for name in pair):
                raise InputError(f"{pair[0]} and {pair[1]} are two ways to say the same; give one of them.")
        self._check_mode()
        if self.heads_ratio is not None and self.units == "neurons":
            raise InputError("heads_ratio is a share of the attention heads, and only neurons are chosen; give --units "
                             "heads or both.")
        if self.shard and self.gpus == 1:
            raise InputError("shard divides the model between GPUs, and there is 1; give --gpus.")
        if self.answer_length is not None and self.answer_length >= self.max_length:
            raise InputError(f"answer_length must be below max_length {self.max_length} (the first token follows "
                             f"none), got {self.answer_length}")
        if (self.tflops or self.measure) and not (self.examples or self.tokens):
            raise InputError("the time follows from the amount of data; give --examples or --tokens too.")

    def _check_mode(self) -> None:
        """No flag of another mode."""
        if self.mode in KEEPS_EVERYTHING and (self.keep or self.topk_ratio or self.units != "neurons"):
            instead = "; give --budget" if self.mode in WEIGHT_MODES else ""
            raise InputError(f"keep, topk_ratio and units say what is kept, and mode {self.mode!r} keeps everything"
                             f"{instead}.")
        if self.budget is not None:
            if self.mode not in WEIGHT_MODES:
                raise InputError(f"budget is about single weights ({', '.join(WEIGHT_MODES)}), and the mode is "
                                 f"{self.mode!r}; leave it out.")
            check_amount(self.budget)
        if self.include_norm and self.mode != "bitfit":
            raise InputError(f"include_norm is about the biases of mode 'bitfit', and the mode is {self.mode!r}; leave "
                             "it out.")
        if self.shard and self.mode in get_args(InPlaceMode):
            raise InputError(f"shard divides what mode {self.mode!r} trains in place, which the recipes refuse; leave "
                             "it out: every GPU has the whole model.")

    @property
    def proposed(self) -> float:
        """The share that each of STT's two scores proposes."""
        return PUBLISHED_RATIO if self.topk_ratio is None else self.topk_ratio

    @property
    def labelled(self) -> int:
        """Tokens of an example that are trained on."""
        return self.answer_length or self.max_length - 1

    @property
    def rows(self) -> int | None:
        """Training examples; None = not given."""
        return -(-self.tokens // self.max_length) if self.tokens else self.examples

    @property
    def steps(self) -> int | None:
        """Of the optimizer; None if the number of examples is not given."""
        return self.rows and self.epochs * -(-self.rows // (self.gpus * self.train_batch))
