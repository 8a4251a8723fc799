"""Sliced models on disk: save and load them exactly, and put their trained units back into the dense model.

The folder is described in docs/selection_file.md.
"""
from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from stt.errors import InputError
from stt.heads import sites_named
from stt.hub import METHOD, check_version, is_entry
from stt.mlps.stt_linear import STTLinear
from stt.narrow import parts_of, put_back
from stt.selection import SELECTION, Selection
from stt.stt_transformer import selection_for
from stt.surgery import head_is_tied, narrow_state, tie, untie_head

logger = logging.getLogger(__name__)

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS = "model.safetensors"


def save(model: PreTrainedModel, directory: str | Path,
         tokenizer: PreTrainedTokenizerBase | BaseImageProcessor | None = None) -> Path:
    """Write a sliced model, with its tokenizer or image processor; the folder. Every parameter keeps its dtype; padding
    is left out.

    Written beside and renamed, so never half there. Raises InputError, before anything is written, for a model that is
    not sliced or carries adapters, and for a folder that holds anything but a sliced checkpoint.

    >>> stt.save(model, "checkpoint", tokenizer)
    """
    selection = _selection_of(model)
    if not is_sliced(Path(directory)):
        check_free(Path(directory))
    kind = named_class(type(model).__name__, f"a {type(model).__name__}")
    plain = empty_model(kind, copy.deepcopy(model.config), model.config.dtype, "meta")
    _check_no_adapter(model.state_dict(), plain.state_dict().keys() | _down_biases(model))
    with written_whole(Path(directory)) as part:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    logger.info("saved %d sliced sites to %s", len(selection), directory)
    return Path(directory)


def load(directory: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
         example: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """The sliced model that `save` wrote: compact, in evaluation mode, every parameter in the dtype it was saved in
    (or in `dtype`; a model of several dtypes runs under autocast).

    `from_pretrained` of the class the config names, but strict. `example` is a batch for models whose input cannot be
    made up, as for find_sites. Raises InputError for a folder that is missing, plain, damaged, or from a newer version.

    >>> model = stt.load("checkpoint")
    """
    directory = Path(directory)
    _check_sliced(directory)
    for path in _weight_files(directory):
        with _reading(path), safe_open(path, "pt"):
            pass
    kind, config = class_and_config(directory)
    config.quantization_config = {"quant_method": METHOD, "example": example, "keep_dtypes": dtype is None}
    model, info = kind.from_pretrained(str(directory), config=config, dtype=dtype or "auto", output_loading_info=True,
                                       ignore_mismatched_sizes=True)
    _check_complete(info, directory)
    return model if device is None else model.to(device)


def restore(sliced: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Put everything `sliced` holds back into the dense model it was made from, in place: the kept rows and columns of
    every site, and all other parameters. The dropped units stay what they are in `dense`.

    Values are cast to the dtypes of `dense`: load it in float32 to keep float32 trained values to the last bit. A head
    that was untied in `sliced` is untied in `dense` too. Raises InputError, before anything changes, for another model.
    """
    selection = _selection_of(sliced)
    if "compensate" in sliced.config.stt:
        raise InputError("the kept units were compensated for the removed ones, which cannot be put back beside them: "
                         "select with compensate=\"none\" to restore or export a dense model")
    sites = sites_named(dense, selection)
    selection_for(sites, selection)  # raises for another model
    values, target = narrow_state(sliced), dense.state_dict()
    parts = parts_of(dense, [sites[name] for name in selection], selection)
    of_sites = {name for tensor in parts for name in aliases(dense, tensor)}
    others = {name: value for name, value in values.items() if name not in of_sites}
    expected = {name: value for name, value in target.items() if name not in of_sites}
    _check_no_adapter(others, expected.keys())
    _check_shapes(expected, others, "the sliced model")
    _check_shapes(others, expected, "the dense model")
    if head_is_tied(dense) and not head_is_tied(sliced):
        untie_head(dense)
        target = dense.state_dict()
    with torch.no_grad():
        for name, of_tensor in parts.items():
            put_back(target[name], of_tensor, as_stored(dense, name, values[name]))
        for name, value in others.items():
            target[name].copy_(value)


# ---------------------------------------------------------------- a model and its tensors


def aliases(model: nn.Module, tensor: str) -> list[str]:
    """All names of a tensor in the state dict of a model: shared ones have several."""
    state = model.state_dict(keep_vars=True)
    return [name for name, value in state.items() if value is state[tensor]]


def as_stored(model: nn.Module, tensor: str, value: Tensor) -> Tensor:
    """The weight of an STTLinear as the model it was made from stores it: a Conv1D keeps its transpose."""
    owner, _, attribute = tensor.rpartition(".")
    is_transposed = isinstance(model.get_submodule(owner), Conv1D) and attribute == "weight"
    return value.T if is_transposed else value


def cast_floats(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """All floating tensors in one dtype; the others as they are."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}


def empty_model(kind: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype | None,
                device: str = "cpu") -> PreTrainedModel:
    """A model whose parameters are allocated but never written, and not tied; on the meta device they are tied, and the
    buffers hold their values in either case."""
    with no_init_weights(), init_empty_weights(include_buffers=False) if device == "meta" else torch.device(device):
        model = kind._from_config(config, dtype=dtype)
    if device == "meta":
        tie(model)
    return model


def class_and_config(directory: Path) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and the config a folder names. Raises InputError if this transformers has no such class."""
    names = _config_of(directory).get("architectures") or ["no architecture"]
    kind = named_class(names[0], str(directory / CONFIG))
    return kind, kind.config_class.from_pretrained(directory)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Tensors of a sliced checkpoint by name. Raises InputError if they are missing or damaged."""
    _check_sliced(directory)
    state: dict[str, Tensor] = {}
    for path in _weight_files(directory):
        with _reading(path):
            state |= load_file(path)
    return state


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or cut short ({error}): copy or save the checkpoint again") from error


def _weight_files(directory: Path) -> list[Path]:
    """The one file of weights, or the shards that an index beside them names."""
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    names = sorted(set(_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]
    files = [directory / name for name in names]
    for path in files:
        if not path.is_file():
            raise InputError(f"{directory} holds no {path.name}: save the model again")
    return files


def named_class(name: str, origin: str) -> type[PreTrainedModel]:
    """The model class that a config names. Raises InputError if this transformers has no such class."""
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise InputError(f"{origin} names {name!r}, which transformers {transformers.__version__} does not have: "
                         "use a model class of the library")
    return kind


def _selection_of(model: nn.Module) -> Selection:
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"a Hugging Face model is needed, got {type(model).__name__}: unwrap it, and merge its "
                         "adapters (merge_and_unload)")
    selection = getattr(model, "stt_selection", None)
    if selection is None:
        raise InputError(f"this {type(model).__name__} is not sliced: apply a selection first (stt.apply), or use "
                         "save_pretrained")
    return selection


def _check_no_adapter(state: Mapping[str, Tensor], expected: Collection[str]) -> None:
    foreign = state.keys() - set(expected)
    if foreign:
        raise InputError(f"the sliced model has a tensor {min(foreign)!r} that its class does not have: merge LoRA "
                         "(STTLoraLinear.merge_and_convert) and remove other adapters first")


def _down_biases(model: nn.Module) -> set[str]:
    """Names of the biases that compensation makes where the model's class has none."""
    return {f"{name}.bias" for name, layer in model.named_modules() if "compensate" in model.config.stt
            and isinstance(layer, STTLinear) and layer.in_indices is not None}


def _check_complete(info: Mapping[str, Iterable], directory: Path) -> None:
    """Raises InputError unless the file held every tensor of the model, in its shape, and no other."""
    for name, given, wanted in sorted(info["mismatched_keys"]):
        raise InputError(f"{name!r} of {directory} is {tuple(given)}, expected {tuple(wanted)}: "
                         "both must be of one and the same model")
    if info["unexpected_keys"]:
        raise InputError(f"{directory} holds {min(info['unexpected_keys'])!r}, and its class has no such tensor: "
                         "both must be of one and the same model")
    if info["missing_keys"]:
        raise InputError(f"{directory} lacks {len(info['missing_keys'])} tensors of the model (first: "
                         f"{min(info['missing_keys'])!r}): save it again")


def _check_shapes(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], origin: str | Path) -> None:
    for name, value in given.items():
        if name not in expected or expected[name].shape != value.shape:
            wanted = tuple(expected[name].shape) if name in expected else "no such tensor"
            raise InputError(f"{name!r} of {origin} is {tuple(value.shape)}, expected {wanted}: "
                             "both must be of one and the same model")


# ---------------------------------------------------------------- folders


def is_sliced(directory: Path) -> bool:
    """True if the folder is a sliced checkpoint."""
    try:
        return (directory / SELECTION).is_file() and is_entry(_config_of(directory).get("stt"))
    except InputError:
        return False


def check_free(path: Path) -> None:
    """Raises InputError unless `path` is absent or an empty folder, and below no regular file."""
    for parent in (path, *path.absolute().parents):
        if parent.exists() and not parent.is_dir():
            raise InputError(f"cannot write to {path}: {parent} is a file; choose another folder")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path} is not empty: choose a new folder, or remove it first")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place when the block ends well and is removed when it fails.

    Raises InputError where no folder can be made."""
    path = path.resolve()
    part, old = path.with_name(path.name + ".part"), path.with_name(path.name + ".old")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}; choose another folder") from None
    try:
        yield part
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not path.exists():
            os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)


def _config_of(directory: Path) -> dict[str, object]:
    path = directory / CONFIG
    if not path.is_file():
        raise InputError(f"no sliced checkpoint at {directory} (no {CONFIG}): give a folder that stt.save wrote")
    return _json(path)


def _json(path: Path) -> dict[str, object]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON ({error}): save the checkpoint again") from error


def _check_sliced(directory: Path) -> None:
    """Raises InputError unless the folder is a sliced checkpoint of a version we can read."""
    entry = _config_of(directory).get("stt")
    if not is_entry(entry):
        raise InputError(f"{directory} is a plain Hugging Face model, not a sliced checkpoint: load it with "
                         "from_pretrained")
    check_version(entry, directory)
