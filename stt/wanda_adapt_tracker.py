"""WandaAdaptTracker: neurons by Wanda, summed per neuron. The published front door; the score is scores/wanda.py."""
from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from stt.batches import Batch, batched
from stt.errors import InputError
from stt.selection import Selection
from stt.stt_tracker import Tracker


class WandaAdaptTracker(Tracker):
    """`norm` "l2" is the paper's, "l1" the published adaptation's."""

    method = "wanda"

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, topk_ratio: float = 0.10,
                 device: torch.device | str | None = None, verbose: bool = False, norm: str = "l2"):
        super().__init__(model, tokenizer, topk_ratio=topk_ratio, device=device, verbose=verbose)
        self.options = {"wanda": {"norm": norm}}

    def get_wanda_indices(self, dataloader: Iterable[Batch], scan_batches: int | None = None) -> Selection:
        """The best neurons of every site, measured on the first `scan_batches` batches (None: on all).

        Raises InputError for fewer than one.
        """
        if scan_batches is not None and scan_batches < 1:
            raise InputError(f"scan_batches must be at least 1 or None for all, got {scan_batches}")
        return self.get_active_indices(islice(batched(dataloader), scan_batches))
