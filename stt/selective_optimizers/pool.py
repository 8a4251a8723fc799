"""The chosen entries of some tensors, side by side in vectors that an ordinary optimizer trains."""
from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Protocol

import torch
from torch import Tensor, nn

from stt.errors import InputError
from stt.selective_optimizers.by_entry import FRESH
from stt.selective_optimizers.weights import read, write

# Shapes: n entries of a pool, k entries of one tensor.

GLOBAL, ENTRY, APART = "global", "entry", "apart"  # how a late entry joins
State = MutableMapping[Tensor, dict[str, object]]  # of the base optimizer


class Gradient(Protocol):
    """What is known of the gradient of one tensor."""

    def at(self, ids: Tensor) -> Tensor:
        """(k,) at these flat positions."""
        ...


class Pool:
    """Entries of tensors of one parameter group, one device and one dtype; float32 or wider, whatever that dtype.

    An entry's place in the vectors is in the order of choosing. `late` says how one joins that is chosen after others:
    APART, what is chosen together is one parameter (a cohort), whose steps the base optimizer counts from then on;
    else all are one parameter. As in GLOBAL it takes over the state of an entry that has only seen gradients of 0: that
    of `blank`, which trains beside them. As in ENTRY its state begins at 0, and so does its step count (by_entry.py).
    """

    def __init__(self, tensors: Mapping[str, Tensor], late: str):
        self.tensors = dict(tensors)
        some = next(iter(self.tensors.values()))
        self.device, self.stored = some.device, some.dtype
        self.dtype = torch.promote_types(some.dtype, torch.float32)
        self.ids = {name: torch.empty(0, dtype=torch.long, device=self.device) for name in self.tensors}
        self.order: Tensor | None = None  # (n,) places of the entries, by tensor and id; None: as they are
        self.start = torch.empty(0, dtype=self.stored, device=self.device)  # (n,) values when they were chosen
        self.cohorts: list[nn.Parameter] = []
        self.late = late
        self.blank = self._parameter(torch.zeros(1)) if late == GLOBAL else None

    def __len__(self) -> int:
        return len(self.start)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the base optimizer trains."""
        return self.cohorts + ([self.blank] if self.blank is not None else [])

    @property
    def has_moved(self) -> bool:
        """Whether the tensors are on another device or of another dtype by now."""
        return any(tensor.device != self.device or tensor.dtype != self.stored for tensor in self.tensors.values())

    # ------------------------------------------------------------ a step

    def refresh(self) -> None:
        """Take up the values of the tensors, where they are no longer those that were written."""
        if not len(self):
            return
        now = self._placed([read(self.tensors[name], None, ids) for name, ids in self.ids.items()])
        values = now.to(self.dtype)
        if self.dtype != self.stored:
            old = self._values()
            values = torch.where(now == old.to(self.stored), old, values)
        for cohort, part in zip(self.cohorts, self._split(values), strict=True):
            cohort.copy_(part)

    def load(self, gradients: Mapping[str, Gradient]) -> list[Tensor]:
        """Give the parameters their gradients, and return these. A tensor without one counts as 0; where no tensor has
        one the parameters have none."""
        has_any = any(name in gradients for name in self.tensors)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter) if has_any else None
        if not has_any or not len(self):
            return []
        pieces = [gradients[name].at(ids).to(self.dtype) if name in gradients else
                  torch.zeros(len(ids), dtype=self.dtype, device=self.device) for name, ids in self.ids.items()]
        for cohort, part in zip(self.cohorts, self._split(self._placed(pieces)), strict=True):
            cohort.grad = part
        return [cohort.grad for cohort in self.cohorts]

    def write(self, gradients: Mapping[str, Gradient]) -> None:
        """Put the values into the tensors that have a gradient; the others stay as they are."""
        for name, values in self.by_tensor(self._values()).items():
            if name in gradients and len(values):
                write(self.tensors[name], None, self.ids[name], values)

    # ------------------------------------------------------------ which entries

    def add(self, new: Mapping[str, Tensor], state: State) -> None:
        """Choose these positions, too; `state` is the base optimizer's, which grows with them."""
        new = {name: ids.to(self.device) for name, ids in new.items() if len(ids)}
        if not new:
            return
        values = torch.cat([read(self.tensors[name].detach(), None, ids) for name, ids in new.items()])
        offsets = self._offsets()
        keys = torch.cat([self._keys(), *(ids + offsets[name] for name, ids in new.items())])
        self.start = torch.cat([self.start, values])
        if self.late == APART:
            self.cohorts.append(self._parameter(values))
        else:
            self.cohorts = self.cohorts or [self._parameter(values[:0])]
            _extend(self.cohorts[0], values.to(self.dtype), self._state_of_late(state), state)
        self._arrange(keys)

    def drop(self, dropped: Mapping[str, Tensor], state: State) -> None:
        """Give up these positions, with their state; their tensors get the values back that they started from."""
        starts = self.by_tensor(self.start)
        is_dropped = {name: torch.isin(ids, dropped[name].to(self.device)) if name in dropped else
                      torch.zeros_like(ids, dtype=torch.bool) for name, ids in self.ids.items()}
        for name, mask in is_dropped.items():
            write(self.tensors[name], None, self.ids[name][mask], starts[name][mask])
        keep = ~self._placed(list(is_dropped.values()))
        keys = self._keys()[keep]
        for cohort, mask in zip(list(self.cohorts), self._split(keep), strict=True):
            _shrink(cohort, mask, state)
        self.cohorts = [cohort for cohort in self.cohorts if len(cohort)]
        self.start = self.start[keep]
        self._arrange(keys)

    def moved(self) -> dict[str, Tensor]:
        """How far each entry is from where it started: tensor name -> (k,), in the order of `ids`."""
        return self.by_tensor((self._values() - self.start).abs())

    def by_tensor(self, placed: Tensor) -> dict[str, Tensor]:
        """(n,) of the entries -> tensor name -> (k,), in the order of `ids`."""
        ordered = placed if self.order is None else placed[self.order]
        return dict(zip(self.ids, ordered.split([len(ids) for ids in self.ids.values()]), strict=True))

    # ------------------------------------------------------------ checkpoint

    def state_dict(self) -> dict[str, object]:
        """Tensors and lists; the base optimizer's state is not among them."""
        return {"tensors": list(self.tensors), "ids": list(self.ids.values()), "order": self.order,
                "start": self.start, "values": [cohort.detach() for cohort in self.cohorts]}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over what `state_dict` gave, on the device where the tensors are. Raises InputError if they are on
        several by now, or if the steps of late entries were counted in another way."""
        if self.late != APART and len(state["values"]) > 1:
            raise InputError("the state counts the steps of weights that were chosen together, this optimizer those of "
                             "every weight: start the training again")
        if len({(tensor.device, tensor.dtype) for tensor in self.tensors.values()}) > 1:
            raise InputError("the model was spread over devices or dtypes after the optimizer was built: build the "
                             "optimizer afterwards")
        some = next(iter(self.tensors.values()))
        self.device, self.stored = some.device, some.dtype
        self.dtype = torch.promote_types(some.dtype, torch.float32)
        self.ids = {name: ids.to(self.device, copy=True) for name, ids in zip(self.tensors, state["ids"], strict=True)}
        self.order = None if state["order"] is None else state["order"].to(self.device, copy=True)
        self.start = state["start"].to(self.device, self.stored, copy=True)
        self.cohorts = [self._parameter(values) for values in state["values"]]
        self.blank = None if self.blank is None else self._parameter(torch.zeros(1))

    def _state_of_late(self, state: State) -> dict[str, object]:
        """What an entry begins with that is chosen now."""
        if self.blank is not None:
            return state.get(self.blank, {})
        zero = torch.zeros(1, dtype=self.dtype, device=self.device)
        return dict.fromkeys([*FRESH, *state.get(self.cohorts[0], {})], zero)

    # ------------------------------------------------------------ places

    def _parameter(self, values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.detach().to(self.device, self.dtype, copy=True))

    def _values(self) -> Tensor:
        return torch.cat([self.start[:0].to(self.dtype), *(cohort.detach() for cohort in self.cohorts)])

    def _split(self, placed: Tensor) -> tuple[Tensor, ...]:
        return placed.split([len(cohort) for cohort in self.cohorts])

    def _placed(self, pieces: list[Tensor]) -> Tensor:
        """Pieces in the order of tensors and ids -> (n,) in place."""
        ordered = torch.cat(pieces)
        return ordered if self.order is None else torch.empty_like(ordered).index_copy_(0, self.order, ordered)

    def _offsets(self) -> dict[str, int]:
        """Where each tensor begins if all are laid end to end."""
        offsets, total = {}, 0
        for name, tensor in self.tensors.items():
            offsets[name], total = total, total + tensor.numel()
        return offsets

    def _keys(self) -> Tensor:
        """(n,) position of every entry if all tensors are laid end to end."""
        offsets = self._offsets()
        return self._placed([ids + offsets[name] for name, ids in self.ids.items()])

    def _arrange(self, keys: Tensor) -> None:
        """Set `ids` and `order` for entries with these keys."""
        ordered, order = keys.sort()
        is_sorted = torch.equal(ordered, keys)
        self.order = None if is_sorted else order
        offsets = self._offsets()
        bounds = torch.searchsorted(ordered, torch.tensor(list(offsets.values()), device=self.device)).tolist()
        pieces = ordered.tensor_split(bounds[1:])
        self.ids = {name: piece - offset for (name, offset), piece in zip(offsets.items(), pieces, strict=True)}


def _extend(cohort: nn.Parameter, values: Tensor, given: Mapping[str, object], state: State) -> None:
    """Add entries to a parameter, with the state that is `given` of one: what of it is a number per entry is repeated.
    """
    own = state.get(cohort, {})
    for name, value in given.items():
        if isinstance(value, Tensor) and value.shape == (1,):
            more = value.expand(len(values))
            own[name] = torch.cat([own[name], more]) if name in own else more.clone()
        elif name not in own:
            own[name] = value.clone() if isinstance(value, Tensor) else value
    if own:
        state[cohort] = own
    cohort.data = torch.cat([cohort.data, values])
    cohort.grad = None


def _shrink(cohort: nn.Parameter, keep: Tensor, state: State) -> None:
    """Keep some entries of a parameter and of its state; without any left the state goes."""
    own = state.pop(cohort, {})
    kept = {name: value[keep] if isinstance(value, Tensor) and value.shape == cohort.shape else value
            for name, value in own.items()}
    cohort.data = cohort.data[keep]
    cohort.grad = None
    if kept and len(cohort):
        state[cohort] = kept
