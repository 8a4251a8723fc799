"""Learning from another model's distributions: Hinton, Vinyals and Dean 2015, arxiv.org/abs/1503.02531, section 2.

At every labelled position, with logits z of the model, v of the teacher and p_T = softmax(z / T), q_T = softmax(v / T):

    loss = (1 - weight) * -log p_1[answer] + weight * T^2 * KL(q_T || p_T)

T^2 keeps the two parts in proportion: the derivative of the second by z is weight * T * (p_T - q_T).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from stt.chunked import IGNORED, Objective, cross_entropy
from stt.errors import InputError
from stt.loading import load_tokenizer, load_trained, model_folder
from stt.loss import DecoderLoss, recipe_of
from stt.trace import evaluating
from util.torch_flops import by_length, flops_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stt.dataset import Encoded

# Shapes: B examples, T tokens, L labelled positions, C of these in a chunk, D model width, V words.

LogitsOf = Callable[[int, int], Tensor]  # (start, count) of labelled positions -> logits (count, V)


@dataclass(frozen=True)
class Teacher:
    """A frozen model to learn from; give it to `chunked_loss` as `teach`. Its logits exist a chunk at a time."""

    model: PreTrainedModel
    recipe: DecoderLoss
    weight: float
    temperature: float

    @classmethod
    def of(cls, model: PreTrainedModel, weight: float = 0.5, temperature: float = 1.0) -> Teacher:
        """`model`, frozen and in evaluation mode. Raises InputError for anything but a decoder (`chunked_loss`), and
        for numbers out of range."""
        if not 0 < weight <= 1 or not 0 < temperature < float("inf"):
            raise InputError("distillation needs a weight in (0, 1] and a temperature above 0, got "
                             f"{weight:g} and {temperature:g}")
        return cls(model.eval().requires_grad_(False), recipe_of(model), weight, temperature)

    def __call__(self, arguments: Mapping[str, object], targets: Tensor) -> Objective:
        """The objective of a batch: `arguments` are what the body reads, targets (B, T) what each position predicts."""
        return partial(distillation, teacher=self._logits(arguments, targets), weight=self.weight,
                       temperature=self.temperature)

    @torch.no_grad()
    def _logits(self, arguments: Mapping[str, object], targets: Tensor) -> LogitsOf:
        is_labelled = targets != IGNORED  # (B, T)
        with evaluating(self.model):
            if not self.recipe.is_chunked(self.model, arguments):
                logits = type(self.model).forward(self.model, **arguments, return_dict=True).logits[is_labelled]
                return lambda start, count: logits[start:start + count]
            states = self.recipe.outputs(self.model, arguments)["last_hidden_state"][is_labelled]  # (L, D)
        head, transform = self.model.get_output_embeddings(), self.recipe.transform
        return lambda start, count: transform(head(states[start:start + count]))

    def flops(self, encoded: Sequence[Encoded], epochs: int) -> int:
        """FLOPs of reading `encoded` `epochs` times: the body at every example's own length, the head at its labels."""
        def one(length: int, labelled: int) -> int:
            ids = torch.zeros(1, length, dtype=torch.long, device=self.model.device)
            targets = ids.clone()
            targets[:, labelled:] = IGNORED
            return flops_of(lambda: self._logits({"input_ids": ids}, targets)(0, labelled))

        count, of_head = by_length(lambda length: one(length, 1)), one(4, 2) - one(4, 1)
        labels = [sum(label != IGNORED for label in row["labels"][1:]) for row in encoded]
        return epochs * sum(count(len(row["input_ids"])) + of_head * (number - 1)
                            for row, number in zip(encoded, labels, strict=True))


@torch.no_grad()
def distillation(logits: Tensor, answers: Tensor, start: int, needs_slopes: bool, teacher: LogitsOf, weight: float,
                 temperature: float) -> Tensor:
    """The objective of stt/chunked.py that stands at the top of this file; logits (C, V) become its derivative."""
    target = F.log_softmax(teacher(start, len(logits)).to(logits.dtype) / temperature, -1)  # (C, V)
    own = F.log_softmax(logits / temperature, -1)  # (C, V)
    divergence = F.kl_div(own, target, reduction="sum", log_target=True)
    hard = cross_entropy(logits, answers, start, needs_slopes)
    if needs_slopes:
        logits.mul_(1 - weight).add_(own.exp_().sub_(target.exp_()), alpha=weight * temperature)
    return (1 - weight) * hard + weight * temperature**2 * divergence


def load_teacher(name: str, weight: float, temperature: float, model: PreTrainedModel,
                 tokenizer: PreTrainedTokenizerBase, autocast_dtype: torch.dtype | None) -> Teacher:
    """The teacher of `model` from a run, a folder or the hub, on the model's device. Raises InputError for one that
    cannot be loaded, is no decoder or has another vocabulary."""
    teacher = load_trained(name, autocast_dtype, model.device)
    check_vocabulary(model, tokenizer, teacher, load_tokenizer(model_folder(name)))
    return Teacher.of(teacher, weight, temperature)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel,
                     teachers: PreTrainedTokenizerBase) -> None:
    """Raises InputError unless token number i is the same word for both models."""
    counts = [each.get_output_embeddings().weight.shape[0] for each in (model, teacher)]
    if counts[0] != counts[1] or tokenizer.get_vocab() != teachers.get_vocab():
        raise InputError(f"the teacher has another vocabulary ({len(teachers):,} words, {counts[1]:,} outputs; the "
                         f"model {len(tokenizer):,} and {counts[0]:,}): give a teacher of the same tokenizer")
