"""Everything a decoder run measures: accuracy, perplexity, speed, FLOPs, and the restored dense model."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stt.checkpoint import restore
from stt.dataset import Example, Task, prompt_ids
from stt.evaluate.generation import accuracy, generate_answers, left_padded, majority_accuracy
from stt.evaluate.perplexity import perplexity
from stt.evaluate.throughput import compare_throughput
from stt.loading import load_model
from stt.trainers.sft import Encoded, collate
from util.torch_flops import forward_flops, run_flops, training_flops

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
        """The trained model beside the dense one it came from (alone if it is dense itself), on the same prompts."""
        prompts = [prompt_ids(example, self.tokenizer, self.max_length, self.chat)
                   for example in self.task.test[:self.batch_size]]
        batch = left_padded(prompts, self.tokenizer.pad_token_id, model.device)
        dense = self._dense(model.device) if is_sliced else model
        return compare_throughput(dense, model if is_sliced else None, batch, NEW_TOKENS,
                                  autocast_dtype=self.autocast_dtype)

    def restored(self, model: PreTrainedModel) -> float:
        """Test accuracy with the removed neurons put back: the trained units in the dense model they came from."""
        dense = self._dense(model.device)
        restore(model, dense)
        return self.accuracy(dense, self.task.test)

    def flops(self, model: PreTrainedModel, encoded: Sequence[Encoded], passes: int, selection: int) -> dict[str, int]:
        """The `flops` entry of results.json, at the example of median length: `selection` FLOPs, `passes` examples
        through a training step, and one forward pass of the model as it is now."""
        example = self._median_example(model, encoded)
        with torch.autocast(model.device.type, self.autocast_dtype, enabled=bool(self.autocast_dtype)):
            counted = run_flops(training_flops(model, example), passes, forward_flops(model, example))
        return {**({"selection": selection} if selection else {}), **counted}

    def selection_flops(self, model: PreTrainedModel, encoded: Sequence[Encoded]) -> int:
        """FLOPs of one pass of the model without its head over `encoded`, each as long as the median one."""
        example = self._median_example(model, encoded)
        del example["labels"]
        return forward_flops(model.get_decoder(), example) * len(encoded)

    def _median_example(self, model: PreTrainedModel, encoded: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """A batch of the one example of median length."""
        ordered = sorted(encoded, key=lambda row: len(row["input_ids"]))
        batch = collate(self.tokenizer.pad_token_id)([ordered[len(ordered) // 2]])
        return {name: tensor.to(model.device) for name, tensor in batch.items()}

    def _dense(self, device: torch.device) -> PreTrainedModel:
        return load_model(self.model_name, self.autocast_dtype, device)
