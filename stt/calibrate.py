"""One pass over calibration batches feeds any number of scores.

Padding never counts. Nothing but sums is kept, on the model's device; nothing per token is copied to the host. The pass
ends at the last site: no norm and no head behind it is computed. Every example falls by its content into one of two
halves, whose sums are kept apart: what both halves agree on can be trusted. Hooks are always removed and the model is
left as it was: mode, gradients, requires_grad.
"""
from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.loss.loss_utils import LOSS_MAPPING

from stt.batches import Batch, alone, as_inputs, batched, on_device, padded_right, token_masks
from stt.errors import InputError, unknown_name
from stt.head_scores import Magnitude as HeadMagnitude
from stt.mlps.stt_linear import STTLinear
from stt.observe import Done, Observer, observing
from stt.scores import magnitude
from stt.scores.base import Score, Seen, Statistic, Weights, wide
from stt.sites import Site, Sites, channels_first
from stt.trace import eager_experts, evaluating
from util import ranks

MIN_TOKENS = 32  # that an expert must see to be judged by them
PARTS = ("all", "prompt", "answer")  # of every example, for `select_on`
Results = list[dict[str, Tensor]]  # by score: site -> (F,) float64 on the CPU


@dataclass(frozen=True)
class Calibration:
    """Scores, the same from each half of the examples alone (None if one has no token that counts), and what they were
    measured on.

    `apart` are the statistics asked for by `also`, of each half. `routed` counts the tokens that reached each expert.
    """

    scores: Results
    halves: tuple[Results, Results] | None
    apart: tuple[Sequence[Statistic], Sequence[Statistic]]
    tokens: int
    examples: int
    digest: str  # sha256 of the rows shown, in any order
    routed: dict[str, int]


def calibrate(model: nn.Module, sites: Sites, scores: Sequence[Score], batches: Iterable[Batch] = (),
              tokenizer: PreTrainedTokenizerBase | None = None, count_padding: bool = False, progress: bool = True,
              select_on: str = "all", also: Sequence[Statistic] = (), min_tokens: int = MIN_TOKENS) -> Calibration:
    """All `scores` of all `sites` of `model` whose units they are for, and the statistics `also`, in one pass.

    A batch is a mapping of tensors (with `labels` for gradients), a tensor, a tuple (input, mask, ...) or a list of
    strings with a `tokenizer`; a plain list of strings is batched here. `count_padding` counts padding positions too,
    as the published code does; `select_on` counts the tokens of the "prompt" or of the "answer" (those with a label)
    only. An expert that fewer than `min_tokens` tokens reach is ranked by magnitude; models with experts run example by
    example. Raises InputError for no batch at all, a batch without a usable tensor, a gradient or a part asked for
    without labels, or a model sliced in scatter mode.
    """
    if select_on not in PARTS:
        raise unknown_name("part to select on", select_on, PARTS)
    if count_padding and select_on != "all":
        raise InputError(f"count_padding counts every position, select_on={select_on!r} only some: give one of them")
    of_a, of_b = ([copy.deepcopy(statistic) for statistic in (*scores, *also, _Rows())] for _ in range(2))
    shown = _Shown()
    if {need for statistic in (*scores, *also) for need in statistic.needs} - {"weights"}:
        _check_compact(model, sites)
        _pass(model, sites, (of_a, of_b), batches, tokenizer, count_padding, progress, select_on, shown)
    routed = _routed(sites, of_a[-1], of_b[-1])
    apart = of_a[len(scores):-1], of_b[len(scores):-1]
    of_a, of_b = of_a[:len(scores)], of_b[:len(scores)]
    total = [_added(a, b) for a, b in zip(of_a, of_b, strict=True)]
    thin = {name for name, tokens in routed.items() if tokens < min_tokens}
    results = _results(model, sites, [total, of_a, of_b] if min(shown.tokens) else [total], thin)
    return Calibration(results[0], tuple(results[1:]) or None, apart, sum(shown.tokens), shown.examples,
                       f"{shown.digest:064x}", routed)


def _results(model: nn.Module, sites: Sites, groups: Sequence[Sequence[Score]], thin: Collection[str]) -> list[Results]:
    """The results of several groups of scores, site by site: the weights of one site at a time are float64. A site that
    a half of the data has not reached, or that is `thin`, is ranked by magnitude."""
    found: list[Results] = [[{} for _ in group] for group in groups]
    for site in sites.values():
        weights = site_weights(model, site)
        for into, group in zip(found, groups, strict=True):
            for by_site, score in zip(into, group, strict=True):
                if score.units == site.units:
                    is_unknown = score.needs != ("weights",) and (site.name in thin or site.name not in score.sums)
                    ranked = _by_weights(score) if is_unknown else score
                    by_site[site.name] = ranked.result(site.name, weights).cpu()
    return found


def _by_weights(score: Score) -> Score:
    """What takes the place of a score without data."""
    return HeadMagnitude(widths=score.widths) if score.units == "heads" else magnitude.make()


class _Rows(Statistic):
    """How many rows of each site count."""

    def __init__(self) -> None:
        super().__init__(("hidden",))

    def update(self, site: str, seen: Seen) -> None:
        self.add(site, "rows", torch.tensor(float(len(seen.hidden))) if seen.is_token is None else seen.is_token.sum())


def _routed(sites: Sites, *halves: Statistic) -> dict[str, int]:
    """Tokens that reached each expert."""
    return {site.name: sum(int(half.sums[site.name]["rows"]) if site.name in half.sums else 0 for half in halves)
            for site in sites.values() if site.is_routed}


def site_weights(model: nn.Module, site: Site) -> Weights:
    """The rows of the gate projection and the columns of the down projection that belong to the units."""
    gate, down = site.members[0], site.members[-1]
    return Weights(lambda: channels_first(model, replace(gate, channels=site.gate.unsqueeze(1))),
                   lambda: channels_first(model, down).T)


def _check_compact(model: nn.Module, sites: Sites) -> None:
    for site in sites.values():
        gate = model.get_submodule(site.gate_module)
        if isinstance(gate, STTLinear) and not gate.is_compact:
            raise InputError(f"{site.name} is sliced and in scatter mode: set `inference_time = True` on its "
                             "layers to measure its neurons")


# ---------------------------------------------------------------- the pass


def _pass(model: nn.Module, sites: Sites, halves: tuple[list[Statistic], list[Statistic]], batches: Iterable[Batch],
          tokenizer: PreTrainedTokenizerBase | None, count_padding: bool, progress: bool, select_on: str,
          shown: _Shown) -> None:
    """Show every batch to the statistics of its half."""
    needs = _needs(halves[0])
    seen = {name: site for name, site in sites.items() if needs[site.units]}
    last = last_site(model, seen, needs["neurons"] | needs["heads"])
    is_routed = any(site.is_routed for site in sites.values())
    with_gradients = "gradients" in needs["neurons"] | needs["heads"]
    with _prepared(model, with_gradients):
        hidden = None if progress and ranks.is_first() else True  # None: shown on a terminal
        for batch in tqdm(batched(batches), desc="measuring units", unit="batch", disable=hidden):
            inputs = as_inputs(batch, model, tokenizer)
            inputs = inputs if count_padding else padded_right(model, inputs)
            counted = {} if count_padding else token_masks(model, inputs, select_on)
            in_b = shown.add(inputs, counted, model).to(model.device)
            whole = on_device(inputs, model)
            for part, rows in alone(model, whole) if is_routed and not count_padding else [(whole, slice(None))]:
                masks = {} if count_padding else token_masks(model, part, select_on)
                real = {} if count_padding else token_masks(model, part)
                observers = [Observer(site, halves, needs[site.units], _mask_of(site, model, masks),
                                      _mask_of(site, model, real), in_b[rows], site.name == last,
                                      _gate_bias(model, site))
                             for site in seen.values()]
                _show(model, sites, observers, part, with_gradients)
    shown.add_up_over_ranks()
    if not sum(shown.tokens):
        raise InputError(f"no token of the calibration data belongs to the {select_on}: select on \"all\", or label "
                         "the answers")
    _complete(halves)
    _add_up_over_ranks(halves)


def _needs(statistics: Sequence[Statistic]) -> dict[str, set[str]]:
    """What has to be seen of the sites of neurons, and of those of heads; nothing of weights alone."""
    return {units: {need for statistic in statistics if statistic.units == units for need in statistic.needs}
            - {"weights"} for units in ("neurons", "heads")}


def _show(model: nn.Module, sites: Sites, observers: list[Observer], inputs: dict[str, Tensor],
          with_gradients: bool) -> None:
    """Run one batch past the observers."""
    with observing(model, observers), eager_experts(model):
        if with_gradients:
            summed_loss(model, inputs).backward()
            return
        with suppress(Done):
            body_of(model, sites)(**{name: value for name, value in inputs.items()
                                   if name != "labels" or model.config.is_encoder_decoder})


def _gate_bias(model: nn.Module, site: Site) -> Tensor | None:
    """(C,) of the projection, in its own order."""
    if site.gate_bias is None:
        return None
    own = model.get_parameter(site.gate_bias.tensor).detach()
    return own if site.gate_bias.expert is None else own[site.gate_bias.expert]


def last_site(model: nn.Module, sites: Mapping[str, Site], needs: set[str]) -> str | None:
    """The site behind which nothing needs to be computed; None if that cannot be said: gradients need the loss, a block
    that is called often (a shared layer, or the positions in chunks) may not be done after its first call, and the
    order of execution is known among blocks of neurons and among heads, not between them."""
    is_called_once = all(site.calls == 1 and not site.is_routed for site in sites.values())
    is_chunked = getattr(model.config, "chunk_size_feed_forward", 0)
    is_one_kind = len({site.units for site in sites.values()}) == 1
    return list(sites)[-1] if is_called_once and is_one_kind and not is_chunked and "gradients" not in needs else None


def summed_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Cross-entropy summed over labelled tokens (next-token shifted for causal models)."""
    inputs = dict(inputs)
    is_causal = model.loss_function is LOSS_MAPPING["ForCausalLM"] and not model.config.is_encoder_decoder
    labels = inputs.get("labels") if model.config.is_encoder_decoder else inputs.pop("labels", None)
    if labels is None and is_causal and "input_ids" in inputs:
        mask = inputs.get("attention_mask")
        labels = inputs["input_ids"] if mask is None else inputs["input_ids"].masked_fill(mask == 0, -100)
    if labels is None:
        raise InputError("this score needs gradients, so every calibration batch needs `labels`")
    outputs = model(**inputs)
    if "logits" not in outputs:
        raise InputError(f"this score needs gradients of a loss, and {type(model).__name__} has no task head for one: "
                         "load the model with its head, or choose another score")
    logits = wide(outputs["logits"])
    if is_causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.flatten().to(logits.device)
    return F.cross_entropy(logits.flatten(0, -2), labels, ignore_index=-100, reduction="sum")


def body_of(model: nn.Module, sites: Sites) -> nn.Module:
    """The model without its head, if all sites lie in it: statistics need no logits."""
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    if body is None or model.config.is_encoder_decoder or not all(name.startswith(prefix + ".") for name in sites):
        return model
    return body


@contextmanager
def _prepared(model: nn.Module, with_gradients: bool) -> Iterator[None]:
    """Evaluation mode, no weight gradients; everything is put back afterwards."""
    needed_grad = [p for p in model.parameters() if p.requires_grad]
    for parameter in needed_grad:
        parameter.requires_grad_(False)
    try:
        with evaluating(model), torch.set_grad_enabled(with_gradients):
            yield
    finally:
        for parameter in needed_grad:
            parameter.requires_grad_(True)


def _complete(halves: tuple[list[Statistic], list[Statistic]]) -> None:
    """Zeros for what only the other half has seen, so that both have the same sums."""
    for pair in zip(*halves, strict=True):
        for mine, other in (pair, pair[::-1]):
            for site, sums in other.sums.items():
                for name, like in sums.items():
                    mine.sums.setdefault(site, {}).setdefault(name, torch.zeros_like(like))


def _added(a: Statistic, b: Statistic) -> Statistic:
    """One statistic with the sums of both halves."""
    return replace(a, sums={site: {name: value + b.sums[site][name] for name, value in sums.items()}
                            for site, sums in a.sums.items()})


def _add_up_over_ranks(halves: tuple[list[Statistic], list[Statistic]]) -> None:
    """Every rank sees its share of the data; the sums of all of them make the statistics. An expert that no token of
    this rank has reached adds zeros."""
    if ranks.world() > 1:
        statistics = (*halves[0], *halves[1])
        mine = [{site: {name: (value.shape, value.dtype) for name, value in sums.items()}
                 for site, sums in statistic.sums.items()} for statistic in statistics]
        device = next((v.device for s in statistics for sums in s.sums.values() for v in sums.values()), None)
        for theirs in ranks.gather(mine):
            for statistic, sums_of in zip(statistics, theirs, strict=True):
                for site, sums in sums_of.items():
                    for name, (shape, dtype) in sums.items():
                        zeros = torch.zeros(shape, dtype=dtype, device=device)
                        statistic.sums.setdefault(site, {}).setdefault(name, zeros)
        for statistic in statistics:
            for site in sorted(statistic.sums):
                for name in sorted(statistic.sums[site]):
                    torch.distributed.all_reduce(statistic.sums[site][name])


def _mask_of(site: Site, model: nn.Module, masks: dict[str, Tensor]) -> Tensor | None:
    if not model.config.is_encoder_decoder:
        return masks.get("main")
    encoder = model.get_encoder()
    prefix = next(name for name, module in model.named_modules() if module is encoder)
    return masks.get("main" if site.name.startswith(prefix + ".") else "decoder")


@dataclass
class _Shown:
    """How much was shown, and a digest that does not depend on order or batching; taken before a batch moves to the
    model's device, so that nothing is copied back."""

    tokens: list[int] = field(default_factory=lambda: [0, 0])  # that count, of each half
    examples: int = 0
    digest: int = 0

    def add(self, inputs: dict[str, Tensor], counted: dict[str, Tensor], model: nn.Module) -> Tensor:
        """Count one batch; which of its examples belong to the second half: (B,). Their content decides that."""
        rows = inputs[model.main_input_name if model.main_input_name in inputs else "inputs_embeds"].cpu()
        real, counts = (masks["main"].view(len(rows), -1).cpu() if "main" in masks else None
                        for masks in (token_masks(model, inputs), counted))
        in_b = torch.zeros(len(rows), dtype=torch.bool)
        for i, row in enumerate(rows):
            shown = row if real is None else row[real[i].bool()]
            digest = int(hashlib.sha256(shown.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(), 16)
            in_b[i] = digest & 1
            self.tokens[digest & 1] += int(counts[i].sum()) if counts is not None else len(row) if rows.ndim == 2 else 1
            self.digest += digest
        self.examples += len(rows)
        self.digest %= 2**256
        return in_b

    def add_up_over_ranks(self) -> None:
        """What all ranks have shown. Raises InputError, on every rank, if one of them had no batch."""
        all_of_them = ranks.gather((self.tokens, self.examples, self.digest))
        if not all(examples for _, examples, _ in all_of_them):
            raise InputError("the calibration data is empty" + (" on one of the ranks" if len(all_of_them) > 1 else "")
                             + ": give at least one batch")
        self.tokens = [sum(tokens[half] for tokens, _, _ in all_of_them) for half in (0, 1)]
        self.examples = sum(examples for _, examples, _ in all_of_them)
        self.digest = sum(digest for _, _, digest in all_of_them) % 2**256
