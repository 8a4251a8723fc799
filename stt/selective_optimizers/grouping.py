"""The parameter groups of a selective optimizer: which tensors it chooses from, which train whole, and their pools."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stt.errors import InputError
from stt.selective_optimizers.amount import Amount, weights_in
from stt.selective_optimizers.pool import Pool
from stt.selective_optimizers.schedules import NAMELESS

CHOOSE_ALL = "choose_all"  # in a parameter group: everything in it trains, charged to the budget first


@dataclass
class Group:
    """The tensors of one parameter group that required a gradient when the optimizer was built."""

    candidates: dict[str, nn.Parameter]
    whole: dict[str, nn.Parameter]
    pools: list[Pool] = field(default_factory=list)


def group_of(number: int, group: Mapping[str, object], names: Mapping[int, str], late: str) -> Group:
    """The tensors of `group` by name: those it came with, else `names` by id, else made-up ones.

    Raises InputError for a tensor that holds no real numbers, and for a shard of one.
    """
    given = group.get("param_names") or [names.get(id(tensor), f"{NAMELESS}{number}.{i}")
                                         for i, tensor in enumerate(group["params"])]
    tensors = {name: tensor for name, tensor in zip(given, group["params"], strict=True) if tensor.requires_grad}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{name} is a tensor of {tensor.dtype}: the optimizer trains floating-point ones")
        if hasattr(tensor, "device_mesh"):
            raise InputError(f"{name} is sharded over processes, and weights are chosen from whole tensors: take DDP, "
                             "or stt.attach(model, selection)")
    if group[CHOOSE_ALL]:
        return Group({}, tensors)
    return Group(tensors, {}, pools_of(tensors, late))


def pools_of(tensors: Mapping[str, Tensor], late: str) -> list[Pool]:
    """One for the tensors of every device and dtype."""
    alike: defaultdict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        alike[tensor.device, tensor.dtype][name] = tensor
    return [Pool(members, late) for members in alike.values()]


def numbers(tensors: Mapping[str, Tensor]) -> int:
    """How many weights the tensors have."""
    return sum(tensor.numel() for tensor in tensors.values())


def budget_of(amount: Amount | None, groups: Sequence[Group], needs_room: bool) -> int:
    """The number of weights that may train. Raises InputError if it is missing, more than there are, or less than what
    always trains; with `needs_room` it must be more than that."""
    if amount is None:
        raise InputError("budget= is missing: give the number of weights that may train, or a share (\"0.2%\")")
    whole = sum(numbers(group.whole) for group in groups)
    budget = weights_in(amount, whole + sum(numbers(group.candidates) for group in groups))
    if budget < whole or (needs_room and budget == whole):
        says = "leaves nothing to choose beside" if budget == whole else "is less than"
        raise InputError(f"budget {budget:,} {says} the {whole:,} weights of the choose_all groups: raise it")
    return budget
