"""Perplexity of a text: exp of the mean negative log likelihood (nats) of its tokens.   B batch, T tokens, V words."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from stt.errors import InputError
from stt.evaluate.inference import inference
from util import ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextScore(NamedTuple):
    nll: float   # summed over the scored tokens, nats
    tokens: int  # how many tokens were scored

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.nll / self.tokens, dtype=torch.float64).exp())  # inf, where math.exp raises


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, max_length: int = 128,
               batch_size: int = 16, autocast_dtype: torch.dtype | None = None) -> float:
    """exp(mean NLL) over non-overlapping chunks of `max_length` tokens; see `score_text`."""
    return score_text(model, tokenizer, text, max_length, batch_size, autocast_dtype).perplexity


def score_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, max_length: int = 128,
               batch_size: int = 16, autocast_dtype: torch.dtype | None = None) -> TextScore:
    """The summed NLL of the text and the number of tokens it covers.

    Each chunk is read on its own: its first token is context only, and is the beginning-of-sequence token where the
    tokenizer uses one. The result does not depend on `batch_size`; several processes share the work. Raises InputError
    if nothing can be scored.
    """
    if max_length < 2 or batch_size < 1:
        raise InputError(f"perplexity needs max_length >= 2 and batch_size >= 1, got {max_length} and {batch_size}.")
    chunks = _chunks(text, tokenizer, max_length)
    if not chunks:
        raise InputError("the text for perplexity is empty or a single token: give a longer text.")
    batches = [chunks[start:start + batch_size] for start in range(0, len(chunks), batch_size)]
    with inference(model, autocast_dtype) as device:
        nll = ranks.shared_out(batches, lambda batch: _row_nll(model, batch, device).cpu(), "perplexity")
    return TextScore(float(torch.cat(nll).double().sum()), sum(len(chunk) - 1 for chunk in chunks))


def _chunks(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    begin = [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]
    step = max_length - len(begin)
    chunks = [begin + ids[start:start + step] for start in range(0, len(ids), step)]
    return [chunk for chunk in chunks if len(chunk) > 1]


def _row_nll(model: PreTrainedModel, chunks: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B,) of each chunk, summed over its tokens."""
    width = max(map(len, chunks))
    ids = torch.tensor([[*chunk, *[0] * (width - len(chunk))] for chunk in chunks], device=device)           # (B, T)
    mask = torch.tensor([[1] * len(chunk) + [0] * (width - len(chunk)) for chunk in chunks], device=device)  # (B, T)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits                            # (B, T, V)
    # float32 one row at a time: a whole batch of a 152k vocabulary would take gigabytes
    return torch.stack([functional.cross_entropy(logits[row, :len(chunk) - 1].float(), ids[row, 1:len(chunk)],
                                                 reduction="sum") for row, chunk in enumerate(chunks)])
