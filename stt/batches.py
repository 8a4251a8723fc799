"""Calibration batches of any kind -> keyword tensors for a model, padding on the right, masks of what counts."""
from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from stt.errors import InputError

Batch = Mapping[str, object] | Tensor | tuple | list

def as_inputs(batch: Batch, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Tensor]:
    """Keyword tensors for the model's forward, where they are. Raises InputError for a batch nothing can be made of."""
    accepted = inspect.signature(model.forward).parameters
    named = {name: value for name, value in _named(batch, model.main_input_name, tokenizer).items()
             if name in accepted and isinstance(value, Tensor)}
    if model.main_input_name not in named and "inputs_embeds" not in named:
        raise InputError(f"a calibration batch must hold a tensor {model.main_input_name!r}, got {_described(batch)}")
    ids = named.get("input_ids")
    if ids is not None and (ids.ndim < 2 or not ids.numel()):
        raise InputError(f"`input_ids` of a calibration batch must be (examples, tokens), at least one of each, got "
                         f"{tuple(ids.shape)}")
    if model.config.is_encoder_decoder and model.can_generate() and \
            not named.keys() & {"labels", "decoder_input_ids", "decoder_inputs_embeds"}:
        raise InputError(f"{type(model).__name__} has a decoder: every calibration batch needs `labels` or "
                         f"`decoder_input_ids`, got {_described(batch)}")
    if "use_cache" in accepted:
        named["use_cache"] = False
    return named


def on_device(inputs: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
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
        if texts is None or main in batch:
            return batch
        return _tokenized([texts] if isinstance(texts, str) else list(texts), tokenizer)
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
        if len(batch) > 1 and isinstance(batch[-1], Tensor) and _are_labels(batch[-1], batch[0], len(batch)):
            named["labels"] = batch[-1]
        return named
    raise InputError(f"a calibration batch must be a mapping of tensors, a tensor, a tuple of tensors or a list of "
                     f"strings, got {_described(batch)}")


def _are_labels(last: Tensor, first: Tensor, count: int) -> bool:
    """True for one class per example, and for what stands third or later, has the shape of the tokens and is more than
    zeros and ones (which are token types)."""
    is_per_token = count > 2 and last.shape == first.shape and not last.is_floating_point()
    return last.ndim == 1 or (is_per_token and bool(((last != 0) & (last != 1)).any()))


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


def padded_right(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Left padding moved to the right, so that a model that counts positions from the start counts only real ones."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or "inputs_embeds" in inputs:
        return inputs
    first = (mask != 0).int().argmax(1, keepdim=True)  # (B, 1)
    order = (torch.arange(mask.shape[1], device=mask.device) + first) % mask.shape[1]  # (B, T)
    other_side = {"labels"} if model.config.is_encoder_decoder else set()
    return {name: value.gather(1, order) if isinstance(value, Tensor) and value.shape == mask.shape
            and not name.startswith("decoder_") and name not in other_side else value for name, value in inputs.items()}


def alone(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], slice]]:
    """Every example of a batch that is padded on the right by itself and without padding, and its place in the batch: a
    router sends the positions of a batch to experts, which then see them without a mask."""
    mask = inputs.get("attention_mask")
    count = len(inputs[model.main_input_name if model.main_input_name in inputs else "inputs_embeds"])
    for i in range(count):
        rows = {name: value[i:i + 1] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
                for name, value in inputs.items()}
        if mask is not None and mask.ndim == 2:
            length = max(int((mask[i] != 0).sum()), 1)
            rows = {name: value[:, :length] if isinstance(value, Tensor) and value.shape == mask[i:i + 1].shape
                    and not name.startswith("decoder_") else value for name, value in rows.items()}
        yield rows, slice(i, i + 1)


def token_masks(model: nn.Module, inputs: dict[str, Tensor], select_on: str = "all") -> dict[str, Tensor]:
    """1.0 for positions that count, flattened, of each side of the model ("main", "decoder"); no entry: all count.

    `select_on` "answer" counts tokens that carry a label, "prompt" the others, "all" every real one. Raises InputError
    where that needs labels of every token and the batch has none.
    """
    masks = {"main": inputs.get("attention_mask")}
    if model.config.is_encoder_decoder:
        masks["decoder"] = inputs.get("decoder_attention_mask")
        if masks["decoder"] is None and "labels" in inputs and inputs["labels"].ndim == 2:
            masks["decoder"] = inputs["labels"] != -100
        elif masks["decoder"] is None and "decoder_input_ids" not in inputs:
            masks["decoder"] = masks["main"]  # BART's classifiers feed both sides the same text
    if select_on != "all":
        masks["main"] = _part(model, inputs, masks["main"], select_on)
    return {side: mask.flatten().float() for side, mask in masks.items() if mask is not None and mask.ndim == 2}


def _part(model: nn.Module, inputs: dict[str, Tensor], mask: Tensor | None, select_on: str) -> Tensor:
    labels, ids = inputs.get("labels"), inputs.get("input_ids")
    if model.config.is_encoder_decoder or labels is None or ids is None or labels.shape != ids.shape:
        raise InputError(f"select_on={select_on!r} needs a decoder and, in every batch, `labels` of the shape of "
                         "`input_ids` (-100 on the prompt): give them, or select on \"all\"")
    is_chosen = (labels != -100) == (select_on == "answer")
    return is_chosen if mask is None else is_chosen & (mask != 0)
