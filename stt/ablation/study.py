"""An ablation from its flags to its report; the same for every recipe."""
from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from stt import recipe
from stt.ablation import arms as arms_module
from stt.ablation import bench as benches
from stt.ablation import flags, report, tables
from stt.ablation.arms import CALIBRATION, Arm
from stt.ablation.bench import Bench
from stt.ablation.cells import Cell, Cells, fill
from stt.arguments import CHECKOUT, alias_of
from stt.errors import InputError
from stt.runs import read_json
from stt.words import markdown_table, model_name, percent
from util.utils import FORMAT_VERSION, finite, git_commit, versions, write_json_atomic

logger = logging.getLogger(__name__)

WORK = "work"  # Trainer's folder of the cell that runs, in the ablation's
# between an ablation and its continuation
MAY_CHANGE = (*recipe.MAY_CHANGE, "seeds", "mode", "reference", "run_name", "active_thresholds", "active_sample_ratios",
              "keep_ratios", "eval_batch")


@dataclass(frozen=True)
class Plan:
    """What is compared with what, and how often."""

    arms: list[Arm]
    references: dict[str, Arm]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]


def plan(args: flags.AblationFlags) -> Plan:
    """The plan of the flags, which are resolved. Raises InputError for an unknown mode or reference, and for seeds that
    the trials use. Every cell is one process's: more of them are refused."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("an ablation runs in one process: start it without torchrun, or give each process an ablation "
                         "of its own (stt sweep).")
    if args.seed + args.seeds > flags.TRIAL_SEED:
        raise InputError(f"seed and seeds must stay below {flags.TRIAL_SEED}, which the trials use, got {args.seed} "
                         f"and {args.seeds}.")
    names = ["ns_activeset"] if args.mode == CALIBRATION else args.mode.split(",")
    arms = arms_module.find(names, flags.numbers("active_thresholds", args.active_thresholds, flags.FINITE),
                            flags.numbers("active_sample_ratios", args.active_sample_ratios, flags.IN_01),
                            flags.numbers("keep_ratios", args.keep_ratios, flags.IN_01), args.tune_attn)
    reference = args.reference or arms[0].name
    return Plan(arms, {arm.label: arms_module.reference_of(arm, arms, reference) for arm in arms},
                tuple(sorted(flags.numbers("lrs", args.lrs, flags.ABOVE_0))),
                tuple(range(args.seed, args.seed + args.seeds)))


def open_folder(args: flags.AblationFlags) -> Path:
    """The folder of the ablation, new, emptied or gone on with. Raises InputError if it must not be written to."""
    folder = Path(args.output_dir) / args.run_name
    given = _portable(args)
    if args.resume and not (folder / "args.json").is_file():
        raise InputError(f"nothing to resume: {folder} holds no ablation; start without --resume.")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / "args.json").is_file():
            raise InputError(f"{folder} holds files that no run of ours wrote; choose another folder.")
        if args.overwrite:
            shutil.rmtree(folder)
        else:
            _check_same(folder, given, {field.name: field.default for field in fields(args)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / "args.json", {"format_version": FORMAT_VERSION, "arguments": given,
                                                 "command": sys.argv, "versions": versions(),
                                                 "git_commit": git_commit()})
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another folder.") from None
    return folder


def _portable(args: flags.AblationFlags) -> dict[str, object]:
    """The flags as JSON holds them; what lies in this checkout is named from its root, and a packaged model by its
    alias, so that an ablation can go on elsewhere."""
    root = f"{CHECKOUT}/"
    return {name: alias_of(value.removeprefix(root)) if isinstance(value, str) else value
            for name, value in asdict(args).items()}


def _check_same(folder: Path, given: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Flags that an older release did not have count as their defaults."""
    before = defaults | read_json(folder / "args.json").get("arguments", {})
    for name, value in given.items():
        if name not in MAY_CHANGE and before[name] != value:
            raise InputError(f"the ablation in {folder} was started with {name} {before[name]!r}, now it is "
                             f"{value!r}: go on with the same flags, --overwrite it, or give another --run_name.")


def conduct(args: flags.AblationFlags, plan: Plan, bench: Bench, folder: Path, title: str,
            words: Sequence[str]) -> int:
    """Runs every cell that is missing, then writes the report; 0. `words` say what the data are."""
    if args.mode == CALIBRATION:
        return _calibrate(args, plan, bench, folder, title)
    logging.getLogger("stt.surgery").setLevel(logging.WARNING)  # what trains is said once, in the report
    sink, cells = recipe.wandb(args), Cells(folder / "cells.jsonl")
    fill(cells, plan.arms, plan.lrs, plan.seeds,
         lambda cell: benches.run(bench, cell, folder / WORK, partial(_log, folder / "metrics.jsonl", cell, sink.log)))
    sink.finish()
    shutil.rmtree(folder / WORK, ignore_errors=True)
    lines = tables.lines_of(cells, plan.arms, plan.references)
    found, sites = benches.selections(bench, plan.arms, args.seed)
    majority = [] if bench.majority is None else [f"Majority class: {percent(bench.majority)}."]
    words = [*words, *majority, *_protocol(args, plan, bench), report.head_words(args.head, bench.is_tied, lines[0]),
             *tables.at_edge(lines, plan.lrs), *report.transfer_words(found, plan.arms, args.source_task)]
    text = report.write(folder, title, lines, words, bench.majority, found, sites)
    write_json_atomic(folder / "ablation.json", {
        "format_version": FORMAT_VERSION, "model": model_name(args.model), "task": args.task,
        "lines": [asdict(line) for line in lines], "versions": versions(), "git_commit": git_commit()})
    sys.stdout.write(f"{text}\nreport: {folder / 'report.md'}\n")
    return 0


def _calibrate(args: flags.AblationFlags, plan: Plan, bench: Bench, folder: Path, title: str) -> int:
    """The overlap of what different amounts of data select; nothing is trained."""
    found, _ = benches.selections(bench, plan.arms, args.seed)
    lines = report.write_overlap(folder, found, "Overlap by share of the data selected on (Jaccard, mean over sites)")
    rows = [["share of the training data", *found], *([a, *(f"{benches.mean_over_sites(ours.jaccard(other)):.2f}"
                                                            for other in found.values())] for a, ours in found.items())]
    text = "\n".join([f"# {title}", "", *markdown_table(rows), "", *lines])
    (folder / "report.md").write_text(text, encoding="utf-8")
    sys.stdout.write(f"{text}\nreport: {folder / 'report.md'}\n")
    return 0


def _protocol(args: flags.AblationFlags, plan: Plan, bench: Bench) -> list[str]:
    """How the numbers came about."""
    size = f"exactly {percent(args.keep_ratio)} of every site" if args.keep_ratio is not None else \
        f"the shares named of every site ({args.keep_ratios})" if args.keep_ratios is not None else \
        f"as many of every site as the union of the two best {percent(args.topk_ratio)} that STT keeps"
    sizes = ", ".join(f"{lr:g}" for lr in plan.lrs)
    tried = (f"Every mode tried the same {len(plan.lrs)} step sizes ({sizes}) once, with a seed of its own, and the "
             f"best on the {bench.validated_on} validation examples counts; no test example was read in a trial"
             if len(plan.lrs) > 1 else f"Step size {sizes} for every mode, not tried")
    counted = "1 seed, so that no difference is shown to hold for another one" if len(plan.seeds) == 1 else \
        f"{len(plan.seeds)} seeds"
    return [f"Every mode that cuts keeps {size}. {tried}. Then {counted}, {args.num_epoch} epoch(s) on "
            f"{bench.trained_on} examples; ± is the standard deviation over the seeds."]


def _log(path: Path, cell: Cell, sink: Callable[[Mapping[str, object]], None], **numbers: object) -> None:
    """A row of metrics.jsonl: a step of the training of a cell."""
    row = {"mode": cell.arm.label, "lr": cell.lr, "seed": cell.seed, **finite(numbers, "metrics")}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    sink(row)
