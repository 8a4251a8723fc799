"""When which weights train: chosen once, growing, regrowing, or block after block. A schedule counts steps, no more."""
from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from stt.errors import InputError, unknown_name
from stt.selection import Selection
from stt.selective_optimizers.choose import best
from stt.selective_optimizers.scores.base import Seen, WeightScore
from stt.selective_optimizers.scores.bias import Bias
from stt.selective_optimizers.weights import axis_of, check_fits

logger = logging.getLogger(__name__)

# Shapes: P weights of a tensor.

Tensors = Mapping[str, Tensor]
NAMELESS = "#"  # how the optimizer's own names of tensors begin, where it was given none


@dataclass
class Schedule:
    """Base of all: `done` counts the steps that were made. What is asked for is about the next one."""

    grows: ClassVar[bool] = False  # whether weights are chosen after the start
    done: int = field(default=0, init=False)

    @property
    def origin(self) -> dict[str, object]:
        """The score that chooses and its options, for the meta of a selection."""
        return {}

    def first(self, tensors: Tensors, k: int) -> Mapping[str, Tensor]:
        """Flat positions to train from the first step on, at most k."""
        return {}

    def total(self, k: int) -> int | None:
        """How many are to be chosen in this step, of k at last; None: as many as there are."""
        return None

    def renewed(self, chosen: int) -> int:
        """How many of the chosen ones give way to others in this step."""
        return 0

    def score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        """Of every weight, by which later ones are chosen: the magnitude of its gradient."""
        return gradient.abs()

    def whole(self, tensors: Tensors) -> list[str]:
        """Names of tensors that train whole in this step."""
        return []

    def visited(self, tensors: Tensors) -> list[str]:
        """Names of tensors that have trained whole."""
        return []


@dataclass
class Static(Schedule):
    """The best by a score that looks at no data, or a selection of weights that was made before."""

    choice: WeightScore | Selection

    @property
    def origin(self) -> dict[str, object]:
        return origin_of(self.choice)

    def first(self, tensors: Tensors, k: int) -> dict[str, Tensor]:
        return chosen(self.choice, tensors, k)


@dataclass
class Biases(Schedule):
    """BitFit: every bias up to the budget, in the order of the groups; with `include_norm` the scales of norms, too.
    Tensors without names: whatever has one dimension, as published."""

    include_norm: bool = False

    @property
    def origin(self) -> dict[str, object]:
        return origin_of(Bias(self.include_norm))

    def first(self, tensors: Tensors, k: int) -> dict[str, Tensor]:
        has_names = not any(name.startswith(NAMELESS) for name in tensors)
        if not has_names:
            logger.warning("BitFit was given tensors without names: every one with a single dimension trains, norms "
                           "too; give model= or model.named_parameters()")
        found = chosen(Bias(self.include_norm or not has_names), tensors, k)
        if k and not any(len(ids) for ids in found.values()):
            raise InputError("the model has no bias for BitFit to train: take include_norm=True, or another method")
        return found


def chosen(choice: WeightScore | Selection, tensors: Tensors, k: int) -> dict[str, Tensor]:
    """Flat positions of the k best; of a selection, all, which must be k. Raises InputError for a score that looks at
    data, and for a selection of other tensors or of another size."""
    if isinstance(choice, WeightScore):
        if choice.needs:
            raise InputError(f"the score {type(choice).__name__} looks at data: make a selection with "
                             "stt.select_weights and give that")
        return best(((name, choice.result(name, tensor.detach(), Seen()).flatten())
                     for name, tensor in tensors.items()), k)
    check_fits(choice, tensors)
    found = {name: _flat(tensors[name], axis_of(choice, name), ids) for name, ids in choice.items()}
    count = sum(len(ids) for ids in found.values())
    if count > k:
        raise InputError(f"the selection has {count:,} weights and the budget leaves {k:,}: raise budget=")
    return found


def origin_of(choice: WeightScore | Selection) -> dict[str, object]:
    """What a selection's meta says of the score that chose."""
    if isinstance(choice, Selection):
        return {key: choice.meta[key] for key in ("score", "options", "seed") if key in choice.meta}
    return {"score": type(choice).__module__.rpartition(".")[2], "options": asdict(choice)}


def _check_steps(name: str, steps: int | None) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"{name}= must be a number of optimizer steps, 1 or more, got {steps}")


def _flat(tensor: Tensor, axis: int | None, ids: Tensor) -> Tensor:
    """Flat positions of these rows or columns, sorted."""
    if axis is None:
        return ids
    return torch.arange(tensor.numel()).view(tensor.shape).index_select(axis, ids).flatten().sort().values


SHAPES: dict[str, Callable[[int, int, int], int]] = {  # after step t (from 0) of T: how many of k
    "uniform": lambda k, t, T: (t + 1) * (k // T) + min(t + 1, k % T),
    "linear": lambda k, t, T: round(k * (1 - (1 - (t + 1) / T) ** 2)),
    "front": lambda k, t, T: round(k * (1 - (1 - (t + 1) / T) ** 3)),
}


@dataclass
class Grow(Schedule):
    """More weights in every one of `max_steps` steps, those with the highest score; none is given up.

    `shape`: "uniform", as many in every step, the remainder in the first ones (ID3); "linear", fewer from step to step
    down to none; "front", a cubic, most of them early.
    """

    grows: ClassVar[bool] = True
    max_steps: int
    by: WeightScore
    shape: str = "uniform"

    def __post_init__(self) -> None:
        _check_steps("max_steps", self.max_steps)
        if set(self.by.needs) - {"gradient"}:
            raise InputError(f"the score {type(self.by).__name__} needs more than the gradient of a step: choose by it "
                             "with stt.select_weights")
        if self.shape not in SHAPES:
            raise unknown_name("schedule", str(self.shape), SHAPES)

    @property
    def origin(self) -> dict[str, object]:
        return origin_of(self.by)

    def total(self, k: int) -> int:
        return SHAPES[self.shape](k, min(self.done, self.max_steps - 1), self.max_steps)

    def score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        return self.by.result(name, weight, Seen(gradient=gradient))


@dataclass
class Regrow(Schedule):
    """First what `choice` says; every `every` steps a share of it, what moved least, goes back to where it started, and
    as many others with the largest gradients are chosen.

    The share is `rate` at first and falls linearly to 0 at `max_steps`. After SpIEL (arxiv.org/abs/2401.16405), which
    takes the gradients of several steps; here they are those of the step.
    """

    grows: ClassVar[bool] = True
    choice: WeightScore | Selection
    every: int
    max_steps: int
    rate: float = 0.2

    def __post_init__(self) -> None:
        _check_steps("every", self.every)
        _check_steps("max_steps", self.max_steps)
        if not 0 < self.rate <= 1:
            raise InputError(f"rate= must be a share of the chosen weights, above 0 and at most 1, got {self.rate}")

    @property
    def origin(self) -> dict[str, object]:
        return origin_of(self.choice)

    def first(self, tensors: Tensors, k: int) -> dict[str, Tensor]:
        return chosen(self.choice, tensors, k)

    def renewed(self, chosen: int) -> int:
        if self.done == 0 or self.done % self.every or self.done >= self.max_steps:
            return 0
        return round(self.rate * (1 - self.done / self.max_steps) * chosen)


@dataclass
class Rotate(Schedule):
    """Whole blocks of tensors, one at a time for `every` steps; those of the others rest, without optimizer state.

    `order`: "ascending" or "descending" through `blocks`, or "random", every block once in a round (BAdam,
    arxiv.org/abs/2404.02827; layers so in LISA, arxiv.org/abs/2403.17919).
    """

    blocks: Sequence[Iterable[Tensor]]
    every: int
    order: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_steps("every", self.every)
        self.blocks = [list(block) for block in self.blocks]
        if self.order not in (orders := ("ascending", "descending", "random")):
            raise unknown_name("order of blocks", str(self.order), orders)
        if not all(self.blocks) or not self.blocks:
            raise InputError(f"blocks= must be lists of tensors, none empty, got {len(self.blocks)} of them")

    def first(self, tensors: Tensors, k: int) -> Mapping[str, Tensor]:
        known = {id(tensor) for tensor in tensors.values()}
        if any(id(tensor) not in known for block in self.blocks for tensor in block):
            raise InputError("blocks= holds a tensor that the optimizer does not choose from: give it all of them, and "
                             "let them require gradients")
        largest = max(sum(tensor.numel() for tensor in block) for block in self.blocks)
        if largest > k:
            raise InputError(f"the largest block has {largest} weights and the budget leaves {k}: raise budget=, or "
                             "make smaller blocks")
        return {}

    def whole(self, tensors: Tensors) -> list[str]:
        turn, count = self.done // self.every, len(self.blocks)
        active = {id(tensor) for tensor in self.blocks[self._round(turn // count)[turn % count]]}
        return [name for name, tensor in tensors.items() if id(tensor) in active]

    def visited(self, tensors: Tensors) -> list[str]:
        """Names of the tensors that have trained so far."""
        turns = -(-self.done // self.every)
        rounds = (self._round(turn // len(self.blocks))[turn % len(self.blocks)] for turn in range(turns))
        seen = {id(tensor) for block in set(rounds) for tensor in self.blocks[block]}
        return [name for name, tensor in tensors.items() if id(tensor) in seen]

    def _round(self, number: int) -> list[int]:
        """The order of the blocks in one round."""
        count = len(self.blocks)
        if self.order == "random":
            return _shuffled(count, self.seed + number)
        return list(range(count) if self.order == "ascending" else range(count - 1, -1, -1))


@functools.lru_cache(maxsize=16)
def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
