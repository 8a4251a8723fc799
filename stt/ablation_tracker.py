"""AblationTracker: one of STT's two scores alone. The published front door."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

from stt.batches import Batch
from stt.selection import Selection
from stt.stt_tracker import Tracker


class AblationTracker(Tracker):
    """By the activation rate if `use_activation_rate`, else by the mean activation."""

    method = "activation_mean"

    def get_active_indices(self, dataloader: Iterable[Batch], use_activation_rate: bool = False) -> Selection:
        """The best `topk_ratio` of every site."""
        self._collect_by(use_activation_rate, dataloader)
        return self.compute_layerwise_active_indices()

    def get_active_indices_with_budget(self, dataloader: Iterable[Batch], k_map: Mapping[str, int],
                                       use_activation_rate: bool = False) -> Selection:
        """Exactly `k_map[site]` units of every site; keys are site names or those of get_layer_name_map()."""
        self._collect_by(use_activation_rate, dataloader)
        return self.kept_with_budget(k_map)

    def _collect_by(self, use_activation_rate: bool, dataloader: Iterable[Batch]) -> None:
        self.method = "activation_rate" if use_activation_rate else "activation_mean"
        self.collect(dataloader)
