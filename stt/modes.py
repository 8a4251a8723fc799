"""A training mode is one row: which score chooses the units, what adapts them, what trains."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from stt import scores
from stt.batches import Batch
from stt.calibrate import MIN_TOKENS
from stt.errors import InputError, unknown_name
from stt.heads import find_heads, sites_named
from stt.mlps.stt_linear import STTLinear
from stt.selecting import Budget, composition, kept, measure, measured_for
from stt.selection import Selection
from stt.sites import find_sites
from stt.stt_lora import STTLoraLinear, add_stt_lora
from stt.stt_transformer import apply
from stt.surgery import head_parameters, replace_module, sliced_parameters, train_only, untie_head


@dataclass(frozen=True)
class Mode:
    """`score` None keeps every unit. `trains`: "everything", the "kept" units, or a "lora" on them; where nothing is
    removed, the selected units "in_place", selected "weights", or a "growing" selection of weights."""

    score: str | None
    trains: str

    @property
    def chooses_units(self) -> bool:
        """Whether it ranks neurons or heads."""
        return self.score is not None and self.trains in ("kept", "lora", "in_place")

    @property
    def cuts(self) -> bool:
        """Whether units are removed."""
        return self.score is not None and self.trains in ("kept", "lora")

    @property
    def is_in_place(self) -> bool:
        """Whether the model keeps its shape, and a part of it trains."""
        return self.trains in ("in_place", "weights", "growing")


MODES = {
    "baseline": Mode(None, "everything"),
    "lora": Mode(None, "lora"),
    "stt": Mode("stt", "kept"),
    "stt_lora": Mode("stt", "lora"),
    "magnitude_pruning": Mode("magnitude", "kept"),
    "wanda_adapt": Mode("wanda", "kept"),
    "random": Mode("random", "kept"),
}
IN_PLACE = {  # nothing is removed
    "train_in_place": Mode("stt", "in_place"),
    "pafi": Mode("smallest", "weights"),
    "bitfit": Mode("bias", "weights"),
    "random_weights": Mode("random", "weights"),
    "id3": Mode("d3", "growing"),
}


@dataclass(frozen=True)
class Lora:
    """Rank, scale and dropout of the low-rank adapters."""

    r: int = 16
    alpha: float = 32
    dropout: float = 0.1


def find(name: str, score: str | None = None) -> Mode:
    """The mode called `name`, choosing by `score` instead of its own if given. Raises InputError for an unknown one."""
    known = MODES | IN_PLACE
    if name not in known:
        raise unknown_name("mode", name, known)
    if score in (None, "stt"):
        return known[name]
    scores.make(score)  # raises for an unknown one
    return replace(known[name], score=score)


def check_sites(model: nn.Module, partial: str, units: str = "neurons") -> None:
    """Raises InputError if the model has no site of these units (selecting.UNITS), or if only a part of its blocks can
    be sliced, unless `partial` is "ok"."""
    finders = {"neurons": [find_sites], "heads": [find_heads], "both": [find_sites, find_heads]}[units]
    lost = [entry for find in finders for entry in find(model).lost]
    if lost and partial != "ok":
        raise InputError(f"only a part of {type(model).__name__} can be sliced: {lost[0].name} and {len(lost) - 1} "
                         f"more cannot ({lost[0].reason}); `stt sites` lists them, --partial ok goes on with the rest")


def select_units(mode: Mode, model: nn.Module, batches: Iterable[Batch], tokenizer: PreTrainedTokenizerBase | None,
                 size: Budget, threshold: float, seed: int, count_padding: bool = False, select_on: str = "all",
                 compensate: str = "none", min_tokens: int = MIN_TOKENS,
                 units: str = "neurons") -> tuple[Selection, dict[str, dict[str, int]]]:
    """The mode's selection of these units (selecting.UNITS) and, for STT's, the composition of its neurons by site.
    Every other score gets STT's sizes site by site, so that modes differ in which units they keep and in nothing
    else."""
    methods, head_score = measured_for(["stt", mode.score], units)
    measured = measure(model, batches, tokenizer, methods, threshold=threshold, seed=seed, count_padding=count_padding,
                       select_on=select_on, compensate=compensate, min_tokens=min_tokens, head_score=head_score)
    if mode.score == "stt":
        by_stt = kept(measured, "stt", size)
        return by_stt, composition(measured, by_stt)
    counts = {site: len(ids) for site, ids in kept(measured, "stt", size, "none").items()}
    return kept(measured, mode.score, replace(size, counts=counts)), {}


def prepare(mode: Mode, model: nn.Module, selection: Selection | None, lora: Lora, head: str,
            tune_attn: bool = False) -> list[str]:
    """Slice, adapt and freeze: the model is ready to train; names of what trains.

    `tune_attn` trains the other projections of the layers too. A head to untie is untied first: the embedding it was
    tied to is then a part of the body like any other.
    """
    if head == "untie":
        untie_head(model)
    attention = other_projections(model) if tune_attn else []
    projections = [] if selection is None else _attention_projections(model, selection)
    if selection is not None:
        apply(model, selection)
    if mode.trains == "everything":
        chosen = [name for name, _ in model.named_parameters() if name not in head_parameters(model)]
    elif mode.trains == "kept":
        chosen = sliced_parameters(model)
    else:
        chosen = add_lora(model, lora) if selection is None else _add_lora_to_kept(model, lora, projections)
    chosen += [f"{name}.{parameter}" for name in attention
               for parameter, _ in model.get_submodule(name).named_parameters(recurse=False)]
    return train_only(model, chosen, head)


def other_projections(model: nn.Module) -> list[str]:
    """Linear layers of the repeated layers that belong to no site: the attention's."""
    sites = find_sites(model)
    members = {member.module for site in sites.values() for member in site.members}
    lists = tuple(name + "." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return [name for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and name.startswith(lists) and name not in members]


def add_lora(model: nn.Module, lora: Lora) -> list[str]:
    """PEFT LoRA on every linear layer but the head; names of the new parameters."""
    heads = {name.rpartition(".")[0] for name in head_parameters(model)}
    output = model.get_output_embeddings()
    return _inject(model, lora, [name for name, module in model.named_modules()
                                 if isinstance(module, nn.Linear | Conv1D) and name not in heads
                                 and module is not output])


def _attention_projections(model: nn.Module, selection: Selection) -> list[str]:
    """Names of the linear layers of the attention sites of a selection."""
    sites = sites_named(model, selection)
    modules = [member.module for name in selection if sites[name].units == "heads" for member in sites[name].members]
    return [name for name in dict.fromkeys(modules) if isinstance(model.get_submodule(name), nn.Linear | Conv1D)]


def _add_lora_to_kept(model: nn.Module, lora: Lora, projections: list[str]) -> list[str]:
    """LoRA on every STTLinear, and PEFT's on the attention projections, which keep their class when they are made
    narrow; names of the new parameters."""
    injected = _inject(model, lora, projections) if projections else []
    has_neurons = any(isinstance(module, STTLinear) for module in model.modules())
    of_neurons = add_stt_lora(model, lora.r, lora.alpha, lora.dropout) if has_neurons or not injected else []
    return injected + of_neurons


def _inject(model: nn.Module, lora: Lora, targets: list[str]) -> list[str]:
    """PEFT LoRA on the layers of these names; names of the new parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    before = {name for name, _ in model.named_parameters()}
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    inject_adapter_in_model(config, model)
    return [name for name, _ in model.named_parameters() if name not in before and "lora_" in name]


def merge_adapters(model: nn.Module) -> int:
    """Merge every adapter of the model and put the plain layers back; how many there were.

    A half-precision weight becomes float32 first, so that the update is not rounded away.
    """
    merged = STTLoraLinear.merge_and_convert(model)
    if not hasattr(model, "peft_config"):
        return merged
    from peft.tuners.lora import LoraLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, module in adapted:
        base = module.get_base_layer()
        base.weight.data = base.weight.data.to(torch.promote_types(base.weight.dtype, torch.float32))
        module.merge(safe_merge=True)
        replace_module(model, name, base)
    del model.peft_config
    return merged + len(adapted)
