"""GateProductTracker: neurons by the mean of what the down projection reads. The published front door."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

from stt.batches import Batch
from stt.selection import Selection
from stt.stt_tracker import Tracker


class GateProductTracker(Tracker):
    method = "gate_product"

    def get_active_indices_with_budget(self, dataloader: Iterable[Batch], k_map: Mapping[str, int]) -> Selection:
        """Exactly `k_map[site]` units of every site; keys are site names or those of get_layer_name_map()."""
        self.collect(dataloader)
        return self.kept_with_budget(k_map)
