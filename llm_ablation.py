#!/usr/bin/env python
"""Compare ways to select and train the neurons of a decoder, so that a difference can be detected.

Without arguments: three modes on models/stt-tiny and CLUTRR, offline, in minutes. `python llm_ablation.py --help`
explains the flags, docs/ablations.md the modes and the tables.
"""
from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from stt import cli, recipe
from stt.ablation.llm_flags import LLMAblationArgs, resolve
from stt.arguments import short_name
from train_llm import load_data, read_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from stt.batches import Batch
    from stt.dataset import Encoded, Example, Task
    from stt.distill import Teacher
    from stt.evaluate.llm import Judge
    from stt.packing import Packing
    from stt.selective_optimizers.recipe import Growing


def main(args: LLMAblationArgs) -> int:
    """One ablation, from the flags to the report; 0. Raises InputError before anything is written, TrainingFailed
    later."""
    from stt import modes
    from stt.ablation import study
    from stt.dataset.base import limit_validation
    from stt.distill import load_teacher
    from stt.evaluate.llm import Judge
    from stt.loading import check_decoder, compute_dtype, load_tokenizer
    from stt.packing import find_packing
    from stt.trainers.memory import check_can_recompute
    from util.utils import pick_device

    # ---------------------------------------------------------------- everything that can be wrong, before any write
    args = resolve(args)
    recipe.hide_bars()
    plan, device = study.plan(args), pick_device()
    tokenizer = load_tokenizer(args.model)
    task = limit_validation(load_data(args, tokenizer), args.val_size, args.seed)
    source = load_source(args)
    dtype = compute_dtype(args.precision, device)
    judge = Judge(args.model, task, tokenizer, read_text(args.ppl_text), args.eval_batch, args.max_length,
                  args.apply_chat_template, dtype)
    bench = LLMBench(args, device, judge, source)
    model = bench.load(args.seed)
    check_decoder(model, tokenizer)
    judge.check_lengths(model, bench.encoded)
    if any(arm.mode.chooses_units for arm in plan.arms):
        modes.check_sites(model, args.partial, args.units)
    if args.activation_checkpointing:
        check_can_recompute(model)
    if args.pack:
        bench = replace(bench, packing=find_packing(model, bench.encoded))
    if args.distill != "none":
        teacher = load_teacher(args.teacher, args.distill_weight, args.distill_temperature, model, tokenizer, dtype)
        bench = replace(bench, teacher=teacher)

    # ---------------------------------------------------------------- train, measure, compare
    folder = study.open_folder(args)
    if args.test_size:
        bench = replace(bench, judge=replace(judge, task=with_new_stories(task, args.test_size, folder)))
    title = f"llm_ablation · {task.name} · {short_name(args.model)} · {len(bench.task.test)} test examples"
    origin = "newly made" if args.test_size else "held out" if args.dev_mode else "of the task"
    return study.conduct(args, plan, bench, folder, title, [f"{len(bench.task.test)} test examples, {origin}."])


@dataclass(frozen=True)
class LLMBench:
    """A decoder, its task, and answers that are generated (stt/ablation/bench.py says what each part is)."""

    args: LLMAblationArgs
    device: torch.device
    judge: Judge
    source: Task | None  # what mode transfer selects on
    packing: Packing | None = None
    teacher: Teacher | None = None

    @property
    def task(self) -> Task:
        return self.judge.task

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.judge.tokenizer

    @property
    def select_on(self) -> str:
        return self.args.select_on

    @property
    def trained_on(self) -> int:
        return len(self.task.train)

    @property
    def validated_on(self) -> int:
        return len(self.task.validation)

    @property
    def majority(self) -> float | None:
        from stt.evaluate.generation import majority_accuracy

        return majority_accuracy(self.task.train, self.task.test)

    @cached_property
    def is_tied(self) -> bool:
        from stt.surgery import head_is_tied

        return head_is_tied(self.load(self.args.seed))

    @cached_property
    def encoded(self) -> list[Encoded]:
        return self._rows(self.task.train)

    def load(self, seed: int) -> PreTrainedModel:
        from stt.loading import load_model

        return load_model(self.args.model, self.judge.autocast_dtype, self.device)

    def batches(self, ratio: float | None, seed: int, from_source: bool) -> list[Batch]:
        from stt.dataset import selection_subset
        from stt.trainers.sft import collate

        task, usual = self.task, self.args.active_sample_ratio
        if from_source:
            task, usual = self.source, self.args.source_ratio or usual
        rows = self._rows(selection_subset(task.train, ratio or usual, seed))
        size = self.args.eval_batch
        return [collate(self.tokenizer.pad_token_id)(rows[i:i + size]) for i in range(0, len(rows), size)]

    def arguments(self, args: LLMAblationArgs, folder: Path) -> TrainingArguments:
        from stt.trainers.loop import training_arguments

        return training_arguments(args, folder, self.device, self.judge.autocast_dtype, args.group_by_length)

    def train(self, model: PreTrainedModel, arguments: TrainingArguments, log: Callable[..., None],
              growing: Growing | None = None) -> None:
        from stt.trainers.sft import train

        train(model, self.encoded, self.tokenizer.pad_token_id, arguments, log, packing=self.packing,
              teach=self.teacher, make_optimizer=growing)

    def correct(self, model: PreTrainedModel, split: str) -> list[bool]:
        return [row["correct"] for row in self.judge.answers(model, getattr(self.task, split))]

    def more(self, model: PreTrainedModel) -> dict[str, float]:
        return {"perplexity": self.judge.perplexity(model)}

    def _rows(self, examples: Sequence[Example]) -> list[Encoded]:
        from stt.dataset import encode_all

        return encode_all(examples, self.tokenizer, self.args.max_length, self.args.apply_chat_template)[0]


def load_source(args: LLMAblationArgs) -> Task | None:
    """What mode transfer selects on."""
    from stt.dataset import load_task

    return None if args.source_task is None else load_task(args.source_task, args.source_dir)


def with_new_stories(task: Task, count: int, folder: Path) -> Task:
    """The task with `count` new test stories, none of which it trains or validates on."""
    from stt.ablation.stories import check_apart, folder_of_new
    from stt.dataset import load_task

    test = load_task(task.name, folder_of_new(count, folder)).test
    check_apart((example.prompt for example in test), (example.prompt for example in (*task.train, *task.validation)))
    return replace(task, test=test)


if __name__ == "__main__":
    sys.exit(cli.run(main, LLMAblationArgs, prog="llm_ablation.py"))
