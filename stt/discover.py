"""From a trace of the model to its feed-forward sites, and to what looks like one and is not, with the reason."""
from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stt.blocks import LAYERS, Call, form_of, layer_of, named_once, shared_weights, sites_of, tensors_of
from stt.decode import COUNTS, MIXES_POSITIONS, NO_BLOCK, decode
from stt.dummy import dummy_inputs, hidden_inputs, passing_over
from stt.errors import InputError
from stt.sites import LeftOut, Site, is_repeated
from stt.trace import Source, bit_positions, trace

ELSEWHERE = "a projection of it is also used elsewhere"


def discover(model: nn.Module, example: Mapping[str, Tensor] | None) -> tuple[list[Site], list[LeftOut]]:
    """The sites of a model in the order of execution, and what is left out. Raises InputError if `example` does not
    fit the model."""
    found = _looked_at(model, example)
    sites = found.sites()
    main, side_families = _main_families(model, sites, [tensors for _, tensors in found.refused.values()])
    return main, [*found.left_out(sites), *side_families]


@torch.inference_mode(False)
@torch.enable_grad()
@torch.autocast("cpu", enabled=False)
def _looked_at(model: nn.Module, example: Mapping[str, Tensor] | None) -> _Found:
    found = _Found(model)
    if example is not None:
        found.look("", model, dict(example))
    else:
        _try(found, "", model)
    _look_at_the_rest(found)
    return found


def _try(found: _Found, name: str, module: nn.Module) -> bool:
    """Trace a model, or a model in it, on made-up inputs; False if none fit."""
    for inputs in dummy_inputs(module):
        try:
            found.look(name, module, inputs)
        except InputError:
            continue
        return True
    return False


def _look_at_the_rest(found: _Found) -> None:
    """What the first trace did not execute: a tower is traced by itself, an idle expert or any other block on hidden
    states made up for it, the smallest module first that shows a site."""
    for name, module in found.model.named_modules():
        if name and isinstance(module, PreTrainedModel) and found.is_untouched(name):
            _try(found, name, module)
    tried = set()
    for projection in found.never_called():
        if projection in found.seen:
            continue
        parts = projection.split(".")[:-1]
        for depth in range(len(parts) - 1, 0, -1):
            name = ".".join(parts[:depth])
            module = found.model.get_submodule(name)
            if name in tried or isinstance(module, nn.ModuleList | nn.ModuleDict) or not found.is_untouched(name):
                break
            tried.add(name)
            if _try_block(found, name, module):
                break


def _try_block(found: _Found, name: str, module: nn.Module) -> bool:
    """True if hidden states can be made up with which the block shows a site, if need be with the blocks in it (as its
    attention) passed over."""
    for returned in (None, lambda x: x, lambda x: (x, None)):
        for inputs in hidden_inputs(module):
            try:
                with passing_over(module, returned):
                    if found.look(name, module, inputs, is_block=True):
                        return True
            except InputError:
                continue
    return False


# ---------------------------------------------------------------- down projections and what feeds them


class _Found:
    """What the traces have shown so far."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.seen: set[str] = set()
        self.calls: dict[str, list[Call]] = defaultdict(list)  # down parameter -> its calls
        self.used_elsewhere: set[str] = set()
        self.refused: dict[str, tuple[str, set[str]]] = {}  # down projection -> the reason, its tensors

    def look(self, name: str, module: nn.Module, inputs: Mapping[str, object], is_block: bool = False) -> bool:
        """Trace one module (called `name` in the model); True if it shows a site. A block that shows none does not
        count as seen, nor what it shows as refused: a larger one around it may show more, other inputs less."""
        sources, refused = trace(module, inputs), dict(self.refused)
        for source in sources:
            source.parameter = self._in_model(name, source.parameter)
        examples = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
        readers = [{sources[i].parameter if i >= 0 else None for i in source.consumers} for source in sources]
        explained: set[int] = set()
        for position, down in enumerate(sources):
            if down.layout is not None and all(not _may_feed(sources[i], down) or readers[i] == {down.parameter}
                                               for i in bit_positions(down.reads)):
                explained |= self._call(sources, position, examples, is_block)
        if is_block and not explained:
            self.refused = refused
            return False
        self.seen |= {source.parameter for source in sources}
        self.used_elsewhere |= {source.parameter for position, source in enumerate(sources)
                                if source.layout is not None and position not in explained}
        return bool(explained)

    def _call(self, sources: Sequence[Source], position: int, examples: int, is_alone: bool) -> set[int]:
        """Decode one call of a projection that alone reads what feeds it; the positions of the sources it explains."""
        down = sources[position]
        feeding = {i: sources[i] for i in bit_positions(down.reads)}
        projections = [source for source in feeding.values() if _may_feed(source, down)]
        if not projections:
            own = [source for source in feeding.values() if source.layout and source.consumers == {position}]
            if sum(source.value.shape[source.axis] for source in own) == down.layout.inputs.size:
                self.refused[layer_of(down.parameter)] = COUNTS, {down.parameter, *(s.parameter for s in own)}
            return set()
        decoded = decode(down, list(feeding.values()))
        if isinstance(decoded, str):
            sizes = [source.value.shape[source.axis] for source in feeding.values() if source.layout is not None]
            is_attention = sizes != [down.layout.inputs.size]  # three projections, or one of three times the size
            if decoded != NO_BLOCK and (decoded != MIXES_POSITIONS or not is_attention):
                name = layer_of(down.parameter)
                self.refused[name] = decoded, {down.parameter, *(source.parameter for source in projections)}
            return set()
        reached = [list(feeding.values())[place].parameter for place in decoded.projections]
        if len(set(reached)) < len(reached) or any(map(self._is_part, (down, *feeding.values()))):
            self.refused[layer_of(down.parameter)] = ELSEWHERE, {down.parameter, *reached}
            return set()
        shape = down.input.shape
        is_time_first = len(shape) == 3 and shape[0] != examples == shape[1]
        self.calls[down.parameter].append(Call(down, tuple(feeding.values()), decoded, is_time_first, is_alone))
        return {position, *(i for place, i in enumerate(feeding) if place in decoded.projections)}

    def _is_part(self, source: Source) -> bool:
        """True for a product with some rows or columns of a layer's weight: the others may mean something else."""
        spans = (source.layout.inputs, source.layout.outputs) if source.layout else ()
        shape = self.shapes.get(source.parameter, ())
        return isinstance(self.model.get_submodule(source.parameter.rpartition(".")[0]), LAYERS) \
            and any(span.size < shape[span.axis] for span in spans)

    def _in_model(self, name: str, tensor: str) -> str:
        """The model's own, first name for a tensor of the module called `name`."""
        tensor = f"{name}.{tensor}" if name else tensor
        owner, _, attribute = tensor.rpartition(".")
        return self.names.get(id(getattr(self.model.get_submodule(owner), attribute)), tensor)

    # ------------------------------------------------------------ sites

    def sites(self) -> list[Site]:
        """The sites that can be sliced; what else was decoded is added to what is refused."""
        of_downs = {parameter: list(sites_of(calls, self.shapes)) for parameter, calls in self.calls.items()}
        readers = Counter(tensor for of_down in of_downs.values() for tensor in tensors_of(of_down, "out"))
        read_twice = {tensor for tensor, count in readers.items() if count > 1}
        used = set(self.used_elsewhere)
        sizes = {parameter: self._weights(tensors_of(of_down)) for parameter, of_down in of_downs.items()}
        largest_first = sorted(of_downs, key=lambda down: (not is_repeated(self.model, down), -sizes[down]))
        for parameter in largest_first:  # of a chain of projections each is in one block
            tensors = tensors_of(of_downs[parameter])
            if used & tensors or read_twice & tensors_of(of_downs[parameter], "out"):
                self.refused[layer_of(parameter)] = ELSEWHERE, tensors
                del of_downs[parameter]
            else:
                used |= tensors
        routed = self._routed(of_downs)
        shared = shared_weights(self.model)
        sites = [replace(site, form=form_of(self.model, site, shared), is_routed=parameter in routed)
                 for parameter, of_down in of_downs.items() for site in of_down]
        return named_once(sites)

    def _routed(self, downs: Iterable[str]) -> set[str]:
        """Down projections that read some of the positions: stacks, and blocks whose neighbours in their list read
        another number of single positions (N, C), or none."""
        lists: dict[str, dict[str, int]] = defaultdict(dict)
        stacks, single = set(), set()
        for parameter in downs:
            calls = self.calls[parameter]
            if len(self.shapes[parameter]) == 3 or parameter != f"{layer_of(parameter)}.weight":
                stacks.add(parameter)
            rows = 0 if calls[0].is_alone else sum(call.decoded.rows for call in calls)
            lists[_list_of(self.model, parameter)][parameter] = rows
            single |= {parameter} if rows and calls[0].down.input.ndim == 2 else set()
        return stacks.union(*(of_list for of_list in lists.values()
                              if len(set(of_list.values())) > 1 and single & of_list.keys()))

    # ------------------------------------------------------------ what was not executed

    def is_untouched(self, name: str) -> bool:
        """True if no trace has called a projection in this module."""
        return not any(parameter.startswith(name + ".") for parameter in self.seen)

    def never_called(self) -> Iterator[str]:
        """Weights that no trace has used."""
        for module in self.model.modules():
            for parameter, value in module.named_parameters(recurse=False):
                full = self.names[id(value)]
                is_weight = isinstance(module, LAYERS) and parameter == "weight" or _is_stack(module, value)
                if is_weight and full not in self.seen:
                    yield full

    def left_out(self, sites: Sequence[Site]) -> Iterator[LeftOut]:
        """What was refused, what no trace called, and stacks that are no site. It is a loss unless the sites of the
        same layer, or those that share its weights, hold more weights: a low-rank pair of an attention layer is none,
        beside a feed-forward block. Attention that was never called is none, either, where the layer has a site."""
        for name, (reason, tensors) in self.refused.items():
            if is_repeated(self.model, f"{name}.weight"):
                is_loss = self._weights(tensors) >= self._beside(name, sites, tensors)
                yield LeftOut(name, reason, is_loss, tuple(sorted(tensors)))
        yield from self._idle(tensors_of(sites))
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups < module.out_channels \
                    and set(module.kernel_size) == {1} and is_repeated(self.model, f"{name}.weight"):
                is_loss = module.weight.numel() > self._beside(f"{name}.weight", sites)
                yield LeftOut(name, "a convolution in groups of channels", is_loss, (f"{name}.weight",))
        yield from self._unknown_stacks(sites)

    def _idle(self, members: Collection[str]) -> Iterator[LeftOut]:
        """What no trace called."""
        never = sorted(self.never_called())
        for name in never:
            layer = _layer(self.model, name)
            reason = "never called by the dummy input (an idle expert or an unused tower)"
            is_block = sum(other.startswith(layer) for other in never) > 1 or len(self.shapes[name]) == 3
            is_sliced = any(member.startswith(layer) for member in members)
            is_loss = is_repeated(self.model, name) and is_block and not is_sliced
            yield LeftOut(layer_of(name), reason, is_loss, (name,))

    def _unknown_stacks(self, sites: Sequence[Site]) -> Iterator[LeftOut]:
        """Stacks that were called and are in no block: a loss if they are half of their layer, as experts would be, and
        one is larger than its sites. The projections of a state-space layer or of attention are less."""
        known = tensors_of(sites).union(*(tensors for _, tensors in self.refused.values()))
        stacks = [name for name in sorted(self.seen & self.shapes.keys() - known)
                  if _is_stack(self.model.get_submodule(name.rpartition(".")[0]), self.model.get_parameter(name))]
        for name in stacks:
            layer = _layer(self.model, name, outermost=True)
            of_stacks, of_all = (self._weights(other for other in names if other.startswith(layer))
                                 for names in (stacks, self.shapes))
            is_loss = 2 * of_stacks >= of_all and self._weights([name]) > self._beside(name, sites)
            yield LeftOut(name, "a stack of weights of no known structure", is_loss, (name,))

    def _weights(self, tensors: Iterable[str]) -> int:
        return sum(math.prod(self.shapes[name]) for name in tensors)

    def _beside(self, name: str, sites: Iterable[Site], tensors: Collection[str] = ()) -> int:
        """Weights of the sites in the layer of `name`, and of those that hold any of the tensors."""
        layer = _layer(self.model, name, outermost=True)
        beside = (own for own in (tensors_of([site]) for site in sites)
                  if any(tensor in tensors or tensor.startswith(layer) for tensor in own))
        return self._weights(set().union(*beside))


def _list_of(model: nn.Module, name: str) -> str:
    """The innermost list or dictionary of modules that `name` lies in."""
    parts = name.split(".")
    lists = [".".join(parts[:i]) for i in range(1, len(parts))
             if isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList | nn.ModuleDict)]
    return lists[-1] if lists else ""


def _layer(model: nn.Module, name: str, outermost: bool = False) -> str:
    """The element of the innermost (or outermost) list of layers that `name` lies in, ending in a dot."""
    parts = name.split(".")
    lists = [isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList) for i in range(1, len(parts))]
    places = [i + 2 for i, is_list in enumerate(lists) if is_list]
    return ".".join(parts[:places[0 if outermost else -1]]) + "." if places else name


def _may_feed(source: Source, down: Source) -> bool:
    """True for a projection with one channel, or more, for each that `down` reads."""
    return source.layout is not None and source.value.shape[source.axis] % down.layout.inputs.size == 0


def _is_stack(module: nn.Module, value: Tensor) -> bool:
    is_conv = isinstance(module, nn.modules.conv._ConvNd | nn.utils.parametrize.ParametrizationList)
    return value.ndim == 3 and min(value.shape) > 1 and not is_conv


def _main_families(model: nn.Module, sites: list[Site],
                   refused: Iterable[set[str]]) -> tuple[list[Site], list[LeftOut]]:
    """Of every layer the blocks that are at least a quarter as large as the largest, where of a stack only one
    expert counts; the rest is named. A refused block counts, too."""
    parameters = dict(model.named_parameters())
    repeated = [site for site in sites if is_repeated(model, site.members[-1].tensor)]
    layers: dict[str, list[Site]] = defaultdict(list)
    for site in repeated:
        layers[_layer(model, site.members[-1].tensor, outermost=True)].append(site)

    def size(tensors: Iterable[str]) -> int:
        return sum(parameters[name].numel() for name in tensors)

    def of_one(site: Site) -> float:
        whole = ((member, parameters[member.tensor]) for member in site.members)
        return sum(value.numel() * member.channels.numel() / value.shape[member.axis]
                   / (1 if member.expert is None else len(value)) for member, value in whole)

    main = set()
    for layer, of_layer in layers.items():
        beside = (size(tensors) for tensors in refused if min(tensors).startswith(layer))
        limit = max(*map(of_one, of_layer), *beside, 0) / 4
        main |= {site.name for site in of_layer if size(tensors_of([site])) >= limit}
    side = [LeftOut(site.name, "a small side block" if site in repeated else "outside the repeated layers", False,
                    tuple(sorted(tensors_of([site])))) for site in sites if site.name not in main]
    return [site for site in repeated if site.name in main], side
