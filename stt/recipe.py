"""What the training recipes have in common: the selection and its record, resuming, and what stands in the results."""
from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stt.arguments import RunArgs
from stt.errors import InputError
from util import ranks

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
PARTS_OF_UPDATE = ("train_batch", "gradient_accumulation_steps")  # so may these, if an update keeps its size
Row = TypeVar("Row")


def check_can_shard(args: RunArgs, device: torch.device) -> None:
    """Raises InputError if a model is to be sharded where accelerate would silently train copies of it."""
    if args.fsdp and device.type != "cuda":
        raise InputError("fsdp shards a model over GPUs, and there is none here; leave it out: torchrun alone trains a "
                         "copy in every process.")
    if args.fsdp and ranks.world() == 1:
        raise InputError("fsdp shards a model over several processes, and this is one; start with torchrun "
                         "--nproc_per_node N, or leave it out.")


def batches_of(rows: Sequence[Row], size: int, collate: Callable[[Sequence[Row]], Batch]) -> list[Batch]:
    """The batches that this process selects on: its share of all, of `size` rows or of so few that each process has
    one."""
    size = min(size, max(len(rows) // ranks.world(), 1))
    return [collate(part) for part in ranks.share([rows[i:i + size] for i in range(0, len(rows), size)])]


def select(args: RunArgs, mode: Mode, model: PreTrainedModel, batches: Sequence[Batch],
           tokenizer: PreTrainedTokenizerBase | None, folder: Path,
           select_on: str = "all") -> tuple[Selection, list[dict[str, object]]]:
    """The selection on these batches of every process, and its sites for the record; all have the first one's.

    Raises InputError if a resumed run would select otherwise than it did.
    """
    from stt.modes import select_units
    from stt.report import agreement_lines
    from stt.selecting import Budget, routed_to
    from stt.selection import Selection

    size = Budget(args.topk_ratio, args.keep_ratio, width=args.width, multiple_of=args.multiple_of,
                  heads_keep=args.heads_ratio)
    selection, composition = ranks.broadcast(select_units(
        mode, model, batches, tokenizer, size, args.active_threshold, args.seed, args.count_padding, select_on,
        args.compensate or "none", args.min_tokens, args.units))
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
            "versions": versions(), "git_commit": git_commit(), "device": str(device), "processes": ranks.world()}


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
    if ranks.is_first():
        sys.stdout.write(f"already finished: {folder / 'report.html'}\n")
    return True


def check_same_flags(folder: Path, args: RunArgs) -> None:
    """Raises InputError if the run in `folder` was started with other flags than `args`. Of an update's examples the
    parts of a process and of a forward pass may change together, as the number of processes does."""
    from stt.runs import read_json

    record = read_json(folder / "args.json")
    before = record.get("arguments")
    before = before if isinstance(before, dict) else {}
    was, now = update_size(before, record.get("processes", 1)), update_size(asdict(args), ranks.world())
    may_change = (*MAY_CHANGE, *(PARTS_OF_UPDATE if was == now else ()))
    for name, value in asdict(args).items():
        if name not in may_change and before.get(name) != value:
            raise InputError(f"the run in {folder} was started with {name} {before.get(name)!r}, now it is {value!r}: "
                             "resume with the same flags, or start another run")
    if was != now:
        logger.warning("an update was made of %s examples, and is of %s with %d processes now: another "
                       "--train_batch or --gradient_accumulation_steps keeps it", was, now, ranks.world())


def update_size(arguments: Mapping[str, object], processes: object) -> int | None:
    """Examples of one optimizer step; None if the record does not say."""
    factors = [*(arguments.get(name) for name in PARTS_OF_UPDATE), processes]
    return math.prod(factors) if all(type(factor) is int for factor in factors) else None


def wandb(args: RunArgs) -> Sink:
    """The W&B run if asked for, of the first process, else nothing."""
    from util.sinks import NoSink, wandb_sink

    if not args.use_wandb or not ranks.is_first():
        return NoSink()
    return wandb_sink(args.wandb_project, args.wandb_entity, args.wandb_run_name or args.run_name, asdict(args))
