#!/usr/bin/env python
"""Compare ways to select and train the neurons of a classifier, so that a difference can be detected.

Without arguments: three modes on models/vit-digits and digits lying on their side, offline, in minutes.
`python classifier_ablation.py --help` explains the flags, docs/ablations.md the modes and the tables.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from stt import cli, recipe
from stt.ablation.classifier_flags import ClassifierAblationArgs, resolve
from stt.arguments import short_name
from stt.errors import InputError
from train_classifier import load_data, load_reader, loop_arguments, source

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainingArguments

    from stt.batches import Batch
    from stt.dataset.classification import LabelTask
    from stt.dataset.classification.encode import Rows
    from stt.evaluate.classifier import ClassifierJudge
    from stt.selective_optimizers.recipe import Growing


def main(args: ClassifierAblationArgs) -> int:
    """One ablation, from the flags to the report; 0. Raises InputError before anything is written, TrainingFailed
    later."""
    from stt import modes
    from stt.ablation import study
    from stt.dataset.base import limit_validation
    from stt.dataset.classification.encode import encoder_of
    from stt.evaluate.classifier import ClassifierJudge
    from stt.loading import check_classifier, compute_dtype
    from stt.trainers.memory import check_can_recompute
    from util.utils import pick_device

    # ---------------------------------------------------------------- everything that can be wrong, before any write
    args = resolve(args)
    recipe.hide_bars()
    plan, device = study.plan(args), pick_device()
    task = limit_validation(load_data(args), args.val_size, args.seed)
    if task.is_regression:
        raise InputError(f"{task.name} predicts a quantity, and answers are compared that are right or wrong: give a "
                         "task with classes.")
    selects_on = None if args.source_task is None else source(args, task.modality)
    reader = load_reader(args, task.modality)
    dtype = compute_dtype(args.precision, device)
    bench = ClassifierBench(args, device, dtype, reader.pad_token_id if task.modality == "text" else None, None, task,
                            selects_on)
    model = bench.load(args.seed)
    encoder = encoder_of(reader, model, args.max_length)
    bench = replace(bench, judge=ClassifierJudge(bench.load, task, encoder, args.eval_batch, dtype))
    rows = (*bench.rows, *bench.judge.validation_rows, *bench.judge.test_rows)
    check_classifier(model, encoder.batch([max(rows, key=encoder.length)]))
    if any(arm.mode.chooses_units for arm in plan.arms):
        modes.check_sites(model, args.partial, args.units)
    if args.activation_checkpointing:
        check_can_recompute(model)

    # ---------------------------------------------------------------- train, measure, compare
    folder = study.open_folder(args)
    if args.test_size:
        task = with_new_stories(task, args.test_size, folder)
        bench = replace(bench, task=task, judge=replace(bench.judge, task=task))
    title = f"classifier_ablation · {task.name} · {short_name(args.model)} · {len(task.test)} test examples"
    origin = "newly made" if args.test_size else "held out" if args.dev_mode else "of the task"
    return study.conduct(args, plan, bench, folder, title, [f"{len(task.test)} test examples, {origin}."])


@dataclass(frozen=True)
class ClassifierBench:
    """A classifier, its task, and classes that are predicted (stt/ablation/bench.py says what each part is)."""

    args: ClassifierAblationArgs
    device: torch.device
    dtype: torch.dtype | None
    pad_token_id: int | None
    judge: ClassifierJudge | None  # None until there is a model to read the inputs of
    task: LabelTask
    source: LabelTask | None  # what mode transfer selects on

    tokenizer = None  # batches are encoded already
    select_on = "all"
    is_tied = False

    @property
    def trained_on(self) -> int:
        return len(self.task.train)

    @property
    def validated_on(self) -> int:
        return len(self.task.validation)

    @property
    def majority(self) -> float:
        return self.judge.majority()

    @cached_property
    def rows(self) -> Rows:
        return self.judge.encoder.rows(self.task.train)

    def load(self, seed: int) -> PreTrainedModel:
        from stt.loading import Classes, load_classifier

        classes = Classes(self.task.modality, self.task.labels, seed, self.args.disable_dropout)
        return load_classifier(self.args.model, classes, self.dtype, self.device, self.pad_token_id)

    def batches(self, ratio: float | None, seed: int, from_source: bool) -> list[Batch]:
        from stt.dataset.classification import balanced_subset

        task, usual = self.task, self.args.active_sample_ratio
        if from_source:
            task, usual = self.source, self.args.source_ratio or usual
        rows = self.judge.encoder.rows(balanced_subset(task.train, ratio or usual, len(task.labels), seed))
        return [self.judge.encoder.batch(part) for part in self.judge.batches(rows)]

    def arguments(self, args: ClassifierAblationArgs, folder: Path) -> TrainingArguments:
        return loop_arguments(args, folder, self.device, self.dtype)

    def train(self, model: PreTrainedModel, arguments: TrainingArguments, log: Callable[..., None],
              growing: Growing | None = None) -> None:
        from stt.trainers.classify import train

        train(model, self.judge.encoder, self.rows, arguments, log, make_optimizer=growing)

    def correct(self, model: PreTrainedModel, split: str) -> list[bool]:
        rows = self.judge.validation_rows if split == "validation" else self.judge.test_rows
        predictions = self.judge.predictions(self.judge.outputs(model, rows))
        return [item.label == found for item, found in zip(getattr(self.task, split), predictions, strict=True)]

    def more(self, model: PreTrainedModel) -> dict[str, float]:
        return {}


def with_new_stories(task: LabelTask, count: int, folder: Path) -> LabelTask:
    """The task with `count` new test stories, none of which it trains or validates on."""
    from stt.ablation.stories import check_apart, folder_of_new
    from stt.dataset.classification import load_task

    test = load_task(task.name, folder_of_new(count, folder)).test
    check_apart((item.content for item in test), (item.content for item in (*task.train, *task.validation)))
    return replace(task, test=test)


if __name__ == "__main__":
    sys.exit(cli.run(main, ClassifierAblationArgs, prog="classifier_ablation.py"))
