"""The channel map between two projections: which channels of what feeds a down projection belong to which of its units.

Shapes: F units, N rows (positions), C channels of a source.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stt.trace import Source

MIXES_POSITIONS = "mixes positions (attention, or a norm over them, stands between)"
NO_BLOCK = "no projection reaches it"
COUNTS = "channel counts do not fit"
MIXES_NEURONS = "mixes neurons (a norm or another projection stands between)"


@dataclass(frozen=True)
class Decoded:
    """What feeds the units of one call of a down projection: of every projection its channels (F, n), of every
    parameter used channel by channel its axis and channels; and `gate` = (which projection, which of its n channels).
    """

    projections: dict[int, Tensor]  # place in `feeding` -> (F, n)
    along: dict[int, tuple[int, Tensor]]  # place -> axis, (F, n)
    added: dict[int, int]  # place of a parameter that is added to a projection -> place of that projection
    gate: tuple[int, int]
    rows: int  # positions of the call


def decode(down: Source, feeding: Sequence[Source]) -> Decoded | str:
    """Which channels of each feeding source make unit j, for every j; or why that has no answer.

    Three vector-Jacobian products at one row, with weights 1, 1 + j/F and 1 + p(j)/F for a permutation p: the ratio of
    the first two names the one j that a feeding channel reaches, the third confirms it.
    """
    x = down.input.movedim(down.input_axis, -1)
    rows = x.reshape(-1, x.shape[-1])
    if not rows.requires_grad or not len(rows) or down.layout.inputs.size != rows.shape[1]:
        return NO_BLOCK
    probe = _Probe(rows, feeding)
    found = {place: of_place for place, of_place in enumerate(probe.at(max(len(rows) // 2 - 1, 0)))
             if of_place is not None and (of_place != 0).any()}
    if not found:  # neurons that decide together which of them are zero, here all; or attention to a padded position
        return MIXES_NEURONS if sum(source.layout is not None for source in feeding) <= 2 else NO_BLOCK
    products = {place: of_place for place, of_place in found.items() if (of_place[0] != 0).any()}
    reached = {feeding[place].parameter for place in products}
    if any(source.layout is not None and source.parameter not in reached for source in feeding):
        return NO_BLOCK  # attention over a single position
    is_local = _is_local(products, feeding)
    if not is_local and not any(feeding[place].is_depthwise for place in products):
        return MIXES_POSITIONS
    channels, along = {}, {}
    for place, of_place in products.items():
        source = feeding[place]
        if source.is_parameter:
            standing = _along(of_place, probe)
            if isinstance(standing, str):
                reason = f"reads the parameter {source.parameter} between the projections"
                return reason if is_local else MIXES_POSITIONS
            if standing is not None:
                along[place] = standing
        elif source.layout is None:
            return f"reads {source.parameter} between the projections"
        elif source.value.shape[source.axis] >= probe.width:  # fewer channels scale all units alike
            of_units = _channels(_by_position(of_place, source), probe)
            if isinstance(of_units, str):
                return of_units if is_local else MIXES_POSITIONS
            channels[place] = of_units
    if not channels:
        return COUNTS
    added = {place: other for place in along for other in channels if _is_added(products[place],
             _by_position(products[other], feeding[other]))}
    return Decoded(channels, along, added, _gate(probe, feeding, channels), len(rows))


def _is_local(products: dict[int, Tensor], feeding: Sequence[Source]) -> bool:
    """True if the row is made of one position of every projection."""
    return all(_by_position(of_place[:1], feeding[place]).abs().sum(-1).count_nonzero() == 1
               for place, of_place in products.items() if feeding[place].layout is not None)


def _by_position(products: Tensor, source: Source) -> Tensor:
    """(k, *shape of the source) -> (k, N, C)"""
    return products.movedim(source.axis % source.value.ndim + 1, -1).flatten(1, -2)


class _Probe:
    """Vector-Jacobian products of one row of x with respect to every feeding source."""

    def __init__(self, rows: Tensor, feeding: Sequence[Source]):
        self.rows = rows
        self.width = rows.shape[1]
        self.values = [source.value for source in feeding]
        self.permutation = torch.randperm(self.width, generator=torch.Generator().manual_seed(1))
        counted = torch.stack([torch.zeros(self.width), torch.arange(self.width), self.permutation])
        self.weights = counted / self.width + 1

    def at(self, row: int) -> list[Tensor | None]:
        """(3, *shape) for every source that the row depends on."""
        jacobians = [torch.autograd.grad(self.rows[row] @ weights, self.values, retain_graph=True, allow_unused=True)
                     for weights in self.weights]
        return [None if of_source[0] is None else torch.stack(of_source) for of_source in zip(*jacobians, strict=True)]

    def units(self, products: Tensor) -> Tensor | None:
        """The unit that each channel reaches: (3, M) -> (M,); None if some reaches none or several."""
        if (products[0] == 0).any():
            return None
        place = (products[1] / products[0] - 1) * self.width
        units = place.round().long()
        if not place.isfinite().all() or (place - units).abs().max() > 0.1 or units.min() < 0 \
                or units.max() >= self.width:
            return None
        confirmed = (products[2] / products[0] - 1) * self.width - self.permutation[units]
        return units if confirmed.abs().max() <= 0.1 else None


def _channels(products: Tensor, probe: _Probe) -> Tensor | str:
    """The channels (F, n) of a projection, from products (3, N, C)."""
    if products.shape[-1] % probe.width:
        return COUNTS
    units = probe.units(products.sum(1))
    if units is None:
        return MIXES_NEURONS
    channels = _by_unit(units, probe.width)
    if channels is None or not _is_in_order(channels):
        return "the neurons change places between the projections"
    return channels


def _along(products: Tensor, probe: _Probe) -> tuple[int, Tensor] | str | None:
    """The axis of a parameter that runs along the units, and its channels (F, n), from products (3, *shape); None if
    the parameter is shared by all units, a reason if it is neither."""
    index = (products[0] != 0).nonzero()  # (M, ndim)
    units = probe.units(products[:, products[0] != 0])
    if units is None:
        is_shared = all(size % probe.width for size in products.shape[1:])
        return None if is_shared else MIXES_NEURONS
    for axis, size in enumerate(products.shape[1:]):
        unit_of = torch.full((size,), -1)
        unit_of[index[:, axis]] = units
        if torch.equal(unit_of[index[:, axis]], units):
            channels = _by_unit(unit_of, probe.width)
            if channels is not None:
                return axis, channels
    return MIXES_NEURONS


def _is_added(products: Tensor, of_projection: Tensor) -> bool:
    """True if a parameter has the slopes of a projection's output, from products (3, *shape) and (3, N, C)."""
    slopes, wanted = products[0][products[0] != 0], of_projection[0].sum(0)
    return slopes.shape == wanted.shape and torch.equal(slopes, wanted)


def _by_unit(units: Tensor, width: int) -> Tensor | None:
    """The channels of every unit, in the layer's own order: (F, n); None unless all units have equally many. A channel
    of no unit is -1."""
    counts = torch.bincount(units[units >= 0], minlength=width)
    if len(counts) != width or counts.min() != counts.max():
        return None
    return units.sort(stable=True).indices[(units < 0).sum():].view(width, -1)


def _is_in_order(channels: Tensor) -> bool:
    """True if the units (F, n) follow one another, in one block, in n blocks or as n-tuples."""
    consecutive = torch.arange(channels.numel())
    return any(torch.equal(channels, layout) for layout in (consecutive.view(channels.shape[::-1]).T,
                                                            consecutive.view(channels.shape)))


def _gate(probe: _Probe, feeding: Sequence[Source], channels: dict[int, Tensor]) -> tuple[int, int]:
    """(place, column) of the gate: the factor the product is not linear in; of a ReLU gate, the one whose negative
    values make it vanish; the first one otherwise. Judged at the last row, whose values have mixed signs."""
    columns = [(place, n) for place, of_place in channels.items() for n in range(of_place.shape[1])]
    if len(columns) == 1:
        return columns[0]
    x, products = probe.rows[-1].detach(), probe.at(len(probe.rows) - 1)
    picked = {}
    for place, n in columns:
        source = feeding[place]
        if products[place] is None:
            return columns[0]
        value, slope = (t.movedim(source.axis % source.value.ndim, -1).reshape(-1, source.value.shape[source.axis])
                        for t in (source.value.detach(), products[place][0]))
        touched = slope.abs().sum(-1).nonzero().flatten()
        if len(touched) != 1:
            return columns[0]
        picked[place, n] = value[touched[0], channels[place][:, n]], slope[touched[0], channels[place][:, n]]
    bent = [c for c, (value, slope) in picked.items() if not torch.allclose(value * slope, x, rtol=1e-3, atol=1e-5)]
    if len(bent) == 1:
        return bent[0]
    vanishing = [c for c, (value, _) in picked.items() if torch.equal(x == 0, value < 0)]
    return (vanishing or bent or columns)[0]
