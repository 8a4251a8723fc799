"""Finds the feed-forward sites of any Hugging Face model by structure: no model names, no layer names.

A site is the set of projections whose channels stand or fall together: the rows of the gate and up projections and the
columns of the down projection. It is found from a weightless trace (stt/trace.py): a linear layer whose input is made,
channel by channel and position by position, from one or two other linear layers that nothing else reads.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stt.errors import InputError
from stt.trace import Source, bit_positions, dummy_inputs, trace

# Shapes: F neurons (units) of a site, N rows (positions) of an activation.


@dataclass(frozen=True)
class Member:
    """One projection of a site: `channels[i]` are the output (side "out") or input (side "in") channels of unit i."""

    module: str
    side: str
    channels: Tensor  # (F, n)


@dataclass(frozen=True)
class Site:
    """A feed-forward block. `members` end with the down projection; `gate` are the channels of the first member whose
    pre-activation decides (the gate of a GLU, the only projection of a plain MLP)."""

    name: str
    kind: str  # "plain" | "glu" | "glu_fused"
    members: tuple[Member, ...]
    width: int
    gate: Tensor  # (F,)
    calls: int = 1  # in one forward pass; more for a block that several layers share
    is_time_first: bool = False  # it reads (T, B, ...) instead of (B, T, ...), as in XLNet

    @property
    def gate_module(self) -> str:
        return self.members[0].module

    @property
    def down_module(self) -> str:
        return self.members[-1].module

    def pick(self, member: Member, units: Tensor) -> Tensor:
        """Channels of `member` that belong to `units`, in the layer's own order: (k * n,)."""
        return member.channels[units].flatten().sort().values


@dataclass(frozen=True)
class LeftOut:
    """Something that looks like a part of a feed-forward block and is not sliced; `is_loss` if the model keeps
    neurons there that the method would have chosen from."""

    name: str
    reason: str
    is_loss: bool


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


def find_sites(model: nn.Module, example: Mapping[str, Tensor] | None = None) -> Sites:
    """The feed-forward sites of `model`; cached on it until its shapes change.

    `example` is a batch (name -> CPU tensor) for models whose input cannot be made up. Raises InputError when no site
    is found, with the reasons.
    """
    shapes = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
    cached = model.__dict__.get("_stt_sites")
    if example is None and cached is not None and cached[0] == shapes:
        return cached[1]
    found, left_out = _looked_at(model, example)
    if not found:
        reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in left_out[:3]) or "it has none"
        raise InputError(f"no feed-forward site in {type(model).__name__} ({reasons}). "
                         "`stt sites MODEL` shows what was looked at.")
    sites = Sites({site.name: site for site in found}, tuple(left_out), _fingerprint(model))
    model.__dict__["_stt_sites"] = (shapes, sites)
    return sites


def _fingerprint(model: nn.Module) -> str:
    """sha256 over names and shapes of the parameters in repeated layers: equal for the same dense model with any head
    and vocabulary, and whatever of it this version of the library can slice."""
    shapes = [f"{name}{tuple(p.shape)}" for name, p in model.named_parameters() if _is_repeated(model, name)]
    return hashlib.sha256("".join(shapes).encode()).hexdigest()


def describe(model: nn.Module) -> dict[str, object]:
    """What was found and what was left out and why, as JSON: the answer of `stt sites`. A model of which nothing can be
    sliced has no sites and all the reasons."""
    sites, left_out = _looked_at(model, None)
    return {"model": type(model).__name__,
            "sites": [{"name": site.name, "kind": site.kind, "width": site.width,
                       "members": [member.module.removeprefix(site.name + ".") for member in site.members]}
                      for site in sites],
            "left_out": [{"name": entry.name, "reason": entry.reason, "is_loss": entry.is_loss} for entry in left_out]}


@torch.inference_mode(False)
@torch.enable_grad()
@torch.autocast("cpu", enabled=False)
def _looked_at(model: nn.Module, example: Mapping[str, Tensor] | None) -> tuple[list[Site], list[LeftOut]]:
    inputs = dummy_inputs(model) if example is None else dict(example)
    sources = trace(model, inputs, is_made_up=example is None)
    candidates, refused = _candidates(model, sources, _batch_size(model, inputs))
    found, side_families = _main_families(model, candidates)
    return found, refused + side_families + _unseen(model, sources)


# ---------------------------------------------------------------- candidates: down projections and what feeds them


def _batch_size(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    return len(inputs.get(model.main_input_name, next(v for v in inputs.values() if isinstance(v, Tensor))))


def _candidates(model: nn.Module, sources: list[Source], examples: int) -> tuple[list[Site], list[LeftOut]]:
    """Every pair (feeding projections, down projection) that decodes, one entry for a block that is called often."""
    sites: dict[str, Site] = {}
    refused: dict[str, LeftOut] = {}
    explained: set[int] = set()  # positions of the calls that belong to a decoded pair
    for position, down in enumerate(sources):
        feeding = [sources[i] for i in bit_positions(down.reads)]
        linear = [source for source in feeding if source.is_linear]
        if not down.is_linear or not 1 <= len(linear) <= 2:
            continue
        if any(source.consumers != {position} for source in linear):
            continue
        biases = {source.parameter.removesuffix("weight") + "bias" for source in linear}  # added outside F.linear
        others = [s.parameter for s in feeding if not s.is_linear and s.parameter not in biases]
        decoded = _decode(down.input, [source.value for source in linear])
        name = down.parameter.removesuffix(".weight")
        if isinstance(decoded, str):
            if decoded != MIXES_POSITIONS:
                refused[name] = LeftOut(name, decoded, is_loss=True)
        elif others:
            refused[name] = LeftOut(name, f"reads the parameter {others[0]} between the projections", is_loss=True)
        else:
            site = _site(name, [s.parameter.removesuffix(".weight") for s in linear], *decoded)
            shape = down.input.shape
            sites[name] = replace(site, calls=sites[name].calls + 1 if name in sites else 1,
                                  is_time_first=len(shape) == 3 and shape[0] != examples == shape[1])
            explained |= {position, *bit_positions(down.reads)}
    used_elsewhere = {source.parameter.removesuffix(".weight") for position, source in enumerate(sources)
                      if source.is_linear and position not in explained}
    used_elsewhere |= _shared(model)
    for name, site in list(sites.items()):
        modules = [m.module for m in site.members]
        if used_elsewhere.intersection(modules) or len(set(modules)) < len(modules):
            refused[name] = LeftOut(name, "a projection of it is also used elsewhere", is_loss=True)
            del sites[name]
        used_elsewhere.update(modules)
    return _named_once(sites.values()), [entry for name, entry in refused.items() if _is_repeated(model, name)]


def _shared(model: nn.Module) -> set[str]:
    """Linear layers whose weight another layer, or the same one in another place, uses too: replacing one module would
    leave the other as it was."""
    places: dict[int, dict[tuple[int, str], str]] = {}  # id of a weight -> (owner, attribute) -> name
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | Conv1D):
            owner, _, attribute = name.rpartition(".")
            places.setdefault(id(module.weight), {})[id(model.get_submodule(owner)), attribute] = name
    return {name for names in places.values() if len(names) > 1 for name in names.values()}


def _site(down: str, feeding: list[str], channels: list[Tensor], gate: tuple[int, int]) -> Site:
    """`channels[m]` (F, n) of each feeding projection; `gate` = (which projection, which of its n channels)."""
    first, column = gate
    order = [first] + [m for m in range(len(feeding)) if m != first]
    members = [Member(feeding[m], "out", channels[m]) for m in order]
    width = len(channels[first])
    members.append(Member(down, "in", torch.arange(width).unsqueeze(1)))
    kind = "glu" if len(feeding) == 2 else "glu_fused" if channels[first].shape[1] == 2 else "plain"
    return Site(_common_owner([m.module for m in members]), kind, tuple(members), width, channels[first][:, column])


def _common_owner(names: list[str]) -> str:
    """The innermost module that holds all of `names`."""
    return os.path.commonpath([name.replace(".", "/") for name in names]).replace("/", ".")


def _named_once(sites: Collection[Site]) -> list[Site]:
    """Two sites of one owner (or of the whole model) are told apart by their gate projection."""
    sites, owners = list(sites), [site.name for site in sites]
    return [replace(site, name=site.gate_module) if not site.name or owners.count(site.name) > 1 else site
            for site in sites]


# ---------------------------------------------------------------- the channel map between two layers

MIXES_POSITIONS = "mixes positions"


def _decode(x: Tensor, feeding: list[Tensor]) -> tuple[list[Tensor], tuple[int, int]] | str:
    """Which channels of each feeding output make input channel j, for every j; or why that has no answer.

    Three vector-Jacobian products at one row, with weights 1, 1 + j/F and 1 + p(j)/F for a permutation p: the ratio of
    the first two names the one j that a feeding channel reaches, the third confirms it.
    """
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    permutation = torch.randperm(width, generator=torch.Generator().manual_seed(1))
    weights = torch.stack([torch.zeros(width), torch.arange(width), permutation]) / width + 1
    channels, signed = [], []
    for row, is_signed in ((len(rows) // 2 - 1, False), (len(rows) - 1, True)):
        jacobians = [torch.autograd.grad(rows[row] @ w, feeding, retain_graph=True, allow_unused=True) for w in weights]
        for m, value in enumerate(feeding):
            if jacobians[0][m] is None:
                return "a projection does not reach it"
            products = torch.stack([j[m].reshape(-1, value.shape[-1]) for j in jacobians])  # (3, N, out)
            touched = products[0].abs().sum(-1).nonzero().flatten()
            if len(touched) > 1 or (len(touched) == 0 and not is_signed):
                return MIXES_POSITIONS
            if value.shape[-1] % width or sum(v.shape[-1] for v in feeding) not in (width, 2 * width):
                return "channel counts do not fit"
            if is_signed:
                signed.append((value.reshape(-1, value.shape[-1])[touched[0]], products[0, touched[0]])
                              if len(touched) else None)
                continue
            reached = _reached(products[:, touched[0]], permutation)
            if reached is None:
                return "mixes neurons (a norm or another projection stands between)"
            channels.append(reached)
    per_unit = [_by_unit(reached, width) for reached in channels]
    if not all(_is_in_order(c) for c in per_unit):
        return "the neurons change places between the projections"
    return per_unit, _gate(rows[-1].detach(), per_unit, signed)


def _reached(products: Tensor, permutation: Tensor) -> Tensor | None:
    """Input channel reached by each feeding channel: (out,); None if some channel reaches none or several."""
    width = len(permutation)
    if (products[0] == 0).any():
        return None
    position = (products[1] / products[0] - 1) * width
    reached = position.round().long()
    if (position - reached).abs().max() > 0.1 or reached.min() < 0 or reached.max() >= width:
        return None
    confirmed = (products[2] / products[0] - 1) * width - permutation[reached]
    return reached if confirmed.abs().max() <= 0.1 else None


def _by_unit(reached: Tensor, width: int) -> Tensor:
    """The channels of every unit, in the layer's own order: (F, n)."""
    return reached.sort(stable=True).indices.view(width, -1)


def _is_in_order(channels: Tensor) -> bool:
    """True if the units (F, n) follow one another, in one block, in n blocks or as n-tuples."""
    consecutive = torch.arange(channels.numel())
    return any(torch.equal(channels, layout) for layout in (consecutive.view(channels.shape[::-1]).T,
                                                            consecutive.view(channels.shape)))


def _gate(x: Tensor, channels: list[Tensor], signed: list[tuple[Tensor, Tensor] | None]) -> tuple[int, int]:
    """(projection, column) of the gate: the factor the product is not linear in; of a ReLU gate, the one whose
    negative values make it vanish; the first one otherwise. `signed` = (values, gradients) at a row of mixed signs."""
    columns = [(m, n) for m in range(len(channels)) for n in range(channels[m].shape[1])]
    if len(columns) == 1 or any(entry is None for entry in signed):
        return columns[0]
    picked = {(m, n): (signed[m][0][channels[m][:, n]], signed[m][1][channels[m][:, n]]) for m, n in columns}
    bent = [c for c, (value, slope) in picked.items() if not torch.allclose(value * slope, x, rtol=1e-3, atol=1e-5)]
    if len(bent) == 1:
        return bent[0]
    vanishing = [c for c, (value, _) in picked.items() if torch.equal(x == 0, value < 0)]
    return (vanishing or bent or columns)[0]


# ---------------------------------------------------------------- which of them are the model's feed-forward blocks


def _is_repeated(model: nn.Module, name: str) -> bool:
    """True inside a list of layers: a classification head or a pooler is not."""
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList) for i in range(1, len(parts)))


def _main_families(model: nn.Module, sites: list[Site]) -> tuple[list[Site], list[LeftOut]]:
    """Sites inside repeated layers that are at least a quarter as large as the largest; the rest is named."""
    def size(site: Site) -> int:
        return sum(model.get_submodule(m.module).weight.numel() for m in site.members)

    repeated = [site for site in sites if _is_repeated(model, site.down_module)]
    largest = max((size(site) for site in repeated), default=0)
    main = [site for site in repeated if size(site) * 4 >= largest]
    kept = {site.name for site in main}
    side = [(site.name, "a small side block" if site in repeated else "outside the repeated layers")
            for site in sites if site.name not in kept]
    return main, [LeftOut(name, reason, is_loss=False) for name, reason in side]


def _unseen(model: nn.Module, sources: list[Source]) -> list[LeftOut]:
    """Projections of repeated layers that the trace never called, and stacked expert parameters."""
    seen = {source.parameter for source in sources}
    entries = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" not in seen and _is_repeated(model, name):
            entries.append(LeftOut(name, "never called by the dummy input (an idle expert or an unused tower)", True))
        for parameter, value in module.named_parameters(recurse=False):
            if value.ndim == 3 and min(value.shape) > 1 and not isinstance(module, nn.modules.conv._ConvNd):
                reason = "stacked experts (mixture of experts) are not supported"
                entries.append(LeftOut(f"{name}.{parameter}", reason, is_loss=True))
    return entries
