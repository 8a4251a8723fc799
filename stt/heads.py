"""Finds the attention heads of a model by structure, from the weightless trace: a unit is a key/value head with all the
query heads that read it (in plain multi-head attention one head)."""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stt.blocks import LAYERS, layer_of
from stt.dummy import dummy_inputs
from stt.errors import InputError
from stt.resize import noting_calls, with_sizes
from stt.sites import LeftOut, Member, Site, Sites, find_sites, fingerprint, is_repeated, keep_sites, kept_sites
from stt.trace import Source, bit_positions, trace

# Shapes: F channels that the output projection O reads, N rows (positions), C channels of a source, U units.

KEPT_UNDER = "_stt_heads"
ELSEWHERE = "its queries, keys or values are also used elsewhere"
LATENT = "one of its projections is made from another of them (a latent that its heads share)"
CONVOLVED = "a convolution stands between the projections (linear attention or a state-space layer)"
SHARED = "all its query heads share a key and value head"
MIXED = "it has a single head, or something between the projections mixes the heads"
NORM = "a norm across all heads stands between the projections"
COUNTS = "its heads are not of equal size, one after the other"
NEVER = "never called by the dummy input (pass a batch as find_heads(model, example=...))"
NOT_RUN = "a projection of it was not executed by the dummy input"


@dataclass(frozen=True)
class Attention:
    """One call of an output projection and the sources its heads are made of: supports of shape (U, *source)."""

    down: Source
    supports: list[tuple[Source, Tensor]]
    heads: int  # query heads of a unit
    is_time_first: bool


@torch.inference_mode(False)
@torch.enable_grad()
@torch.autocast("cpu", enabled=False)
def find_heads(model: nn.Module, example: Mapping[str, Tensor] | None = None) -> Sites:
    """The attention sites of `model` in the order of execution, one for every output projection whose heads can be told
    apart and cut, and what is left out and why; cached on it until its shapes change.

    `example` is a batch (name -> CPU tensor) for models whose input cannot be made up. Raises InputError when no site
    is found, with the reasons, or if `example` does not fit the model.
    """
    cached = kept_sites(model, KEPT_UNDER)
    if example is None and cached is not None:
        return cached
    found, left_out = _discover(model, example)
    if not found:
        reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in left_out[:3]) or "none was recognised"
        raise InputError(f"no attention site in {type(model).__name__} ({reasons}): select neurons instead")
    sites = Sites({site.name: site for site in _named_once(found)}, tuple(left_out), fingerprint(model))
    keep_heads(model, sites)
    return sites


def keep_heads(model: nn.Module, heads: Sites) -> None:
    """`find_heads` will answer this until a shape changes."""
    keep_sites(model, heads, KEPT_UNDER)


def _discover(model: nn.Module, example: Mapping[str, Tensor] | None) -> tuple[list[Site], list[LeftOut]]:
    """The sites that can be cut, and the output projections of which none is made, with the reason."""
    found: dict[str, list[Attention]] = defaultdict(list)
    refused: dict[str, str] = {}
    seen: set[str] = set()
    uses: Counter[str] = Counter()  # products with every weight, and below those that are none of an attention
    with noting_calls(model) as calls:
        for sources, examples in _traces(model, example, seen):
            uses.update(source.parameter for source in sources if source.layout is not None)
            _collect(model, sources, examples, found, refused)
    for attention in (attention for attentions in found.values() for attention in attentions):
        uses.subtract(source.parameter for source, _ in attention.supports if source.layout is not None)
        uses.subtract([attention.down.parameter])
    sites = []
    for parameter, attentions in found.items():
        site = _site(model, attentions, seen) if parameter not in refused else refused[parameter]
        if isinstance(site, str):
            refused[parameter] = site
        else:
            sites.append(site)
    readers = Counter(member.tensor for site in sites for member in site.members)
    elsewhere = {name for name in readers if uses[name] or readers[name] > 1}
    refused |= {site.members[-1].tensor: ELSEWHERE for site in sites
                if any(member.tensor in elsewhere for member in site.members)}
    resized, not_resized = with_sizes(model, [s for s in sites if s.members[-1].tensor not in refused], calls)
    refused |= not_resized
    left_out = [LeftOut(layer_of(name), reason, True, (name,)) for name, reason in refused.items()]
    return resized, left_out + [LeftOut(name, NEVER, True) for name, module in model.named_modules()
                                if isinstance(module, nn.ModuleList) and not is_repeated(model, name)
                                and not any(parameter.startswith(name + ".") for parameter in seen)]


def sites_named(model: nn.Module, names: Iterable[str], other_names: Mapping[str, str] | None = None) -> Sites:
    """The feed-forward sites of the model, and its attention sites too if one of `names` (or what `other_names` makes
    of it) is one.

    Raises InputError if the model has no feed-forward site, or if one of them is called as an attention site is.
    """
    neurons = find_sites(model)
    known = set(neurons) | {member.module for site in neurons.values() for member in site.members}
    unknown = {(other_names or {}).get(name, name) for name in names} - known
    if not unknown:
        return neurons
    try:
        heads = find_heads(model)
    except InputError:
        return neurons
    return with_heads(model, neurons, heads) if unknown & heads.keys() else neurons


def with_heads(model: nn.Module, neurons: Sites, heads: Sites) -> Sites:
    """Both. Raises InputError for a name that is in both."""
    for name in heads.keys() & neurons.keys():
        raise InputError(f"{name} holds both neurons and heads in {type(model).__name__}: select neurons alone")
    return Sites({**neurons, **heads}, (*neurons.left_out, *heads.left_out), neurons.fingerprint)


def _traces(model: nn.Module, example: Mapping[str, Tensor] | None,
            seen: set[str]) -> Iterator[tuple[list[Source], int]]:
    """The trace of the model, then of every tower it did not execute, each with its number of examples; names in the
    sources are the model's."""
    names = {id(p): name for name, p in model.named_parameters()}
    for prefix, module in model.named_modules():
        if prefix and (not isinstance(module, PreTrainedModel) or any(name.startswith(prefix + ".") for name in seen)):
            continue
        sources, examples = _first_trace(module, [] if prefix or example is None else [dict(example)])
        for source in sources:
            owner, _, attribute = source.parameter.rpartition(".")
            owner = f"{prefix}.{owner}" if prefix and owner else prefix or owner
            value = getattr(model.get_submodule(owner), attribute)
            source.parameter = names.get(id(value), f"{owner}.{attribute}" if owner else attribute)
        seen |= {source.parameter for source in sources}
        yield sources, examples


def _first_trace(module: nn.Module, given: Sequence[Mapping[str, Tensor]]) -> tuple[list[Source], int]:
    """The trace on what is given, or on the first made-up batch that fits, and its number of examples; nothing if none
    does. Raises InputError if what is given does not fit."""
    for inputs in given or dummy_inputs(module):
        try:
            return trace(module, inputs), len(next(value for value in inputs.values() if isinstance(value, Tensor)))
        except InputError:
            if given:
                raise
    return [], 0


def _collect(model: nn.Module, sources: Sequence[Source], examples: int, found: dict[str, list[Attention]],
             refused: dict[str, str]) -> None:
    """Add what one trace shows of every output projection of a repeated layer."""
    for position, down in enumerate(sources):
        if down.layout is None or not is_repeated(model, down.parameter):
            continue
        decoded = _decode(sources, position, examples)
        if isinstance(decoded, str):
            refused.setdefault(down.parameter, decoded)
        elif decoded is not None:
            found[down.parameter].append(decoded)


# ---------------------------------------------------------------- one output projection


def _decode(sources: Sequence[Source], position: int, examples: int) -> Attention | str | None:
    """The heads in the input of one projection; a reason if they cannot be cut, None if it is no attention."""
    down, places = sources[position], list(bit_positions(sources[position].reads))
    feeding = [sources[place] for place in places]
    own = [source for source in feeding if source.layout is not None and source.consumers == {position}]
    rows = down.input.movedim(down.input_axis, -1)
    rows = rows.reshape(-1, rows.shape[-1])  # (N, F)
    if not own or not len(rows) or not rows.requires_grad or down.layout.inputs.size != rows.shape[1]:
        return None
    probe = _Probe(rows, feeding)
    queries = probe.queries()
    if any(source.is_depthwise for source in feeding):
        is_blockwise = any(int(first.sum()) > 1 for first, source in zip(probe.channels(0), feeding, strict=True)
                           if source.layout is not None)
        return CONVOLVED if queries and is_blockwise else None
    of_head = probe.unit_size(queries)
    if of_head < 2:  # heads of scattered channels; or channel by channel: a gate made from all positions
        first = probe.channels(0)
        return COUNTS if any((first[place] & mask).sum() > 1 for place, mask in queries.items()) else None
    projections = {place: torch.tensor(True) for place, source in enumerate(feeding) if source.layout is not None}
    readers = set().union(*(feeding[place].consumers for place in projections)) - {position}
    if readers:
        return LATENT if readers <= set(places) else ELSEWHERE
    size = probe.unit_size(projections)
    if size == rows.shape[1]:
        reason = _why_single(probe, projections, queries)
        if reason != SHARED:
            return reason
        size = of_head
    if rows.shape[1] % size:
        return COUNTS
    supports = probe.by_unit(size)
    shape = down.input.shape
    return Attention(down, list(zip(feeding, supports, strict=True)), size // of_head,
                     len(shape) == 3 and shape[0] != examples == shape[1])


class _Probe:
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
        return [_by_channel(source, entries).any(0)
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
            counts = _by_channel(source, slope != 0).sum(0)  # (C,)
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


def _by_channel(source: Source, entries: Tensor) -> Tensor:
    """(*shape of the source) -> (N, C)"""
    entries = entries.movedim(source.axis, -1) if entries.ndim else entries.view(1)
    return entries.reshape(-1, entries.shape[-1])


def _why_single(probe: _Probe, projections: Iterable[int], queries: Mapping[int, Tensor]) -> str:
    """Why the first and the last channel of x belong together."""
    first, last = probe.channels(0), probe.channels(probe.rows.shape[1] - 1)
    common = {place: first[place] & last[place] for place in projections if (first[place] & last[place]).any()}
    if not any((common[place] & queries[place]).any() for place in queries if place in common):
        return SHARED
    widths = {source.value.shape[source.axis] for source in (probe.feeding[place] for place in common)}
    is_norm = any(source.is_parameter and source.value.ndim == 1 and len(source.value) in widths
                  for source in probe.feeding)
    return NORM if is_norm else MIXED


# ---------------------------------------------------------------- sites


def _site(model: nn.Module, calls: Sequence[Attention], seen: set[str]) -> Site | str:
    """The site of an output projection, from all its calls; or why it is none."""
    all_members: list[dict[tuple[str, str], Member]] = []
    for call in calls:
        members = _members(model, call)
        if isinstance(members, str):
            return members
        all_members.append(members)
    merged = {key: member for members in all_members for key, member in members.items()}
    if any(not torch.equal(member.channels, merged[key].channels)
           for members in all_members for key, member in members.items()):
        return COUNTS
    projections = tuple(member for member in merged.values() if member.side == "out")
    down = next(member for member in merged.values() if member.side == "in")
    along = tuple(member for member in merged.values() if member.side == "along")
    site = Site("", "attention", (*projections, down), len(down.channels), projections[0].channels[:, 0], len(calls),
                calls[0].is_time_first, along, down.tensor, "attention", heads=calls[0].heads)
    return NOT_RUN if _is_not_run(model, site, seen) else replace(site, name=site.owner)


def _members(model: nn.Module, call: Attention) -> dict[tuple[str, str], Member] | str:
    """The members by tensor and side: projections, O, and what has entries for every unit between them."""
    members: dict[tuple[str, str], Member] = {}
    for source, supports in call.supports:
        member = _member(source, supports)
        if isinstance(member, str):
            return member
        if member is None:
            continue
        shared = 0 if member.shared is None else len(member.shared)
        if _size(model, member) != member.channels.numel() + shared:
            return COUNTS
        known = members.setdefault((member.tensor, member.side), member)
        if not torch.equal(known.channels, member.channels):
            return COUNTS
    span = call.down.layout.inputs
    units = len(call.supports[0][1])
    module, _, parameter = call.down.parameter.rpartition(".")
    down = Member(module, "in", torch.arange(span.size).view(units, -1), parameter, span.axis)
    if _size(model, down) != span.size:
        return ELSEWHERE
    biases = {f"{module}.bias" for module in (member.module for member in members.values() if member.side == "out")}
    return {key: member for key, member in members.items() if member.side == "out" or member.tensor not in biases} | {
        (down.tensor, "in"): down}


def _size(model: nn.Module, member: Member) -> int:
    return getattr(model.get_submodule(member.module), member.parameter).shape[member.axis]


def _member(source: Source, supports: Tensor) -> Member | str | None:
    """What of a source belongs to each unit; None if all units share all of it, a reason if neither is so."""
    module, _, parameter = source.parameter.rpartition(".")
    if source.layout is not None:
        by_unit = torch.stack([_by_channel(source, entries).any(0) for entries in supports])  # (U, C)
        shared = by_unit.all(0)
        if shared.all():
            return None
        channels = _channels(by_unit & ~shared, ~shared)
        return COUNTS if channels is None else Member(
            module, "out", channels, parameter, source.layout.outputs.axis,
            shared=shared.nonzero().flatten() if shared.any() else None)
    if (supports == supports[0]).all():
        return None
    axes = range(source.value.ndim) if source.is_parameter else [source.axis % source.value.ndim]
    for axis in axes:
        by_unit = supports.movedim(axis + 1, 1).reshape(len(supports), source.value.shape[axis], -1).any(2)  # (U, n)
        channels = _channels(by_unit, torch.tensor(True))
        if channels is not None:
            if len(source.consumers) > 1:
                return None  # it stays whole: the layers may be given a part of it
            return Member(module, "along", channels, parameter, axis if source.is_parameter else 1)
    return f"reads {source.parameter} between the projections"


def _channels(by_unit: Tensor, own: Tensor) -> Tensor | None:
    """(U, C) marks -> (U, n); None unless every one of the `own` channels (C,) belongs to one unit, and every unit has
    equally many."""
    counts = by_unit.sum(1)
    if (by_unit.sum(0) != own).any() or counts.min() != counts.max():
        return None
    return by_unit.nonzero()[:, 1].view(len(by_unit), -1)


def _is_not_run(model: nn.Module, site: Site, seen: set[str]) -> bool:
    """True if beside the projections stands one as large that no trace has executed (queries for global tokens)."""
    shapes = {tuple(sorted(model.get_parameter(member.tensor).shape)) for member in site.members}
    names = {id(p): name for name, p in model.named_parameters()}
    return any(isinstance(module, LAYERS) and names[id(module.weight)] not in seen
               and tuple(sorted(module.weight.shape)) in shapes
               for module in model.get_submodule(site.owner).modules())


def _named_once(sites: Sequence[Site]) -> list[Site]:
    """Two sites of one owner are told apart by their output projection."""
    owners = [site.name for site in sites]
    return [replace(site, name=site.down_module) if not site.name or owners.count(site.name) > 1 else site
            for site in sites]
