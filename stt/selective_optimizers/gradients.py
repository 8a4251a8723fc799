"""The gradients that a step works on: dense ones as the backward pass leaves them, or what was kept of them."""
from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stt.errors import InputError
from stt.selective_optimizers.choose import best, top_entries
from stt.selective_optimizers.weights import read

# Shapes: P weights of a tensor, k chosen entries of it, u candidates.

ScoreOf = Callable[[str, Tensor, Tensor], Tensor]  # name, weight, gradient -> a number per weight


class Dense:
    """The gradient of a whole tensor."""

    def __init__(self, gradient: Tensor):
        self.gradient = gradient

    def at(self, ids: Tensor) -> Tensor:
        """(k,)"""
        return read(self.gradient, None, ids)

    def candidates(self, name: str, weight: Tensor, taken: Tensor, score: ScoreOf) -> tuple[Tensor, Tensor | None]:
        """Scores of all weights, -inf for those taken; None: each at its own position."""
        return scores(name, weight, self.gradient, taken, score), None

    @property
    def sample(self) -> Tensor:
        """What must be finite."""
        return self.gradient


class Kept:
    """Of a gradient that is gone: its values at the chosen entries and at those that may be chosen next."""

    def __init__(self, gradient: Tensor, taken: Tensor):
        self.ids = taken
        self.sample = read(gradient, None, taken)
        self._candidates = taken[:0], torch.empty(0, device=taken.device)

    def add(self, gradient: Tensor) -> None:
        """One more backward pass."""
        self.sample = self.sample + read(gradient, None, self.ids)

    def consider(self, name: str, weight: Tensor, gradient: Tensor, score: ScoreOf, most: int) -> None:
        """Keep the `most` best of those not taken, too; of a gradient with infinite or undefined numbers, only that."""
        if not is_finite([gradient]):
            self.sample = self.sample.new_full((1,), torch.nan)
            return
        of_all = scores(name, weight, gradient, self.ids, score)
        found = top_entries(of_all, most)
        self._candidates = found, of_all[found]
        both = torch.cat([self.ids, found])
        values = torch.cat([self.sample, read(gradient, None, found)])
        self.ids, order = both.sort()
        self.sample = values[order]

    def at(self, ids: Tensor) -> Tensor:
        """(k,)"""
        return self.sample[torch.searchsorted(self.ids, ids)]

    def candidates(self, name: str, weight: Tensor, taken: Tensor, score: ScoreOf) -> tuple[Tensor, Tensor | None]:
        """Scores of those that may be chosen, and their positions."""
        found, of_found = self._candidates
        return of_found, found


def scores(name: str, weight: Tensor, gradient: Tensor, taken: Tensor, score: ScoreOf) -> Tensor:
    """(P,) in float32 or wider, -inf for those taken."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    found = score(name, weight.detach().to(wide), gradient.to(wide)).flatten()
    if found.data_ptr() in (weight.data_ptr(), gradient.data_ptr()):
        found = found.clone()
    return found.index_fill_(0, taken, -torch.inf)


def choose(gradients: Mapping[str, Dense | Kept], tensors: Mapping[str, Tensor], taken: Mapping[str, Tensor],
           score: ScoreOf, k: int) -> dict[str, Tensor]:
    """Positions of the k highest scores of the tensors that have a gradient; fewer where fewer are left."""
    places: dict[str, Tensor | None] = {}

    def scored() -> object:
        for name, tensor in tensors.items():
            if name in gradients:
                found, places[name] = gradients[name].candidates(name, tensor, taken[name], score)
                yield name, found

    return {name: ids if places[name] is None else places[name][ids.to(places[name].device)].sort().values
            for name, ids in best(scored(), k).items()}


def is_finite(tensors: list[Tensor]) -> bool:
    """Whether no number of these tensors is infinite or undefined."""
    filled = [tensor.detach() for tensor in tensors if tensor.numel()]
    extremes = [torch.stack(torch.aminmax(tensor)).to(filled[0].device) for tensor in filled]
    return not extremes or bool(torch.cat(extremes).isfinite().all())


def dense(tensors: Mapping[str, Tensor]) -> dict[str, Dense]:
    """The gradients that tensors have. Raises InputError for a sparse one."""
    for name, tensor in tensors.items():
        if tensor.grad is not None and tensor.grad.is_sparse:
            raise InputError(f"the gradient of {name} is a sparse tensor: build the embedding with sparse=False")
    return {name: Dense(tensor.grad) for name, tensor in tensors.items() if tensor.grad is not None}


class Catcher:
    """Takes from every gradient what the step needs as soon as the backward pass has it, and lets the gradient go;
    where `keep` says None it stays.

    Several backward passes before a step add up. For scores of the gradient (a schedule that grows) their sum is
    needed: with `passes` of them a gradient stays dense until the last.
    """

    def __init__(self, tensors: Mapping[str, nn.Parameter], passes: int,
                 keep: Callable[[str, Tensor, Kept | None], Kept | None]):
        self.kept: dict[str, Kept] = {}
        self.passes = passes
        self._keep, self._count = keep, dict.fromkeys(tensors, 0)
        me = weakref.ref(self)  # the tensors do not keep a discarded optimizer alive, nor does it act on them
        self.handles: list[RemovableHandle] = [tensor.register_post_accumulate_grad_hook(_caught_by(me, name))
                                               for name, tensor in tensors.items()]

    def catch(self, name: str, tensor: Tensor) -> None:
        self._count[name] += 1
        if self._count[name] % self.passes == 0:
            kept = self._keep(name, tensor, self.kept.get(name))
            if kept is not None:
                self.kept[name], tensor.grad = kept, None

    def clear(self) -> None:
        self.kept.clear()
        self._count = dict.fromkeys(self._count, 0)


def _caught_by(catcher: weakref.ref[Catcher], name: str) -> Callable[[Tensor], None]:
    def hook(tensor: Tensor) -> None:
        if (it := catcher()) is not None:
            it.catch(name, tensor)
    return hook
