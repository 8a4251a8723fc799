"""The measurements: what is alternated with what, as seconds of every round, ratios and tables."""
from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from benchmarks import memory, models, straightforward, variants
from benchmarks.sizes import Plan, Size
from benchmarks.table import Cell, Table, with_interval
from benchmarks.timing import Patience, Ratio, Work, alternate, ratio
from benchmarks.variants import NARROW, TITLES, Variant
from stt import selecting

NOTE = ("Saved: what autograd keeps for the backward pass, parameters excluded; gradients that a loss already makes in "
        "its forward (ours: those of the head) are not in it, but in the peak. Peak: weights, gradients, AdamW state "
        "and everything else at the worst moment of a step.")
TRL_NOTE = "TRL's loss skips unlabelled positions on a GPU only."
INFERENCE = ("full", "scatter", "ours", "narrow")  # rows whose prefill and decode are measured
PASS_TITLES = {"forward": "plain forward, head included", "ours": "ours", "hooks": "straightforward hooks"}
Seconds = dict[str, list[float]]  # by row: one number per round
Column = Mapping[str, Cell | list[float]]  # by row; seconds of all rounds are shown as their median


@dataclass
class Outcome:
    """Ratios by key, tables for the reader, and what was measured, by name."""

    ratios: dict[str, Ratio]
    tables: list[Table]
    sizes: dict[str, str]

    def add(self, other: Outcome) -> None:
        self.ratios |= other.ratios
        self.tables += other.tables
        self.sizes |= other.sizes


@dataclass(frozen=True)
class Setting:
    """The plan, the device, the clock, and the time.perf_counter() at which the run should end."""

    plan: Plan
    device: torch.device
    clock: str = "wall"
    deadline: float = math.inf

    def patience(self, measurement: str, at_least: int = 6) -> Patience:
        return Patience(self.plan.seconds[measurement], at_least, self.deadline, clock=self.clock)


# ---------------------------------------------------------------- training


def training(size: Size, measurement: str, setting: Setting) -> tuple[dict[str, Variant], Seconds]:
    """The rows, checked to compute the same, and the seconds of their training steps."""
    built = variants.build(size, setting.device)
    batch = models.batch(size, setting.device)
    variants.check_same({name: variants.computed(variant, batch) for name, variant in built.items()})
    works = {name: Work(lambda _, variant=variant: variant.step(batch)) for name, variant in built.items()}
    return built, alternate(works, setting.patience(measurement), setting.device)


def decoder(size: Size, setting: Setting) -> Outcome:
    """Training on every position, forward, prefill and decode; fewer layers if the memory asks for it."""
    plan = setting.plan
    size = memory.layers_that_fit(size, memory.free_bytes(setting.device))
    built, step = training(size, "step", setting)
    batch = models.batch(size, setting.device)
    memory_used = memory_columns(built, batch)
    columns = {} if plan.is_quick else training_columns(built, step, memory_used)
    evaluated = {name: variant.model.eval() for name, variant in built.items()
                 if name == "narrow" or name not in NARROW}
    if not plan.is_quick:
        columns |= forward_columns(evaluated, batch, setting)
    used = {name: model for name, model in evaluated.items() if name in INFERENCE}
    prefill = alternate(_prefills(used, batch), setting.patience("prefill"), setting.device)
    decode = alternate(_decodes(used, batch, plan), setting.patience("decode", at_least=30), setting.device)
    columns |= {"prefill tokens/s": _speeds(prefill, size.batch * size.length),
                "decode tokens/s": _speeds(decode, plan.new_tokens)}
    table = _table(f"Training and inference: {size.described()}", size.rows, columns)
    table.notes.append(
        f"Forward: without gradients, logits of all positions. Prefill: batch {size.batch}, logits of the last "
        f"position. Decode: batch 1, {plan.new_tokens} tokens after {plan.prompt}. LoRA rows run their adapters "
        "unmerged.")
    return Outcome({f"step_vs_narrow{size.suffix}": ratio(step["ours"], step["narrow"]),
                    f"saved_activations_vs_narrow{size.suffix}": _exact(memory_used["saved MB"]),
                    f"peak_memory_vs_narrow{size.suffix}": _exact(memory_used["peak MB"]),
                    f"prefill_vs_narrow{size.suffix}": ratio(prefill["ours"], prefill["narrow"]),
                    f"decode_vs_narrow{size.suffix}": ratio(decode["ours"], decode["narrow"])}, [table],
                   {size.name: size.described()})


def _of_steps(key: str, size: Size, step: Seconds) -> Outcome:
    """Our training step beside the narrow model's, without a table."""
    return Outcome({key + size.suffix: ratio(step["ours"], step["narrow"])}, [], {size.name: size.described()})


def answer_only(size: Size, setting: Setting) -> Outcome:
    """Training on the answer only, with a large vocabulary; fewer layers if the memory asks for it."""
    plan = setting.plan
    size = memory.layers_that_fit(size, memory.free_bytes(setting.device))
    built, step = training(size, "answer", setting)
    outcome = _of_steps("answer_only_step_vs_narrow", size, step)
    if not plan.is_quick:
        batch = models.batch(size, setting.device)
        columns = training_columns(built, step, memory_columns(built, batch))
        outcome.tables = [_table(f"Training on the answer only: {size.described()}", size.rows, columns)]
    return outcome


def encoder(size: Size, setting: Setting) -> Outcome:
    """Training and forward of an encoder with a classifier."""
    plan = setting.plan
    built, step = training(size, "encoder", setting)
    outcome = _of_steps("encoder_step_vs_narrow", size, step)
    if not plan.is_quick:
        batch = models.batch(size, setting.device)
        columns = training_columns(built, step, memory_columns(built, batch))
        columns |= forward_columns({name: variant.model.eval() for name, variant in built.items()}, batch, setting)
        outcome.tables = [_table(f"Encoder: {size.described()}", size.rows, columns)]
    return outcome


# ---------------------------------------------------------------- inference


def _prefills(used: Mapping[str, PreTrainedModel], batch: Mapping[str, Tensor]) -> dict[str, Work]:
    inputs = {**_inputs(batch), "use_cache": True, "logits_to_keep": 1}
    return {name: Work(lambda _, model=model: _forward(model, inputs)) for name, model in used.items()}


def _decodes(used: Mapping[str, PreTrainedModel], batch: Mapping[str, Tensor], plan: Plan) -> dict[str, Work]:
    prompt = batch["input_ids"][:1, :plan.prompt]  # (1, P)

    def tokens(model: PreTrainedModel, out: CausalLMOutputWithPast) -> None:
        for _ in range(plan.new_tokens):
            chosen = out.logits[:, -1:].argmax(-1)  # (1, 1)
            out = _forward(model, {"input_ids": chosen, "past_key_values": out.past_key_values, "use_cache": True})

    return {name: Work(lambda out, model=model: tokens(model, out),
                       lambda model=model: _forward(model, {"input_ids": prompt, "use_cache": True}))
            for name, model in used.items()}


@torch.inference_mode()
def _forward(model: PreTrainedModel, inputs: Mapping[str, object]) -> ModelOutput:
    with variants.precision(model.device):
        return model(**inputs)


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


# ---------------------------------------------------------------- selection


def selection(size: Size, setting: Setting) -> Outcome:
    """The selection pass beside a plain forward of the same batches, head included, and the obvious hooks."""
    plan, device = setting.plan, setting.device
    model = models.dense(size, device).eval()
    batches = [_inputs(models.batch(size, device, number)) for number in range(plan.selection_batches)]
    gates = [f"{layer}.{models.ARCHITECTURES[size.architecture].feeding[0]}" for layer in models.layers(model, size)]
    passes = {"forward": lambda: [_forward(model, batch) for batch in batches],
              "ours": lambda: selecting.measure(model, batches, None, ["stt"], progress=False),
              "hooks": lambda: straightforward.measure(model, gates, batches)}
    check_statistics(passes["ours"](), passes["hooks"]())
    works = {name: Work(lambda _, name=name: passes[name]()) for name in size.rows}
    with variants.precision(device):
        seconds = alternate(works, setting.patience("selection"), device)
    table = Table(f"Selection pass, {plan.selection_batches} batches: {size.described()}", ("", "s", "/ plain forward"))
    for name, taken in seconds.items():
        compared = ratio(taken, seconds["forward"])
        table.rows.append((PASS_TITLES[name], statistics.median(taken), with_interval(compared)))
    return Outcome({f"selection_vs_forward{size.suffix}": ratio(seconds["ours"], seconds["forward"])}, [table],
                   {size.name: size.described()})


def check_statistics(ours: selecting.Measured, by_hooks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raises DifferentComputations unless our statistics equal those of the obvious hooks."""
    for site in ours.sites.values():
        for score, statistic in (("activation_mean", "mean"), ("activation_rate", "rate")):
            given, expected = ours.scores[score][site.name].float(), by_hooks[site.gate_module][statistic]
            if not torch.allclose(given, expected, rtol=1e-4, atol=1e-4):
                raise variants.DifferentComputations(
                    f"the {statistic} of {site.name} differs from that of the obvious hooks by "
                    f"{float((given - expected).abs().max()):.2g}: the passes do not measure the same thing")


# ---------------------------------------------------------------- columns


def memory_columns(built: Mapping[str, Variant], batch: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Megabytes of a training step: what its forward saves for its backward, and the most there is at any time."""
    return {"saved MB": _of_each(built, lambda row: memory.saved_bytes(row.model, lambda: row.loss(batch))),
            "peak MB": _of_each(built, lambda row: memory.peak_bytes(row.model, row.optimizer,
                                                                     lambda: row.step(batch)))}


def training_columns(built: Mapping[str, Variant], step: Seconds,
                     memory_used: Mapping[str, Mapping[str, float]]) -> dict[str, Column]:
    """Time and memory of a training step."""
    columns: dict[str, Column] = {"step s": step}
    columns |= {"step / full": _ratios(step, "full")} if "full" in step else {}
    saved = memory_used["saved MB"]
    return columns | {
        "step / narrow": _ratios(step, "narrow"),
        **memory_used,
        "saved / narrow": {name: value / saved["narrow"] for name, value in saved.items()},
        "parameters MB": _of_each(built, lambda row: memory.parameter_bytes(row.model)),
        "gradients + AdamW MB": _of_each(
            built, lambda row: memory.gradient_bytes(row.model) + memory.optimizer_bytes(row.optimizer))}


def forward_columns(evaluated: Mapping[str, PreTrainedModel], batch: Mapping[str, Tensor],
                    setting: Setting) -> dict[str, Column]:
    """Time of a forward without gradients."""
    inputs = _inputs(batch)
    works = {name: Work(lambda _, model=model: _forward(model, inputs)) for name, model in evaluated.items()}
    seconds = alternate(works, setting.patience("forward"), setting.device)
    return {"forward s": seconds, "forward / narrow": _ratios(seconds, "narrow")}


def _of_each(built: Mapping[str, Variant], counted: Callable[[Variant], int]) -> dict[str, float]:
    """Bytes as megabytes."""
    return {name: counted(variant) / memory.MB for name, variant in built.items()}


def _exact(counts: Mapping[str, float]) -> Ratio:
    """A ratio of what is counted and not timed."""
    of = counts["ours"] / counts["narrow"]
    return Ratio(of, of, of, 1)


def _ratios(seconds: Seconds, base: str) -> dict[str, str]:
    return {name: with_interval(ratio(taken, seconds[base])) for name, taken in seconds.items()}


def _speeds(seconds: Seconds, tokens: int) -> dict[str, float]:
    return {name: tokens / statistics.median(taken) for name, taken in seconds.items()}


def _table(title: str, rows: tuple[str, ...], columns: Mapping[str, Column]) -> Table:
    """A row per variant; one that could not be measured says why."""
    table = Table(title, ("", *columns), notes=[NOTE])
    for name in rows:
        cells: list[Cell] = [statistics.median(cell) if isinstance(cell, list) else cell
                             for cell in (column.get(name) for column in columns.values())]
        table.rows.append((TITLES[name], *cells))
        if name == "narrow_trl":
            table.notes.append(TRL_NOTE)
        if variants.missing(name):
            table.notes.append(f"{TITLES[name]}: {variants.missing(name)}.")
    return table
