"""A sliced checkpoint as a plain Hugging Face folder, for people who do not have this library.

`export_hf` keeps the model narrow: every site is padded with exact zeros to the widest one, because a plain config has
one width for all, and on to what a runtime needs. `export_dense` puts the trained units back into the dense model.
"""
from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stt import serving
from stt.checkpoint import (
    CONFIG,
    GENERATION,
    cast_floats,
    check_free,
    empty_model,
    is_sliced,
    load,
    read_weights,
    restore,
    written_whole,
)
from stt.errors import InputError
from stt.mlps.stt_linear import STTLinear
from stt.sites import find_sites
from stt.surgery import widest_dtype
from stt.trace import dummy_inputs

logger = logging.getLogger(__name__)

Keys = tuple[str, ...]  # where a value stands in a nested config
Entry = tuple[Keys, object, set[int]]  # where, the value, the whole numbers beside it
Widths = dict[int, int]  # dense width of a site -> width in the exported model
Change = tuple[dict[Keys, object], Widths]  # new config values, and the widths they give
UNFIT = (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError, AssertionError,
         StrictDataclassError)  # how a config or a model class refuses a value
TOLERANCE = 1e-5  # relative to the largest output, float32


def export_hf(directory: str | Path, out: str | Path, multiple_of: int = 1,
              example: Mapping[str, Tensor] | None = None, runtime: str | None = None, tp: int = 1) -> Path:
    """Write the sliced checkpoint `directory` as a narrow model that plain `from_pretrained` loads; the new folder.

    All sites of one dense width get the same width: their widest, rounded up to `multiple_of`, at most the dense one.
    For a `runtime` (serving.RUNTIMES) on `tp` ranks it is also rounded up to what that needs, beyond the dense width if
    it must be; the log says what the padding costs. The config entry is found by its value and verified by the shapes
    of every parameter; the outputs are compared through real files before the folder appears, on `example` if the
    model's input cannot be made up. Parameters of several dtypes are all written in the widest of them. Raises
    InputError, with nothing written, if no config entry sets the width, if the width the runtime needs cannot be had,
    or if `out` is not free.
    """
    directory, out = Path(directory), Path(out)
    check_free(out)
    multiple_of = math.lcm(serving.check_multiple(multiple_of), serving.multiple_for(runtime, tp))
    dtype = widest_dtype(read_weights(directory).values())
    compute = torch.promote_types(dtype, torch.float32)
    sliced = load(directory, dtype=compute, example=example)
    _check_biases(sliced)
    inputs = dummy_inputs(sliced) if example is None else example
    expected = _first_output(sliced, inputs)
    serving.check_served(runtime, tp, _left_out(sliced).values())
    config, widths = _narrow_config(sliced, multiple_of, beyond_dense=runtime is not None)
    serving.check_served(runtime, tp, widths.values())
    kept = _bytes(sliced, dtype)
    for layer in _narrow_layers(sliced).values():
        layer.layout.pad(widths[_dense_width(layer)])
    plain = _plain_model(sliced, config, dtype)
    with written_whole(out) as part:
        plain.save_pretrained(part)
        _copy_tokenizer(directory, part)
        loaded = type(plain).from_pretrained(part, dtype=compute)
        error = (_first_output(loaded, inputs) - expected).abs().max().item() / expected.abs().max().item()
        if not error <= TOLERANCE:
            raise InputError(f"the exported {type(plain).__name__} differs from the sliced one by {error:.1e} of its "
                             "largest output, so nothing was written: export with --to dense, or load the checkpoint "
                             "with stt.load")
    logger.info("exported %s with width %s to %s (outputs differ by %.0e of the largest)", type(plain).__name__,
                ", ".join(str(width) for width in widths.values()), out, error)
    logger.info("%s", serving.padding_tax(kept, _bytes(plain, dtype)))
    return out


def export_dense(directory: str | Path, out: str | Path, base: str | Path | None = None,
                 example: Mapping[str, Tensor] | None = None) -> Path:
    """Write the dense model with the trained units of the checkpoint `directory` put back; the new folder.

    `base` is the dense model (hub id or folder) the selection was made on; by default the one the checkpoint names.
    All parameters are written in the widest dtype of the checkpoint, so that no trained value is rounded. Raises
    InputError, with nothing written, for a base that is unknown, missing, or another model.
    """
    directory, out = Path(directory), Path(out)
    check_free(out)
    sliced = load(directory, example=example)
    base = base or sliced.config.stt["base"]
    if base is None:
        raise InputError(f"{directory} does not say which dense model it was made from: give it (--base)")
    if is_sliced(Path(base)):
        raise InputError(f"the base {base} is a sliced checkpoint itself: give the dense model it was made from "
                         "(--base)")
    dense = _dense_model(sliced, base)
    find_sites(dense, example)  # stays on the model, for restore
    restore(sliced, dense)
    if sliced.can_generate():
        dense.generation_config = sliced.generation_config
    with written_whole(out) as part:
        dense.save_pretrained(part)
        _copy_tokenizer(directory, part)
    logger.info("put the trained units of %s back into %s, written to %s", directory, base, out)
    return out


def _check_biases(sliced: PreTrainedModel) -> None:
    """Raises InputError if compensation made a bias that the plain model has no place for."""
    plain = empty_model(type(sliced), _without_entry(sliced.config), None, "meta").state_dict()
    extra = sorted(sliced.state_dict().keys() - plain.keys())
    if extra:
        raise InputError(f"the compensated model has {len(extra)} biases that a plain {type(sliced).__name__} lacks "
                         f"(first: {extra[0]}): load it with stt.load, or select with compensate=\"none\" to export")


def _dense_model(sliced: PreTrainedModel, base: str | Path) -> PreTrainedModel:
    """The dense model called `base`, in the widest dtype of `sliced`. It may lack what `restore` will write, as a head,
    but no projection of a site: its dropped units would be random."""
    try:
        dense, info = type(sliced).from_pretrained(base, config=_without_entry(sliced.config), output_loading_info=True,
                                                   dtype=widest_dtype(sliced.parameters()))
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"cannot load the dense model {str(base)!r} ({reason}): give the model the checkpoint was "
                         "made from (--base)") from error
    absent = [name for name in info["missing_keys"] if name.rpartition(".")[0] in _narrow_layers(sliced)]
    if absent:
        raise InputError(f"{str(base)!r} has no {min(absent)}, so it is not the dense model of this "
                         f"{type(sliced).__name__}: give the model the checkpoint was made from (--base)")
    return dense


# ---------------------------------------------------------------- the width of the exported model


def _narrow_config(sliced: PreTrainedModel, multiple_of: int, beyond_dense: bool) -> tuple[PreTrainedConfig, Widths]:
    """The first config whose model has exactly the shapes of the padded one, and its widths."""
    data = _without_entry(sliced.config).to_dict()
    needed = _needed_widths(sliced, multiple_of, beyond_dense)
    for changes, widths in _candidates(list(_entries(data, sliced.config)), needed):
        try:
            config = type(sliced.config).from_dict(_changed(data, changes))
            is_right = _fits(empty_model(type(sliced), config, None, "meta"), sliced, widths)
        except UNFIT:
            continue
        if is_right:
            said = ", ".join(f"{'.'.join(keys)} = {value}" for keys, value in changes.items())
            logger.info("changed in the config: %s", said or "nothing")
            return config, widths
    raise InputError(f"{type(sliced).__name__} has no config entry that gives its feed-forward blocks, and nothing "
                     f"else, another width ({', '.join(f'{old} to {new}' for old, new in needed.items())}): export "
                     "with --to dense, or load the checkpoint with stt.load")


def _needed_widths(sliced: PreTrainedModel, multiple_of: int, beyond_dense: bool) -> Widths:
    """For each dense width the kept units of the widest such site, rounded up, at most the dense width unless
    `beyond_dense`; a site that the selection leaves out keeps all its units."""
    needed: Widths = {}
    kept = {site: len(ids) for site, ids in sliced.stt_selection.items()} | _left_out(sliced)
    for site, width in sliced.stt_selection.widths.items():
        rounded = serving.rounded_up(kept[site], multiple_of)
        needed[width] = max(needed.get(width, 0), rounded if beyond_dense else min(rounded, width))
    return needed


def _left_out(sliced: PreTrainedModel) -> dict[str, int]:
    """Dense widths of the sites that the selection leaves as they are."""
    selection = sliced.stt_selection
    return {site: width for site, width in selection.widths.items() if site not in selection}


def _entries(data: Mapping[str, object], config: PreTrainedConfig, above: Keys = ()) -> Iterator[Entry]:
    """Every entry of a config and of the configs in it."""
    numbers = {value for value in data.values() if type(value) is int}
    for key, value in data.items():
        if key in config.sub_configs and isinstance(value, dict):
            yield from _entries(value, getattr(config, key), (*above, key))
        else:
            yield (*above, key), value, numbers


def _candidates(entries: list[Entry], needed: Widths) -> Iterator[Change]:
    """Changes of the config that may give the needed widths: of entries that hold a dense width (fewest first), then of
    one that holds its ratio to the hidden size, then of one that is unset."""
    if all(old == new for old, new in needed.items()):
        yield {}, needed
    equal = [(keys, needed[value]) for keys, value, _ in entries if type(value) is int and value in needed]
    for count in range(1, min(len(equal), 4) + 1):
        yield from ((dict(chosen), needed) for chosen in itertools.combinations(equal, count))
    for keys, value, numbers in entries:
        if type(value) in (int, float) and value > 0:
            yield from (({keys: ratio}, widths) for ratio, widths in _ratios(value, numbers, needed))
    if len(needed) == 1:
        yield from (({keys: new}, needed) for keys, value, _ in entries if value is None for new in needed.values())


def _ratios(ratio: float, numbers: set[int], needed: Widths) -> Iterator[tuple[float, Widths]]:
    """Smaller ratios of width to hidden size that hold the needed widths, and the widths they give: the exact one, then
    the next whole one, for a config that takes no other."""
    smallest = min(needed)
    hidden = round(smallest / ratio)
    if hidden * ratio != smallest or hidden not in numbers:
        return
    width = max(-(-new * smallest // old) for old, new in needed.items())
    exact = width / hidden
    exact = exact if int(hidden * exact) == width else math.nextafter(exact, math.inf)
    for smaller in (exact, math.ceil(width / hidden)):
        widths = {old: round(old / ratio * smaller) for old in needed}
        if smaller < ratio and all(widths[old] >= new for old, new in needed.items()):
            yield smaller, widths


def _fits(candidate: PreTrainedModel, sliced: PreTrainedModel, widths: Widths) -> bool:
    """True if the tensors of both have the same names and shapes once the sites of `sliced` are padded to `widths`."""
    wanted = {name: tuple(value.shape) for name, value in sliced.state_dict().items()}
    for name, layer in _narrow_layers(sliced).items():
        width = widths[_dense_width(layer)]
        rows = layer.out_features if layer.out_indices is None else width * _channels_per_unit(layer)
        columns = layer.in_features if layer.in_indices is None else width
        is_transposed = isinstance(candidate.get_submodule(name), Conv1D)
        wanted[f"{name}.weight"] = (columns, rows) if is_transposed else (rows, columns)
        if layer.bias is not None:
            wanted[f"{name}.bias"] = (rows,)
    return wanted == {name: tuple(value.shape) for name, value in candidate.state_dict().items()}


def _changed(data: Mapping[str, object], changes: Mapping[Keys, object]) -> dict[str, object]:
    data = copy.deepcopy(dict(data))
    for keys, value in changes.items():
        owner = functools.reduce(lambda inner, key: inner[key], keys[:-1], data)
        owner[keys[-1]] = value
    return data


# ---------------------------------------------------------------- the exported model


def _plain_model(sliced: PreTrainedModel, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """An ordinary model with the (padded) weights of `sliced`; transposed where the architecture stores them so."""
    plain = empty_model(type(sliced), config, dtype)
    state = cast_floats(sliced.state_dict(), dtype)
    for name in _narrow_layers(sliced):
        if isinstance(plain.get_submodule(name), Conv1D):
            state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
    plain.load_state_dict(state, assign=True)
    plain.tie_weights(missing_keys=set(), recompute_mapping=False)
    if sliced.can_generate():
        plain.generation_config = sliced.generation_config
    return plain.eval()


def _bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """What the parameters take in `dtype`; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _narrow_layers(sliced: PreTrainedModel) -> dict[str, STTLinear]:
    return {name: module for name, module in sliced.named_modules() if isinstance(module, STTLinear)}


def _channels_per_unit(layer: STTLinear) -> int:
    """1, or 2 for the output channels of a fused gate and up projection."""
    return layer.blocks * layer.interleaved


def _dense_width(layer: STTLinear) -> int:
    """Units of the dense site this layer belongs to."""
    if layer.out_indices is None:
        return layer.original_in_features
    return layer.original_out_features // _channels_per_unit(layer)


def _without_entry(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    del config.stt
    return config


def _first_output(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def _copy_tokenizer(directory: Path, part: Path) -> None:
    """Copy every file that is neither weights nor configuration."""
    for path in directory.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (CONFIG, GENERATION):
            shutil.copy2(path, part)
