"""Narrowing tensors where they are: convolutions, norms and stacks of experts keep their module and their forward, and
lose the channels of the removed units."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stt.errors import InputError
from stt.sites import Member, Site

Parts = Sequence[tuple[Member, Tensor]]  # of one tensor: what stands in it, and the channels to keep


def parts_of(model: nn.Module, sites: Iterable[Site], units: Mapping[str, Tensor]) -> dict[str, Parts]:
    """What of every tensor of these sites belongs to the given units, by name of the tensor."""
    parts: dict[str, list[tuple[Member, Tensor]]] = defaultdict(list)
    for site in sites:
        for member in (*site.members, *site.along):
            for each in (member, *_beside(model, member)):
                parts[each.tensor].append((each, site.pick(each, units[site.name])))
    return parts


def narrowed_tensors(model: nn.Module, sites: Sequence[Site], units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The kept part of every tensor of these sites, by name; nothing is changed. `units` are the kept ids by site.

    Raises InputError if experts of one stack keep different numbers of units, or only some of them are cut.
    """
    _check_groups(sites, units)
    return {name: _kept(_tensor(model, name).detach(), of_tensor)
            for name, of_tensor in parts_of(model, sites, units).items()}


def put_back(tensor: Tensor, parts: Parts, narrow: Tensor) -> None:
    """Write what `narrowed_tensors` took out into its place, in place; the rest stays."""
    narrow = narrow.to(tensor)
    member = parts[0][0]
    if member.expert is None:
        tensor.index_copy_(member.axis, _every(parts).to(tensor.device), narrow)
        return
    for expert, channels in _by_expert(parts, len(tensor)).items():
        tensor[expert].index_copy_(member.axis - 1, channels.to(tensor.device), narrow[expert])


def narrow(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the narrow tensors in every place of theirs, and the sizes that modules remember; `sliced_tensors` knows them
    afterwards."""
    for name, value in tensors.items():
        owner, _, attribute = name.rpartition(".")
        old = getattr(model.get_submodule(owner), attribute)
        new = nn.Parameter(value.clone(), old.requires_grad) if isinstance(old, nn.Parameter) else value.clone()
        for module in model.modules():
            if any(own is old for own in (module._parameters.get(attribute), module._buffers.get(attribute))):
                setattr(module, attribute, new)
                _remember_sizes(module, tuple(old.shape), tuple(new.shape))
                if isinstance(new, nn.Parameter):
                    module.stt_narrowed = (*getattr(module, "stt_narrowed", ()), attribute)


def remember_widths(model: nn.Module, sites: Sequence[Site], units: Mapping[str, Tensor]) -> None:
    """A stack with the experts one after the other along an axis is taken apart by a width that its modules keep as a
    number. Raises InputError, before anything changes, if the number could also be another size."""
    changes = []
    for site in sites:
        down = site.members[-1]
        if site.form != "experts" or down.expert is not None:
            continue
        weight = model.get_parameter(down.tensor)
        if site.width in weight.shape[1 - down.axis:2 - down.axis]:
            raise InputError(f"the experts of {down.module} are as wide as the model ({site.width}), so it cannot be "
                             "told which of their sizes to change: keep all of them")
        for owner in (down.module, down.module.rpartition(".")[0]):
            module = model.get_submodule(owner)
            changes += [(module, name, len(units[site.name])) for name, value in vars(module).items()
                        if type(value) is int and value == site.width]
    for module, name, width in changes:
        setattr(module, name, width)


def sliced_tensors(model: nn.Module) -> Iterator[str]:
    """Names of the parameters that `narrow` has made."""
    narrow = {id(getattr(module, name)) for module in model.modules() for name in getattr(module, "stt_narrowed", ())}
    yield from (name for name, parameter in model.named_parameters() if id(parameter) in narrow)


def _beside(model: nn.Module, member: Member) -> Iterator[Member]:
    """What a layer has beside its weight: a bias that goes with its outputs, and copies of either as buffers (a
    quantised layer's)."""
    module = model.get_submodule(member.module)
    if member.side == "along" or member.expert is not None or member.parameter != "weight":
        return
    shape = module.weight.shape
    for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        is_bias = member.side == "out" and value.ndim == 1 and len(value) == shape[member.axis]
        if is_bias or (value.shape == shape and name != "weight"):
            yield replace(member, side="along", parameter=name, axis=0 if is_bias else member.axis)


def _check_groups(sites: Sequence[Site], units: Mapping[str, Tensor]) -> None:
    """Sites of a group are all cut, to one width."""
    groups: dict[str, set[int]] = defaultdict(set)
    for site in sites:
        groups[site.group].add(len(units[site.name]) if site.name in units else site.width)
    for group, counts in groups.items():
        if len(counts) > 1:
            raise InputError(f"the experts of {group} keep {sorted(counts)} units, but share one tensor: keep equally "
                             "many of each")


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


def _kept(tensor: Tensor, parts: Parts) -> Tensor:
    """The channels of all parts: along the axis, or in a stack along the axis of each expert."""
    member = parts[0][0]
    if member.expert is None:
        return tensor.index_select(member.axis, _every(parts).to(tensor.device))
    return torch.stack([tensor[expert].index_select(member.axis - 1, channels.to(tensor.device))
                        for expert, channels in _by_expert(parts, len(tensor)).items()])


def _every(parts: Parts) -> Tensor:
    return torch.cat([channels for _, channels in parts]).sort().values


def _by_expert(parts: Parts, count: int) -> dict[int, Tensor]:
    """The channels of every expert; one without a part (nothing reads it) has the first ones."""
    given = {member.expert: channels for member, channels in parts}
    first = torch.arange(len(parts[0][1]))
    return {expert: given.get(expert, first) for expert in range(count)}


def _remember_sizes(module: nn.Module, old: Sequence[int], new: Sequence[int]) -> None:
    if isinstance(module, nn.modules.conv._ConvNd) and len(new) > 1:
        is_depthwise = module.groups == old[0]
        module.groups = new[0] if is_depthwise else module.groups
        module.out_channels, module.in_channels = new[0], new[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = new[0]
    elif isinstance(module, nn.Linear) and len(new) == 2:
        module.out_features, module.in_features = new
    elif isinstance(module, Conv1D) and len(new) == 2:
        module.nx, module.nf = new
