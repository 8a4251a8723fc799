"""What a training run will take, from the config alone: parameters, FLOPs, memory of a GPU, time.

The model is built on the meta device and really sliced, adapted and frozen, with as many neurons kept as the run would
keep; its training step really runs, on tensors without data (stt/plan_step.py). Nothing here is a formula of an
architecture.
"""
from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stt import modes, plan_in_place
from stt.arguments import WEIGHT_MODES, resolve_model, usual_budget
from stt.discover import discover
from stt.errors import InputError
from stt.loading import on_meta
from stt.plan_arguments import PlanArgs
from stt.plan_in_place import SCORES, Chosen
from stt.plan_step import Batch, selection_flops, step_bytes, step_flops
from stt.recipe import kept_fraction
from stt.selecting import select
from stt.selection import Selection
from stt.sites import find_sites
from stt.surgery import count_parameters
from stt.trainers.memory import check_can_recompute, recompute
from util.utils import pick_device

CARDS = (24, 40, 80)  # GB of the GPUs that are asked about
USABLE = 0.9  # of a GPU; the rest is for CUDA itself and for gaps between tensors
ADAMW_STATE = 2  # numbers for every trained one: the means of the gradient and of its square


@dataclass(frozen=True)
class Plan:
    """One size of the run. The fractions are of a selection of units: those that are kept, or that train in place.
    `memory` is in bytes, of one GPU, in its parts and at the worst moment of a step."""

    kept_fraction_of_units: float
    kept_fraction_of_heads: float | None
    parameters: dict[str, int]
    flops: dict[str, int | None]
    memory: dict[str, int]
    disk: dict[str, int] | None  # of what was trained in place
    seconds: dict[str, float] | None

    @property
    def peak(self) -> int:
        return self.memory["peak"]


def planned(args: PlanArgs) -> dict[str, object]:
    """The answer of `stt plan` as JSON: `plans` holds one size, or the least and the most that the union of
    `topk_ratio` may keep; `cards` says for the last of them, by GB of a GPU, whether it fits, else what would.

    Raises InputError for a model that cannot be read, sliced or counted.
    """
    dense, chooses_units = _dense(args), modes.find(args.mode).chooses_units
    if args.budget is None and args.mode in WEIGHT_MODES and args.mode != "bitfit":
        args = replace(args, budget=usual_budget(resolve_model(args.model)))
    selecting = {"selection_example": None}
    _check_experts(dense, chooses_units and args.units != "heads")
    if chooses_units:
        modes.check_sites(dense, args.partial, args.units)
        selecting = {"selection_example": selection_flops(copy.deepcopy(dense), args.max_length, args.units)}
    tflops = measured_tflops(_compute_dtype(args) or torch.float32) if args.measure else args.tflops
    selections = _selections(dense, args)
    plans = [_plan(dense, selection, args, selecting, tflops) for selection in selections]
    return {"model": args.model, "architecture": type(dense).__name__, "arguments": asdict(args), "tflops": tflops,
            "steps": args.steps,
            "plans": [asdict(plan) for plan in plans], "cards": _cards(dense, selections[-1], args, plans[-1].peak)}


def _dense(args: PlanArgs) -> PreTrainedModel:
    """The dense model on the meta device, in the dtype a run would load it in."""
    model = on_meta(resolve_model(args.model))
    if hasattr(model.config, "stt"):
        raise InputError(f"{args.model} is already sliced: give the dense model")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and args.max_length > positions:
        raise InputError(f"max_length {args.max_length} passes the {positions} positions of the model: give at most "
                         f"{positions}")
    if args.activation_checkpointing:
        check_can_recompute(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(_loaded_dtype(model, args))
    return model


def _check_experts(model: PreTrainedModel, has_sites: bool) -> None:
    """Raises InputError for experts whose work depends on which tokens they get: that of grouped products does not."""
    sites = find_sites(model).values() if has_sites else discover(model, None)[0]
    is_grouped = getattr(model.config, "_experts_implementation", None) == "grouped_mm"
    if not is_grouped and any(site.is_routed for site in sites):
        raise InputError(f"{type(model).__name__} sends tokens to experts by their values, one expert after the other, "
                         "so its step cannot be counted without data: time a short run instead")


def _compute_dtype(args: PlanArgs) -> torch.dtype | None:
    """That of autocast; None: no autocast."""
    return torch.bfloat16 if args.precision == "bf16" else None


def _loaded_dtype(model: PreTrainedModel, args: PlanArgs) -> torch.dtype:
    """Frozen weights keep the checkpoint's dtype under autocast; without it everything is float32."""
    return (model.config.dtype if _compute_dtype(args) else None) or torch.float32


def _selections(dense: PreTrainedModel, args: PlanArgs) -> list[Selection | None]:
    """Selections of the right sizes: of one, or of the least and the most that a union of two sets keeps."""
    if not modes.find(args.mode).chooses_units:
        return [None]
    choose = partial(select, dense, score="random", units=args.units, heads_keep=args.heads_ratio)
    if args.keep is not None:
        return [choose(keep=args.keep)]
    least = choose(topk_ratio=args.proposed)
    if args.units == "heads":  # one score, so no union
        return [least]
    most = {site: len(ids) if site in least.heads else min(2 * len(ids), least.widths[site])
            for site, ids in least.items()}
    return [least, choose(keep=most)]


def _plan(dense: PreTrainedModel, selection: Selection | None, args: PlanArgs, selecting: dict[str, int | None],
          tflops: float | None) -> Plan:
    model, chosen = _prepared(dense, selection, args)
    counted = chosen.parameters() if chosen else count_parameters(model)
    training = step_flops(copy.deepcopy(model), _batch(args), _compute_dtype(args))
    flops = {"training_example": training, **selecting} | _in_all(training, selecting["selection_example"], args)
    seconds = None
    if tflops and args.rows:
        seconds = {name: (flops[name] or 0) / (args.gpus * tflops * 1e12) for name in ("training", "selection")}
    kept = kept_fraction(selection), kept_fraction(selection, "heads") if selection and selection.heads else None
    return Plan(*kept, {"dense": count_parameters(dense)["total"], "kept": counted.pop("total"), **counted}, flops,
                _memory(model, chosen, args), chosen and chosen.disk(), seconds)


def _in_all(training: int, selection: int | None, args: PlanArgs) -> dict[str, int | None]:
    """FLOPs of the whole run; None where the amount of data is not given, or nothing is selected."""
    if args.rows is None:
        return {"training": None, "selection": None}
    shown = max(1, round(args.active_sample_ratio * args.rows))
    return {"training": training * args.rows * args.epochs, "selection": selection and selection * shown}


def _prepared(dense: PreTrainedModel, selection: Selection | None,
              args: PlanArgs) -> tuple[PreTrainedModel, Chosen | None]:
    """A copy of the dense model, ready to train, and what trains of it in place."""
    model, mode, chosen = copy.deepcopy(dense), modes.find(args.mode), None
    if mode.is_in_place:
        chosen = plan_in_place.chosen(model, mode, selection, args)
        plan_in_place.prepare(model, chosen, args.head)
    else:
        modes.prepare(mode, model, selection, modes.Lora(args.lora_r), args.head)
    if args.activation_checkpointing:
        recompute(model)
    return model, chosen


# ---------------------------------------------------------------- memory


def _batch(args: PlanArgs) -> Batch:
    return Batch(args.train_batch, args.max_length, args.labelled)


def _memory(model: PreTrainedModel, chosen: Chosen | None, args: PlanArgs) -> dict[str, int]:
    """Bytes of one GPU in a training step of the prepared model, which is of no other use afterwards."""
    parts = args.gpus if args.shard else 1
    weights = list(model.parameters())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    passing = chosen.passing(trained) if chosen and args.gpus == 1 else set()
    memory = {"weights": sum(shard_bytes(p, parts) for p in weights),
              "gradients": sum(shard_bytes(p, parts) for name, p in trained.items() if name not in passing)}
    memory |= {"optimizer": chosen.state_bytes() if chosen else ADAMW_STATE * memory["gradients"],
               "chosen": chosen.held_bytes(model) if chosen else 0, "communication": 0}
    if args.shard:
        memory["communication"] = _gathered_bytes(model, _compute_dtype(args) or torch.float32)
    elif args.gpus > 1:
        memory["communication"] = memory["gradients"]  # DDP adds gradients up in buckets of its own
    buffers = sum(buffer.nbytes for buffer in plan_in_place.own_buffers(model))
    passing = trained.keys() if args.shard else passing
    held = step_bytes(model, _batch(args), _compute_dtype(args), passing, 0 if args.shard else SCORES)
    worst = held.peak + (memory["gradients"] if args.shard else 0)
    if chosen and chosen.grows:
        worst = max(worst, memory["gradients"] + (chosen.taken_bytes(args.steps) if passing else chosen.scoring_bytes())
                    + chosen.choosing_bytes())
    always = sum(memory[name] for name in ("weights", "optimizer", "chosen", "communication"))
    return memory | {"activations": held.saved, "peak": always + buffers + worst}


def shard_bytes(parameter: Tensor, parts: int) -> int:
    """Bytes of the largest of `parts` equal slices along the first axis, as FSDP2 cuts them; one part is all of it."""
    if parts == 1 or parameter.ndim == 0:
        return parameter.nbytes
    return -(-len(parameter) // parts) * parameter[0].nbytes


def _gathered_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What FSDP2 holds whole, in the compute dtype: what lies outside the repeated layers all the time, and two of the
    layers, one that computes and one that is fetched."""
    layers = [layer for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
              and not any(part.isdigit() for part in name.split(".")) for layer in module]
    of_layers = [{id(p): p.numel() for p in layer.parameters()} for layer in layers]
    inside = {address for each in of_layers for address in each}
    outside = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return dtype.itemsize * (outside + sum(sorted(sum(each.values()) for each in of_layers)[-2:]))


def _cards(dense: PreTrainedModel, selection: Selection | None, args: PlanArgs, peak: int) -> dict[str, object]:
    """By GB of a GPU: whether the run fits, else the first of the changes that make it fit and its peak, if any does.
    """
    cards = {size: {"fits": peak <= USABLE * size * 1e9, "change": None, "peak": peak} for size in CARDS}
    open_ones = [size for size in reversed(CARDS) if not cards[size]["fits"]]
    changes = _changes(args, dense.supports_gradient_checkpointing) if open_ones else iter(())
    for flags, changed in changes:
        peak = _memory(*_prepared(dense, selection, changed), changed)["peak"]
        for size in [size for size in open_ones if peak <= USABLE * size * 1e9]:
            cards[size] |= {"change": flags, "peak": peak}
            open_ones.remove(size)
        if not open_ones:
            break
    return {str(size): card for size, card in cards.items()}


def _changes(args: PlanArgs, can_checkpoint: bool) -> Iterator[tuple[str, PlanArgs]]:
    """Flags that save memory, each in addition to those before it."""
    flags: list[str] = []
    for flag, name, value, is_of_use in (
            ("--train_batch 1", "train_batch", 1, args.train_batch > 1),
            ("--activation_checkpointing", "activation_checkpointing", True,
             can_checkpoint and not args.activation_checkpointing),
            ("--shard", "shard", True, args.gpus > 1 and not (args.shard or modes.find(args.mode).is_in_place)),
            ("--head freeze", "head", "freeze", args.head != "freeze")):
        if is_of_use:
            args = replace(args, **{name: value})
            flags.append(flag)
            yield " ".join(flags), args


# ---------------------------------------------------------------- time


def measured_tflops(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """10^12 FLOPs a second of the best product of two square matrices within `seconds`, on the device of a run."""
    device = pick_device()
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12
