"""An optimizer that trains chosen weights of any model and leaves every other bit as it is.

The chosen entries stand side by side in small parameters (pool.py), which an ordinary optimizer trains; after its step
they go back into their tensors. No tensor of the model's size is kept, and what was not chosen is never written.
"""
from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stt.errors import InputError, TrainingFailed, unknown_name
from stt.selection import Selection
from stt.selective_optimizers.amount import Amount
from stt.selective_optimizers.by_entry import COUNTS, follow, step_by_entry
from stt.selective_optimizers.choose import best
from stt.selective_optimizers.deltas import digest, read_units
from stt.selective_optimizers.elementwise import check_elementwise
from stt.selective_optimizers.gradients import Catcher, Dense, Kept, choose, dense, is_finite
from stt.selective_optimizers.grouping import CHOOSE_ALL, Group, budget_of, group_of, numbers
from stt.selective_optimizers.patch import Patch
from stt.selective_optimizers.pool import APART, ENTRY, GLOBAL, Pool
from stt.selective_optimizers.schedules import Schedule
from stt.selective_optimizers.weights import all_of, named_tensors, selection_of, write

logger = logging.getLogger(__name__)

OURS = ("params", "param_names", CHOOSE_ALL)  # keys of a parameter group that are not the base optimizer's
STATE = "selective"  # key in the state dict
OWN = ("budget", "schedule", "max_grad_norm", "_base", "_arguments", "_late", "_groups", "_trainer",
       "_candidates", "_whole", "_start_of_whole", "_digests", "_catcher")  # attributes that a copy needs, too
CORRECTIONS = (GLOBAL, ENTRY)
GATHERS = ("step", "backward")
PASSES = ("there were more backward passes before a step than accumulation_steps= says, and the schedule chooses by "
          "their sum: say how many, or take gather=\"step\"")


class SelectiveOptimizer(Optimizer):
    """Trains exactly `budget` weights of `params` with `base`, those that `schedule` says.

    `params` are tensors, pairs of name and tensor, or groups; a group with `choose_all` trains whole and is charged to
    the budget first. Frozen tensors, and those that get no gradient, are never chosen. Every other argument is the base
    optimizer's, as are those of the groups: its weight decay acts on chosen weights alone. `max_grad_norm` clips the
    norm of the gradients that are used. The step is skipped, with a warning, if one of these is infinite or undefined.

    `bias_correction`: a weight chosen late joins with the step count of all ("global", as published) or starts its own
    ("entry"). `gather`: "backward" takes what is needed of a gradient as soon as it is there and frees it; a schedule
    that grows must then be told the number of backward passes per step in `accumulation_steps`. `verify` keeps a digest
    of every tensor for `post_train_work`. `model` gives names to the tensors.

    Raises InputError for a base that does not work number by number, a budget that does not fit, and unknown words.
    """

    def __init__(self, params: Iterable[object], base: type[Optimizer], schedule: Schedule, *,
                 budget: Amount | None = None, bias_correction: str = "global", max_grad_norm: float | None = None,
                 gather: str = "step", accumulation_steps: int = 1, verify: bool = False,
                 model: nn.Module | None = None, **arguments: object):
        _check(bias_correction, gather, accumulation_steps, arguments)
        self.schedule, self.max_grad_norm = schedule, max_grad_norm
        self._base, self._arguments = base, arguments
        self._late = APART if not schedule.grows or bias_correction == ENTRY and base not in COUNTS else bias_correction
        names = {id(tensor): name for name, tensor in named_tensors(model).items()} if model is not None else {}
        self._groups: list[Group] | None = None  # not built yet
        super().__init__(params, {**base([nn.Parameter(torch.zeros(1, 1))], **arguments).defaults, CHOOSE_ALL: False})
        check_elementwise(base, arguments, self.param_groups[0]["params"][0].device)
        groups = [group_of(i, group, names, self._late) for i, group in enumerate(self.param_groups)]
        self.budget = budget_of(budget, groups, schedule.grows)
        self._take(groups)
        self._trainer = self._new_trainer()
        self._start_of_whole = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._whole.items()}
        self._add(schedule.first(self._candidates, self._room))
        self._digests = {name: digest(tensor) for name, tensor in self._candidates.items()} if verify else {}
        self._catcher = Catcher(self._candidates, accumulation_steps if schedule.grows else 1, self._keep) \
            if gather == "backward" else None
        self._step_supports_amp_scaling = gather == "backward"  # so that a GradScaler makes itself known

    # ------------------------------------------------------------ a step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Choose what the schedule adds by the gradients there are, and train what is chosen; the closure's loss."""
        if hasattr(self, "found_inf"):  # GradScaler says it to optimizers that unscale by themselves
            raise InputError("gather=\"backward\" takes gradients before a GradScaler can unscale them: take "
                             "gather=\"step\"")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_devices()
        whole = [tensor.grad for tensor in (self._whole | self._active()).values() if tensor.grad is not None]
        gradients = dense(self._candidates)
        if self._catcher is not None:
            if gradients.keys() & self._catcher.kept.keys():
                raise InputError(PASSES)
            gradients |= self._catcher.kept
        if whole or gradients:
            self._step(gradients, whole)
        if self._catcher is not None:
            self._catcher.clear()
        return loss

    def kept_gradients(self) -> list[Tensor]:
        """What was taken of gradients that are gone, for the step to come."""
        return [kept.sample for kept in self._catcher.kept.values()] if self._catcher is not None else []

    def announce(self, passes: int) -> None:
        """Begin a step: it and those after it are of so many backward passes, in place of `accumulation_steps`. What
        was taken of earlier ones is forgotten."""
        if self._catcher is not None:
            self._catcher.clear()
            self._catcher.passes = passes if self.schedule.grows else 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._catcher is not None:
            self._catcher.clear()

    def _step(self, gradients: Mapping[str, Dense | Kept], whole: list[Tensor]) -> None:
        new = self._number_of_new()
        used = whole + ([gradient.sample for gradient in gradients.values()] if new else self._load(gradients))
        if not is_finite(used):
            logger.warning("a gradient is infinite or undefined: this step is skipped")
            return
        if new:
            self._choose(gradients, new)
            self._load(gradients)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([p for group in self._trainer.param_groups for p in group["params"]],
                                     self.max_grad_norm)
        self._share(self.param_groups, self._trainer.param_groups)
        step_by_entry(self._trainer)
        self._trainer.step()
        self._share(self._trainer.param_groups, self.param_groups)  # some optimizers count in their groups
        for pool in self._pools:
            pool.write(gradients)
        self.schedule.done += 1
        self._renew()

    def _number_of_new(self) -> int:
        """How many weights this step chooses."""
        chosen, total = self._chosen, self.schedule.total(self._room)
        return self.schedule.renewed(chosen) + (max(0, total - chosen) if total is not None else 0)

    def _choose(self, gradients: Mapping[str, Dense | Kept], count: int) -> None:
        for pool in self._pools:
            pool.refresh()
        taken = {name: ids for pool in self._pools for name, ids in pool.ids.items()}
        new = choose(gradients, self._candidates, taken, self.schedule.score, count)
        renewed = min(self.schedule.renewed(self._chosen), sum(len(ids) for ids in new.values()))
        if renewed:
            moved = {name: value for pool in self._pools for name, value in pool.moved().items()}
            places = best(((name, -value) for name, value in moved.items()), renewed)
            dropped = {name: taken[name][places[name].to(taken[name].device)] for name in taken}
            for pool in self._pools:
                pool.drop({name: dropped[name] for name in pool.tensors}, self._trainer.state)
        self._add(new)

    def _add(self, new: Mapping[str, Tensor]) -> None:
        for pool in self._pools:
            pool.add({name: new[name] for name in pool.tensors if name in new}, self._trainer.state)
        self._renew()

    def _load(self, gradients: Mapping[str, Dense | Kept]) -> list[Tensor]:
        loaded = []
        for pool in self._pools:
            pool.refresh()
            loaded += pool.load(gradients)
        return loaded

    def _keep(self, name: str, tensor: Tensor, before: Kept | None) -> Kept | None:
        """What the next step needs of a gradient that is about to go; None: all of it."""
        if name in self._active():
            return None
        if not self._catcher.kept:
            self._follow_devices()
        new = self._number_of_new()
        if before is not None:
            if new:
                raise InputError(PASSES)
            before.add(tensor.grad)
            return before
        kept = Kept(tensor.grad, next(pool.ids[name] for pool in self._pools if name in pool.ids))
        if new:
            kept.consider(name, tensor, tensor.grad, self.schedule.score, new)
        return kept

    # ------------------------------------------------------------ what it did

    def get_budget_used(self) -> int:
        """How many weights train."""
        return self._chosen + numbers(self._whole) + numbers(self._active())

    def selection(self, model: nn.Module) -> Selection:
        """What has trained so far, by the names of `model`. Raises InputError if a tensor of it is not the model's."""
        tensors = named_tensors(model)
        units = self._units(tensors)
        along = {name: axis for name, (axis, _) in units.items() if axis is not None}
        meta = {"unit": "weight", "budget": self.budget, "schedule": type(self.schedule).__name__.lower(),
                **self.schedule.origin}
        return selection_of({name: ids for name, (_, ids) in units.items()}, along, tensors, meta)

    def start_values(self, model: nn.Module) -> dict[str, Tensor]:
        """The values that what has trained started from, by the names of `model`, shaped as weights.read returns them.
        Raises InputError for blocks that trained in turn: what they started from is not kept."""
        ours = self._ours(named_tensors(model))
        if self.schedule.visited(self._candidates):
            raise InputError("what the blocks of this optimizer started from is not kept, as it would be a second copy "
                             "of the model: take Patch.between(base, model, optimizer.selection(model))")
        start = self._start_of_whole | {name: value.cpu() for pool in self._pools
                                        for name, value in pool.by_tensor(pool.start).items() if len(value)}
        return {model_name: start[name] for model_name, name in ours.items() if name in start}

    def patch(self, model: nn.Module, new: Collection[str] = ()) -> Patch:
        """The patch of what has trained, by the names of `model`; `new` names tensors that its base has no values of (a
        head drawn at random), as for Patch.from_values."""
        selection, tensors = self.selection(model), named_tensors(model)
        trained = {name: read_units(tensors[name], selection, name) for name in selection}
        return Patch.from_values(model, selection, self.start_values(model), trained, new)

    def get_summary(self, model: nn.Module) -> Patch:
        """The published name of `patch`."""
        return self.patch(model)

    def post_train_work(self) -> None:
        """Check that no weight but the chosen ones has changed: with `verify`, bit by bit. Raises TrainingFailed,
        naming the tensors, if one has."""
        changed = []
        for pool in self._pools:
            starts = pool.by_tensor(pool.start)
            changed += [name for name, tensor in pool.tensors.items() if name in self._digests
                        and _as_started(tensor, pool.ids[name], starts[name]) != self._digests[name]]
        changed = [name for name in changed if name not in self.schedule.visited(self._candidates)]
        if changed:
            raise TrainingFailed(f"weights outside the selection changed in {', '.join(changed)}: something else than "
                                 "this optimizer wrote to them")
        logger.info("%d of %d weights of the budget train%s", self.get_budget_used(), self.budget,
                    "; the others are bit for bit as they were" if self._digests else "")

    def _units(self, tensors: Mapping[str, nn.Parameter]) -> dict[str, tuple[int | None, Tensor]]:
        """The axis and ids of what has trained, by the names of `tensors`."""
        ids = {name: ids.cpu() for pool in self._pools for name, ids in pool.ids.items() if len(ids)}
        whole = {*self._whole, *self.schedule.visited(self._candidates)}
        return {model_name: all_of(tensors[model_name]) if name in whole else (None, ids[name])
                for model_name, name in self._ours(tensors).items() if name in whole or name in ids}

    def _ours(self, tensors: Mapping[str, nn.Parameter]) -> dict[str, str]:
        """The name of every tensor of a model -> ours, for those that are here. Raises InputError if one is missing."""
        ours = {id(tensor): name for name, tensor in (self._candidates | self._whole).items()}
        found = {name: ours[id(tensor)] for name, tensor in tensors.items() if id(tensor) in ours}
        if len(found) < len(ours):
            missing = next(name for name in ours.values() if name not in found.values())
            raise InputError(f"the optimizer trains a tensor ({missing}) that this model does not have: give the model "
                             "it was built for")
        return found

    # ------------------------------------------------------------ checkpoint and groups

    def state_dict(self) -> dict[str, object]:
        """Everything of the run: what is chosen, its values and state, the counters; tensors and plain containers."""
        pools = [pool.state_dict() for pool in self._pools]
        ours = {"pools": pools, "base": self._trainer.state_dict(), "done": self.schedule.done,
                "start": self._start_of_whole, "digests": self._digests}
        return super().state_dict() | {STATE: ours}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Go on where `state_dict` was taken; the model's weights are loaded apart. Raises InputError for the state of
        another optimizer."""
        ours = state_dict.get(STATE)
        if ours is None:
            raise InputError("this is not the state of a selective optimizer: give what its state_dict() returned")
        if [pool["tensors"] for pool in ours["pools"]] != [list(pool.tensors) for pool in self._pools]:
            raise InputError("the state is of an optimizer with other tensors: build this one with the same groups, "
                             "and after the model is on its devices")
        super().load_state_dict(dict(state_dict))
        for pool, saved in zip(self._pools, ours["pools"], strict=True):
            pool.load_state_dict(saved)
        self.schedule.done = ours["done"]
        self._start_of_whole = {name: value.to("cpu", copy=True) for name, value in ours["start"].items()}
        self._digests = dict(ours["digests"])
        self._trainer = self._new_trainer()
        self._trainer.load_state_dict(copy.deepcopy(ours["base"]))
        follow(self._trainer)
        if self._catcher is not None:
            self._catcher.clear()

    def add_param_group(self, param_group: dict[str, object]) -> None:
        """One more group. Raises InputError, once training may have begun, for one the budget has no room for, and for
        one to choose from if the schedule chooses no more."""
        if getattr(self, "_groups", None) is None:
            return super().add_param_group(param_group)
        super().add_param_group(param_group)
        added = group_of(len(self._groups), self.param_groups[-1], {}, self._late)
        reason = self._why_not(added)
        if reason:
            self.param_groups.pop()
            raise InputError(reason)
        self._take([*self._groups, added])
        self._start_of_whole |= {name: tensor.detach().to("cpu", copy=True) for name, tensor in added.whole.items()}
        if self._digests:
            self._digests |= {name: digest(tensor) for name, tensor in added.candidates.items()}
        self._trainer.add_param_group(self._base_group(len(self._groups) - 1))
        self._renew()
        return None

    def _why_not(self, added: Group) -> str:
        room = self.budget - self.get_budget_used()
        if numbers(added.whole) > room:
            return (f"the group has {numbers(added.whole):,} weights and the budget {room:,} left: give it to the "
                    "optimizer when it is built, or raise budget=")
        if added.candidates and (not self.schedule.grows or self._catcher is not None):
            return "this optimizer has chosen already: give it the group when it is built, or with choose_all"
        return ""

    def __getstate__(self) -> dict[str, object]:
        """For a copy; torch's own keeps three attributes."""
        if self._catcher is not None:
            raise InputError("an optimizer with gather=\"backward\" cannot be copied: its hooks sit on the tensors")
        return super().__getstate__() | {name: self.__dict__[name] for name in OWN}

    # ------------------------------------------------------------ parts

    def _take(self, groups: list[Group]) -> None:
        self._groups = groups
        self._candidates = {name: tensor for group in groups for name, tensor in group.candidates.items()}
        self._whole = {name: tensor for group in groups for name, tensor in group.whole.items()}

    @property
    def _pools(self) -> list[Pool]:
        return [pool for group in self._groups for pool in group.pools]

    @property
    def _room(self) -> int:
        """How many weights may be chosen."""
        return self.budget - numbers(self._whole)

    @property
    def _chosen(self) -> int:
        return sum(len(pool) for pool in self._pools)

    def _active(self) -> dict[str, nn.Parameter]:
        """Candidates that train whole in the next step."""
        return {name: self._candidates[name] for name in self.schedule.whole(self._candidates)}

    # ------------------------------------------------------------ the base optimizer

    def _new_trainer(self) -> Optimizer:
        return self._base([self._base_group(i) for i in range(len(self._groups))], **self._arguments)

    def _base_group(self, number: int) -> dict[str, object]:
        return {name: value for name, value in self.param_groups[number].items() if name not in OURS} | \
            {"params": self._trained(number)}

    def _trained(self, number: int) -> list[nn.Parameter]:
        """The parameters of one group that the base optimizer trains."""
        group, active = self._groups[number], self._active()
        return [*(parameter for pool in group.pools for parameter in pool.parameters), *group.whole.values(),
                *(tensor for name, tensor in active.items() if name in group.candidates)]

    def _renew(self) -> None:
        """Give the base optimizer the parameters that train now; the state of those that no longer do goes."""
        for number, group in enumerate(self._trainer.param_groups):
            trained, before = self._trained(number), group["params"]
            group["params"] = trained
            for parameter in {*before} - {*trained}:
                self._trainer.state.pop(parameter, None)

    def _share(self, given: list[dict[str, object]], taking: list[dict[str, object]]) -> None:
        """Copy the hyperparameters of these groups to those."""
        for source, target in zip(given, taking, strict=True):
            target.update({name: value for name, value in source.items() if name not in OURS})

    def _follow_devices(self) -> None:
        if any(pool.has_moved for pool in self._pools):
            self.load_state_dict(self.state_dict())


def _check(bias_correction: str, gather: str, accumulation_steps: int, arguments: Mapping[str, object]) -> None:
    for kind, given, known in (("bias_correction", bias_correction, CORRECTIONS), ("gather", gather, GATHERS)):
        if given not in known:
            raise unknown_name(kind, str(given), known)
    if accumulation_steps < 1:
        raise InputError(f"accumulation_steps must be 1 or more, got {accumulation_steps}")
    if arguments.get("differentiable"):
        raise InputError("differentiable=True does not go with training chosen weights: leave it out")
    if gather == "backward" and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise InputError("gather=\"backward\" frees gradients before several processes can add them up: take "
                         "gather=\"step\", or stt.attach(model, selection)")


def _as_started(tensor: Tensor, ids: Tensor, start: Tensor) -> str:
    """Digest of a tensor with what was chosen of it as it was when it was chosen."""
    values = tensor.detach().clone()
    write(values, None, ids, start)
    return digest(values)
