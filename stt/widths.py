"""The plain config whose model has the widths of a sliced one: found by value, verified by the shapes of all tensors.
"""
from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
from collections.abc import Iterator, Mapping

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from stt import serving
from stt.checkpoint import aliases, empty_model
from stt.errors import InputError
from stt.narrow import parts_of
from stt.sites import Site, Sites

logger = logging.getLogger(__name__)

Keys = tuple[str | int, ...]  # where a value stands in a nested config
Entry = tuple[Keys, object, set[int]]  # where, the value, the whole numbers beside it
Widths = dict[int, int]  # dense width of a site -> width in the exported model
Change = tuple[dict[Keys, object], Widths]  # new config values, and the widths they give
Shapes = dict[str, tuple[int, ...]]
Tried = dict[str, tuple[PreTrainedConfig, Shapes] | None]  # by changes: the config, and the shapes of its model
Spans = list[tuple[str, int, int]]  # of a tensor of a site: name, axis, dense width of the site
UNFIT = (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError, AssertionError,
         StrictDataclassError)  # how a config or a model class refuses a value


def narrow_config(sliced: PreTrainedModel, dense: PreTrainedModel, sites: Sites, multiple_of: int,
                  beyond_dense: bool) -> tuple[PreTrainedConfig, Widths]:
    """The first config whose model has exactly the shapes of the padded one, and its widths. `dense` is the model the
    selection was made on, on the meta device, and `sites` are its sites. Where no entry sets a width (of one tower,
    say), those blocks are padded back to their dense width.

    Raises InputError if no width can be set.
    """
    needed = _needed_widths(sliced, multiple_of, beyond_dense)
    spans = _spans(dense, [sites[name] for name in sliced.stt_selection])
    tried: Tried = {}
    for some in _fewer_and_fewer(needed):
        found = _fitting_config(type(sliced), dense, spans, some, tried)
        if found is not None:
            whole = sorted(width for width in needed if some[width] == width > needed[width])
            if whole:
                logger.warning("no config entry sets the width of the blocks that are %s wide in the dense model: they "
                               "are padded back to that", " and ".join(map(str, whole)))
            return found
    raise InputError(f"{type(sliced).__name__} has no config entry that gives its feed-forward blocks, and nothing "
                     f"else, another width ({', '.join(f'{old} to {new}' for old, new in needed.items())}): export "
                     "with --to dense, or load the checkpoint with stt.load")


def _fewer_and_fewer(needed: Widths) -> Iterator[Widths]:
    """The widths, then with one left dense, then with more, but not all."""
    for count in range(len(needed)):
        for whole in itertools.combinations(needed, count):
            yield needed | {width: width for width in whole}


def _fitting_config(kind: type[PreTrainedModel], dense: PreTrainedModel, spans: Spans, needed: Widths,
                    tried: Tried) -> tuple[PreTrainedConfig, Widths] | None:
    data, shapes = dense.config.to_dict(), _shapes(dense)
    for changes, widths in _candidates(list(_entries(data, dense.config)), needed):
        key = repr(changes)
        if key not in tried:
            tried[key] = _built(kind, type(dense.config), _changed(data, changes))
        if tried[key] is not None and tried[key][1] == _padded(shapes, spans, widths):
            said = ", ".join(f"{'.'.join(map(str, keys))} = {value}" for keys, value in changes.items())
            logger.info("changed in the config: %s", said or "nothing")
            return tried[key][0], widths
    return None


def _built(kind: type[PreTrainedModel], of_config: type[PreTrainedConfig],
           data: dict[str, object]) -> tuple[PreTrainedConfig, Shapes] | None:
    """The config and the shapes of its model; None if one of them refuses a value."""
    try:
        config = of_config.from_dict(data)
        return config, _shapes(empty_model(kind, config, None, "meta"))
    except UNFIT:
        return None


def _needed_widths(sliced: PreTrainedModel, multiple_of: int, beyond_dense: bool) -> Widths:
    """For each dense width the kept units of the widest such site, rounded up, at most the dense width unless
    `beyond_dense`; a site that the selection leaves out keeps all its units."""
    needed: Widths = {}
    kept = {site: len(ids) for site, ids in sliced.stt_selection.items()} | left_out(sliced)
    for site, width in sliced.stt_selection.widths.items():
        rounded = serving.rounded_up(kept[site], multiple_of)
        needed[width] = max(needed.get(width, 0), rounded if beyond_dense else min(rounded, width))
    return needed


def left_out(sliced: PreTrainedModel) -> dict[str, int]:
    """Dense widths of the sites that the selection leaves as they are."""
    selection = sliced.stt_selection
    return {site: width for site, width in selection.widths.items() if site not in selection}


def _entries(data: Mapping[str, object], config: PreTrainedConfig, above: Keys = ()) -> Iterator[Entry]:
    """Every entry of a config and of the configs in it."""
    values = [each for value in data.values() for each in (value if type(value) is list else [value])]
    numbers = {value for value in values if type(value) is int}
    for key, value in data.items():
        if key in config.sub_configs and isinstance(value, dict):
            yield from _entries(value, getattr(config, key), (*above, key))
        else:
            yield (*above, key), value, numbers
            elements = enumerate(value) if type(value) is list else ()
            yield from (((*above, key, i), each, numbers) for i, each in elements)


def _candidates(entries: list[Entry], needed: Widths) -> Iterator[Change]:
    """Changes of the config that may give the needed widths: of entries that hold a dense width (fewest first), then of
    one that holds its ratio to the hidden size, then of one that is unset."""
    if all(old == new for old, new in needed.items()):
        yield {}, needed
    equal = [(keys, factor * new) for keys, value, _ in entries for old, new in needed.items() for factor in (1, 2)
             if type(value) is int and value == factor * old and new != old]  # some say that of gate and up together
    for count in (*range(1, min(len(equal), 4) + 1), len(equal)):
        yield from ((dict(chosen), needed) for chosen in itertools.combinations(equal, count))
    yield from _lists_of_ratios(entries, needed)
    for keys, value, numbers in entries:
        if type(value) in (int, float) and value > 0:
            yield from (({keys: ratio}, widths) for ratio, widths in _ratios(value, numbers, needed))
    if len(needed) == 1:
        yield from (({keys: new}, needed) for keys, value, _ in entries if value is None for new in needed.values())


def _lists_of_ratios(entries: list[Entry], needed: Widths) -> Iterator[Change]:
    """One ratio of width to hidden size for each of several stages: the exact ones, then the next whole ones."""
    lists = {keys: value for keys, value, _ in entries if type(value) is list
             and all(type(each) in (int, float) for each in value)}
    for keys, ratios in lists.items():
        for hidden in (other for other in lists.values() if len(other) == len(ratios) and other is not ratios):
            old = [round(ratio * size) for ratio, size in zip(ratios, hidden, strict=True)]
            if not _changing(needed).keys() <= set(old) <= needed.keys():
                continue
            stages = list(zip(old, hidden, strict=True))
            yield {keys: [_exact_ratio(needed[width], size) for width, size in stages]}, needed
            whole = [math.ceil(needed[width] / size) for width, size in stages]
            yield {keys: whole}, needed | {width: n * size for n, (width, size) in zip(whole, stages, strict=True)}


def _ratios(ratio: float, numbers: set[int], needed: Widths) -> Iterator[tuple[float, Widths]]:
    """Smaller ratios of width to hidden size that hold the needed widths, and the widths they give: the exact one, then
    the next whole one, for a config that takes no other."""
    changing = _changing(needed)
    smallest = min(changing)
    hidden = round(smallest / ratio)
    if hidden * ratio != smallest or hidden not in numbers:
        return
    width = max(-(-new * smallest // old) for old, new in changing.items())
    for smaller in (_exact_ratio(width, hidden), math.ceil(width / hidden)):
        widths = {old: int(round(old / ratio) * smaller) for old in changing}
        if smaller < ratio and all(widths[old] >= new for old, new in changing.items()):
            yield smaller, needed | widths


def _changing(needed: Widths) -> Widths:
    return {old: new for old, new in needed.items() if old != new}


def _exact_ratio(width: int, hidden: int) -> float:
    """The ratio of which a model makes the width, as int(hidden * ratio)."""
    exact = width / hidden
    return exact if int(hidden * exact) == width else math.nextafter(exact, math.inf)


def _shapes(model: PreTrainedModel) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _spans(dense: PreTrainedModel, selected: list[Site]) -> Spans:
    """Where the units of these sites lie in the state dict of the dense model, under every name of a tensor."""
    everything = {site.name: torch.arange(site.width) for site in selected}
    width_of = {tensor: site.width for site in selected for tensor in parts_of(dense, [site], everything)}
    return [(alias, parts[0][0].axis, width_of[tensor])
            for tensor, parts in parts_of(dense, selected, everything).items() for alias in aliases(dense, tensor)]


def _padded(shapes: Shapes, spans: Spans, widths: Widths) -> Shapes:
    """The shape of every tensor of the plain model with these widths."""
    padded = {name: list(shape) for name, shape in shapes.items()}
    for name, axis, old in spans:
        padded[name][axis] = padded[name][axis] // old * widths[old]
    return {name: tuple(shape) for name, shape in padded.items()}


def _changed(data: Mapping[str, object], changes: Mapping[Keys, object]) -> dict[str, object]:
    data = copy.deepcopy(dict(data))
    for keys, value in changes.items():
        owner = functools.reduce(lambda inner, key: inner[key], keys[:-1], data)
        owner[keys[-1]] = value
    return data
