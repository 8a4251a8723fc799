"""What a plan knows of the modes that remove nothing: how many weights of which tensors train, and what that takes.

Where a tensor's chosen weights stand changes no number here, only how many they are: biases and the rows and columns of
neurons are known, and single weights are shared out in proportion to the tensors' sizes, as random ones are.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stt.errors import InputError
from stt.modes import Mode
from stt.plan_arguments import PlanArgs
from stt.selection import Selection
from stt.selective_optimizers import recipe, scores
from stt.selective_optimizers.amount import apportioned, weights_in
from stt.selective_optimizers.in_place import in_place
from stt.selective_optimizers.leaf import Leaf, place
from stt.selective_optimizers.weights import all_of, axis_of, named_tensors, width
from stt.surgery import head_parameters, untie_head

# Bytes of each weight or unit. What id3's optimizer holds of a chosen weight beside AdamW's state (pool.py): its place
# in the tensor and that in the order of choosing, the value it started from, its value and the number of its steps.
VALUE, PLACE, PLACE_IN_FILE, STATE = 4, 8, 4, 8
POOL = 2 * PLACE + 3 * VALUE
SORTING = 4 * PLACE  # while new weights are put among the chosen ones
SCORES = 2 * VALUE  # of the weights of one tensor: while they are computed, and half of it until those of the next are
MOST_IN_FILE = 2**31  # larger places take twice the bytes


@dataclass(frozen=True)
class Part:
    """Of one tensor: how many units along an axis (None: single weights) train, and how many weights those have."""

    axis: int | None
    units: int
    weights: int


@dataclass(frozen=True)
class Chosen:
    """What trains in the end of a model that keeps its shape: `parts` by tensor, of tensors of these `sizes`; those in
    `heads` train whole, if at all. It `grows` while it trains (id3), or is known at the start."""

    grows: bool
    parts: Mapping[str, Part]
    sizes: Mapping[str, int]
    heads: frozenset[str]

    @property
    def trained(self) -> int:
        return sum(part.weights for part in self.parts.values())

    @property
    def outside_head(self) -> int:
        return sum(part.weights for name, part in self.parts.items() if name not in self.heads)

    def parameters(self) -> dict[str, int]:
        """As surgery.count_parameters, of the model as it is when it has been trained."""
        return {"total": sum(self.sizes.values()), "trained": self.trained, "trained_without_head": self.outside_head}

    def disk(self) -> dict[str, int]:
        """Bytes of the patch, and of a checkpoint while it trains: a patch and the optimizer's state, which in one that
        chooses has what it knows of the chosen weights, and what the head started from."""
        places = sum(part.units * PLACE_IN_FILE * (1 if self.sizes[name] < MOST_IN_FILE else 2)
                     for name, part in self.parts.items())
        patch = places + VALUE * self.trained
        choosing = POOL * self.outside_head + VALUE * (self.trained - self.outside_head)
        return {"patch": patch, "checkpoint": patch + self.state_bytes() + choosing * self.grows}

    def state_bytes(self) -> int:
        """AdamW's means of the gradient and of its square."""
        return STATE * self.trained

    def held_bytes(self, model: nn.Module) -> int:
        """What the prepared model, or the optimizer that chooses, holds of the chosen weights beside values and state.
        """
        ids = sum(leaf.ids.nbytes for leaf in model.modules() if isinstance(leaf, Leaf))
        return ids + (POOL * self.outside_head if self.grows else 0)

    def passing(self, trained: Iterable[str]) -> set[str]:
        """Those of the trained tensors whose gradients an optimizer that chooses lets go, in one process."""
        return {name for name in trained if self.grows and name not in self.heads}

    def choosing_bytes(self) -> int:
        """What one step of an optimizer that chooses needs at a time, beside gradients and what it holds: for the
        chosen weights in a new order, or the square roots in AdamW's step."""
        return max(SORTING * self.outside_head, VALUE * self.trained)

    def taken_bytes(self, steps: int | None) -> int:
        """What is taken of gradients that are gone: of the chosen weights, and of as many others of every tensor as the
        step chooses of all (few where it is not known of how many `steps`)."""
        new = -(-self.outside_head // steps) if steps else 0
        candidates = sum(min(size, new) for name, size in self.sizes.items() if name not in self.heads)
        return (PLACE + VALUE) * (self.outside_head + 2 * candidates)

    def scoring_bytes(self) -> int:
        """What the scores of a tensor need, where the gradients of all are there."""
        sizes = [size for name, size in self.sizes.items() if name not in self.heads]
        return max(SCORES * size + SCORES // 2 * before for before, size in itertools.pairwise([0, *sizes]))


def chosen(model: nn.Module, mode: Mode, selection: Selection | None, args: PlanArgs) -> Chosen:
    """What trains of a dense model, whose head is untied now if it is to be.

    Raises InputError for a budget that the model has no room for, and for biases of a model that has none.
    """
    if args.head == "untie":
        untie_head(model)
    tensors, heads = named_tensors(model), head_parameters(model)
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    if mode.trains == "in_place":
        rows = in_place(model, selection)
        parts = {name: _part(tensors[name], axis_of(rows, name), len(ids)) for name, ids in rows.items()}
    else:
        body = {name: tensor for name, tensor in tensors.items() if name not in heads}
        parts = {name: Part(None, count, count) for name, count in _shared_out(body, mode, args, sum(sizes.values()))}
    if args.head != "freeze":
        parts |= {name: _part(tensor, *_whole(tensor)) for name, tensor in heads.items()}
    return Chosen(mode.trains == "growing", {name: parts[name] for name in tensors if name in parts}, sizes,
                  frozenset(heads))


def own_buffers(model: nn.Module) -> list[Tensor]:
    """The model's buffers without the places of what trains."""
    ids = {id(leaf.ids) for leaf in model.modules() if isinstance(leaf, Leaf)}
    return [buffer for buffer in model.buffers() if id(buffer) not in ids]


def prepare(model: nn.Module, what: Chosen, head: str) -> None:
    """Freeze the meta-device model but for what trains. Raises InputError for a module in which that is impossible."""
    if what.grows:
        recipe.prepare(model, None, head)
    else:
        place(model, {name: (part.axis, torch.empty(part.units, dtype=torch.long, device="meta"))
                      for name, part in what.parts.items()})


def _whole(tensor: Tensor) -> tuple[int | None, int]:
    axis, ids = all_of(tensor)
    return axis, len(ids)


def _part(tensor: Tensor, axis: int | None, units: int) -> Part:
    return Part(axis, units, units * tensor.numel() // width(tensor, axis))


def _shared_out(body: Mapping[str, Tensor], mode: Mode, args: PlanArgs, total: int) -> list[tuple[str, int]]:
    """How many single weights each tensor outside the head has of the budget, a share of which is one of `total`."""
    if mode.score == "bias":
        return _biases(body, args, total)
    sizes = {name: tensor.numel() for name, tensor in body.items()}
    matrices = {name: size for name, size in sizes.items() if body[name].dim() > 1}
    count, available = weights_in(args.budget, total), sum(sizes.values())
    if count > available:
        raise InputError(f"budget {count:,} is more than the {available:,} weights outside the head: lower it")
    if mode.score == "smallest" and count <= sum(matrices.values()):
        sizes = matrices  # the smallest weights are not among the scales of norms
    shares = apportioned(count, list(sizes.values()))
    return [(name, share) for name, share in zip(sizes, shares, strict=True) if share]


def _biases(body: Mapping[str, Tensor], args: PlanArgs, total: int) -> list[tuple[str, int]]:
    """The biases up to the budget, from the first on."""
    score = scores.make("bias", include_norm=args.include_norm)
    sizes = {name: tensor.numel() for name, tensor in body.items() if score.takes(name, tensor)}
    available = sum(sizes.values())
    left = available if args.budget is None else weights_in(args.budget, total)
    if not sizes:
        raise InputError("mode 'bitfit' trains biases, and the model has none: give --include_norm, or another mode")
    if left > available:
        raise InputError(f"budget {left:,} is more than the {available:,} biases: lower it")
    ends = itertools.accumulate(sizes.values())
    return [(name, min(size, left - (end - size))) for (name, size), end in zip(sizes.items(), ends, strict=True)
            if end - size < left]
