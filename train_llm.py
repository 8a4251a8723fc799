#!/usr/bin/env python
"""Select-then-train a decoder: choose its neurons or heads on a little data, train only those, measure, report.

Without arguments: models/stt-tiny on the shipped CLUTRR data, offline. `python train_llm.py --help` explains the flags.
"""
from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from stt import cli, recipe
from stt.errors import InputError
from stt.llm_arguments import LLMArgs, resolved
from stt.recipe import DEV_SHARE, GPU_MULTIPLE, SELECTION, kept_fractions, resumed_step, wandb

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stt.dataset import Encoded, Task
    from stt.evaluate.llm import Judge
    from stt.modes import Mode
    from stt.selection import Selection
    from util.clock import Clock

logger = logging.getLogger(__name__)


def main(args: LLMArgs) -> int:
    """One run, from the flags to the report; 0. Raises InputError before anything is written, TrainingFailed later."""
    args = resolved(args)
    if recipe.is_finished(Path(args.output_dir) / args.run_name, args):
        return 0
    import transformers

    from stt import modes, report
    from stt.dataset import encode_all, truncation
    from stt.distill import load_teacher
    from stt.evaluate.llm import Judge
    from stt.loading import check_decoder, compute_dtype, load_model, load_tokenizer
    from stt.packing import find_packing
    from stt.surgery import count_parameters, pad_sites
    from stt.trainers.loop import training_arguments
    from stt.trainers.sft import train
    from util.clock import Clock
    from util.files import writing
    from util.utils import RunFolder, peak_memory_bytes, pick_device, set_seed

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()

    # ---------------------------------------------------------------- everything that can be wrong, before any write
    device, clock = pick_device(), Clock()
    set_seed(args.seed)
    mode = modes.find(args.mode, args.score)
    run = RunFolder(Path(args.output_dir) / args.run_name, args.overwrite, args.resume)
    step = resumed_step(run.path, args) if args.resume else 0
    tokenizer = load_tokenizer(args.model)
    task = load_data(args, tokenizer)
    encoded, _ = encode_all(task.train, tokenizer, args.max_length, args.apply_chat_template)
    lost = truncation(task, tokenizer, args.max_length, args.apply_chat_template)
    autocast_dtype = compute_dtype(args.precision, device)
    judge = Judge(args.model, task, tokenizer, read_text(args.ppl_text), args.eval_batch, args.max_length,
                  args.apply_chat_template, autocast_dtype)
    model = load_model(args.model, autocast_dtype, device)
    check_decoder(model, tokenizer)
    judge.check_lengths(model, encoded)
    packing = find_packing(model, encoded) if args.pack else None
    teacher = load_teacher(args.teacher, args.distill_weight, args.distill_temperature, model, tokenizer,
                           autocast_dtype) if args.distill != "none" else None
    parameters = {"dense": count_parameters(model)["total"]}
    perplexity = {"dense": judge.perplexity(model)}

    # ---------------------------------------------------------------- select
    selection, sites, flops = None, [], {}
    if mode.score:
        modes.check_sites(model, args.partial, args.units)
        selection, sites, flops["selection"] = select(args, mode, model, judge, run.path, clock)
    run.start(asdict(args), wandb(args), step)
    if selection is not None:
        selection.save(run.path / SELECTION)
    clock.add("training", run.seconds)

    # ---------------------------------------------------------------- then train
    lora = modes.Lora(args.lora_r, args.lora_alpha, args.lora_dropout)
    modes.prepare(mode, model, selection, lora, args.head, args.tune_attn)
    parameters |= {name: count for name, count in count_parameters(model).items() if name != "total"}
    perplexity |= {"sliced": judge.perplexity(model)} if selection is not None else {}
    flops["training"] = judge.training_flops(model, encoded, args.num_epoch)
    flops |= {"teacher": teacher.flops(encoded, args.num_epoch)} if teacher else {}
    validate = clock.timed("validation", lambda: judge.accuracy(model, task.validation)) if args.eval_epochs else None
    with clock.lap("training"):
        arguments = training_arguments(args, run.path, device, autocast_dtype, args.group_by_length)
        train(model, encoded, tokenizer.pad_token_id, arguments, run.log, validate, args.resume, run.seconds,
              packing, teacher)
    peak = peak_memory_bytes()

    speed = training_speed(args, encoded, clock)

    # ---------------------------------------------------------------- measure
    with clock.lap("evaluation"):
        modes.merge_adapters(model)
        flops["inference"] = judge.inference_flops(model)
        parameters |= {"kept": count_parameters(model)["total"], **kept_fractions(selection)}
        pad_sites(model, GPU_MULTIPLE if device.type == "cuda" else 1)
        accuracy, answer_loss = judge.test(model, run.path), judge.answer_loss(model)
        perplexity["trained"] = judge.perplexity(model)
        throughput = judge.throughput(model, is_sliced=selection is not None)
        if args.eval_restored:
            accuracy["restored"] = judge.restored(model)

    # ---------------------------------------------------------------- ship and report
    with writing(run.path / "checkpoint", "the last checkpoint is kept"):
        ship(model, judge, run.path / "checkpoint", selection is not None)
    part = [] if args.select_on == "all" else [f"on the {args.select_on}"]
    results = {
        "recipe": "train_llm", **recipe.described(args, mode, task.name, device, *part), "accuracy": accuracy,
        "truncation": {"max_length": args.max_length, **lost}, "training_tokens_per_second": speed,
        "answer_loss": answer_loss, "perplexity": perplexity, "parameters": parameters, "flops": flops,
        "throughput": throughput, "peak_memory_bytes": peak, "seconds": clock.seconds(), "sites": sites}
    report.write_report(run.path, results)
    run.finish(results)
    print("\n".join([*report.summary_lines(results), f"report: {run.path / 'report.html'}"]))
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


def select(args: LLMArgs, mode: Mode, model: PreTrainedModel, judge: Judge, folder: Path,
           clock: Clock) -> tuple[Selection, list[dict[str, object]], int]:
    """The selection, its sites for the record, and the FLOPs of making it."""
    from stt.dataset import encode_all, selection_subset
    from stt.selecting import measured_for
    from stt.trainers.sft import collate

    examples = selection_subset(judge.task.train, args.active_sample_ratio, args.seed)
    rows, _ = encode_all(examples, judge.tokenizer, args.max_length, args.apply_chat_template)
    batches = [collate(judge.tokenizer.pad_token_id)(rows[i:i + args.eval_batch])
               for i in range(0, len(rows), args.eval_batch)]
    with clock.lap("selection"):
        selection, sites = recipe.select(args, mode, model, batches, judge.tokenizer, folder, args.select_on)
    methods, head_score = measured_for(["stt", mode.score], args.units)
    return selection, sites, judge.selection_flops(model, rows, methods, args.compensate or "none", head_score)


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
    """The trained model and its tokenizer, for stt.load or plain from_pretrained; no value is rounded."""
    from stt import checkpoint
    from stt.surgery import widest_dtype

    tokenizer, stop_ids = judge.tokenizer, judge.task.stop_ids
    if stop_ids:  # the ends of a chat template's turns, which plain `generate` has to know
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *stop_ids]
    if is_sliced:
        checkpoint.save(model, folder, tokenizer)
    else:
        model.to(widest_dtype(model.parameters())).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(cli.run(main, LLMArgs, prog="train_llm.py"))
