"""Sliced models in transformers' own `from_pretrained`, `save_pretrained` and `push_to_hub`.

transformers lets a library decide how a checkpoint is loaded: config.json names a `quant_method`, and a quantizer
registered under that name changes the model before its weights are read. Ours, "stt", narrows the dense model to the
selection beside the weights. Nothing is quantized: what is loaded is an ordinary model that trains.

Imported in the middle of importing transformers (stt/__init__.py), so what needs its model classes is imported late.
"""
from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from stt.errors import InputError
from stt.selection import FORMAT_VERSION, SELECTION, Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stt.sites import Sites

METHOD = "stt"
HUB_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


@register_quantization_config(METHOD)
@dataclass
class SlicedConfig(QuantizationConfigMixin):
    """What config.json says under `quantization_config`; what is kept stands in the entry `stt` and in the selection.

    `example` and `keep_dtypes` come from stt.load and are never saved: a batch for a model whose input cannot be made
    up, and whether every tensor stays in the dtype it was saved in.
    """

    quant_method: str = METHOD
    note: str = "sliced by select-then-train: `import stt` before from_pretrained"
    example: Mapping[str, Tensor] | None = None
    keep_dtypes: bool = False

    def to_dict(self) -> dict[str, object]:
        """The part that is saved."""
        return {"quant_method": self.quant_method, "note": self.note}


@register_quantizer(METHOD)
class SlicedQuantizer(HfQuantizer):
    """Narrows the model that `from_pretrained` has laid out, on the meta device and dense, before it reads the weights.

    Raises InputError for a selection that is missing, damaged, or of another model.
    """

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def get_new_dtype(self, converter: object, param: object, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype a tensor of the file is cast to; None leaves it as it is."""
        return None if self.quantization_config.keep_dtypes else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None,
                                             **_: object) -> PreTrainedModel:
        from stt.stt_transformer import apply

        name = model.config.name_or_path
        del model.config.quantization_config  # it is for files: in memory the model is an ordinary one
        if not checkpoint_files:
            raise InputError("a sliced model is loaded from a folder or a hub id, not from a state dict: give one")
        entry = getattr(model.config, "stt", None)
        if not is_entry(entry):
            raise InputError(f"the config that {name} is loaded with has no entry `stt`, which tells the widths: load "
                             f"it with the class it was saved with, not {type(model).__name__}, and its own config")
        check_version(entry, name)
        with _as_outside(model):
            selection = Selection.load(_selection_file(name, Path(checkpoint_files[0])))
            _check_sizes(selection, entry, name)
            sites, fitted = _sites_of(selection, model, self.quantization_config.example)
            apply(model, fitted)
        model.config.stt |= {key: entry[key] for key in ("base", "compensate") if key in entry}
        if "compensate" in entry:
            _make_biases(model, checkpoint_files)
        self._channels = dict(_channels(model, sites, fitted))
        return model

    def postprocess_model(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        """Give the layers back what the meta device has no values for, and take the marks of a quantized model away:
        Trainer and PEFT treat it like any other."""
        for name, channels in self._channels.items():
            module, _, buffer = name.rpartition(".")
            layer = model.get_submodule(module)
            setattr(layer, buffer, channels.to(getattr(layer, buffer).device))
        self.remove_quantization_config(model)
        return model


# ---------------------------------------------------------------- from the files to the model


def is_entry(entry: object) -> bool:
    """True for the `stt` entry of a sliced model's config."""
    return isinstance(entry, dict) and isinstance(entry.get("format_version"), int) and "sites" in entry


def check_version(entry: Mapping[str, object], name: str | Path) -> None:
    """Raises InputError for an entry of a format newer than this library."""
    if entry["format_version"] > FORMAT_VERSION:
        raise InputError(f"{name} has format {entry['format_version']}, this version reads up to {FORMAT_VERSION}: "
                         "update stt")


def _selection_file(name: str, weights: Path) -> Path:
    """Beside the weights, or fetched from where on the hub they come from. Raises InputError if the hub has none."""
    beside = weights.parent / SELECTION
    snapshot = next((folder for folder in weights.parents if folder.parent.name == "snapshots"), None)
    if beside.is_file() or snapshot is None or Path(name).is_dir():
        return beside
    inside = weights.parent.relative_to(snapshot).as_posix()
    try:
        return Path(cached_file(name, SELECTION, cache_dir=snapshot.parents[2], revision=snapshot.name,
                                subfolder="" if inside == "." else inside))
    except OSError as error:
        raise InputError(f"no selection file in {name} on the hub that can be reached ({str(error).splitlines()[0]}): "
                         f"upload {SELECTION} beside the weights, or log in if the repository is private") from error


def _check_sizes(selection: Selection, entry: Mapping[str, object], name: str) -> None:
    sizes = {site: [len(ids), selection.widths.get(site)] for site, ids in selection.items()}
    if sizes != entry["sites"]:
        raise InputError(f"the {SELECTION} of {name} is not the selection its config.json speaks of: restore the files "
                         "that were saved together")


def _sites_of(selection: Selection, model: PreTrainedModel,
              example: Mapping[str, Tensor] | None) -> tuple[Sites, Selection]:
    """The sites that the selection is of, found on a twin and kept on the model for `apply`, and the selection under
    their names. Raises InputError if the model has none."""
    from stt.heads import find_heads, keep_heads, with_heads
    from stt.sites import find_sites, keep_sites

    twin = _twin(model)
    try:
        neurons = find_sites(twin, example)
    except InputError:
        neurons = None
    if neurons is not None:
        keep_sites(model, neurons)
        fitted = _fitted(selection, model, neurons)
        if fitted.keys() <= neurons.keys():
            return neurons, fitted
    heads = find_heads(twin, example)
    keep_heads(model, heads)
    sites = heads if neurons is None else with_heads(model, neurons, heads)
    return sites, _fitted(selection, model, sites)


def _fitted(selection: Selection, model: PreTrainedModel, sites: Sites) -> Selection:
    """The selection under this model's names: its class may lack the base model's prefix, have one that the saved
    class lacked, or be one tower of the saved model. A selection of another model is returned as it is."""
    known, prefix = {name for name, _ in model.named_modules(remove_duplicate=False)}, f"{model.base_model_prefix}."
    names = {}
    for site in selection.widths:
        here = next((name for name in (site, site.removeprefix(prefix), prefix + site) if name in known), None)
        if here is not None:
            names[site] = here
    widths = {here: selection.widths[site] for site, here in names.items()}
    if list(names) == list(names.values()) == list(selection.widths) or \
            widths != {name: site.width for name, site in sites.items()}:
        return selection
    return Selection({names[site]: ids for site, ids in selection.items() if site in names},
                     selection.meta | {"widths": widths, "fingerprint": sites.fingerprint})


def _channels(model: nn.Module, sites: Sites, selection: Selection) -> Iterator[tuple[str, Tensor]]:
    """The name and values of every buffer of kept channels."""
    from stt.mlps.stt_linear import STTLinear

    for name, ids in selection.items():
        for member in sites[name].members:
            if isinstance(model.get_submodule(member.module), STTLinear):
                yield f"{member.module}.{member.side}_indices", sites[name].pick(member, ids)


def _make_biases(model: PreTrainedModel, files: Sequence[str]) -> None:
    """Make room for the biases in the files that compensation has made where the class has none."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    from stt.mlps.stt_linear import STTLinear

    without = {f"{name}.bias": layer for name, layer in model.named_modules()
               if isinstance(layer, STTLinear) and layer.in_indices is not None and layer.bias is None}
    known = dict.fromkeys([*model.state_dict(), *without], True)
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    for file in files:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
                if name in without:
                    weight = without[name].weight
                    without[name].bias = nn.Parameter(torch.empty(len(weight), dtype=weight.dtype, device="meta"))


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without weights, but with the values of its buffers, which `from_pretrained` has not yet."""
    from stt.checkpoint import empty_model

    return empty_model(type(model), copy.deepcopy(model.config), None, "meta")


@contextmanager
def _as_outside(model: PreTrainedModel) -> Iterator[None]:
    """What `from_pretrained` holds back while it lays out a model, for a while: new tensors are float32 on the CPU, and
    tied parameters are one."""
    tied = []
    for target, source in model.all_tied_weights_keys.items():
        owner, _, attribute = target.rpartition(".")
        tied.append((owner, attribute, model.get_parameter_or_buffer(target), model.get_parameter_or_buffer(source)))
        setattr(model.get_submodule(owner), attribute, tied[-1][-1])
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
        for owner, attribute, own, shared in tied:
            if getattr(model.get_submodule(owner), attribute) is shared:
                setattr(model.get_submodule(owner), attribute, own)


# ---------------------------------------------------------------- from the model to the files


def check_not_quantized(model: nn.Module) -> None:
    """Raises InputError for a quantized model: packed weights have no rows to keep, and config.json has one place for
    either."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    for found in (getattr(one, "quantization_config", None) for one in (config, text)):
        method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
        if found is not None and method != METHOD:
            raise InputError(f"this {type(model).__name__} is quantized ({getattr(method, 'value', method)}), and a "
                             "model is either quantized or sliced: slice it in full precision, and quantize what `stt "
                             "export --to hf` writes")


@contextmanager
def declared_sliced(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, the class's save_pretrained saves the model as a sliced one, and whole: also what it leaves out
    because the class would make it anew (sinusoidal positions)."""
    left_out = model._keys_to_ignore_on_save
    model._keys_to_ignore_on_save, model.config.quantization_config = None, SlicedConfig()
    try:
        yield
    finally:
        model._keys_to_ignore_on_save = left_out
        del model.config.quantization_config


def push_to_hub(model: PreTrainedModel, repo_id: str, *, commit_message: str | None = None,
                commit_description: str | None = None, private: bool | None = None, token: bool | str | None = None,
                revision: str | None = None, create_pr: bool = False, max_shard_size: int | str = "50GB",
                tags: Sequence[str] | str | None = None) -> object:
    """Upload the model, its selection and its card; what the commit is known by. A card that the repository already has
    is left alone. Arguments as of the `push_to_hub` of any model.

    >>> model.push_to_hub("me/my-sliced-model")
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    model.add_model_tags([tags] if isinstance(tags, str) else list(tags or ()))
    has_card = api.file_exists(repo_id, "README.md", revision=revision)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr,
                                 commit_message=commit_message or "Upload model", commit_description=commit_description,
                                 ignore_patterns=["README.md"] if has_card else None)
