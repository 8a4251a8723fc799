"""A sliced checkpoint as a plain Hugging Face folder, for people who do not have this library.

`export_hf` keeps the model narrow: every site is padded with exact zeros to the widest one, because a plain config has
one width for all, and on to what a runtime needs. `export_dense` puts the trained units back into the dense model.
"""
from __future__ import annotations

import copy
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from stt import serving
from stt.card import CARD
from stt.checkpoint import (
    CONFIG,
    GENERATION,
    aliases,
    as_stored,
    cast_floats,
    check_free,
    empty_model,
    is_sliced,
    load,
    read_weights,
    restore,
    written_whole,
)
from stt.dummy import fitting_inputs
from stt.errors import InputError
from stt.narrow import parts_of, put_back
from stt.sites import Site, find_sites
from stt.surgery import narrow_state, sliced_parameters, widest_dtype
from stt.widths import left_out, narrow_config

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # relative to the largest output, float32


def export_hf(directory: str | Path, out: str | Path, multiple_of: int = 1,
              example: Mapping[str, Tensor] | None = None, runtime: str | None = None, tp: int = 1) -> Path:
    """Write the sliced checkpoint `directory` as a narrow model that plain `from_pretrained` loads; the new folder.

    All sites of one dense width get the same width: their widest, rounded up to `multiple_of` (with experts of 8,
    for their grouped products), at most the dense one. For a `runtime` (serving.RUNTIMES) on `tp` ranks it is also
    rounded up to what that needs, beyond the dense width if it must be; the log says what the padding costs. The
    config entry is found by its value and verified by the shapes of every parameter; the outputs are compared
    through real files before the folder appears, on `example` if the model's input cannot be made up (without one
    the tensors are compared, and the log says so). Parameters of several dtypes are all written in the widest of
    them. Raises InputError, with nothing written, if no config entry sets the width, if the width the runtime needs
    cannot be had, or if `out` is not free.
    """
    directory, out = Path(directory), Path(out)
    check_free(out)
    multiple_of = math.lcm(serving.check_multiple(multiple_of), serving.multiple_for(runtime, tp))
    dtype = widest_dtype(read_weights(directory).values())
    compute = torch.promote_types(dtype, torch.float32)
    sliced = load(directory, dtype=compute, example=example)
    dense = empty_model(type(sliced), _without_entry(sliced.config), None, "meta")
    _check_biases(sliced, dense)
    inputs = fitting_inputs(sliced) if example is None else example
    expected = None if inputs is None else _first_output(sliced, inputs)
    serving.check_served(runtime, tp, left_out(sliced).values())
    sites = find_sites(dense, example)
    if any(site.form == "experts" for site in sites.values()):
        multiple_of = math.lcm(multiple_of, serving.EXPERTS)
    if not sliced.stt_selection.keys() <= sites.keys():
        raise InputError(f"{directory} keeps some of the attention heads of its layers, which no plain "
                         f"{type(sliced).__name__} can: export with --to dense, or load it with stt.load")
    config, widths = narrow_config(sliced, dense, sites, multiple_of, runtime is not None)
    serving.check_served(runtime, tp, widths.values())
    kept = _bytes(sliced, dtype)
    plain = _plain_model(sliced, config, dtype, [sites[name].resized(widths[sites[name].width])
                                                 for name in sliced.stt_selection])
    with written_whole(out) as part:
        plain.save_pretrained(part)
        _copy_tokenizer(directory, part)
        said = _compared(type(plain).from_pretrained(part, dtype=compute), cast_floats(plain.state_dict(), compute),
                         inputs, expected)
    logger.info("exported %s with width %s to %s (%s)", type(plain).__name__,
                ", ".join(str(width) for width in widths.values()), out, said)
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


def _compared(loaded: PreTrainedModel, written: Mapping[str, Tensor], inputs: Mapping[str, Tensor] | None,
              expected: Tensor | None) -> str:
    """What the comparison of the loaded folder with the sliced model found. Raises InputError if they differ; without
    inputs the tensors are compared with those that were written."""
    if inputs is None:
        wrong = [name for name, value in loaded.state_dict().items() if not torch.equal(value, written[name])]
        error, said = float(bool(wrong)), "tensors compared; outputs not, for no input could be made up: pass example="
    else:
        error = (_first_output(loaded, inputs) - expected).abs().max().item() / expected.abs().max().item()
        said = f"outputs differ by {error:.0e} of the largest"
    if not error <= TOLERANCE:
        raise InputError(f"the exported {type(loaded).__name__} differs from the sliced one by {error:.1e} of its "
                         "largest output, so nothing was written: export with --to dense, or load the checkpoint "
                         "with stt.load")
    return said


def _check_biases(sliced: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Raises InputError if compensation made a bias that the plain model has no place for."""
    extra = sorted(sliced.state_dict().keys() - dense.state_dict().keys())
    if extra:
        raise InputError(f"the compensated model has {len(extra)} biases that a plain {type(sliced).__name__} lacks "
                         f"(first: {extra[0]}): load it with stt.load, or select with "
                         "compensate=\"lstsq_weights\" to export")


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
    absent = set(info["missing_keys"]).intersection(sliced_parameters(sliced))
    if absent:
        raise InputError(f"{str(base)!r} has no {min(absent)}, so it is not the dense model of this "
                         f"{type(sliced).__name__}: give the model the checkpoint was made from (--base)")
    return dense


# ---------------------------------------------------------------- the exported model


def _plain_model(sliced: PreTrainedModel, config: PreTrainedConfig, dtype: torch.dtype,
                 sites: Sequence[Site]) -> PreTrainedModel:
    """An ordinary model with the weights of `sliced` in the first units of its `sites`, and zeros in the others."""
    plain = empty_model(type(sliced), config, dtype)
    state = cast_floats(narrow_state(sliced), dtype)
    first = {name: torch.arange(len(ids)) for name, ids in sliced.stt_selection.items()}
    for name, parts in parts_of(plain, sites, first).items():
        padded = torch.zeros_like(plain.state_dict()[name], dtype=dtype)
        put_back(padded, parts, as_stored(plain, name, state[name]))
        state |= dict.fromkeys(aliases(plain, name), padded)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights(missing_keys=set(), recompute_mapping=False)
    if sliced.can_generate():
        plain.generation_config = sliced.generation_config
    return plain.eval()


def _bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """What the parameters take in `dtype`; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _without_entry(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    del config.stt
    return config


def _first_output(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        leaves = pytree.tree_leaves(list(model(**inputs).values()))
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _copy_tokenizer(directory: Path, part: Path) -> None:
    """Copy every file that is neither weights, configuration nor the card of the sliced model."""
    others = (CONFIG, GENERATION, SAFE_WEIGHTS_INDEX_NAME, CARD)
    for path in directory.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in others:
            shutil.copy2(path, part)
