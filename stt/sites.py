"""Finds the feed-forward sites of any Hugging Face model by structure: no model names, no layer names.

A site is the set of projections whose channels stand or fall together: the rows of the gate and up projections and the
columns of the down projection. It is found from a weightless trace (stt/trace.py): a projection whose input is made,
channel by channel, from other projections that nothing else reads.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stt.errors import InputError

# Shapes: F neurons (units) of a site, N rows (positions) of an activation.


@dataclass(frozen=True)
class Member:
    """One tensor of a site: `channels[i]` along `axis` belong to unit i. `side` is that of a projection ("out" or "in")
    or "along" for what stands between two projections. `expert` is the place in a stack of experts (the first axis).
    `shared` are channels that belong to all units: a key and value head that all query heads read."""

    module: str
    side: str
    channels: Tensor  # (F, n)
    parameter: str = "weight"
    axis: int = 0
    expert: int | None = None
    shared: Tensor | None = None  # (S,)

    @property
    def tensor(self) -> str:
        """The name of the parameter or buffer in the model."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


@dataclass(frozen=True)
class Size:
    """A whole number that an attention module keeps of its heads, as an attribute or, `of_config`, as an entry of the
    configuration it holds; it shrinks as the units do. `module` is inside the attention module."""

    module: str
    name: str
    of_config: bool = False


@dataclass(frozen=True)
class Argument:
    """A tensor an attention module is called with (by place or by keyword) that has entries for every head along an
    axis, such as a position bias."""

    key: int | str
    axis: int


@dataclass(frozen=True)
class Site:
    """A feed-forward block, or the attention of a layer. `members` are its projections, ending with the down (output)
    projection; `gate` are the channels of the first of them whose pre-activation decides (the gate of a GLU, the only
    projection of a plain MLP). `along` are the tensors between them with one entry, or more, a unit. Sites of one
    `group` share tensors, so a width too."""

    name: str
    kind: str  # "plain" | "glu" | "glu_fused" | "attention"
    members: tuple[Member, ...]
    width: int
    gate: Tensor  # (F,)
    calls: int = 1  # in one forward pass; more for a block that several layers share
    is_time_first: bool = False  # it reads (T, B, ...) instead of (B, T, ...), as in XLNet
    along: tuple[Member, ...] = ()
    group: str = ""
    form: str = "linear"  # of nn.Linear or Conv1D alone; "conv", "experts" (stacked tensors), "shared", "attention"
    gate_bias: Member | None = None  # added to the first projection outside it
    is_routed: bool = False  # it reads the positions that a router sends it
    heads: int = 1  # query heads of one unit, in attention
    sizes: tuple[Size | Argument, ...] = ()  # what changes in an attention module besides its tensors

    @property
    def units(self) -> str:
        """What its units are: "neurons" or "heads"."""
        return "heads" if self.kind == "attention" else "neurons"

    @property
    def owner(self) -> str:
        """The innermost module that holds all of it."""
        names = [member.module.replace(".", "/") for member in (*self.members, *self.along)]
        return os.path.commonpath(names).replace("/", ".")

    @property
    def gate_module(self) -> str:
        return self.members[0].module

    @property
    def down_module(self) -> str:
        return self.members[-1].module

    def resized(self, width: int) -> Site:
        """The same block of another width: where its channels would stand."""
        members, along = ([replace(member, channels=_resized(member.channels, width)) for member in group]
                          for group in (self.members, self.along))
        return replace(self, width=width, members=tuple(members), along=tuple(along))

    def pick(self, member: Member, units: Tensor) -> Tensor:
        """Channels of `member` that belong to `units`, in the layer's own order: (k * n,), and those that all share."""
        channels = member.channels[units].flatten()
        return (channels if member.shared is None else torch.cat([channels, member.shared])).sort().values


def _resized(channels: Tensor, width: int) -> Tensor:
    """(F, n) -> (width, n), in the same order: n blocks or n-tuples, behind as many others (experts) as before."""
    units, per_unit = channels.shape
    before = int(channels.min()) // channels.numel() * width * per_unit
    is_tuples = per_unit > 1 and int(channels[0, 1] - channels[0, 0]) == 1
    steps = (per_unit, 1) if is_tuples else (1, width)
    return before + torch.arange(width).unsqueeze(1) * steps[0] + torch.arange(per_unit) * steps[1]


@dataclass(frozen=True)
class LeftOut:
    """Something that looks like a part of a feed-forward block and is not sliced; `is_loss` if the model keeps
    neurons there that the method would have chosen from. `tensors` are its weights."""

    name: str
    reason: str
    is_loss: bool
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sites(Mapping[str, Site]):
    """Read-only mapping site name -> Site, in the order of execution, what was left out and why, and a fingerprint of
    the model's layers."""

    found: dict[str, Site]
    left_out: tuple[LeftOut, ...]
    fingerprint: str

    def __getitem__(self, name: str) -> Site:
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    @property
    def lost(self) -> list[LeftOut]:
        """What a selection would have chosen from and cannot: the model is only partly sliced if there is any."""
        return [entry for entry in self.left_out if entry.is_loss]


def projection_weight(module: nn.Module) -> Tensor:
    """The weight of a Linear or Conv1D as (out, in)."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def channels_first(model: nn.Module, member: Member) -> Tensor:
    """The weights of a member's channels, one row a channel: (F * n, rest)."""
    weight = model.get_parameter(member.tensor)
    weight, axis = (weight, member.axis) if member.expert is None else (weight[member.expert], member.axis - 1)
    return weight.movedim(axis, 0).flatten(1)[member.channels.flatten().to(weight.device)]


def find_sites(model: nn.Module, example: Mapping[str, Tensor] | None = None) -> Sites:
    """The feed-forward sites of `model`; cached on it until its shapes change.

    `example` is a batch (name -> CPU tensor) for models whose input cannot be made up. Raises InputError when no site
    is found, with the reasons.
    """
    from stt.discover import discover

    cached = kept_sites(model)
    if example is None and cached is not None:
        return cached
    found, left_out = discover(model, example)
    if not found:
        reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in left_out[:3]) or "it has none"
        raise InputError(f"no feed-forward site in {type(model).__name__} ({reasons}). "
                         "`stt sites MODEL` shows what was looked at.")
    sites = Sites({site.name: site for site in found}, tuple(left_out), fingerprint(model))
    keep_sites(model, sites)
    return sites


def keep_sites(model: nn.Module, sites: Sites, under: str = "_stt_sites") -> None:
    """`find_sites` (or whatever looks `under` this name) will answer this until a shape changes."""
    model.__dict__[under] = (_shapes(model), sites)


def kept_sites(model: nn.Module, under: str = "_stt_sites") -> Sites | None:
    """What `keep_sites` has kept, if no shape has changed since."""
    shapes, sites = model.__dict__.get(under, (None, None))
    return sites if shapes == _shapes(model) else None


def _shapes(model: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(p.shape)) for name, p in model.named_parameters())


def describe(model: nn.Module) -> dict[str, object]:
    """What was found and what was left out and why, as JSON: the answer of `stt sites`. A model of which nothing can be
    sliced has no sites and all the reasons. `heads` are the query heads of one unit of attention, 0 for neurons."""
    from stt.discover import discover

    found = {"neurons": discover(model, None), "heads": _heads(model)}
    return {"model": type(model).__name__,
            "sites": [{"name": site.name, "kind": site.kind, "form": site.form, "width": site.width,
                       "group": site.group, "members": _own_names(site), "units": units,
                       "heads": site.heads if units == "heads" else 0}
                      for units, (sites, _) in found.items() for site in sites],
            "left_out": [{"name": entry.name, "reason": entry.reason, "is_loss": entry.is_loss, "units": units}
                         for units, (_, left_out) in found.items() for entry in left_out]}


def _heads(model: nn.Module) -> tuple[list[Site], Sequence[LeftOut]]:
    """The attention sites and what is left out."""
    from stt.heads import discover_heads, find_heads

    try:
        heads = find_heads(model)
    except InputError:  # there is none
        return [], discover_heads(model)[1]
    return list(heads.values()), heads.left_out


def _own_names(site: Site) -> list[str]:
    """The projections, as seen from the block."""
    block = site.name.rpartition(".")[0] if site.form == "experts" else site.name
    return [member.tensor.removeprefix(block + ".").removesuffix(".weight") for member in site.members]


def is_repeated(model: nn.Module, name: str) -> bool:
    """True inside a list of layers: a classification head or a pooler is not."""
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList) for i in range(1, len(parts)))


def fingerprint(model: nn.Module) -> str:
    """sha256 over names and shapes of the parameters in repeated layers: equal for the same dense model with any head
    and vocabulary, and whatever of it this version of the library can slice."""
    shapes = [f"{name}{tuple(p.shape)}" for name, p in model.named_parameters() if is_repeated(model, name)]
    return hashlib.sha256("".join(shapes).encode()).hexdigest()
