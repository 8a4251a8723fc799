"""The flags of train_llm.py that other recipes do not have, or that mean something of their own there."""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import arg

from stt import arguments
from stt.arguments import KEEPS_EVERYTHING, RunArgs, check_choices, check_ranges, open_flag
from stt.errors import InputError

Part = Literal["all", "prompt", "answer"]
Distill = Literal["none", "kl"]

# What `None` stands for: the shipped model needs other numbers than a real one (those are the published defaults).
FOR_SHIPPED_MODEL = {"lr": 1e-3, "num_epoch": 3, "train_batch": 32, "schedule": True}
FOR_REAL_MODELS = {"lr": 1e-5, "num_epoch": 10, "train_batch": 8, "schedule": False}


_open = functools.partial(open_flag, "stt-tiny", FOR_SHIPPED_MODEL, FOR_REAL_MODELS)


@dataclass(frozen=True)
class LLMArgs(RunArgs):
    """Select the neurons of a decoder that a task needs, train only those, measure, and write a report.

    Without arguments: select-then-train of the shipped models/stt-tiny on the shipped CLUTRR data, offline.
    """

    for_shipped_model: ClassVar[dict[str, object]] = FOR_SHIPPED_MODEL
    for_real_models: ClassVar[dict[str, object]] = FOR_REAL_MODELS

    task: Annotated[str | None, arg(aliases=("--dataset",), metavar="STR",
                                    help_behavior_hint="(default: clutrr)")] = None
    """clutrr | boolq | arc-e | arc-c | obqa"""
    apply_chat_template: bool = False
    """put every prompt into the tokenizer's chat template"""
    lr: Annotated[float | None, _open("lr", "FLOAT", "--learning_rate")] = None
    """step size of AdamW"""
    train_batch: Annotated[int | None, _open("train_batch", "INT", "--batch_size")] = None
    """examples per forward pass, of each process"""
    num_epoch: Annotated[int | None, _open("num_epoch", "INT", "--num_epochs")] = None
    """passes over the training data"""
    schedule: Annotated[bool | None, _open("schedule", "| --no_schedule")] = None
    """warm up, then decay the step size linearly to 0, or keep it constant"""
    select_on: Part = "all"
    """tokens that the selection looks at: all of an example, its prompt, or its answer"""
    group_by_length: bool = False
    """put training examples of about the same length into one batch: less padding, another order"""
    pack: bool = False
    """let the examples of a training batch share rows, apart from each other: the same steps without the padding"""
    distill: Distill = "none"
    """kl: also learn a teacher's distribution over the next token wherever there is a label"""
    teacher: Annotated[str | None, arg(metavar="base|PATH")] = None
    """whom --distill learns from: base, the dense model of --model (default), or a run, folder or hub id"""
    distill_weight: float = 0.5
    """share of the teacher in the loss; the rest is the data's"""
    distill_temperature: float = 1.0
    """logits of both are divided by this before they are compared"""
    max_length: int = 256
    """tokens of prompt and answer together; a longer prompt loses its beginning"""
    max_new_tokens: int | None = None
    """most tokens of a generated answer to a row of --train_file or --eval_file; None = 128"""
    ppl_text: str | None = None
    """text file for the perplexity; None = heldout.txt of stt-tiny"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"select_on": Part, "distill": Distill})
        check_ranges(self, ((("max_length",), lambda x: x >= 2, "2 or more"),
                            (("max_new_tokens",), lambda x: x >= 1, "1 or more"),
                            (("distill_weight",), lambda x: 0 < x <= 1, "in (0, 1]"),
                            (("distill_temperature",), lambda x: 0 < x < math.inf, "a number above 0")))
        if self.distill == "none":
            self._check_no_teacher()
        if self.train_file is None and self.max_new_tokens:
            raise InputError("max_new_tokens is about the data of train_file, and that is not given; a task has its "
                             "own.")
        if self.select_on != "all" and self.mode in KEEPS_EVERYTHING:
            raise InputError(f"select_on says what a selection looks at, and mode {self.mode!r} selects nothing.")
        if self.select_on != "all" and self.count_padding:
            raise InputError("count_padding counts every position and select_on only some; give one of them.")

    def _check_no_teacher(self) -> None:
        """No flag of a distillation that is not done."""
        for name, default in (("teacher", None), ("distill_weight", 0.5), ("distill_temperature", 1.0)):
            if getattr(self, name) != default:
                raise InputError(f"{name} is about a teacher, and there is none; give --distill kl, or leave it out.")


def resolved(args: LLMArgs) -> LLMArgs:
    """`args` with nothing left open: a model that can be loaded, and the numbers and paths that `None` stands for.

    Says in the log what it filled in. Raises InputError for a model path or text file that is not there.
    """
    text = args.ppl_text or str(arguments.SHIPPED_MODELS / "stt-tiny" / "heldout.txt")
    if args.ppl_text and not Path(text).is_file():
        raise InputError(f"no text file {text!r} for the perplexity; give a path, or leave --ppl_text out.")
    args = replace(arguments.filled(args, "clutrr"), ppl_text=text)
    part = [] if args.select_on == "all" else [args.select_on]
    part += ["packed"] * args.pack
    if args.distill != "none":
        args = replace(args, teacher=args.model if args.teacher in (None, "base") else args.teacher)
        part += [args.distill, *([] if args.teacher == args.model else [Path(args.teacher).name])]
    return replace(args, run_name=args.run_name or arguments.run_name(args, *part))
