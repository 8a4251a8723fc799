"""One pass over calibration batches feeds any number of scores.

Padding never counts. Nothing but sums is kept, on the model's device; nothing per token is copied to the host. Hooks
are always removed and the model is left as it was: mode, gradients, requires_grad.
"""
from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from stt.errors import InputError
from stt.mlps.stt_linear import STTLinear
from stt.scores.base import Score, Seen
from stt.sites import Site, Sites, projection_weight
from stt.trace import evaluating

Batch = Mapping[str, object] | Tensor | tuple | list


@dataclass(frozen=True)
class Calibration:
    """Scores by name and site, each (F,) float32 on the CPU, and what they were measured on."""

    scores: list[dict[str, Tensor]]
    tokens: int
    examples: int
    digest: str  # sha256 of the rows shown, in any order


def calibrate(model: nn.Module, sites: Sites, scores: list[Score], batches: Iterable[Batch] = (),
              tokenizer: PreTrainedTokenizerBase | None = None, count_padding: bool = False,
              progress: bool = True) -> Calibration:
    """All `scores` of all `sites` of `model` in one pass.

    A batch is a mapping of tensors (with `labels` for gradients), a tensor, a tuple (input, mask, ...) or a list of
    strings with a `tokenizer`; a plain list of strings is batched here. `count_padding` counts padding positions too,
    as the published code does. Raises InputError for no batch at all, a batch without a usable tensor, a gradient
    asked for without labels, or a model sliced in scatter mode.
    """
    needs = {need for score in scores for need in score.needs}
    shown = _Shown()
    if needs - {"weights"}:
        for site in sites.values():
            gate = model.get_submodule(site.gate_module)
            if isinstance(gate, STTLinear) and not gate.is_compact:
                raise InputError(f"{site.name} is sliced and in scatter mode: set `inference_time = True` on its "
                                 "layers to measure its neurons")
        with _prepared(model, with_gradients="gradients" in needs):
            hidden = None if progress else True  # None: shown on a terminal
            for batch in tqdm(batched(batches), desc="measuring neurons", unit="batch", disable=hidden):
                inputs = as_inputs(batch, model, tokenizer)
                inputs = inputs if count_padding else _padded_right(model, inputs)
                shown.add(inputs, {} if count_padding else _token_masks(model, inputs), model)
                inputs = _on_device(inputs, model)
                _show(model, sites, scores, inputs, {} if count_padding else _token_masks(model, inputs), needs)
        if not shown.examples:
            raise InputError("the calibration data is empty: give at least one batch")
        _add_up_over_ranks(scores)
    weights = {site.name: gate_weight(model, site) for site in sites.values()}
    results = [{name: score.result(name, weight).cpu() for name, weight in weights.items()} for score in scores]
    return Calibration(results, shown.tokens, shown.examples, f"{shown.digest:064x}")


def gate_weight(model: nn.Module, site: Site) -> Tensor:
    """Rows of the gate projection that belong to the units: (F, D) float32, detached."""
    module = model.get_submodule(site.gate_module)
    weight = projection_weight(module)
    return weight.detach()[site.gate.to(weight.device)].float()


# ---------------------------------------------------------------- one batch


def _show(model: nn.Module, sites: Sites, scores: list[Score], inputs: dict[str, Tensor], masks: dict[str, Tensor],
          needs: set[str]) -> None:
    """Run one batch and show every site to every score."""
    with ExitStack() as hooks:
        for site in sites.values():
            observe = _Observer(site, scores, needs, _mask_of(site, model, masks))
            gate, down = model.get_submodule(site.gate_module), model.get_submodule(site.down_module)
            hooks.callback(gate.register_forward_hook(observe.gate).remove)
            hooks.callback(down.register_forward_pre_hook(observe.down).remove)
        if "gradients" in needs:
            _summed_loss(model, inputs).backward()
        else:
            _body(model, sites)(**{name: value for name, value in inputs.items()
                                   if name != "labels" or model.config.is_encoder_decoder})


@dataclass
class _Observer:
    """Hooks of one site: collects a Seen over the gate's and the down projection's calls."""

    site: Site
    scores: list[Score]
    needs: set[str]
    is_token: Tensor | None
    partly: dict[str, Tensor] = field(default_factory=dict)

    def gate(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if "inputs" in self.needs:
            self.partly["inputs"] = args[0].detach().flatten(0, -2)
        if "outputs" in self.needs:
            rows = output.detach().flatten(0, -2)
            is_fused = rows.shape[1] != self.site.width
            self.partly["outputs"] = rows[:, self.site.gate.to(rows.device)] if is_fused else rows

    def down(self, module: nn.Module, args: tuple) -> tuple | None:
        x = args[0]
        seen = {**self.partly, "hidden": x.detach().flatten(0, -2)}
        self.partly.clear()
        if "gradients" not in self.needs:
            return self._update(seen)
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        x.register_hook(lambda gradient: self._update({**seen, "gradients": gradient.flatten(0, -2)}))
        return (x, *args[1:])

    def _update(self, seen: dict[str, Tensor]) -> None:
        hidden = seen["hidden"]
        is_token = _fitted(self.is_token, len(hidden), self.site.name)
        with torch.autocast(hidden.device.type, enabled=False):  # sums stay float32 whatever the model computes in
            for score in self.scores:
                if score.needs != ("weights",):
                    score.update(self.site.name, Seen(is_token, **seen))


def _fitted(is_token: Tensor | None, rows: int, site: str) -> Tensor | None:
    """The mask, if the site sees one row per position; None if the model itself has already dropped the padding."""
    if is_token is None or len(is_token) == rows:
        return is_token
    if int(is_token.sum()) == rows:
        return None
    raise InputError(f"{site} sees {rows} positions but the attention mask has {len(is_token)}: "
                     "pass a mask that fits, or count_padding=True")


def _summed_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
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
    logits = outputs["logits"].float()
    if is_causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.flatten().to(logits.device)
    return F.cross_entropy(logits.flatten(0, -2), labels, ignore_index=-100, reduction="sum")


def _body(model: nn.Module, sites: Sites) -> nn.Module:
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


def _add_up_over_ranks(scores: list[Score]) -> None:
    """Every rank sees its share of the data; the sums of all of them make the statistics."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for score in scores:
            for sums in score.sums.values():
                for value in sums.values():
                    torch.distributed.all_reduce(value)


# ---------------------------------------------------------------- batches of any kind -> keyword arguments


def as_inputs(batch: Batch, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Tensor]:
    """Keyword tensors for the model's forward, where they are. Raises InputError for a batch nothing can be made of."""
    accepted = inspect.signature(model.forward).parameters
    named = {name: value for name, value in _named(batch, model.main_input_name, tokenizer).items()
             if name in accepted and isinstance(value, Tensor)}
    if model.main_input_name not in named and "inputs_embeds" not in named:
        raise InputError(f"a calibration batch must hold a tensor {model.main_input_name!r}, got {_described(batch)}")
    if model.config.is_encoder_decoder and model.can_generate() and \
            not named.keys() & {"labels", "decoder_input_ids", "decoder_inputs_embeds"}:
        raise InputError(f"{type(model).__name__} has a decoder: every calibration batch needs `labels` or "
                         f"`decoder_input_ids`, got {_described(batch)}")
    if "use_cache" in accepted:
        named["use_cache"] = False
    return named


def _on_device(inputs: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The same on the model's device, floating tensors in its dtype."""
    parameter = next(model.parameters())
    return {name: value if not isinstance(value, Tensor) else
            value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()}


def batched(data: Iterable[Batch] | Sequence[str]) -> Iterable[Batch]:
    """A plain list of strings in batches of 16, the longest first; batches as they are. Raises InputError for what can
    only be one batch."""
    if isinstance(data, Mapping | str | Tensor):
        raise InputError(f"the calibration data must be an iterable of batches, got one {type(data).__name__}: "
                         "put it into a list")
    if isinstance(data, Sequence) and data and isinstance(data[0], str):
        texts = sorted(data, key=len, reverse=True)
        return [texts[i:i + 16] for i in range(0, len(texts), 16)]
    return data


def _named(batch: Batch, main: str, tokenizer: PreTrainedTokenizerBase | None) -> Mapping[str, object]:
    if isinstance(batch, Mapping):
        texts = batch.get("text")
        return batch if texts is None or main in batch else _tokenized(list(texts), tokenizer)
    if isinstance(batch, Tensor):
        return {main: batch}
    if isinstance(batch, list | tuple) and batch and all(isinstance(text, str) for text in batch):
        return _tokenized(list(batch), tokenizer)
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        named = {main: batch[0]}
        if main == "input_ids" and len(batch) > 1 and batch[1].shape == batch[0].shape:  # (ids, mask, labels, ...)
            named["attention_mask"] = batch[1]
            if not torch.isin(batch[1], torch.tensor([0, 1], device=batch[1].device)).all():
                raise InputError("the second tensor of a tuple must be the attention mask, zeros and ones: "
                                 "give a mapping with names instead")
        if len(batch) > 1 and isinstance(batch[-1], Tensor) and batch[-1].ndim == 1:  # one class per example
            named["labels"] = batch[-1]
        return named
    raise InputError(f"a calibration batch must be a mapping of tensors, a tensor, a tuple of tensors or a list of "
                     f"strings, got {_described(batch)}")


def _tokenized(texts: list[str], tokenizer: PreTrainedTokenizerBase | None) -> Mapping[str, object]:
    if tokenizer is None:
        raise InputError("a batch of strings needs a tokenizer: pass tokenizer=...")
    if tokenizer.pad_token is None and len(texts) > 1:
        raise InputError("the tokenizer has no padding token: set tokenizer.pad_token = tokenizer.eos_token")
    has_limit = tokenizer.model_max_length < VERY_LARGE_INTEGER
    return tokenizer(texts, padding=len(texts) > 1, truncation=has_limit, return_tensors="pt")


def _described(batch: object) -> str:
    if isinstance(batch, Mapping):
        held = [f"{name} ({type(value).__name__})" for name, value in batch.items()]
        return f"a mapping of {', '.join(held) or 'nothing'}"
    inside = f" of {type(batch[0]).__name__}" if isinstance(batch, list | tuple) and batch else ""
    return f"{type(batch).__name__}{inside}"


# ---------------------------------------------------------------- padding


def _padded_right(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Left padding moved to the right, so that a model that counts positions from the start counts only real ones."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or "inputs_embeds" in inputs:
        return inputs
    first = (mask != 0).int().argmax(1, keepdim=True)  # (B, 1)
    order = (torch.arange(mask.shape[1], device=mask.device) + first) % mask.shape[1]  # (B, T)
    other_side = {"labels"} if model.config.is_encoder_decoder else set()
    return {name: value.gather(1, order) if isinstance(value, Tensor) and value.shape == mask.shape
            and not name.startswith("decoder_") and name not in other_side else value for name, value in inputs.items()}


def _token_masks(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """1.0 for real positions, flattened, of each side of the model ("main", "decoder"); no entry: all are real."""
    masks = {"main": inputs.get("attention_mask")}
    if model.config.is_encoder_decoder:
        masks["decoder"] = inputs.get("decoder_attention_mask")
        if masks["decoder"] is None and "labels" in inputs and inputs["labels"].ndim == 2:
            masks["decoder"] = inputs["labels"] != -100
        elif masks["decoder"] is None and "decoder_input_ids" not in inputs:
            masks["decoder"] = masks["main"]  # BART's classifiers feed both sides the same text
    return {side: mask.flatten().float() for side, mask in masks.items() if mask is not None and mask.ndim == 2}


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

    tokens: int = 0
    examples: int = 0
    digest: int = 0

    def add(self, inputs: dict[str, Tensor], masks: dict[str, Tensor], model: nn.Module) -> None:
        rows = inputs[model.main_input_name if model.main_input_name in inputs else "inputs_embeds"].cpu()
        self.examples += len(rows)
        is_token = masks["main"].view(len(rows), -1).bool().cpu() if "main" in masks else None
        for i, row in enumerate(rows):
            row = row if is_token is None else row[is_token[i]]
            self.tokens += len(row) if rows.ndim == 2 else 1
            self.digest += int(hashlib.sha256(row.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(), 16)
        self.digest %= 2**256
