"""Accuracy by generation: greedy answers to a task's prompts, and how many of them are right.   B batch, T tokens."""
from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin

from stt.dataset.base import Example, Task, prompt_ids
from stt.errors import InputError
from stt.evaluate.inference import inference
from util import ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task,
                     examples: Sequence[Example], batch_size: int, chat: bool = False, max_length: int = 512,
                     autocast_dtype: torch.dtype | None = None) -> list[dict[str, object]]:
    """One row an example, in their order: prompt, response, prediction (a label or None), label, correct.

    Prompts are `prompt_ids(…, max_length, chat)`: give the `max_length` of training. Answers are greedy, of at most
    `task.max_new_tokens` tokens, and stop at the tokenizer's end token or at one of `task.stop_ids`; in float32 they do
    not depend on `batch_size`. Several processes share the work, and each gets all rows.
    """
    if not examples:
        raise InputError("there are no examples to answer: the data is empty.")
    if batch_size < 1:
        raise InputError(f"the evaluation batch size must be at least 1, got {batch_size}.")
    prompts = [prompt_ids(example, tokenizer, max_length, chat) for example in examples]
    check_positions(model, max(map(len, prompts)), task.max_new_tokens)
    config = _greedy(tokenizer, task)
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # little padding; memory fails at once
    batches = [longest_first[start:start + batch_size] for start in range(0, len(prompts), batch_size)]
    with inference(model, autocast_dtype) as device, _own_settings_aside(model):
        def answer(chosen: list[int]) -> list[list[int]]:
            batch = left_padded([prompts[i] for i in chosen], config.pad_token_id, device)
            return model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1]:].tolist()

        answered = ranks.shared_out(batches, answer, f"answering {task.name}")
    ids_of = dict(zip(itertools.chain(*batches), itertools.chain(*answered), strict=True))
    return [_row(example, tokenizer.decode(_until_end(ids_of[i], config.eos_token_id), skip_special_tokens=True), task)
            for i, example in enumerate(examples)]


def accuracy(rows: Sequence[Mapping[str, object]]) -> float:
    """The part of the rows of `generate_answers` that is correct, 0 to 1."""
    if not rows:
        raise InputError("there are no answers to count: the data is empty.")
    return sum(bool(row["correct"]) for row in rows) / len(rows)


def majority_accuracy(train: Sequence[Example], test: Sequence[Example]) -> float | None:
    """The accuracy of always giving the most frequent training label (of equals, the first in the alphabet); None if
    the answers are no labels but free text."""
    if not train or not test:
        raise InputError("there are no examples to count: the data is empty.")
    if not test[0].choices:
        return None
    counts = Counter(example.label for example in train)
    majority = min(counts, key=lambda label: (-counts[label], label))
    return sum(example.label == majority for example in test) / len(test)


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, every prompt ending at the last column, whatever the tokenizer's side is."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device),         # (B, T)
            "attention_mask": torch.tensor(mask, device=device)}   # (B, T)


def _greedy(tokenizer: PreTrainedTokenizerBase, task: Task) -> GenerationConfig:
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(max_new_tokens=task.max_new_tokens, do_sample=False, num_beams=1, use_cache=True,
                            eos_token_id=[end, *task.stop_ids], pad_token_id=pad)


@contextmanager
def _own_settings_aside(model: nn.Module) -> Iterator[None]:
    """`generate` fills what a config leaves out from the model's own generation_config, where instruction-tuned models
    ship sampling and a repetition penalty. It is set aside, and put back afterwards."""
    own = [(module, module.generation_config) for module in model.modules() if isinstance(module, GenerationMixin)]
    for module, _ in own:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in own:
            module.generation_config = config


def check_positions(model: PreTrainedModel, longest_prompt: int, max_new_tokens: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # None: no limit (BLOOM)
    if positions is not None and longest_prompt + max_new_tokens > positions:
        raise InputError(f"a prompt of {longest_prompt} tokens and {max_new_tokens} new ones pass the {positions}"
                         f" positions of the model: set max_length to at most {positions - max_new_tokens}.")


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[:next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _row(example: Example, response: str, task: Task) -> dict[str, object]:
    prediction = task.extract(response, example)
    return {"prompt": example.prompt, "response": response, "prediction": prediction, "label": example.label,
            "correct": prediction == example.label}
