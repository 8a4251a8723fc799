"""Everything a decoder run measures: accuracy, perplexity, speed, FLOPs, and the restored dense model."""
from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stt.checkpoint import restore
from stt.dataset import Example, Task, prompt_ids
from stt.evaluate.generation import accuracy, check_positions, generate_answers, left_padded, majority_accuracy
from stt.evaluate.perplexity import perplexity
from stt.evaluate.throughput import compare_throughput
from stt.loading import load_model
from stt.trainers.sft import Encoded
from util.torch_flops import by_length, forward_flops, training_flops

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

    def test(self, model: PreTrainedModel, folder: Path) -> dict[str, float]:
        """The `accuracy` entry of results.json; the answers themselves go to outputs.json."""
        rows = self.answers(model, self.task.test)
        (folder / "outputs.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
        return {"test": accuracy(rows), "n": len(rows), "correct": sum(row["correct"] for row in rows),
                "majority": majority_accuracy(self.task.train, self.task.test)}

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
        """Test accuracy with the removed neurons put back: the trained units in the dense model they came from, all in
        float32, so that no trained value is rounded."""
        dense = load_model(self.model_name, None, model.device)
        restore(model, dense)
        return self.accuracy(dense, self.task.test)

    def selection_flops(self, model: PreTrainedModel, encoded: Sequence[Encoded]) -> int:
        """FLOPs of one pass of the model without its head over `encoded`, every example at its own length."""
        body = model.get_decoder()
        count = by_length(lambda length: forward_flops(body, {"input_ids": self._ids(model, length)}))
        return sum(count(len(row["input_ids"])) for row in encoded)

    def training_flops(self, model: PreTrainedModel, encoded: Sequence[Encoded], epochs: int) -> int:
        """FLOPs of `epochs` forward and backward passes over `encoded`, every example at its own length."""
        def one(length: int) -> int:
            ids = self._ids(model, length)
            with torch.autocast(model.device.type, self.autocast_dtype, enabled=bool(self.autocast_dtype)):
                return training_flops(model, {"input_ids": ids, "labels": ids})
        count = by_length(one)
        return epochs * sum(count(len(row["input_ids"])) for row in encoded)

    def inference_flops(self, model: PreTrainedModel) -> int:
        """FLOPs of reading all test prompts once, divided by their number."""
        with torch.autocast(model.device.type, self.autocast_dtype, enabled=bool(self.autocast_dtype)):
            count = by_length(lambda length: forward_flops(model, {"input_ids": self._ids(model, length)}))
        lengths = [len(prompt_ids(example, self.tokenizer, self.max_length, self.chat)) for example in self.task.test]
        return round(sum(map(count, lengths)) / len(lengths))

    def check_lengths(self, model: PreTrainedModel, encoded: Sequence[Encoded]) -> None:
        """Raises InputError if an example to train on, or a prompt with its answer, passes the model's positions."""
        check_positions(model, max(len(row["input_ids"]) for row in encoded), 0)
        prompts = [prompt_ids(example, self.tokenizer, self.max_length, self.chat)
                   for example in (*self.task.validation, *self.task.test)]
        check_positions(model, max(map(len, prompts)), self.task.max_new_tokens)

    def _ids(self, model: PreTrainedModel, length: int) -> torch.Tensor:
        """Any ids: FLOPs do not depend on them."""
        return torch.full((1, length), self.tokenizer.eos_token_id, device=model.device)
