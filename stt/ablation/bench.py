"""One cell from the dense model to its row, and the selections an ablation compares; the same for every recipe."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from stt import modes
from stt.ablation.arms import Arm
from stt.ablation.cells import Cell, Row, packed
from stt.arguments import RunArgs
from stt.batches import Batch
from stt.recipe import kept_fraction
from stt.selecting import Budget
from stt.selection import Selection
from stt.selective_optimizers import recipe as in_place
from stt.selective_optimizers.recipe import Growing
from stt.surgery import count_parameters
from stt.trainers.memory import recompute
from util.utils import set_seed

Log = Callable[..., None]


class Bench(Protocol):
    """What differs between the recipes: the model, its data, its loss and what is right."""

    args: RunArgs
    tokenizer: PreTrainedTokenizerBase | None
    select_on: str  # the part of an example that a selection looks at
    trained_on: int  # examples
    validated_on: int
    majority: float | None  # share of the test items that have the most frequent training label
    is_tied: bool  # whether the head is the input embedding

    def load(self, seed: int) -> PreTrainedModel:
        """The dense model."""

    def batches(self, ratio: float | None, seed: int, from_source: bool) -> Sequence[Batch]:
        """What a selection looks at; None: as much as the flags say."""

    def arguments(self, args: RunArgs, folder: Path) -> TrainingArguments:
        """What Trainer is told; nothing is saved or evaluated on the way."""

    def train(self, model: PreTrainedModel, arguments: TrainingArguments, log: Log,
              growing: Growing | None = None) -> None:
        """Train what requires gradients, or what `growing` chooses of it."""

    def correct(self, model: PreTrainedModel, split: str) -> list[bool]:
        """Whether each "validation" or "test" item is answered rightly."""

    def more(self, model: PreTrainedModel) -> dict[str, float]:
        """Further numbers of a trained model."""


def run(bench: Bench, cell: Cell, folder: Path, log: Log) -> Row:
    """The row of a cell: trained, and measured on the validation data if it is a trial, else on the test data. Trainer
    works in `folder`, steps of the training go to `log`."""
    args, arm, started = replace(bench.args, lr=cell.lr, seed=cell.seed), cell.arm, time.perf_counter()
    set_seed(args.seed)
    model, selection, counts, row = bench.load(args.seed), None, {}, {}
    if arm.is_cut_after:
        _prepare(args, modes.MODES["baseline"], model, None)
        counts = count_parameters(model)  # the most that is trained
        _train(bench, args, model, folder, log)
        args = replace(args, lr=args.recovery_lr, num_epoch=1, train_batch=max(1, args.train_batch // 2),
                       gradient_accumulation_steps=2 * args.gradient_accumulation_steps)
    args = args if arm.bias_correction is None else replace(args, bias_correction=arm.bias_correction)
    growing = Growing(args) if arm.mode.trains == "growing" else None
    if arm.mode.chooses_units:
        selection, _ = select(bench, arm, model, args.seed)
    elif arm.mode.trains == "weights":
        selection = in_place.choose(model, arm.mode.score, args)
    _prepare(args, arm.mode, model, selection, arm.tune_attn)
    if arm.is_cut_after and not cell.is_trial:
        row["accuracy_cut"] = _share(bench.correct(model, "test"))
    counts = counts or (growing.counts(model) if growing else count_parameters(model))
    _train(bench, args, model, folder, log, growing)
    if arm.mode.is_in_place:
        in_place.finished(model, growing)
    modes.merge_adapters(model)
    correct = bench.correct(model, "validation" if cell.is_trial else "test")
    row |= {"accuracy": _share(correct), "n": len(correct)}
    if not cell.is_trial:
        row |= {"correct": packed(correct), **_kept(selection if arm.cuts else None), "trained": counts["trained"],
                "trained_without_head": counts["trained_without_head"], **bench.more(model)}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def select(bench: Bench, arm: Arm, model: PreTrainedModel, seed: int) -> tuple[Selection, dict[str, dict[str, int]]]:
    """What the arm keeps of the model, as many units of every site as STT does on the run's own data; and what chose
    them, where that is STT itself."""
    args = bench.args
    size = Budget(args.topk_ratio, args.keep_ratio if arm.keep_ratio is None else arm.keep_ratio, width=args.width,
                  multiple_of=args.multiple_of, heads_keep=args.heads_ratio)
    compensate = args.compensate or "none"
    if not arm.own_data:
        return _units(bench, arm.mode, model, size, bench.batches(None, seed, False), args.active_threshold, seed,
                      compensate)
    usual, _ = _units(bench, modes.MODES["stt"], model, size, bench.batches(None, seed, False), args.active_threshold,
                      seed, "none")
    size = replace(size, keep_ratio=None, counts={site: len(ids) for site, ids in usual.items()})
    threshold = args.active_threshold if arm.threshold is None else arm.threshold
    batches = bench.batches(arm.sample_ratio, seed, arm.from_source)
    return _units(bench, arm.mode, model, size, batches, threshold, seed, compensate)[0], {}


def _units(bench: Bench, mode: modes.Mode, model: PreTrainedModel, size: Budget, batches: Sequence[Batch],
           threshold: float, seed: int, compensate: str) -> tuple[Selection, dict[str, dict[str, int]]]:
    return modes.select_units(mode, model, batches, bench.tokenizer, size, threshold, seed, bench.args.count_padding,
                              bench.select_on, compensate, bench.args.min_tokens, bench.args.units)


def selections(bench: Bench, arms: Sequence[Arm], seed: int) -> tuple[dict[str, Selection], list[dict[str, object]]]:
    """The selection of every arm that cuts the dense model (those that train it first cut another one), and the sites
    of the first by STT with what chose their units."""
    cutting = [arm for arm in arms if arm.cuts and not arm.is_cut_after]
    model = bench.load(seed) if cutting else None
    found, sites = {}, []
    for arm in cutting:
        found[arm.label], composition = select(bench, arm, model, seed)
        if composition and not sites:
            sites = [{"name": name, "width": found[arm.label].widths[name], "kept": len(ids), **composition[name]}
                     for name, ids in found[arm.label].items() if name in composition]
    return found, sites


def mean_over_sites(by_site: Mapping[str, float]) -> float:
    """The mean of a number per site."""
    return sum(by_site.values()) / len(by_site)


def _prepare(args: RunArgs, mode: modes.Mode, model: PreTrainedModel, selection: Selection | None,
             tune_attn: bool = False) -> None:
    if mode.is_in_place:
        in_place.prepare(model, selection, args.head)
        return
    lora = modes.Lora(args.lora_r, args.lora_alpha, args.lora_dropout)
    modes.prepare(mode, model, selection, lora, args.head, tune_attn)


def _train(bench: Bench, args: RunArgs, model: PreTrainedModel, folder: Path, log: Log,
           growing: Growing | None = None) -> None:
    arguments = bench.arguments(args, folder)
    if args.activation_checkpointing:
        recompute(model)
    bench.train(model, replace(arguments, save_strategy="no", eval_strategy="no"), log, growing)
    if args.activation_checkpointing:
        model.activation_checkpointing_disable()


def _kept(selection: Selection | None) -> dict[str, float]:
    """The share of neurons that are kept, and of heads where they were chosen from."""
    return {"kept": kept_fraction(selection)} | ({"kept_heads": kept_fraction(selection, "heads")} if
                                                 selection is not None and selection.heads else {})


def _share(correct: Sequence[bool]) -> float:
    return sum(correct) / len(correct)
