#!/usr/bin/env python
"""Select-then-train a classifier of texts or images: choose its neurons on a little data, train only those, measure.

Without arguments: models/vit-digits on digits lying on their side, offline. `python train_classifier.py --help`
explains the flags.
"""
from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from stt import cli, recipe
from stt.classifier_arguments import ClassifierArgs, resolved
from stt.errors import InputError
from stt.recipe import Run
from util import ranks
from util.utils import RunFolder, peak_memory_bytes

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
    from transformers.image_processing_utils import BaseImageProcessor

    from stt.dataset.classification import LabelTask
    from stt.evaluate.classifier import ClassifierJudge
    from stt.selection import Selection


def main(args: ClassifierArgs) -> int:
    """One run, from the flags to the report; 0. Raises InputError before anything is written, TrainingFailed later."""
    args = resolved(args)
    if recipe.is_finished(args):
        return 0
    from stt.dataset.classification.encode import encoder_of
    from stt.evaluate.classifier import ClassifierJudge
    from stt.loading import Classes, check_classifier, load_classifier
    from stt.surgery import count_parameters
    from stt.trainers.classify import train

    # ---------------------------------------------------------------- everything that can be wrong, before any write
    with ranks.together():
        run = recipe.open_run(args)
        task = load_data(args)
        reader = load_reader(args, task.modality)
        classes = Classes(task.modality, task.labels, args.seed, args.disable_dropout)
        load = partial(load_classifier, args.model, classes, device=run.device,
                       pad_token_id=reader.pad_token_id if task.modality == "text" else None)
        model = load(run.autocast_dtype)
        encoder = encoder_of(reader, model, args.max_length)
        judge = ClassifierJudge(load, task, encoder, args.eval_batch, run.autocast_dtype)
        rows = encoder.rows(task.train)
        longest = max((*rows, *judge.validation_rows, *judge.test_rows), key=encoder.length)
        check_classifier(model, encoder.batch([longest]))
        run.check(model)
    parameters = {"dense": count_parameters(model)["total"]}

    # ---------------------------------------------------------------- select
    selection, sites, flops = None, [], {}
    if run.mode.score and not run.growing:
        selection, sites, flops["selection"] = select(args, run, model, judge)
    run.begin(selection)

    # ---------------------------------------------------------------- then train
    parameters |= run.prepare(model, selection)
    flops["training"] = judge.training_flops(model, rows, args.num_epoch)
    validate = (lambda: judge.validate(model)) if args.eval_epochs else None
    arguments = loop_arguments(args, run.path, run.device, run.autocast_dtype)
    with run.clock.lap("training"):
        train(model, encoder, rows, arguments, logged(run.folder, task), validate, args.resume, run.folder.seconds,
              run.growing)
    peak = peak_memory_bytes()

    # ---------------------------------------------------------------- measure
    with run.clock.lap("evaluation"):
        kept, flops["inference"] = run.deploy(model, selection, judge, has_new_head=True)
        measured = judge.test(model, run.path)
        throughput = ranks.on_first(lambda: judge.throughput(model, is_sliced=run.mode.cuts))
        if args.eval_restored:
            measured["accuracy"]["restored"] = judge.restored(model)

    # ---------------------------------------------------------------- ship and report
    ranks.on_first(lambda: recipe.ship(model, reader, run.path / "checkpoint", run.mode.cuts))
    source = [] if args.source_task is None else [f"on {args.source_task}"]
    run.finish({
        "recipe": "train_classifier", **recipe.described(run, task.name, *source), **measured,
        "parameters": parameters | kept, "flops": flops, "throughput": throughput, "peak_memory_bytes": peak,
        "seconds": run.clock.seconds(), "sites": run.sites(sites)})
    return 0


def load_data(args: ClassifierArgs) -> LabelTask:
    """The splits of the task or of the user's data, cut down as the flags say. Raises InputError for data that is not
    what --modality or --num_classes says, or that cannot be read."""
    from stt.dataset.classification import check_readable, dev_split, limit, load_task, read_own

    if args.train_file is None:
        task = load_task(args.task, args.data_dir)
    else:
        task = read_own(args.train_file, args.eval_file, is_quantity=args.num_classes == 1)
    if args.modality not in (None, task.modality):
        raise InputError(f"modality is {args.modality!r} and {task.name} holds {task.modality}s; leave --modality out.")
    if args.num_classes not in (None, max(len(task.labels), 1)):
        raise InputError(f"num_classes is {args.num_classes} and {task.name} has {max(len(task.labels), 1)} (1: a "
                         "quantity); leave --num_classes out.")
    if args.count_padding and task.modality == "image":
        raise InputError("count_padding is about texts: pictures have no padding; leave it out.")
    task = limit(dev_split(task, args.dev_ratio, args.seed) if args.dev_mode else task, args.train_size, args.seed)
    if task.modality == "image":
        check_readable([item.content for item in (*task.train, *task.validation, *task.test)])
    return task


def load_reader(args: ClassifierArgs, modality: str) -> PreTrainedTokenizerBase | BaseImageProcessor:
    """The tokenizer of a text model, the processor of an image model."""
    from stt.loading import load_processor, load_tokenizer

    return load_processor(args.model, args.image_size) if modality == "image" else load_tokenizer(args.model)


def select(args: ClassifierArgs, run: Run, model: PreTrainedModel,
           judge: ClassifierJudge) -> tuple[Selection, list[dict[str, object]], int]:
    """The selection, its sites for the record, and the FLOPs of making it."""
    from stt.dataset.classification import balanced_subset
    from stt.loading import check_classifier

    task, ratio = judge.task, args.active_sample_ratio
    if args.source_task is not None:
        task, ratio = source(args, task.modality), args.source_ratio or ratio
    rows = judge.encoder.rows(balanced_subset(task.train, ratio, len(task.labels), args.seed))
    check_classifier(model, judge.encoder.batch([max(rows, key=judge.encoder.length)]))
    return recipe.select(run, model, judge, rows, judge.encoder.batch, None)


def source(args: ClassifierArgs, modality: str) -> LabelTask:
    """The task to select on. Raises InputError if it is of another modality."""
    from stt.dataset.classification import check_readable, load_task

    task = load_task(args.source_task, args.source_dir)
    if task.modality != modality:
        raise InputError(f"source_task {task.name} holds {task.modality}s and the task {modality}s; give one of those.")
    if modality == "image":
        check_readable([item.content for item in task.train])
    return task


def loop_arguments(args: ClassifierArgs, folder: Path, device: torch.device,
                   autocast_dtype: torch.dtype | None) -> TrainingArguments:
    """What the loop is told, with the flags that only this recipe has."""
    from stt.trainers.loop import training_arguments

    arguments = training_arguments(args, folder, device, autocast_dtype)
    changes: dict[str, object] = {}
    if args.warmup_steps is not None and args.schedule:
        changes["warmup_steps"] = args.warmup_steps
    if args.eval_steps is not None:
        steps = {"eval_steps": args.eval_steps, "save_steps": args.eval_steps}
        changes |= {"eval_strategy": "steps", "save_strategy": "steps", **steps}
    return replace(arguments, **changes)


def logged(run: RunFolder, task: LabelTask) -> object:
    """`run.log`, the validation under the name of the task's first metric."""
    named = {"validation_accuracy": f"validation_{task.metrics[0]}"}
    return lambda **numbers: run.log(**{named.get(name, name): value for name, value in numbers.items()})


if __name__ == "__main__":
    sys.exit(cli.run(main, ClassifierArgs, prog="train_classifier.py"))
