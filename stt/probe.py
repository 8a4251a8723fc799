"""Which channels of the projections before an output projection O reach which channels of what O reads."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from stt.trace import Source

# Shapes: F channels that the output projection O reads, N rows (positions), C channels of a source, U units.

SHARED = "all its query heads share a key and value head"
MIXED = "it has a single head, or something between the projections mixes the heads"
NORM = "a norm across all heads stands between the projections"


class Probe:
    """Which channels of the feeding sources reach which channels of x (N, F), by vector-Jacobian products."""

    def __init__(self, rows: Tensor, feeding: Sequence[Source]):
        self.rows = rows
        self.feeding = feeding
        self.row_weights = torch.rand(len(rows), 1, generator=torch.Generator().manual_seed(1)) + 0.5

    def slopes(self, weights: Tensor) -> list[Tensor]:
        """The slope of (rows * weights).sum() in every source; zeros where it does not depend on one."""
        values = [source.value for source in self.feeding]
        slopes = torch.autograd.grad((self.rows * weights).sum(), values, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(value) if slope is None else slope
                for value, slope in zip(values, slopes, strict=True)]

    def reached(self, start: int, stop: int) -> list[Tensor]:
        """The entries of every source that channels start ... stop - 1 of any row depend on."""
        weights = torch.zeros_like(self.rows)
        weights[:, start:stop] = torch.rand(stop - start, generator=torch.Generator().manual_seed(2)) + 0.5
        return [slope != 0 for slope in self.slopes(weights * self.row_weights)]

    def channels(self, channel: int) -> list[Tensor]:
        """The channels (C,) of every source that one channel of x depends on."""
        return [by_channel(source, entries).any(0)
                for source, entries in zip(self.feeding, self.reached(channel, channel + 1), strict=True)]

    def queries(self) -> dict[int, Tensor]:
        """The channels (C,) of projections, by place, that reach a row from a single position, if there are others that
        reach it from several: else nothing attends to anything."""
        count = len(self.rows)
        for row in dict.fromkeys((max(count // 2 - 1, 0), count // 4, count - 1)):  # some may be padding
            local = self._queries_of(row)
            if local:
                return local
        return {}

    def _queries_of(self, row: int) -> dict[int, Tensor]:
        weights = torch.zeros_like(self.rows)
        weights[row] = 1.0
        local: dict[int, Tensor] = {}
        is_mixing = False
        for place, (source, slope) in enumerate(zip(self.feeding, self.slopes(weights), strict=True)):
            if source.layout is None:
                continue
            counts = by_channel(source, slope != 0).sum(0)  # (C,)
            is_mixing = is_mixing or bool((counts > 1).any())
            if (counts == 1).any():
                local[place] = counts == 1
        return local if is_mixing else {}

    def unit_size(self, projections: Mapping[int, Tensor]) -> int:
        """How many channels of x, from the first on, share one of these channels of a projection with it (by place, a
        mask): by bisection. 0 without any projection."""
        first = self.channels(0)
        low, high = 0, self.rows.shape[1]  # channel low is of the first unit, channel high is not
        while high - low > 1:
            middle = (low + high) // 2
            of_middle = self.channels(middle)
            is_same = any((first[place] & of_middle[place] & mask).any() for place, mask in projections.items())
            low, high = (middle, high) if is_same else (low, middle)
        return high if projections else 0

    def by_unit(self, size: int) -> list[Tensor]:
        """For every source what each unit of `size` channels depends on: (U, *shape of the source)."""
        units = [self.reached(start, start + size) for start in range(0, self.rows.shape[1], size)]
        return [torch.stack(of_source) for of_source in zip(*units, strict=True)]


def by_channel(source: Source, entries: Tensor) -> Tensor:
    """(*shape of the source) -> (N, C)"""
    entries = entries.movedim(source.axis, -1) if entries.ndim else entries.view(1)
    return entries.reshape(-1, entries.shape[-1])


def why_single(probe: Probe, projections: Iterable[int], queries: Mapping[int, Tensor]) -> str:
    """Why the first and the last channel of x belong together."""
    first, last = probe.channels(0), probe.channels(probe.rows.shape[1] - 1)
    common = {place: first[place] & last[place] for place in projections if (first[place] & last[place]).any()}
    if not any((common[place] & queries[place]).any() for place in queries if place in common):
        return SHARED
    widths = {source.value.shape[source.axis] for source in (probe.feeding[place] for place in common)}
    is_norm = any(source.is_parameter and source.value.ndim == 1 and len(source.value) in widths
                  for source in probe.feeding)
    return NORM if is_norm else MIXED
