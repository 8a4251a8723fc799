"""The rows of the tables: one model each, trained its own way, and the check that they compute the same thing."""
from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

import stt
from benchmarks import models, straightforward
from benchmarks.models import ARCHITECTURES, Kept
from benchmarks.sizes import Size
from stt.stt_lora import add_stt_lora

LEARNING_RATE = 1e-5
RANK, ALPHA, DROPOUT = 16, 32, 0.1
TOLERANCE = 1e-4  # relative, in float32


class DifferentComputations(ValueError):
    """Rows of one table do not compute the same thing, so their times must not be compared."""


def precision(device: torch.device) -> AbstractContextManager[object]:
    """What everything that is timed runs under: bfloat16 autocast on a GPU, float32 on the CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@dataclass
class Variant:
    """A model with its batch-independent way of training; `switches` are keyword arguments of a training forward."""

    name: str
    model: PreTrainedModel
    switches: Mapping[str, object] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a training forward."""
        with precision(self.model.device):
            return self.model(**batch, **self.switches).loss

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """One step of training as the usual trainer makes it, without gradient clipping."""
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


# ---------------------------------------------------------------- one function per row


def full(model: PreTrainedModel, size: Size, kept: Kept) -> Variant:
    return Variant("full", model)


def lora(model: PreTrainedModel, size: Size, kept: Kept) -> Variant:
    from peft import LoraConfig, inject_adapter_in_model

    heads = set(models.head_names(model, size))
    targets = [name for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in heads]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=targets)
    inject_adapter_in_model(config, model)
    adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
    return Variant("lora", train(model, heads | adapters))


def scatter(model: PreTrainedModel, size: Size, kept: Kept) -> Variant:
    architecture = ARCHITECTURES[size.architecture]
    straightforward.scatter(model, kept, architecture.feeding, architecture.down)
    return Variant("scatter", train(model, models.neurons_and_head(model, size)))


def ours(model: PreTrainedModel, size: Size, kept: Kept) -> Variant:
    sliced = _sliced(model, size, kept)
    stt.train_only(sliced)
    return Variant("ours", sliced)


def ours_lora(model: PreTrainedModel, size: Size, kept: Kept) -> Variant:
    sliced = _sliced(model, size, kept)
    stt.train_only(sliced, add_stt_lora(sliced, RANK, ALPHA, DROPOUT))
    return Variant("ours_lora", sliced)


def narrow(model: PreTrainedModel, size: Size, kept: Kept) -> Variant:
    thin = models.narrow(model, size, kept)
    return Variant("narrow", train(thin, models.neurons_and_head(thin, size)))


def narrow_trl(model: PreTrainedModel, size: Size, kept: Kept) -> Variant:
    from trl.trainer.utils import add_fused_lm_head  # what TRL's SFTTrainer does to the model it is given

    thin = narrow(model, size, kept).model
    add_fused_lm_head(thin)
    return Variant("narrow_trl", thin, {"fused_lm_head": True})


def narrow_checkpointed(model: PreTrainedModel, size: Size, kept: Kept) -> Variant:
    thin = narrow(model, size, kept).model
    thin.activation_checkpointing_enable()
    return Variant("narrow_checkpointed", thin)


Builder = Callable[[PreTrainedModel, Size, Kept], Variant]
BUILDERS: dict[str, Builder] = {
    build.__name__: build for build in (full, lora, scatter, ours, ours_lora, narrow, narrow_trl, narrow_checkpointed)}
TITLES = {"full": "full fine-tuning", "lora": f"PEFT LoRA r{RANK} + head", "scatter": "straightforward scatter",
          "ours": "ours", "ours_lora": f"ours, LoRA r{RANK}", "narrow": "natively narrow",
          "narrow_trl": "narrow, TRL's chunked loss", "narrow_checkpointed": "narrow, gradient checkpointing"}
DENSE = {"full", "lora"}  # equal losses among themselves
ADAPTED = {"lora", "ours_lora"}  # train something else: their gradients are not compared
NARROW = {"narrow", "narrow_trl", "narrow_checkpointed"}  # only read the dense model; equal outside of training


def build(size: Size, device: torch.device) -> dict[str, Variant]:
    """The rows that can be built here, each from the same dense weights and with the same kept neurons. What is frozen
    and equal in several of them is there once."""
    source = models.dense(size, device)
    kept = models.random_neurons(source, size)
    built: dict[str, Variant] = {}
    frozen: dict[tuple[str, torch.Size], Tensor] = {}
    for name in size.rows:
        if missing(name) is None:
            built[name] = BUILDERS[name](source if name in NARROW else copy.deepcopy(source), size, kept)
            for key, parameter in built[name].model.named_parameters():
                if not parameter.requires_grad:
                    parameter.data = _equal_or_own(frozen.setdefault((key, parameter.shape), parameter.data), parameter)
    return built


def _equal_or_own(known: Tensor, parameter: Tensor) -> Tensor:
    return known if torch.equal(known, parameter) else parameter.data


def missing(name: str) -> str | None:
    """Why the row `name` cannot be measured here; None: it can."""
    needs_trl = name == "narrow_trl" and importlib.util.find_spec("trl") is None
    return "not measured: trl is not installed (pip install -e '.[bench]' -c requirements.txt)" if needs_trl else None


def train(model: PreTrainedModel, names: Iterable[str]) -> PreTrainedModel:
    """`model`, of which only the named parameters train."""
    chosen = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return model


def _sliced(model: PreTrainedModel, size: Size, kept: Kept) -> PreTrainedModel:
    first = ARCHITECTURES[size.architecture].feeding[0]
    stt.apply(model, {f"{layer}.{first}": ids for layer, ids in kept.items()})
    if model.get_output_embeddings() is not None:
        stt.chunked_loss(model)
    return model


# ---------------------------------------------------------------- are they the same?


@dataclass(frozen=True)
class Computed:
    """What one training forward and backward of a row gave, in float32."""

    loss: float
    gradient_norms: Mapping[str, float]  # by parameter
    trained: int  # numbers in all of them


def computed(variant: Variant, batch: Mapping[str, Tensor]) -> Computed:
    """Loss, norms of the gradients and size of what trains; leaves the model as it was."""
    loss = variant.model(**batch, **variant.switches).loss
    loss.backward()
    trained = {name: p for name, p in variant.model.named_parameters() if p.requires_grad}
    norms = {name: p.grad.norm().item() for name, p in trained.items() if p.grad is not None}
    variant.optimizer.zero_grad()
    return Computed(loss.item(), norms, sum(p.numel() for p in trained.values()))


def check_same(results: Mapping[str, Computed]) -> None:
    """Raises DifferentComputations unless rows of the same network have the same loss and, where they train the same
    parameters, as many of them and the same gradient norm of each."""
    for group in (DENSE, set(BUILDERS) - DENSE):
        rows = {name: result for name, result in results.items() if name in group}
        _same("losses", {name: row.loss for name, row in rows.items()}, TOLERANCE)
        comparable = {name: row for name, row in rows.items() if name not in ADAPTED}
        _same("numbers of trained parameters", {name: row.trained for name, row in comparable.items()}, 0)
        for parameter in sorted({parameter for row in comparable.values() for parameter in row.gradient_norms}):
            norms = {name: row.gradient_norms.get(parameter, math.nan) for name, row in comparable.items()}
            _same(f"gradient norms of {parameter}", norms, TOLERANCE)


def _same(what: str, values: Mapping[str, float], tolerance: float) -> None:
    first = next(iter(values.values()), 0)
    if not all(math.isclose(value, first, rel_tol=tolerance) for value in values.values()):  # NaN is close to nothing
        raise DifferentComputations(f"the {what} of the rows differ ({dict(values)}): they do not compute the same "
                                    "thing, so their times cannot be compared")
