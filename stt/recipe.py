"""What the training recipes have in common: the selection and its record, resuming, and what stands in the results."""
from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from stt.arguments import RunArgs
from stt.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stt.batches import Batch
    from stt.modes import Mode
    from stt.selection import Selection
    from util.sinks import Sink

logger = logging.getLogger(__name__)

SELECTION = "selection.safetensors"
GPU_MULTIPLE = 128  # kept neurons of a site are padded to a multiple of this for inference on a GPU
DEV_SHARE = 0.1  # of the training data, held out by --dev_mode
MAY_CHANGE = ("resume", "overwrite", "eval_restored", "log_interval", "save_steps", "output_dir", "ppl_text",
              "use_wandb", "wandb_project", "wandb_entity", "wandb_run_name")  # between a run and its resumption


def select(args: RunArgs, mode: Mode, model: PreTrainedModel, batches: Sequence[Batch],
           tokenizer: PreTrainedTokenizerBase | None, folder: Path,
           select_on: str = "all") -> tuple[Selection, list[dict[str, object]]]:
    """The selection on these batches, and its sites for the record.

    Raises InputError if a resumed run would select otherwise than it did.
    """
    from stt.modes import select_units
    from stt.report import agreement_lines
    from stt.selecting import Budget, routed_to
    from stt.selection import Selection

    size = Budget(args.topk_ratio, args.keep_ratio, width=args.width, multiple_of=args.multiple_of,
                  heads_keep=args.heads_ratio)
    selection, composition = select_units(mode, model, batches, tokenizer, size, args.active_threshold, args.seed,
                                          args.count_padding, select_on, args.compensate or "none", args.min_tokens,
                                          args.units)
    if args.resume and Selection.load(folder / SELECTION).without_new_values() != selection.without_new_values():
        raise InputError(f"{folder / SELECTION} is not what this run selects now: the model or the data changed; start "
                         "again with --overwrite")
    sites = [{"name": name, "width": selection.widths[name], "kept": len(ids), **units_of(selection, name),
              **composition.get(name, {}), **selection.meta["reliability"][name], **routed_to(selection, name)}
             for name, ids in selection.items()]
    logger.info("\n".join(agreement_lines(sites)))
    return selection, sites


def units_of(selection: Selection, site: str) -> dict[str, object]:
    """What the units of a site are, and of heads how many query heads one unit has."""
    if site not in selection.heads:
        return {"units": "neurons"}
    return {"units": "heads", "query_heads_of_unit": selection.heads[site]}


def described(args: RunArgs, mode: Mode, task: str, device: torch.device, *more: str) -> dict[str, object]:
    """What a run was, for its results: flags that tell runs apart, versions and device; `more` are words on what the
    recipe selects by."""
    from util.utils import git_commit, versions

    return {"mode": args.mode, "model": args.model, "task": task, "seed": args.seed,
            "selected_by": selected_by(args, mode, *more), "head": args.head, "dev_mode": args.dev_mode,
            "versions": versions(), "git_commit": git_commit(), "device": str(device)}


def selected_by(args: RunArgs, mode: Mode, *more: str) -> str | None:
    """What chose the units, in words; `more` are words of the recipe's own."""
    from stt.head_scores import matching

    if mode.score is None:
        return None
    parts = [*([] if args.units == "heads" else [mode.score]),
             *([] if args.compensate in (None, "none") else [f"compensated by {args.compensate}"]),
             *([] if args.units == "neurons" else [f"{matching(mode.score)} of heads"]),
             *more, *([] if args.preset == "published" else [f"preset {args.preset}"])]
    return ", ".join(parts)


def kept_fraction(selection: Selection | None, units: str = "neurons") -> float:
    """Share of the neurons (or "heads") of all sites that are kept; 1 if none were chosen from."""
    sites = [] if selection is None else [site for site in selection if (site in selection.heads) == (units == "heads")]
    return sum(len(selection[site]) for site in sites) / sum(selection.widths[site] for site in sites) if sites else 1.0


def kept_fractions(selection: Selection | None) -> dict[str, float]:
    """The shares for the results: of neurons, and of heads where they were chosen from."""
    of_heads = {"kept_fraction_of_heads": kept_fraction(selection, "heads")} if selection and selection.heads else {}
    return {"kept_fraction_of_units": kept_fraction(selection), **of_heads}


def resumed_step(folder: Path, args: RunArgs) -> int:
    """The step of the newest whole checkpoint; says which ones are damaged. Raises InputError if there is none, or if
    the run was started with other flags."""
    from stt.trainers.checkpoints import newest, step_of

    checkpoint, faults = newest(folder)
    check_same_flags(folder, args)
    for name, fault in faults.items():
        logger.warning("%s is damaged (%s): going on from %s", folder / name, fault, checkpoint.name)
    return step_of(checkpoint)


def is_finished(folder: Path, args: RunArgs) -> bool:
    """Whether there is nothing left to resume; says where the report is. Raises InputError if the run was started with
    other flags."""
    if not (args.resume and (folder / "results.json").is_file()):
        return False
    check_same_flags(folder, args)
    sys.stdout.write(f"already finished: {folder / 'report.html'}\n")
    return True


def check_same_flags(folder: Path, args: RunArgs) -> None:
    """Raises InputError if the run in `folder` was started with other flags than `args`."""
    from stt.runs import read_json

    before = read_json(folder / "args.json").get("arguments")
    before = before if isinstance(before, dict) else {}
    for name, value in asdict(args).items():
        if name not in MAY_CHANGE and before.get(name) != value:
            raise InputError(f"the run in {folder} was started with {name} {before.get(name)!r}, now it is {value!r}: "
                             "resume with the same flags, or start another run")


def wandb(args: RunArgs) -> Sink:
    """The W&B run if asked for, else nothing."""
    from util.sinks import NoSink, wandb_sink

    if not args.use_wandb:
        return NoSink()
    return wandb_sink(args.wandb_project, args.wandb_entity, args.wandb_run_name or args.run_name, asdict(args))
