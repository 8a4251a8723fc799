"""STTTracker: the published front door of neuron selection. No logic of its own."""
from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from stt.batches import Batch
from stt.errors import InputError
from stt.selecting import Budget, Measured, kept, measure
from stt.selection import Selection
from stt.sites import find_sites

logger = logging.getLogger(__name__)


class Tracker:
    """Measures the neurons of a model on calibration batches and keeps the best by `method`; a second call starts
    afresh. Raises InputError for a ratio outside (0, 1] before any data is read."""

    method = "stt"

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, threshold: float = 0.01,
                 topk_ratio: float = 0.10, device: torch.device | str | None = None, verbose: bool = False,
                 use_abs_for_rate: bool = False):
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer
        self.threshold = threshold
        self.budget = Budget(topk_ratio)
        self.verbose = verbose
        self.options = {"activation_rate": {"threshold": threshold, "use_abs": use_abs_for_rate}}
        self.measured: Measured | None = None

    def collect(self, dataloader: Iterable[Batch]) -> None:
        """Measure the scores; nothing of an earlier call remains."""
        self.measured = measure(self.model, dataloader, self.tokenizer, [self.method], threshold=self.threshold,
                                options=self.options, progress=self.verbose)

    def compute_layerwise_active_indices(self) -> Selection:
        """The selection from what `collect` measured."""
        return self._kept(self.budget)

    def get_active_indices(self, dataloader: Iterable[Batch]) -> Selection:
        """collect, then compute_layerwise_active_indices."""
        self.collect(dataloader)
        return self.compute_layerwise_active_indices()

    def get_layer_name_map(self) -> dict[str, str]:
        """Published underscore name of every site's gate projection -> site name."""
        return {site.gate_module.replace(".", "_"): site.name for site in find_sites(self.model).values()}

    def kept_with_budget(self, k_map: Mapping[str, int]) -> Selection:
        """Exactly `k_map[site]` units of every site; keys are site names or those of get_layer_name_map()."""
        names = self.get_layer_name_map()
        return self._kept(Budget(counts={names.get(key, key): count for key, count in k_map.items()}))

    def _kept(self, size: Budget) -> Selection:
        if self.measured is None:
            raise InputError("nothing was measured yet: call collect(dataloader) or get_active_indices(dataloader)")
        selection = kept(self.measured, self.method, size)
        if self.verbose:
            logger.info("%s: %r", self.method, selection)
        return selection


class STTTracker(Tracker):
    """Select-Then-Train: the union of the best by mean pre-activation and by activation rate."""
