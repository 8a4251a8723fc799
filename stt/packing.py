"""Several examples in one row of a batch: hardly any padding is computed, and no example sees another.

Positions start again at every example, from which transformers makes the attention mask (masking_utils); models that
do not pass the positions on to it get the mask itself. Loss and gradients are those of the padded batch.
"""
from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model

from stt.chunked import IGNORED
from stt.errors import InputError
from stt.trace import evaluating

logger = logging.getLogger(__name__)

# Shapes: B examples, R rows of them, T tokens of a row, D model width.

Encoded = dict[str, list[int]]  # input_ids and labels (-100: not trained on) of one example
WIDTH = 2  # rows are at most this many times as wide as the longest example: 2 to 6 % padding instead of up to 26 %


@dataclass(frozen=True)
class Packing:
    """How a model is told where an example ends: by its positions alone (None), or by a mask of this dtype too: True
    where a token sees another one, or what is added to the attention scores."""

    mask: torch.dtype | None

    def collate(self, pad_id: int) -> Callable[[Sequence[Encoded]], dict[str, Tensor]]:
        """Batches of the same examples in fewer rows: input_ids, position_ids and labels, all (R, T)."""
        def batch(examples: Sequence[Encoded]) -> dict[str, Tensor]:
            lengths = [len(example["input_ids"]) for example in examples]
            return self._batch([[examples[i] for i in row] for row in rows(lengths, WIDTH * max(lengths))], pad_id)
        return batch

    def _batch(self, packed: Sequence[Sequence[Encoded]], pad_id: int) -> dict[str, Tensor]:
        def joined(parts: Callable[[int, Encoded], list[int]], filler: int) -> Tensor:
            joint = [torch.tensor([value for i, example in enumerate(row) for value in parts(i, example)])
                     for row in packed]
            return nn.utils.rnn.pad_sequence(joint, batch_first=True, padding_value=filler)  # (R, T)

        found = {"input_ids": joined(lambda _, example: example["input_ids"], pad_id),
                 "position_ids": joined(lambda _, example: list(range(len(example["input_ids"]))), 0),
                 # nothing predicts an example's first token: what stands before it is another example
                 "labels": joined(lambda _, example: [IGNORED, *example["labels"][1:]], IGNORED)}
        if self.mask is not None:
            found["attention_mask"] = _mask(joined(lambda i, example: [i] * len(example["input_ids"]), -1), self.mask)
        return found


def _mask(examples: Tensor, dtype: torch.dtype) -> Tensor:
    """A token sees its own example up to itself: (R, 1, T, T); `examples` (R, T) numbers them within their row."""
    length = examples.shape[1]
    is_seen = (examples.unsqueeze(2) == examples.unsqueeze(1)) & torch.ones(length, length, dtype=torch.bool).tril()
    is_seen = is_seen.unsqueeze(1)  # (R, 1, T, T)
    if dtype == torch.bool:
        return is_seen
    return torch.zeros(is_seen.shape, dtype=dtype).masked_fill(~is_seen, torch.finfo(dtype).min)


def rows(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which examples share a row: as few rows as possible of at most `width` tokens, about equally full.

    The longest first, each into the emptiest row (Graham 1969, doi.org/10.1137/0117039); a row more until all fit.
    Ties go to the lower number.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for count in range(max(1, -(-sum(lengths) // width)), len(lengths) + 1):
        found: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for i in order:
            emptiest = filled.index(min(filled))
            found[emptiest].append(i)
            filled[emptiest] += lengths[i]
        if max(filled) <= width:
            return found
    raise InputError(f"an example of {max(lengths)} tokens does not fit a row of {width}: give a greater width")


def find_packing(model: nn.Module, encoded: Sequence[Encoded]) -> Packing:
    """The packing with which this model computes every example as it does alone, tried on a row as wide as they get:
    the two longest examples behind the shortest.

    Raises InputError if there is none: the model takes no positions (Mamba, BLOOM), or it carries a state from token to
    token, or its rows would be too wide for it.
    """
    decoder = unwrap_peft_model(model)
    reason = "its forward takes no position_ids"
    if "position_ids" in inspect.signature(type(decoder).forward).parameters:
        by_length = sorted(encoded, key=lambda example: len(example["input_ids"]))
        tried = [by_length[0], *by_length[-2:]]
        alone = torch.cat([_states(decoder, {"input_ids": torch.tensor([example["input_ids"]])}) for example in tried])
        for packing in map(Packing, (None, torch.bool, torch.float32)):
            reason = _difference(decoder, packing._batch([tried], 0), alone)
            if reason is None:
                logger.info("--pack: the examples of a batch share rows, told apart by %s",
                            "their positions" if packing.mask is None else f"a mask of {packing.mask}")
                return packing
    raise InputError(f"{type(decoder).__name__} does not keep examples in one row apart ({reason}): leave --pack out")


def _difference(decoder: PreTrainedModel, batch: dict[str, Tensor], alone: Tensor) -> str | None:
    """Why the states of a packed row are not those of its examples alone, (T, D); None if they are."""
    try:
        packed = _states(decoder, batch)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        return f"it fails on a row of {batch['input_ids'].shape[1]} tokens: {str(error).splitlines()[0]}"
    # experts may group tokens differently, in few digits
    tolerance = 1e-4 if torch.finfo(alone.dtype).bits >= 32 else 0.05
    found = float((packed - alone).abs().max() / alone.abs().max())
    return None if found <= tolerance else f"their states change by {100 * found:.2g} % beside others"


def _states(decoder: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """What the body returns at the positions of one row: (T, D)."""
    inputs = {name: value.to(decoder.device) for name, value in batch.items() if name != "labels"}
    with torch.no_grad(), evaluating(decoder):
        return decoder.base_model(**inputs, use_cache=False, return_dict=True)[0][0]
