"""Ways to adapt a model by training a given number of its weights, and how each is made ready for training."""
from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import set_seed

import stt
from benchmarks.studies import Measure, Row, Study, add_row, read_rows, train
from benchmarks.weight_cells import UNTRAINED, Cell, Comparison, Plan
from benchmarks.weights import linears, rank_of
from stt.errors import InputError, TrainingFailed, unknown_name
from stt.selective_optimizers.in_place import in_place
from stt.selective_optimizers.optimizer import SelectiveOptimizer
from stt.selective_optimizers.trainer import MakeOptimizer
from stt.selective_optimizers.weights import named_tensors, sizes
from stt.selective_optimizers.wrap import get_selective_optimizer
from stt.trainers.sft import collate

BATCH_SIZE = 4  # rows of 128 tokens


@dataclass
class Ready:
    """A model whose trainable parameters are those of the arm, or the optimizer that chooses them while it trains."""

    model: nn.Module
    make_optimizer: MakeOptimizer | None = None
    optimizer: SelectiveOptimizer | None = None

    @property
    def trained(self) -> int:
        """How many weights trained."""
        if self.optimizer is not None:
            return self.optimizer.get_budget_used()
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


Prepare = Callable[[Study, nn.Module, Cell], Ready]


# ---------------------------------------------------------------- arms


def full(study: Study, model: nn.Module, cell: Cell) -> Ready:
    return Ready(model)


def lora(study: Study, model: nn.Module, cell: Cell) -> Ready:
    """PEFT's, on every linear layer but the head, of the rank that trains as near to the budget as can be."""
    import peft

    rank = rank_of(model, cell.budget)
    set_seed(cell.seed)  # the adapters begin at random
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(linears(model)))
    return Ready(peft.get_peft_model(model, config))


def weights(score: str, **options: object) -> Prepare:
    """Weights of the whole model that are chosen once; by gradients, of 64 rows of the text."""
    def prepare(study: Study, model: nn.Module, cell: Cell) -> Ready:
        chosen = stt.select_weights(model, batches(study, cell.seed), score=score, budget=cell.budget, seed=cell.seed,
                                    **options)
        return Ready(stt.attach(model, chosen))
    return prepare


def id3(bias_correction: str) -> Prepare:
    """Weights that are chosen at every step, evenly over the steps."""
    def prepare(study: Study, model: nn.Module, cell: Cell) -> Ready:
        ready = Ready(model)

        def make(model: nn.Module, steps: int) -> SelectiveOptimizer:
            ready.optimizer = get_selective_optimizer(torch.optim.AdamW, "id3")(
                model.parameters(), lr=cell.lr, weight_decay=study.weight_decay, budget=cell.budget, max_steps=steps,
                bias_correction=bias_correction)
            return ready.optimizer

        ready.make_optimizer = make
        return ready
    return prepare


def neurons(score: str) -> Prepare:
    """Whole neurons of the feed-forward blocks, as many of each as come nearest to the budget, chosen on 64 rows."""
    def prepare(study: Study, model: nn.Module, cell: Cell) -> Ready:
        everything = in_place(model, stt.select(model, score="magnitude", keep=1.0))
        share = cell.budget / sum(sizes(everything, named_tensors(model)).values())
        return Ready(stt.attach(model, stt.select(model, batches(study, cell.seed), score=score, keep=share,
                                                  seed=cell.seed)))
    return prepare


def batches(study: Study, seed: int) -> list[dict[str, torch.Tensor]]:
    """What weights are chosen on."""
    rows = study.select_on(seed)
    return [collate(study.pad_id)(rows[i:i + 32]) for i in range(0, len(rows), 32)]


OWN_SIZE = {"full": full, "norms (BitFit)": weights("bias", include_norm=True)}  # their budget is not ours to choose
ARMS: dict[str, Prepare] = {
    **OWN_SIZE,
    "LoRA": lora,
    "random": weights("random"),
    "smallest (PaFI)": weights("smallest"),
    "largest (Super-Tuning)": weights("largest"),
    "gradient": weights("gradient"),
    "ID3, entry": id3("entry"),
    "ID3, global": id3("global"),
    "neurons by stt": neurons("stt"),
}


# ---------------------------------------------------------------- what is run


def adapted(study: Study) -> Study:
    """The study as all arms are trained: small batches, and no weight decay, which would move the largest weights."""
    return replace(study, batch_size=BATCH_SIZE, weight_decay=0.0)


def plan(study: Study, names: Sequence[str], budgets: Sequence[int]) -> Plan:
    """Every arm of `names` at every budget, and what has a size of its own once; beside the latter, if it is a part of
    the model, as many random weights. Raises InputError for an unknown name and a budget that the model has no room
    for."""
    for name in names:
        if name not in ARMS:
            raise unknown_name("arm", name, ARMS)
    total = sum(tensor.numel() for tensor in named_tensors(study.model).values())
    for budget in budgets:
        if not 0 < budget < total:
            raise InputError(f"a budget must be from 1 to {total - 1:,} weights, got {budget:,}")
    vectors = sum(tensor.numel() for tensor in named_tensors(study.model).values() if tensor.dim() == 1)
    own = {"full": total, "norms (BitFit)": vectors}
    found = [(name, own[name]) for name in names if name in own]
    found += [("random", vectors)] if {"random", "norms (BitFit)"} <= {*names} else []
    found += [(name, budget) for budget in budgets for name in names if name not in own]
    return list(dict.fromkeys(found))


def fill(study: Study, plan: Plan, seeds: int, steps: int, path: Path) -> Comparison:
    """Every cell that has no row in the file yet."""
    found = Comparison(read_rows(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(desc="trainings", unit="training", disable=None) as bar:
        while (cell := found.next_cell(plan, seeds)) is not None:
            bar.set_postfix_str(f"{cell.arm}, {cell.budget:,} weights, step size {cell.lr:g}, seed {cell.seed}")
            add_row(path, found.add(cell, run(study, cell, steps)))
            bar.update()
    return found


def run(study: Study, cell: Cell, steps: int) -> Row:
    """What was measured of one training, and how many weights trained. A trial whose loss is no number has None; raises
    TrainingFailed if it is another training's."""
    if cell == UNTRAINED:
        return {"trained": 0, **measured(study, study.model)}
    ready = ARMS[cell.arm](study, copy.deepcopy(study.model), cell)
    train(study, ready.model, steps, cell.lr, cell.seed, make_optimizer=ready.make_optimizer)
    if cell.is_trial:
        loss = nats(study.validate, ready.model)
        return {"trained": ready.trained, "validation": loss if math.isfinite(loss) else None}
    row = {"trained": ready.trained, **measured(study, ready.model)}
    if not math.isfinite(row["test"] + row["general"]):
        raise TrainingFailed(f"{cell.arm} with {cell.budget:,} weights and step size {cell.lr:g}: the loss of seed "
                             f"{cell.seed} is no number")
    return row


def measured(study: Study, model: nn.Module) -> Row:
    """The losses that count: of the test part, and of general text."""
    return {"test": nats(study.task, model), "general": nats(study.general, model)}


def nats(perplexity: Measure, model: nn.Module) -> float:
    """Per token."""
    return math.log(perplexity(model))
