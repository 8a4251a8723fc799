"""Everything a classifier run measures: metrics, classes, speed, FLOPs, and the restored dense model."""
from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stt.checkpoint import restore
from stt.dataset.classification import Item, LabelTask
from stt.dataset.classification.encode import Encoder, ImageEncoder, Rows
from stt.evaluate.inference import inference
from stt.evaluate.latency import compare_latency
from stt.evaluate.scoring import METRICS, by_class, confusion
from stt.selecting import measure
from stt.surgery import restore_forward
from stt.trainers.classify import with_loss
from util import ranks
from util.torch_flops import by_length, flops_of, forward_flops, training_flops


@dataclass(frozen=True)
class ClassifierJudge:
    """Measures one run: its task and encoder, in the dtype it computes in. `load(dtype)` makes the dense model anew."""

    load: Callable[[torch.dtype | None], PreTrainedModel]
    task: LabelTask
    encoder: Encoder
    batch_size: int
    autocast_dtype: torch.dtype | None

    @cached_property
    def test_rows(self) -> Rows:
        """The test examples, encoded once."""
        return self.encoder.rows(self.task.test)

    @cached_property
    def validation_rows(self) -> Rows:
        """The validation examples, encoded once."""
        return self.encoder.rows(self.task.validation)

    def batches(self, rows: Rows) -> list[Rows]:
        """The rows in pieces of the batch size, in their order."""
        return [rows[start:start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    def outputs(self, model: PreTrainedModel, rows: Rows) -> Tensor:
        """(N, C) float32 on the CPU, in the order of the rows; several processes share the work."""
        with inference(model, self.autocast_dtype) as device:
            def of_part(part: Rows) -> Tensor:
                batch = {name: value.to(device) for name, value in self.encoder.batch(part).items()}
                batch.pop("labels")
                return model(**batch).logits.float().cpu()

            return torch.cat(ranks.shared_out(self.batches(rows), of_part, f"classifying {self.task.name}"))

    def predictions(self, outputs: Tensor) -> list[int] | list[float]:
        """Numbers of classes, or quantities."""
        return outputs.squeeze(-1).tolist() if self.task.is_regression else outputs.argmax(-1).tolist()

    def metrics(self, items: Sequence[Item], predictions: Sequence[int | float]) -> dict[str, float]:
        """The metrics of the task by name."""
        labels = [item.label for item in items]
        return {name: METRICS[name](labels, predictions) for name in self.task.metrics}

    def validate(self, model: PreTrainedModel) -> float:
        """The first of the task's metrics, on the validation examples."""
        predictions = self.predictions(self.outputs(model, self.validation_rows))
        return next(iter(self.metrics(self.task.validation, predictions).values()))

    def test(self, model: PreTrainedModel, folder: Path) -> dict[str, object]:
        """What results.json says of the test examples; every prediction goes to outputs.json."""
        outputs, items = self.outputs(model, self.test_rows), self.task.test
        predictions = self.predictions(outputs)
        rows = [self._row(item, prediction, output) for item, prediction, output in
                zip(items, predictions, outputs, strict=True)]
        if ranks.is_first():
            (folder / "outputs.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
        found: dict[str, object] = {"main": self.task.metrics[0], "metrics": self.metrics(items, predictions)}
        if self.task.is_regression:
            return {**found, "accuracy": {"n": len(items)}}
        labels, names = [item.label for item in items], self.task.labels
        correct = sum(label == prediction for label, prediction in zip(labels, predictions, strict=True))
        accuracy = {"test": correct / len(items), "n": len(items), "correct": correct, "majority": self.majority()}
        return {**found, "accuracy": accuracy, "classes": by_class(labels, predictions, names),
                "confusion": confusion(labels, predictions, len(names))}

    def _row(self, item: Item, prediction: int | float, output: Tensor) -> dict[str, object]:
        content = item.content if isinstance(item.content, tuple) else item.content.where
        if self.task.is_regression:
            return {"input": content, "prediction": prediction, "label": item.label}
        names = self.task.labels
        return {"input": content, "prediction": names[prediction], "label": names[item.label],
                "correct": prediction == item.label, "probability": round(float(output.softmax(-1)[prediction]), 6)}

    def majority(self) -> float:
        """The accuracy of always giving the most frequent training label; of equals, the first."""
        counts = Counter(item.label for item in self.task.train)
        majority = min(counts, key=lambda label: (-counts[label], label))
        return sum(item.label == majority for item in self.task.test) / len(self.task.test)

    def restored(self, model: PreTrainedModel) -> float:
        """The first of the task's metrics on the test examples with the removed neurons put back, all in float32."""
        dense = self.load(None)
        restore(model, dense)
        predictions = self.predictions(self.outputs(dense, self.test_rows))
        return next(iter(self.metrics(self.task.test, predictions).values()))

    # ---------------------------------------------------------------- speed and FLOPs

    def throughput(self, model: PreTrainedModel, is_sliced: bool) -> dict[str, object]:
        """The trained model beside the dense one it came from (alone if it is dense itself), on one batch of the test
        examples, both in the compute dtype, as they would be deployed."""
        batch = self.encoder.batch(self.batches(self.test_rows)[0])
        batch.pop("labels")
        deployed = copy.deepcopy(model).to(self.autocast_dtype or torch.float32)
        if not is_sliced:
            return compare_latency(deployed, None, batch)
        return compare_latency(self.load(self.autocast_dtype).to(deployed.dtype), deployed, batch)

    def selection_flops(self, model: PreTrainedModel, rows: Rows, methods: list[str], compensate: str,
                        head_score: str | None = None) -> int:
        """FLOPs of measuring what `methods`, `compensate` and a score of heads need on `rows`, every example at its own
        length."""
        return self._total(rows, lambda batch: flops_of(lambda: measure(
            model, [batch], None, methods, progress=False, compensate=compensate, head_score=head_score)), model)

    def training_flops(self, model: PreTrainedModel, rows: Rows, epochs: int) -> int:
        """FLOPs of `epochs` forward and backward passes over `rows`, every example at its own length."""
        was_training = model.training
        with_loss(model.train())
        try:
            with torch.autocast(model.device.type, self.autocast_dtype, enabled=bool(self.autocast_dtype)):
                return epochs * self._total(rows, lambda batch: training_flops(model, batch), model)
        finally:
            restore_forward(model)
            model.train(was_training)

    def inference_flops(self, model: PreTrainedModel) -> int:
        """FLOPs of classifying all test examples once, each at its own length, divided by their number."""
        def count(batch: dict[str, Tensor]) -> int:
            batch.pop("labels")
            return forward_flops(model, batch)

        with torch.autocast(model.device.type, self.autocast_dtype, enabled=bool(self.autocast_dtype)):
            return round(self._total(self.test_rows, count, model) / len(self.test_rows))

    def _total(self, rows: Rows, count: Callable[[dict[str, Tensor]], int], model: PreTrainedModel) -> int:
        """`count` of a batch of one example, summed over the rows: by length for texts, all alike for pictures."""
        def one(length: int) -> int:
            return count({name: value.to(model.device) for name, value in self._example(rows, length).items()})

        if isinstance(self.encoder, ImageEncoder):
            return len(rows) * one(1)
        of_length = by_length(one)
        return sum(of_length(self.encoder.length(row)) for row in rows)

    def _example(self, rows: Rows, length: int) -> dict[str, Tensor]:
        """A batch of one: the first picture, or a text of `length` tokens (of its last one, which a classifier may read
        its answer at)."""
        if isinstance(self.encoder, ImageEncoder):
            return self.encoder.batch(rows[:1])
        row = {name: [values[-1]] * length for name, values in rows[0].items() if name != "labels"}
        return self.encoder.batch([{**row, "labels": rows[0]["labels"]}])
