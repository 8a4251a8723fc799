"""What changes in an attention module besides its tensors when it keeps some of its units: found by trying, on a twin
without weights.

The dense module runs with random values in the place of its products. A narrow twin runs with the kept part of the same
values; sizes are right if its output projection then reads the kept part of what the dense one reads.
"""
from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, combinations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import Cache

from stt.blocks import LAYERS
from stt.dummy import UNFIT
from stt.narrow import narrow, narrowed_tensors
from stt.sites import Argument, Member, Site, Size
from stt.surgery import override_forward
from stt.trace import Source, WeightlessTrace, run_under

Sizes = tuple[Size | Argument, ...]
KEEP_THEIR_OWN = (*LAYERS, nn.Embedding, nn.modules.conv._ConvNd)  # layers whose sizes are changed with their weights
TOLERANCE = 1e-4  # of the values that the output projection reads, which are near 1
NOT_CALLED = "its module is not called by itself, so it cannot be tried with fewer heads"
NOT_RESIZED = "its module cannot be given another number of heads: no size that it keeps, reads or is given does it"


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]


class OwnSizes:
    """A configuration as one module sees it: some sizes of its own, everything else read from and written to the one it
    stands before. `read` are the entries that were asked for."""

    def __init__(self, config: object, sizes: Mapping[str, int]):
        vars(self).update(_config=config, _sizes=dict(sizes), _read=set())

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        self._read.add(name)
        return self._sizes[name] if name in self._sizes else getattr(self._config, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._config, name, value)

    def __reduce__(self) -> tuple[type, tuple[object, dict[str, int]]]:
        return OwnSizes, (self._config, self._sizes)


class Calls:
    """The first call of every module that holds others, by its first name, and which of the tensors that it returned
    (by place) another module was given."""

    def __init__(self) -> None:
        self.first: dict[str, Call] = {}
        self.handed_on: dict[str, set[int]] = defaultdict(set)
        self._made: dict[int, tuple[str, int, Tensor]] = {}  # id of a tensor -> who returned it first

    def before(self, name: str, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """A forward pre-hook."""
        self.first.setdefault(name, Call(*pytree.tree_map(_noted, (args, kwargs), is_leaf=_is_cache)))
        for value in pytree.tree_leaves((args, kwargs), is_leaf=_is_cache):
            if id(value) in self._made:
                maker, place, _ = self._made[id(value)]
                self.handed_on[maker].add(place)

    def after(self, name: str, _: nn.Module, args: tuple[object, ...], output: object) -> None:
        """A forward hook."""
        for place, value in enumerate(pytree.tree_leaves(output)):
            if isinstance(value, Tensor):
                self._made.setdefault(id(value), (name, place, value))


@contextmanager
def noting_calls(model: nn.Module) -> Iterator[Calls]:
    """The calls of the modules while it lasts."""
    calls = Calls()
    hooks = []
    for name, module in model.named_modules():
        if name and any(True for _ in module.children()):
            hooks.append(module.register_forward_pre_hook(functools.partial(calls.before, name), with_kwargs=True))
            hooks.append(module.register_forward_hook(functools.partial(calls.after, name)))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def with_sizes(model: nn.Module, sites: Sequence[Site],
               calls: Calls) -> tuple[list[Site], dict[str, str]]:
    """The sites with what changes in their modules, and the reasons for those that cannot be cut, by the name of the
    output projection's weight."""
    numbers = _numbers(model, sites)
    known: dict[type, Sizes] = {}
    resized, refused = [], {}
    for site in sites:
        owner = model.get_submodule(site.owner)
        if site.owner not in calls.first:
            refused[site.members[-1].tensor] = NOT_CALLED
            continue
        trials = _trials(owner, calls.first[site.owner], site, calls.handed_on[site.owner])
        first = [known[type(owner)]] if type(owner) in known else []
        candidates = chain(first, _candidates(trials[0], numbers[type(owner)]))
        right = next((sizes for sizes in candidates if all(trial.is_right(sizes) for trial in trials)), None)
        if right is None:
            refused[site.members[-1].tensor] = NOT_RESIZED
            continue
        known[type(owner)] = right
        resized.append(replace(site, sizes=right))
    return resized, refused


def resize(model: nn.Module, site: Site, units: Tensor) -> None:
    """Let the attention module of a site, whose tensors are narrow, keep these units."""
    owner = model.get_submodule(site.owner)
    of_config: dict[str, int] = {}
    for size in site.sizes:
        if isinstance(size, Argument):
            continue
        if size.of_config:
            of_config[size.name] = _config_of(owner, size.name) * len(units) // site.width
        else:
            module = owner.get_submodule(size.module)
            setattr(module, size.name, getattr(module, size.name) * len(units) // site.width)
    if of_config:
        for module in _with_config(owner):
            module.config = OwnSizes(module.config, of_config)
    for module in owner.modules():
        _forget(module)
    arguments = tuple(size for size in site.sizes if isinstance(size, Argument))
    if arguments:
        heads = (units.unsqueeze(1) * site.heads + torch.arange(site.heads)).flatten()
        override_forward(owner, KeptHeads(arguments, heads, site.width * site.heads))


def _forget(module: nn.Module) -> None:
    """Empties the dictionaries in which a module keeps tensors that it made of its parameters, as LeViT does the
    position biases of a first forward pass: they have the heads of before."""
    for name, value in vars(module).items():
        is_own = name not in ("_parameters", "_buffers", "_modules")
        if is_own and type(value) is dict and value and all(isinstance(part, Tensor) for part in value.values()):
            value.clear()


@dataclass(frozen=True)
class KeptHeads:
    """The forward of an attention module that reads of some arguments the entries of its own heads, and hands the whole
    arguments on where its class would hand on what it was given."""

    arguments: tuple[Argument, ...]
    heads: Tensor
    count: int

    def __call__(self, module: nn.Module, *args: object, **kwargs: object) -> object:
        given = dict(enumerate(args)) | kwargs
        wholes: dict[int, Tensor] = {}  # by the id of the part
        for argument in self.arguments:
            whole = given.get(argument.key)
            if isinstance(whole, Tensor) and whole.shape[argument.axis] > 1:  # else the same for all heads
                given[argument.key] = self._part(whole, argument.axis)
                wholes[id(given[argument.key])] = whole
        output = type(module).forward(module, *(given[i] for i in range(len(args))),
                                      **{key: given[key] for key in kwargs})
        return pytree.tree_map(lambda value: wholes.get(id(value), value), output)

    def _part(self, whole: Tensor, axis: int) -> Tensor:
        """The entries of the kept heads; along the first axis those of all examples may stand."""
        apart = whole.unflatten(axis, (-1, self.count))
        return apart.index_select(axis + 1, self.heads.to(whole.device)).flatten(axis, axis + 1)


# ---------------------------------------------------------------- what may change


def _numbers(model: nn.Module, sites: Sequence[Site]) -> dict[type, list[Size]]:
    """For every class of attention the attributes that are a size of it in all its layers: units, heads or channels."""
    of_class: dict[type, list[set[Size]]] = defaultdict(list)
    for site in sites:
        owner = model.get_submodule(site.owner)
        of_class[type(owner)].append({
            Size(path, name) for path, module in owner.named_modules() if not isinstance(module, KEEP_THEIR_OWN)
            for name, value in vars(module).items() if type(value) is int and value in _sizes_of(site)})
    return {kind: sorted(set.intersection(*sets), key=repr) for kind, sets in of_class.items()}


def _sizes_of(site: Site) -> set[int]:
    """Numbers of units, heads and channels."""
    return {site.width, site.width * site.heads, *(member.channels.numel() for member in site.members)}


def _candidates(trial: _Trial, numbers: Sequence[Size]) -> Iterator[Sizes]:
    """Sets of sizes to try: as few attributes as possible, with or without one or two of the arguments, then also what
    the module reads from its configuration. An attribute that need not change may be anything of the same size, such as
    the layer's place in the model, and stays."""
    arguments = list(trial.arguments())
    for given in chain(combinations(arguments, 0), combinations(arguments, 1), combinations(arguments, 2)):
        yield from ((*given, *sizes) for sizes in _subsets(numbers))
    config = [Size("", name, of_config=True) for name in sorted(trial.config_reads)]
    for of_config in _subsets(config):
        yield from ((*of_config, *sizes) for sizes in _subsets(numbers) if of_config)


def _subsets(sizes: Sequence[Size]) -> Iterator[Sizes]:
    """None of them, one ..., all."""
    for count in range(len(sizes) + 1):
        yield from combinations(sizes, count)


def _with_config(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if "config" in vars(part)]


def _config_of(module: nn.Module, name: str) -> int:
    return next(getattr(part.config, name) for part in _with_config(module) if hasattr(part.config, name))


# ---------------------------------------------------------------- trials


def _trials(owner: nn.Module, call: Call, site: Site, handed_on: set[int]) -> list[_Trial]:
    """With all units but the first, and with the last alone."""
    kept = [torch.arange(1, site.width), torch.arange(site.width - 1, site.width)]
    return [_Trial(owner, call, site, units, handed_on) for units in (kept if site.width > 2 else kept[:1])]


@dataclass(frozen=True)
class Ran:
    """The sources of one call of a module, and the shapes of what it returned."""

    sources: list[Source]
    shapes: list[torch.Size | None]


class _Trial:
    """One attention module, dense and narrow, on the arguments of a call of it."""

    def __init__(self, owner: nn.Module, call: Call, site: Site, units: Tensor, handed_on: set[int]):
        self.call = call
        self.handed_on = handed_on
        self.site = _inside(site)
        self.units = units
        self.narrow = _twin(owner)
        self.config_reads: set[str] = set()
        self.dense = self._dense()
        narrow(self.narrow, narrowed_tensors(self.narrow, [self.site], {self.site.name: units}))

    def _dense(self) -> dict[str, Ran]:
        """A call of the dense module, with every implementation of attention that runs; the sizes that it reads from
        its configuration are noted."""
        twin, dense = copy.deepcopy(self.narrow), {}
        for part in _with_config(twin):
            part.config = OwnSizes(part.config, {})
        for kind in _implementations(twin):
            ran = self._run(twin, WeightlessTrace(twin))
            dense |= {kind: ran} if ran is not None else {}
        for part in _with_config(twin):
            self.config_reads |= {name for name in part.config._read
                                  if type(getattr(part.config, name, None)) is int
                                  and getattr(part.config, name) in _sizes_of(self.site)}
        return dense

    def arguments(self) -> Iterator[Argument]:
        """What the module is given with entries for every head, maybe of all examples, along an axis."""
        heads = self.site.width * self.site.heads
        for key, value in (dict(enumerate(self.call.args)) | dict(self.call.kwargs)).items():
            for axis in range(value.ndim if isinstance(value, Tensor) and heads > 1 else 0):
                if value.shape[axis] == heads or (axis == 0 and value.shape[0] % heads == 0):
                    yield Argument(key, axis)

    def is_right(self, sizes: Sizes) -> bool:
        """True if the narrow module with these sizes reads the kept channels of what the dense one reads, with every
        implementation of attention that runs."""
        module = copy.deepcopy(self.narrow)
        resize(module, replace(self.site, sizes=sizes), self.units)
        return bool(self.dense) and all(self._agrees(module, self.dense[kind]) for kind in _implementations(module)
                                        if kind in self.dense)

    def _agrees(self, module: nn.Module, dense: Ran) -> bool:
        down = self.site.members[-1]
        ran = self._run(module, _Replay(module, self._kept(dense.sources)))
        if ran is None or any(ran.shapes[place] != dense.shapes[place] for place in self.handed_on):
            return False
        expected = next((source for source in dense.sources if source.parameter == down.tensor), None)
        read = next((source.input for source in ran.sources if source.parameter == down.tensor), None)
        if expected is None or read is None:
            return False
        kept = expected.input.index_select(expected.input_axis, self.site.pick(down, self.units))
        return read.shape == kept.shape and bool((read - kept).abs().max() <= TOLERANCE)

    def _kept(self, dense: Iterable[Source]) -> dict[str, list[Tensor]]:
        """The kept part of what every product, lookup and parameter was in the dense module, in order, by tensor."""
        members = {member.tensor: member for member in (*self.site.members[:-1], *self.site.along)}
        values: dict[str, list[Tensor]] = defaultdict(list)
        for source in dense:
            value, member = source.value.detach(), members.get(source.parameter)
            if member is not None:
                axis = member.axis if source.is_parameter else source.axis
                value = value.index_select(axis, self.site.pick(member, self.units))
            values[source.parameter].append(value)
        return values

    def _run(self, module: nn.Module, recorder: WeightlessTrace) -> Ran | None:
        """What one call shows; None if the module does not take it."""
        args, kwargs = pytree.tree_map(_copied, (self.call.args, dict(self.call.kwargs)))
        try:
            output = run_under(recorder, module, args, kwargs)
        except UNFIT:
            return None
        return Ran(recorder.sources, [getattr(value, "shape", None) for value in pytree.tree_leaves(output)])


def _implementations(module: nn.Module) -> Iterator[str]:
    """The configured implementation of attention and the eager one, which reads other sizes; set while it is
    handled."""
    configs = list({id(part.config): part.config for part in _with_config(module)
                    if hasattr(part.config, "_attn_implementation")}.values())
    own = [config._attn_implementation for config in configs]
    yield "own"
    for config in configs:
        config._attn_implementation = "eager"
    yield "eager"
    for config, implementation in zip(configs, own, strict=True):
        config._attn_implementation = implementation


class _Replay(WeightlessTrace):
    """A trace that answers with given values instead of random ones."""

    def __init__(self, module: nn.Module, values: Mapping[str, Sequence[Tensor]]):
        super().__init__(module)
        self._given = {name: list(of_name) for name, of_name in values.items()}

    def _leaf(self, name: str, shape: tuple[int, ...], *axis_and_layout: object) -> Source:
        source = super()._leaf(name, shape, *axis_and_layout)
        source.value = self._next(name, source.value)
        return source

    def _between(self, low: float, high: float, value: Tensor) -> Tensor:
        return self._next(self._parameters.get(id(value)) or self._buffers[id(value)], value)

    def _next(self, name: str, like: Tensor) -> Tensor:
        """The next given value of a tensor. Raises ValueError if there is none, or one of another shape."""
        value = self._given[name].pop(0) if self._given.get(name) else None
        if value is None or value.shape != like.shape:
            raise ValueError(f"{name} is computed in another order or shape")
        return value.requires_grad_()


def _noted(value: object) -> object:
    """What is kept of an argument: no graph, and no cache, which a call fills."""
    is_value = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return None if _is_cache(value) else value.detach() if is_value else value


def _is_cache(value: object) -> bool:
    return isinstance(value, Cache)


def _copied(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value


def _twin(owner: nn.Module) -> nn.Module:
    """A copy with parameters on the meta device."""
    memo: dict[int, object] = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
                               for p in owner.parameters()}
    return copy.deepcopy(owner, memo)


def _inside(site: Site) -> Site:
    """The site with names as seen from its owner."""
    def moved(member: Member) -> Member:
        return replace(member, module=member.module[len(site.owner):].removeprefix("."))

    return replace(site, members=tuple(map(moved, site.members)), along=tuple(map(moved, site.along)))
