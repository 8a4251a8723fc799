#!/usr/bin/env python
"""Select-then-train a decoder: choose its neurons or heads on a little data, train only those, measure, report.

Without arguments: models/stt-tiny on the shipped CLUTRR data, offline. `python train_llm.py --help` explains the flags.
"""
from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stt import cli, recipe
from stt.errors import InputError
from stt.llm_arguments import LLMArgs, resolved
from stt.recipe import DEV_SHARE, Run
from util import ranks
from util.clock import Clock
from util.utils import peak_memory_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stt.dataset import Encoded, Task
    from stt.evaluate.llm import Judge
    from stt.selection import Selection

logger = logging.getLogger(__name__)


def main(args: LLMArgs) -> int:
    """One run, from the flags to the report; 0. Raises InputError before anything is written, TrainingFailed later."""
    args = resolved(args)
    if recipe.is_finished(args):
        return 0
    from stt.dataset import encode_all, truncation
    from stt.distill import load_teacher
    from stt.evaluate.llm import Judge
    from stt.loading import check_decoder, load_model, load_tokenizer
    from stt.packing import find_packing
    from stt.surgery import count_parameters
    from stt.trainers.loop import training_arguments
    from stt.trainers.sft import train

    # ---------------------------------------------------------------- everything that can be wrong, before any write
    with ranks.together():
        run = recipe.open_run(args)
        tokenizer = load_tokenizer(args.model)
        task = load_data(args, tokenizer)
        encoded, _ = encode_all(task.train, tokenizer, args.max_length, args.apply_chat_template)
        lost = truncation(task, tokenizer, args.max_length, args.apply_chat_template)
        judge = Judge(args.model, task, tokenizer, read_text(args.ppl_text), args.eval_batch, args.max_length,
                      args.apply_chat_template, run.autocast_dtype)
        model = load_model(args.model, run.autocast_dtype, run.device)
        check_decoder(model, tokenizer)
        judge.check_lengths(model, encoded)
        packing = find_packing(model, encoded) if args.pack else None
        teacher = load_teacher(args.teacher, args.distill_weight, args.distill_temperature, model, tokenizer,
                               run.autocast_dtype) if args.distill != "none" else None
        run.check(model)
    parameters, perplexity = {"dense": count_parameters(model)["total"]}, {"dense": judge.perplexity(model)}

    # ---------------------------------------------------------------- select
    selection, sites, flops = None, [], {}
    if run.mode.score and not run.growing:
        selection, sites, flops["selection"] = select(args, run, model, judge)
    run.begin(selection)

    # ---------------------------------------------------------------- then train
    parameters |= run.prepare(model, selection)
    perplexity |= {"sliced": judge.perplexity(model)} if run.mode.cuts else {}
    flops["training"] = judge.training_flops(model, encoded, args.num_epoch)
    flops |= {"teacher": teacher.flops(encoded, args.num_epoch)} if teacher else {}
    validate = run.clock.timed("validation", lambda: judge.accuracy(model, task.validation))
    arguments = training_arguments(args, run.path, run.device, run.autocast_dtype, args.group_by_length)
    with run.clock.lap("training"):
        train(model, encoded, tokenizer.pad_token_id, arguments, run.folder.log, validate if args.eval_epochs else None,
              args.resume, run.folder.seconds, packing, teacher, run.growing)
    peak, speed = peak_memory_bytes(), training_speed(args, encoded, run.clock)

    # ---------------------------------------------------------------- measure
    with run.clock.lap("evaluation"):
        kept, flops["inference"] = run.deploy(model, selection, judge)
        accuracy, answer_loss = judge.test(model, run.path), judge.answer_loss(model)
        perplexity["trained"] = judge.perplexity(model)
        throughput = ranks.on_first(lambda: judge.throughput(model, is_sliced=run.mode.cuts))
        if args.eval_restored:
            accuracy["restored"] = judge.restored(model)

    # ---------------------------------------------------------------- ship and report
    ranks.on_first(lambda: ship(model, judge, run.path / "checkpoint", run.mode.cuts))
    part = [] if args.select_on == "all" else [f"on the {args.select_on}"]
    run.finish({
        "recipe": "train_llm", **recipe.described(run, task.name, *part), "accuracy": accuracy,
        "truncation": {"max_length": args.max_length, **lost}, "training_tokens_per_second": speed,
        "answer_loss": answer_loss, "perplexity": perplexity, "parameters": parameters | kept, "flops": flops,
        "throughput": throughput, "peak_memory_bytes": peak, "seconds": run.clock.seconds(), "sites": run.sites(sites)})
    return 0


def load_data(args: LLMArgs, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The splits of the task or of the user's files, cut down as the flags say."""
    from stt.dataset import dev_split, limit, load_task, read_own, tokenised

    if args.train_file is None:
        task = load_task(args.task, args.data_dir)
    else:
        task = read_own(args.train_file, args.eval_file, args.max_new_tokens)
    task = limit(dev_split(task, DEV_SHARE, args.seed) if args.dev_mode else task, args.train_size, args.seed)
    return tokenised(task, tokenizer, args.max_length, args.apply_chat_template) if args.train_file else task


def select(args: LLMArgs, run: Run, model: PreTrainedModel,
           judge: Judge) -> tuple[Selection, list[dict[str, object]], int]:
    """The selection, its sites for the record, and the FLOPs of making it."""
    from stt.dataset import encode_all, selection_subset
    from stt.trainers.sft import collate

    examples = selection_subset(judge.task.train, args.active_sample_ratio, args.seed)
    rows, _ = encode_all(examples, judge.tokenizer, args.max_length, args.apply_chat_template)
    padded = collate(judge.tokenizer.pad_token_id)
    return recipe.select(run, model, judge, rows, padded, judge.tokenizer, args.select_on)


def training_speed(args: LLMArgs, encoded: Sequence[Encoded], clock: Clock) -> float | None:
    """Tokens of the examples a second of training, padding and validation aside; None for a resumed run, part of which
    another process did."""
    if args.resume:
        return None
    seconds = clock.seconds()
    tokens = args.num_epoch * sum(len(row["input_ids"]) for row in encoded)
    speed = tokens / (seconds["training"] - seconds.get("validation", 0.0))
    logger.info("trained on %.0f tokens a second, padding and validation aside", speed)
    return speed


def read_text(path: str) -> str:
    """A text file. Raises InputError if it is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as UTF-8 text ({error}): give a text file") from error


def ship(model: PreTrainedModel, judge: Judge, folder: Path, is_sliced: bool) -> None:
    """recipe.ship, with the ends of a chat template's turns, which plain `generate` has to know."""
    if judge.task.stop_ids:
        model.generation_config.eos_token_id = [judge.tokenizer.eos_token_id, *judge.task.stop_ids]
    recipe.ship(model, judge.tokenizer, folder, is_sliced)


if __name__ == "__main__":
    sys.exit(cli.run(main, LLMArgs, prog="train_llm.py"))
