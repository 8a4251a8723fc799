"""Speed of a sliced classifier beside its dense one: batches classified one after the other."""
from __future__ import annotations

import statistics
from collections.abc import Mapping

import numpy
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from stt.evaluate.inference import inference
from stt.evaluate.throughput import now

PERCENTILES = (50, 90, 99)
WARM_UP = 3  # batches


def compare_latency(dense: PreTrainedModel, sliced: PreTrainedModel | None, batch: Mapping[str, Tensor],
                    rounds: int = 30) -> dict[str, object]:
    """`dense` and `sliced`: seconds a batch at the percentiles of the rounds, and examples a second at the median;
    `ratio`: the same percentiles of each round's sliced / dense. In every round the models take turns, in an order that
    rotates. With `sliced=None` there is only `dense`."""
    models = {"dense": dense} if sliced is None else {"dense": dense, "sliced": sliced}
    n_examples = len(next(iter(batch.values())))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        for _ in range(WARM_UP):
            _seconds(model, batch)
    for number in tqdm(range(rounds), desc="throughput", unit="round", leave=False, disable=None):
        names = list(models)
        for name in names[number % len(names):] + names[:number % len(names)]:
            seconds[name].append(_seconds(models[name], batch))
    result: dict[str, object] = {"batch_size": n_examples, "rounds": rounds}
    for name, times in seconds.items():
        result[name] = {**_percentiles(times), "examples_per_second": n_examples / statistics.median(times)}
    if sliced is not None:
        ratios = [fast / slow for slow, fast in zip(seconds["dense"], seconds["sliced"], strict=True)]
        result["ratio"] = {**_percentiles(ratios), "examples_per_second": 1 / statistics.median(ratios)}
    return result


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"seconds_per_batch_p{percent}": float(numpy.percentile(values, percent)) for percent in PERCENTILES}


def _seconds(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> float:
    with inference(model) as device:
        inputs = {name: value.to(device, model.dtype if value.is_floating_point() else None)
                  for name, value in batch.items()}
        start = now(device)
        model(**inputs)
        return now(device) - start
