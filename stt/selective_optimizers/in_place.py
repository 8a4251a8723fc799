"""From neurons and heads to weights: the rows and columns of a selection, to train them where they are."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stt.heads import sites_named
from stt.narrow import Parts, parts_of
from stt.selection import Selection
from stt.selective_optimizers.weights import all_of, named_tensors, selection_of
from stt.sites import Site
from stt.stt_transformer import selection_for

# Shapes: F units of a site, k selected ones.


def in_place(model: nn.Module, selection: Mapping[str, Tensor]) -> Selection:
    """The weights of the selected neurons or heads: the rows of their gate and up projections (of queries, keys and
    values), the columns of their down projection, their biases, and the down projection's own bias, which belongs to
    all of them. Training those is adapting without removing.

    Raises InputError if the selection is of another model.
    """
    sites = sites_named(model, selection)
    units = selection_for(sites, selection)
    tensors = named_tensors(model)
    chosen, along = {}, {}
    for name, parts in parts_of(model, [sites[site] for site in units], units).items():
        tensor = model.get_parameter(name) if name in dict(model.named_parameters(remove_duplicate=False)) else None
        if tensor is None:
            continue  # a buffer
        first = next(other for other, parameter in tensors.items() if parameter is tensor)
        axis, chosen[first] = places(tensor, parts)
        along |= {} if axis is None else {first: axis}
    for name in _down_biases(model, [sites[site] for site in units]):
        axis, chosen[name] = all_of(tensors[name])
        along |= {} if axis is None else {name: axis}
    meta = {key: units.meta[key] for key in ("method", "keep_ratio", "topk_ratio", "seed") if key in units.meta}
    return selection_of(chosen, along, tensors, {**meta, "unit": units.meta.get("units", "neurons")})


def places(tensor: Tensor, parts: Parts) -> tuple[int | None, Tensor]:
    """Where the channels of these parts stand: whole rows or columns of a matrix, else flat positions."""
    axes = {member.axis for member, _ in parts}
    if tensor.dim() == 2 and len(axes) == 1 and all(member.expert is None for member, _ in parts):
        return axes.pop(), torch.cat([channels for _, channels in parts]).unique()
    mask = torch.zeros(tensor.shape, dtype=torch.bool)
    for member, channels in parts:
        part, axis = (mask, member.axis) if member.expert is None else (mask[member.expert], member.axis - 1)
        part.index_fill_(axis, channels, True)
    return None, mask.flatten().nonzero().flatten()


def _down_biases(model: nn.Module, sites: list[Site]) -> list[str]:
    """Names of the biases of down projections."""
    names = [f"{site.down_module}.bias" for site in sites if site.members[-1].parameter == "weight"]
    known = named_tensors(model)
    return [name for name in dict.fromkeys(names) if name in known]
