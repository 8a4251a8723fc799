#!/usr/bin/env python
"""Select-then-train a decoder: choose its neurons on a little data, train only those, measure, report.

Without arguments: models/stt-tiny on the shipped CLUTRR data, offline. `python train_llm.py --help` explains the flags.
"""
from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from stt import cli
from stt.arguments import LLMArgs, resolved
from stt.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stt.dataset import Task
    from stt.evaluate.llm import Judge
    from stt.modes import Mode
    from stt.selection import Selection
    from util.clock import Clock
    from util.sinks import Sink

logger = logging.getLogger("stt.train_llm")

SELECTION = "selection.safetensors"
GPU_MULTIPLE = 128  # kept neurons of a site are padded to a multiple of this for inference on a GPU
DEV_SHARE = 0.1  # of the training data, held out by --dev_mode
MAY_CHANGE = ("resume", "overwrite", "eval_restored", "log_interval", "output_dir", "ppl_text",
              "use_wandb", "wandb_project", "wandb_entity", "wandb_run_name")  # between a run and its resumption


def main(args: LLMArgs) -> int:
    """One run, from the flags to the report; 0. Raises InputError before anything is written, TrainingFailed later."""
    import transformers

    from stt import modes, report
    from stt.dataset import encode_all
    from stt.evaluate.llm import Judge
    from stt.loading import check_decoder, compute_dtype, load_model, load_tokenizer
    from stt.surgery import count_parameters, pad_sites
    from stt.trainers.sft import train, training_arguments
    from util.clock import Clock
    from util.utils import RunFolder, git_commit, peak_memory_bytes, pick_device, set_seed, versions

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()

    # ---------------------------------------------------------------- everything that can be wrong, before any write
    args, device, clock = resolved(args), pick_device(), Clock()
    set_seed(args.seed)
    mode = modes.find(args.mode, args.score)
    run = RunFolder(Path(args.output_dir) / args.run_name, args.overwrite, args.resume)
    step = resumed_step(run.path, args) if args.resume else 0
    tokenizer = load_tokenizer(args.model)
    task = load_data(args, tokenizer)
    encoded, _ = encode_all(task.train, tokenizer, args.max_length, args.apply_chat_template)
    autocast_dtype = compute_dtype(args.precision, device)
    judge = Judge(args.model, task, tokenizer, read_text(args.ppl_text), args.eval_batch, args.max_length,
                  args.apply_chat_template, autocast_dtype)
    model = load_model(args.model, autocast_dtype, device)
    check_decoder(model, tokenizer)
    judge.check_lengths(model, encoded)
    parameters = {"dense": count_parameters(model)["total"]}
    perplexity = {"dense": judge.perplexity(model)}

    # ---------------------------------------------------------------- select
    selection, sites, flops = None, [], {}
    if mode.score:
        modes.check_sites(model, args.partial)
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
    validate = (lambda: judge.accuracy(model, task.validation)) if args.eval_epochs else None
    with clock.lap("training"):
        train(model, encoded, tokenizer.pad_token_id, training_arguments(args, run.path, device, autocast_dtype),
              run.log, validate, args.resume, run.seconds)
    peak = peak_memory_bytes()

    # ---------------------------------------------------------------- measure
    with clock.lap("evaluation"):
        modes.merge_adapters(model)
        flops["inference"] = judge.inference_flops(model)
        parameters |= {"kept": count_parameters(model)["total"], "kept_fraction_of_units": kept_fraction(selection)}
        pad_sites(model, GPU_MULTIPLE if device.type == "cuda" else 1)
        accuracy, answer_loss = judge.test(model, run.path), judge.answer_loss(model)
        perplexity["trained"] = judge.perplexity(model)
        throughput = judge.throughput(model, is_sliced=selection is not None)
        if args.eval_restored:
            accuracy["restored"] = judge.restored(model)

    # ---------------------------------------------------------------- ship and report
    ship(model, judge, run.path / "checkpoint", selection is not None)
    results = {
        "recipe": "train_llm", "mode": args.mode, "model": args.model, "task": task.name, "seed": args.seed,
        "selected_by": selected_by(args, mode), "head": args.head, "dev_mode": args.dev_mode, "accuracy": accuracy,
        "answer_loss": answer_loss, "perplexity": perplexity, "parameters": parameters, "flops": flops,
        "throughput": throughput, "peak_memory_bytes": peak, "seconds": clock.seconds(), "sites": sites,
        "versions": versions(), "git_commit": git_commit(), "device": str(device)}
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
    """The selection, its sites for the record, and the FLOPs of making it.

    Raises InputError if a resumed run would select otherwise than it did.
    """
    from stt.dataset import encode_all, selection_subset
    from stt.modes import select_units
    from stt.report import agreement_lines
    from stt.selecting import Budget, routed_to
    from stt.selection import Selection
    from stt.trainers.sft import collate

    examples = selection_subset(judge.task.train, args.active_sample_ratio, args.seed)
    rows, _ = encode_all(examples, judge.tokenizer, args.max_length, args.apply_chat_template)
    batches = [collate(judge.tokenizer.pad_token_id)(rows[i:i + args.eval_batch])
               for i in range(0, len(rows), args.eval_batch)]
    size = Budget(args.topk_ratio, args.keep_ratio, width=args.width, multiple_of=args.multiple_of)
    with clock.lap("selection"):
        selection, composition = select_units(
            mode, model, batches, judge.tokenizer, size, args.active_threshold, args.seed, args.count_padding,
            args.select_on, args.compensate or "none", args.min_tokens)
    if args.resume and Selection.load(folder / SELECTION).without_new_values() != selection.without_new_values():
        raise InputError(f"{folder / SELECTION} is not what this run selects now: the model or the data changed; start "
                         "again with --overwrite")
    sites = [{"name": name, "width": selection.widths[name], "kept": len(ids), **composition.get(name, {}),
              **selection.meta["reliability"][name], **routed_to(selection, name)} for name, ids in selection.items()]
    logger.info("\n".join(agreement_lines(sites)))
    methods = list(dict.fromkeys(["stt", mode.score]))
    return selection, sites, judge.selection_flops(model, rows, methods, args.compensate or "none")


def selected_by(args: LLMArgs, mode: Mode) -> str | None:
    """What chose the neurons, in words."""
    if mode.score is None:
        return None
    parts = [mode.score, *([] if args.compensate in (None, "none") else [f"compensated by {args.compensate}"]),
             *([] if args.select_on == "all" else [f"on the {args.select_on}"]),
             *([] if args.preset == "published" else [f"preset {args.preset}"])]
    return ", ".join(parts)


def kept_fraction(selection: Selection | None) -> float:
    """Share of all units of all sites that are kept."""
    return 1.0 if selection is None else sum(map(len, selection.values())) / sum(selection.widths.values())


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


def resumed_step(folder: Path, args: LLMArgs) -> int:
    """The step of the checkpoint to go on from. Raises InputError if the run was started with other flags."""
    from stt.runs import read_json
    from stt.trainers.sft import last_checkpoint

    step = int(last_checkpoint(folder).rpartition("-")[2])
    before = read_json(folder / "args.json")["arguments"]
    for name, value in asdict(args).items():
        if name not in MAY_CHANGE and before.get(name) != value:
            raise InputError(f"the run in {folder} was started with {name} {before.get(name)!r}, now it is {value!r}: "
                             "resume with the same flags, or start another run")
    return step


def wandb(args: LLMArgs) -> Sink:
    """The W&B run if asked for, else nothing."""
    from util.sinks import NoSink, wandb_sink

    if not args.use_wandb:
        return NoSink()
    return wandb_sink(args.wandb_project, args.wandb_entity, args.wandb_run_name or args.run_name, asdict(args))


if __name__ == "__main__":
    sys.exit(cli.run(main, LLMArgs, prog="train_llm.py"))
