"""Speed of a sliced model beside its dense one: prefill and greedy decoding with the KV cache.   B batch, T tokens."""
from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from stt.errors import InputError
from stt.evaluate.inference import inference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP_TOKENS = 2

Speed = dict[str, float]  # prefill_seconds, decode_tokens_per_second, latency_seconds_per_token


def compare_throughput(dense: PreTrainedModel, sliced: PreTrainedModel | None, batch: Mapping[str, Tensor],
                       new_tokens: int, rounds: int = 5,
                       autocast_dtype: torch.dtype | None = None) -> dict[str, object]:
    """`dense` and `sliced`: medians over the rounds; `ratio`: the median of each round's sliced / dense.

    `batch` holds `input_ids` and `attention_mask`, both (B, T). Prefill reads it; decoding then makes `new_tokens`
    tokens for each of the B rows, whatever they are. Latency is the wall time of one token for the whole batch. With
    `sliced=None` there is only `dense`.
    """
    models = {"dense": dense} if sliced is None else {"dense": dense, "sliced": sliced}
    measured = measure_rounds(models, batch, new_tokens, rounds, autocast_dtype)
    rows, length = batch["input_ids"].shape
    result: dict[str, object] = {"batch_size": rows, "prompt_tokens": length, "new_tokens": new_tokens,
                                 "rounds": rounds}
    for name, speeds in measured.items():
        result[name] = _medians(speeds)
    if sliced is not None:
        result["ratio"] = _medians([{key: fast[key] / slow[key] for key in slow}
                                    for slow, fast in zip(measured["dense"], measured["sliced"], strict=True)])
    return result


def measure_rounds(models: Mapping[str, PreTrainedModel], batch: Mapping[str, Tensor], new_tokens: int, rounds: int,
                   autocast_dtype: torch.dtype | None = None) -> dict[str, list[Speed]]:
    """The speeds of every model in every round. In each round all models take their turn, in an order that rotates, so
    that a machine that slows down slows all of them; a first, short round is not counted."""
    if new_tokens < 1 or rounds < 1:
        raise InputError(f"throughput needs at least 1 new token and 1 round, got {new_tokens} and {rounds}.")
    names = list(models)
    for model in models.values():
        _measure(model, batch, WARM_UP_TOKENS, autocast_dtype)
    speeds: dict[str, list[Speed]] = {name: [] for name in names}
    for number in tqdm(range(rounds), desc="throughput", unit="round", leave=False, disable=None):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            speeds[name].append(_measure(models[name], batch, new_tokens, autocast_dtype))
    return speeds


def _measure(model: PreTrainedModel, batch: Mapping[str, Tensor], new_tokens: int,
             autocast_dtype: torch.dtype | None) -> Speed:
    with inference(model, autocast_dtype) as device:
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)  # (B, T)
        rows, length = ids.shape
        mask = torch.cat([mask, mask.new_ones(rows, new_tokens)], dim=1)               # (B, T + new)
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        start = now(device)
        out = model(input_ids=ids, attention_mask=mask[:, :length], use_cache=True, **last_only)
        prefilled = now(device)
        for step in range(1, new_tokens + 1):
            token = out.logits[:, -1:].argmax(-1)                                      # (B, 1)
            out = model(input_ids=token, attention_mask=mask[:, :length + step], past_key_values=out.past_key_values,
                        use_cache=True)
        seconds = now(device) - prefilled
    return {"prefill_seconds": prefilled - start, "decode_tokens_per_second": rows * new_tokens / seconds,
            "latency_seconds_per_token": seconds / new_tokens}


def now(device: torch.device) -> float:
    """Seconds, once the device has finished all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _medians(speeds: list[Speed]) -> Speed:
    return {key: statistics.median(speed[key] for speed in speeds) for key in speeds[0]}
