"""Finds the attention heads of a model by structure, from the weightless trace: a unit is a key/value head with all the
query heads that read it (in plain multi-head attention one head)."""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stt.attends import HIDDEN, Seen, never_called, not_recognised, noting_attention, weights_of
from stt.blocks import LAYERS, layer_of
from stt.dummy import dummy_inputs
from stt.errors import InputError
from stt.probe import SHARED, Probe, by_channel, why_single
from stt.resize import noting_calls, with_sizes
from stt.sites import LeftOut, Member, Site, Sites, find_sites, fingerprint, is_repeated, keep_sites, kept_sites
from stt.trace import Source, bit_positions, trace

# Shapes: F channels that the output projection O reads, N rows (positions), C channels of a source, U units.

KEPT_UNDER = "_stt_heads"
ELSEWHERE = "its queries, keys or values are also used elsewhere"
LATENT = "one of its projections is made from another of them (a latent that its heads share)"
CONVOLVED = "a convolution stands between the projections (linear attention or a state-space layer)"
COUNTS = "its heads are not of equal size, one after the other"
ONE_CHANNEL = "every channel is weighted by itself (a gate made from all positions)"
NOT_RUN = "a projection of it was not executed by the dummy input"


@dataclass(frozen=True)
class Attention:
    """One call of an output projection and the sources its heads are made of: supports of shape (U, *source)."""

    down: Source
    supports: list[tuple[Source, Tensor]]
    heads: int  # query heads of a unit
    is_time_first: bool


def find_heads(model: nn.Module, example: Mapping[str, Tensor] | None = None) -> Sites:
    """The attention sites of `model` in the order of execution, one for every output projection whose heads can be told
    apart and cut, and what is left out and why; cached on it until its shapes change.

    `example` is a batch (name -> CPU tensor) for models whose input cannot be made up. Raises InputError when no site
    is found, with the reasons, or if `example` does not fit the model.
    """
    cached = kept_sites(model, KEPT_UNDER)
    if example is None and cached is not None:
        return cached
    found, left_out = discover_heads(model, example)
    if not found:
        reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in left_out[:3]) or "nothing in it attends"
        raise InputError(f"no attention site in {type(model).__name__} ({reasons}): select neurons instead")
    sites = Sites({site.name: site for site in _named_once(found)}, tuple(left_out), fingerprint(model))
    keep_heads(model, sites)
    return sites


def keep_heads(model: nn.Module, heads: Sites) -> None:
    """`find_heads` will answer this until a shape changes."""
    keep_sites(model, heads, KEPT_UNDER)


@torch.inference_mode(False)
@torch.enable_grad()
@torch.autocast("cpu", enabled=False)
def discover_heads(model: nn.Module, example: Mapping[str, Tensor] | None = None) -> tuple[list[Site], list[LeftOut]]:
    """The sites that can be cut, and what attends and is none, with the reason."""
    shown = _Shown()
    with noting_calls(model) as calls:
        _look(model, example, shown)
    sites, refused = _sites(model, shown)
    sites, not_resized = with_sizes(model, sites, calls)
    refused |= not_resized
    of_attention = weights_of(model, shown.attends)
    tensors = {name: {name, *shown.projections[name]} for name, reason in refused.items()
               if reason != ONE_CHANNEL or not shown.projections[name] & of_attention}
    left_out = [LeftOut(layer_of(name), refused[name], True, tuple(sorted(own))) for name, own in tensors.items()]
    explained = {member.tensor for site in sites for member in site.members}.union(*tensors.values())
    left_out += not_recognised(model, shown.attends, shown.sources, explained)
    return sites, [*left_out, *never_called(model, shown.seen, shown.attends)]


@dataclass
class _Shown:
    """What the traces have shown, by the output projection's weight."""

    found: dict[str, list[Attention]] = field(default_factory=lambda: defaultdict(list))
    refused: dict[str, str] = field(default_factory=dict)
    projections: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # what feeds it
    sources: list[Source] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)  # tensors
    attends: dict[str, Seen] = field(default_factory=dict)  # modules


def _sites(model: nn.Module, shown: _Shown) -> tuple[list[Site], dict[str, str]]:
    """Of every output projection the site, or the reason why it is none."""
    sites, refused = [], dict(shown.refused)
    for parameter, attentions in shown.found.items():
        site = _site(model, attentions, shown.seen) if parameter not in refused else refused[parameter]
        if isinstance(site, str):
            refused[parameter] = site
        else:
            sites.append(site)
    elsewhere = _used_elsewhere(sites, shown)
    refused |= {site.members[-1].tensor: ELSEWHERE for site in sites
                if any(member.tensor in elsewhere for member in site.members)}
    return [site for site in sites if site.members[-1].tensor not in refused], refused


def _used_elsewhere(sites: Sequence[Site], shown: _Shown) -> set[str]:
    """Projections that two sites share, or that take part in something that is no attention."""
    uses = Counter(source.parameter for source in shown.sources if source.layout is not None)
    for attention in (attention for attentions in shown.found.values() for attention in attentions):
        uses.subtract(source.parameter for source, _ in attention.supports if source.layout is not None)
        uses.subtract([attention.down.parameter])
    readers = Counter(member.tensor for site in sites for member in site.members)
    return {name for name in readers if uses[name] or readers[name] > 1}


def sites_named(model: nn.Module, names: Iterable[str], other_names: Mapping[str, str] | None = None,
                example: Mapping[str, Tensor] | None = None) -> Sites:
    """The feed-forward sites of the model, and its attention sites too if one of `names` (or what `other_names` makes
    of it) is one; those alone if it has no feed-forward site.

    Raises InputError if it has neither, or if a feed-forward site is called as an attention site is.
    """
    named = {(other_names or {}).get(name, name) for name in names}
    neurons = _or_none(find_sites, model, example)
    modules = {member.module for site in (neurons or {}).values() for member in site.members}
    if neurons is not None and named <= neurons.keys() | modules:
        return neurons
    heads = _or_none(find_heads, model, example)
    if heads is None or not named & heads.keys():
        return find_sites(model, example)
    return heads if neurons is None else with_heads(model, neurons, heads)


def _or_none(find: Callable[..., Sites], model: nn.Module, example: Mapping[str, Tensor] | None) -> Sites | None:
    try:
        return find(model, example)
    except InputError:
        return None


def with_heads(model: nn.Module, neurons: Sites, heads: Sites) -> Sites:
    """Both. Raises InputError for a name that is in both."""
    for name in heads.keys() & neurons.keys():
        raise InputError(f"{name} holds both neurons and heads in {type(model).__name__}: select neurons alone")
    return Sites({**neurons, **heads}, (*neurons.left_out, *heads.left_out), neurons.fingerprint)


def _look(model: nn.Module, example: Mapping[str, Tensor] | None, shown: _Shown) -> None:
    """Trace the model, and every tower it did not execute. A block by itself is not tried on made-up hidden states:
    they would lack what its layers give it for every head, such as a position bias."""
    for prefix, module in model.named_modules():
        if not prefix or isinstance(module, PreTrainedModel) and _is_untouched(prefix, shown.seen):
            given = [] if prefix or example is None else [dict(example)]
            for inputs in given or dummy_inputs(module):
                try:
                    _add(model, prefix, inputs, shown)
                    break
                except InputError:
                    if given:
                        raise


def _is_untouched(name: str, seen: Iterable[str]) -> bool:
    return not any(tensor.startswith(f"{name}.") for tensor in seen)


def _add(model: nn.Module, prefix: str, inputs: Mapping[str, object], shown: _Shown) -> None:
    """What one trace shows of every output projection of a repeated layer; names in the sources become the model's.
    Raises InputError if the inputs do not fit."""
    names = {id(p): name for name, p in model.named_parameters()}
    with noting_attention(model) as attends:
        sources = trace(model.get_submodule(prefix), inputs)
    shown.attends |= {name: seen for name, seen in attends.seen.items() if name not in shown.attends}
    examples = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
    for source in sources:
        tensor = f"{prefix}.{source.parameter}" if prefix else source.parameter
        owner, _, attribute = tensor.rpartition(".")
        source.parameter = names.get(id(getattr(model.get_submodule(owner), attribute)), tensor)
    shown.sources += sources
    shown.seen |= {source.parameter for source in sources}
    for position, down in enumerate(sources):
        if down.layout is None or not is_repeated(model, down.parameter):
            continue
        decoded = _decode(sources, position, examples)
        if decoded is not None:
            shown.projections[down.parameter] |= {sources[place].parameter for place in bit_positions(down.reads)
                                                  if sources[place].layout is not None}
        if isinstance(decoded, str):
            shown.refused.setdefault(down.parameter, decoded)
        elif decoded is not None:
            shown.found[down.parameter].append(decoded)


# ---------------------------------------------------------------- one output projection


def _decode(sources: Sequence[Source], position: int, examples: int) -> Attention | str | None:
    """The heads in the input of one projection; a reason if they cannot be cut, None if it is no attention."""
    down, places = sources[position], list(bit_positions(sources[position].reads))
    feeding = [sources[place] for place in places]
    own = [source for source in feeding if source.layout is not None and source.consumers == {position}]
    rows = down.input.movedim(down.input_axis, -1)
    rows = rows.reshape(-1, rows.shape[-1])  # (N, F)
    if rows.requires_grad and not feeding:
        return HIDDEN
    if not own or not len(rows) or not rows.requires_grad or down.layout.inputs.size != rows.shape[1]:
        return None
    probe = Probe(rows, feeding)
    queries = probe.queries()
    if any(source.is_depthwise for source in feeding):
        is_blockwise = any(int(first.sum()) > 1 for first, source in zip(probe.channels(0), feeding, strict=True)
                           if source.layout is not None)
        return CONVOLVED if queries and is_blockwise else None
    of_head = probe.unit_size(queries)
    if of_head < 2:  # heads of scattered channels; or channel by channel: a gate made from all positions
        first = probe.channels(0)
        if any((first[place] & mask).sum() > 1 for place, mask in queries.items()):
            return COUNTS
        return ONE_CHANNEL if queries and len(rows) > examples else None
    projections = {place: torch.tensor(True) for place, source in enumerate(feeding) if source.layout is not None}
    readers = set().union(*(feeding[place].consumers for place in projections)) - {position}
    if readers:
        return LATENT if readers <= set(places) else ELSEWHERE
    size = probe.unit_size(projections)
    if size == rows.shape[1]:
        reason = why_single(probe, projections, queries)
        if reason != SHARED:
            return reason
        size = of_head
    if rows.shape[1] % size:
        return COUNTS
    supports = probe.by_unit(size)
    shape = down.input.shape
    return Attention(down, list(zip(feeding, supports, strict=True)), size // of_head,
                     len(shape) == 3 and shape[0] != examples == shape[1])


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
        by_unit = torch.stack([by_channel(source, entries).any(0) for entries in supports])  # (U, C)
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
