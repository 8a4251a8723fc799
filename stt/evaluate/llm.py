"""Everything a decoder run measures: accuracy, perplexity, speed, FLOPs, and the restored dense model."""
from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stt.checkpoint import restore
from stt.dataset import Example, Task, encode_all, prompt_ids
from stt.evaluate.generation import accuracy, check_positions, generate_answers, left_padded, majority_accuracy
from stt.evaluate.inference import inference
from stt.evaluate.perplexity import perplexity
from stt.evaluate.throughput import compare_throughput
from stt.loading import load_model
from stt.loss import answer_nll, chunked_loss
from stt.selecting import measure
from stt.surgery import restore_forward
from stt.trainers.sft import Encoded, collate
from util.torch_flops import by_length, flops_of, forward_flops, training_flops

NEW_TOKENS = 16  # decoded per row when speed is measured


@dataclass(frozen=True)
class Judge:
    """Measures one run: its task, tokenizer and held-out text, in the dtype it computes in."""

    model_name: str
    task: Task
    tokenizer: PreTrainedTokenizerBase
    text: str
    batch_size: int
    max_length: int
    chat: bool
    autocast_dtype: torch.dtype | None

    def answers(self, model: PreTrainedModel, examples: Sequence[Example]) -> list[dict[str, object]]:
        """One row an example: prompt, response, prediction, label, correct."""
        return generate_answers(model, self.tokenizer, self.task, examples, self.batch_size, chat=self.chat,
                                max_length=self.max_length, autocast_dtype=self.autocast_dtype)

    def accuracy(self, model: PreTrainedModel, examples: Sequence[Example]) -> float:
        """Share of right generated answers."""
        return accuracy(self.answers(model, examples))

    def test(self, model: PreTrainedModel, folder: Path) -> dict[str, float | None]:
        """The `accuracy` entry of results.json; the answers themselves go to outputs.json."""
        rows = self.answers(model, self.task.test)
        (folder / "outputs.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
        return {"test": accuracy(rows), "n": len(rows), "correct": sum(row["correct"] for row in rows),
                "majority": majority_accuracy(self.task.train, self.task.test)}

    @cached_property
    def encoded_test(self) -> list[Encoded]:
        """The test examples with their labels."""
        return encode_all(self.task.test, self.tokenizer, self.max_length, self.chat)[0]

    def answer_loss(self, model: PreTrainedModel) -> float:
        """Mean negative log-likelihood of the labelled tokens of the test examples, in nats a token."""
        nll, count, encoded, batches = 0.0, 0, self.encoded_test, collate(self.tokenizer.pad_token_id)
        with inference(model, self.autocast_dtype) as device:
            for start in range(0, len(encoded), self.batch_size):
                batch = batches(encoded[start:start + self.batch_size])
                batch = {name: value.to(device) for name, value in batch.items()}  # (B, T) each
                labels = batch.pop("labels")
                of_batch, labelled = answer_nll(model, batch, labels)
                nll, count = nll + of_batch, count + labelled
        return nll / count

    def perplexity(self, model: PreTrainedModel) -> float:
        """On the held-out general text."""
        return perplexity(model, self.tokenizer, self.text, autocast_dtype=self.autocast_dtype)

    def throughput(self, model: PreTrainedModel, is_sliced: bool) -> dict[str, object]:
        """The trained model beside the dense one it came from (alone if it is dense itself), on the same prompts, both
        in the compute dtype, as they would be deployed."""
        prompts = [prompt_ids(example, self.tokenizer, self.max_length, self.chat)
                   for example in self.task.test[:self.batch_size]]
        batch = left_padded(prompts, self.tokenizer.pad_token_id, model.device)
        deployed = copy.deepcopy(model).to(self.autocast_dtype or torch.float32)
        if not is_sliced:
            return compare_throughput(deployed, None, batch, NEW_TOKENS)
        dense = load_model(self.model_name, self.autocast_dtype, model.device).to(deployed.dtype)
        return compare_throughput(dense, deployed, batch, NEW_TOKENS)

    def restored(self, model: PreTrainedModel) -> float:
        """Test accuracy with the removed units put back: the trained units in the dense model they came from, all in
        float32, so that no trained value is rounded."""
        dense = load_model(self.model_name, None, model.device)
        restore(model, dense)
        return self.accuracy(dense, self.task.test)

    def selection_flops(self, model: PreTrainedModel, encoded: Sequence[Encoded], methods: list[str],
                        compensate: str, head_score: str | None = None) -> int:
        """FLOPs of measuring what `methods`, `compensate` and a score of heads need on `encoded`, every example at its
        own length."""
        def one(length: int) -> int:
            ids = self._ids(model, length)
            return flops_of(lambda: measure(model, [{"input_ids": ids, "labels": ids}], None, methods, progress=False,
                                            compensate=compensate, head_score=head_score))
        count = by_length(one)
        return sum(count(len(row["input_ids"])) for row in encoded)

    def training_flops(self, model: PreTrainedModel, encoded: Sequence[Encoded], epochs: int) -> int:
        """FLOPs of `epochs` forward and backward passes over `encoded`: the body of every example at its own length,
        the head at its labelled positions only."""
        def one(length: int, labelled: int) -> int:
            ids = self._ids(model, length)
            labels = ids.clone()
            labels[:, :-labelled] = -100
            with torch.autocast(model.device.type, self.autocast_dtype, enabled=bool(self.autocast_dtype)):
                return training_flops(model, {"input_ids": ids, "labels": labels})

        was_training = model.training
        chunked_loss(model.train())
        try:
            count, of_head = by_length(lambda length: one(length, 1)), one(4, 2) - one(4, 1)
            return epochs * sum(count(len(row["input_ids"])) + of_head * (_labelled(row) - 1) for row in encoded)
        finally:
            restore_forward(model)
            model.train(was_training)

    def inference_flops(self, model: PreTrainedModel) -> int:
        """FLOPs of reading all test prompts once, divided by their number."""
        with torch.autocast(model.device.type, self.autocast_dtype, enabled=bool(self.autocast_dtype)):
            count = by_length(lambda length: forward_flops(model, {"input_ids": self._ids(model, length)}))
        lengths = [len(prompt_ids(example, self.tokenizer, self.max_length, self.chat)) for example in self.task.test]
        return round(sum(map(count, lengths)) / len(lengths))

    def check_lengths(self, model: PreTrainedModel, encoded: Sequence[Encoded]) -> None:
        """Raises InputError if an example to train on or to score, or a prompt with its answer, passes the model's
        positions."""
        check_positions(model, max(len(row["input_ids"]) for row in (*encoded, *self.encoded_test)), 0)
        prompts = [prompt_ids(example, self.tokenizer, self.max_length, self.chat)
                   for example in (*self.task.validation, *self.task.test)]
        check_positions(model, max(map(len, prompts)), self.task.max_new_tokens)

    def _ids(self, model: PreTrainedModel, length: int) -> torch.Tensor:
        """Any ids: FLOPs do not depend on them."""
        return torch.full((1, length), self.tokenizer.eos_token_id, device=model.device)


def _labelled(row: Encoded) -> int:
    """Positions that are trained to predict the next token."""
    return sum(label != -100 for label in row["labels"][1:])
