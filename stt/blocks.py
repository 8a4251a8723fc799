"""From the decoded calls of a down projection to sites: their members, names and forms."""
from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stt.decode import Decoded
from stt.sites import Member, Site
from stt.trace import Source

LAYERS = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Call:
    """One call of a down projection that decodes."""

    down: Source
    feeding: tuple[Source, ...]
    decoded: Decoded
    is_time_first: bool
    is_alone: bool  # in a trace of the block by itself


def sites_of(calls: Sequence[Call], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Site]:
    """One site for the calls of a down projection that stands alone; one for every expert of a stack, whose layout is
    that of the expert with the most positions."""
    call = max(calls, key=lambda call: call.decoded.rows)
    span = call.down.layout.inputs
    shape = shapes[call.down.parameter]
    is_folded = shape[span.axis] > span.size  # experts one after the other along the same axis
    stacked = len(shape) == 3 and (call.down.layout.expert is not None or call.down.layout.is_batched)
    if not is_folded and not stacked:
        members: dict[tuple, Member] = {}
        for each in calls:
            members |= {(member.tensor, member.side): member for member in _members(each, None)}
        yield _site(list(members.values()), call, len(calls), None)
        return
    count = shape[span.axis] // span.size if is_folded else shape[0]
    for expert in range(count):
        yield _site(list(_members(call, expert)), call, 1, expert)


def _members(call: Call, expert: int | None) -> Iterator[Member]:
    """The tensors of one call: the projection with the gate first, the down projection last, then what is between."""
    places = sorted(call.decoded.projections, key=lambda place: place != call.decoded.gate[0])
    for place in places:
        source = call.feeding[place]
        yield _member(source, "out", call.decoded.projections[place], expert)
    yield _member(call.down, "in", torch.arange(call.down.layout.inputs.size).unsqueeze(1), expert)
    layers = [*(call.feeding[place] for place in places), call.down]
    of_layers = {f"{layer_of(source.parameter)}.bias" for source in layers}
    for place, (axis, channels) in call.decoded.along.items():
        module, _, parameter = call.feeding[place].parameter.rpartition(".")
        if call.feeding[place].parameter in of_layers:
            continue  # goes with its layer, wherever it is added
        in_stack = expert if call.down.layout.expert is not None and call.feeding[place].value.ndim == 2 else None
        side = "added" if call.decoded.added.get(place) == call.decoded.gate[0] else "along"
        yield Member(module, side, channels, parameter, axis, in_stack)


def _member(source: Source, side: str, channels: Tensor, expert: int | None) -> Member:
    module, _, parameter = source.parameter.rpartition(".")
    span = source.layout.outputs if side == "out" else source.layout.inputs
    is_stacked = source.layout.expert is not None or source.layout.is_batched
    if expert is not None and not is_stacked:  # one after the other along the axis
        channels = channels + expert * span.size
    return Member(module, side, channels, parameter, span.axis, expert if is_stacked else None)


def _site(members: Sequence[Member], call: Call, calls: int, expert: int | None) -> Site:
    added = [member for member in members if member.side == "added"]
    projections = [member for member in members if member.side == "out"]
    projections += [member for member in members if member.side == "in"]
    along = tuple(replace(member, side="along") for member in members if member.side in ("along", "added"))
    *feeding, down = projections
    gate = feeding[0].channels[:, call.decoded.gate[1]]
    kind = "glu_fused" if feeding[0].channels.shape[1] == 2 else "plain" if len(feeding) == 1 else "glu"
    owner = common_owner([member.module for member in projections])
    name = owner if expert is None else f"{owner}.{expert}"
    return Site(name, kind, tuple(projections), len(gate), gate, calls, call.is_time_first, along, down.tensor,
                gate_bias=added[0] if added else None)


def form_of(model: nn.Module, site: Site, shared: Collection[str]) -> str:
    if any(member.expert is not None or member.parameter != "weight" for member in site.members):
        return "experts"
    if site.along or not all(isinstance(model.get_submodule(member.module), LAYERS) for member in site.members):
        return "conv"
    return "shared" if tensors_of([site]) & set(shared) else "linear"


def common_owner(names: list[str]) -> str:
    """The innermost module that holds all of `names`."""
    return os.path.commonpath([name.replace(".", "/") for name in names]).replace("/", ".")


def named_once(sites: Collection[Site]) -> list[Site]:
    """Two sites of one owner (or of the whole model) are told apart by their gate projection."""
    sites, owners = list(sites), [site.name for site in sites]
    return [replace(site, name=site.gate_module) if not site.name or owners.count(site.name) > 1 else site
            for site in sites]


def shared_weights(model: nn.Module) -> set[str]:
    """Weights that another layer, or the same one in another place, has too: to replace one module would leave the
    other as it was."""
    places: dict[int, dict[tuple[int, str], str]] = {}  # id of a weight -> (owner, attribute) -> name
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LAYERS):
            owner, _, attribute = name.rpartition(".")
            places.setdefault(id(module.weight), {})[id(model.get_submodule(owner)), attribute] = f"{name}.weight"
    return {name for names in places.values() if len(names) > 1 for name in names.values()}


def tensors_of(sites: Iterable[Site], side: str | None = None) -> set[str]:
    return {member.tensor for site in sites for member in site.members if side in (None, member.side)}


def layer_of(parameter: str) -> str:
    """A layer's name for its weight, the name itself for any other parameter."""
    return parameter.removesuffix(".weight")
