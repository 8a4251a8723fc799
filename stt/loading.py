"""A decoder or a classifier, with its tokenizer or image processor, from the hub or a folder, in the dtype the run
asks for."""
from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.initialization import no_init_weights

from stt import checkpoint
from stt.errors import InputError
from stt.surgery import head_parameters, tie
from stt.trace import evaluating

logger = logging.getLogger(__name__)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of `precision` (auto, fp32, bf16, fp16); None: no autocast, everything is float32.

    "auto" is bf16 on a GPU that has it. Raises InputError for fp16 on a CPU.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise InputError("precision fp16 needs a GPU (its gradients need a scaler): use bf16 or fp32 here")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def load_model(name: str, autocast_dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """The dense model; without autocast all float32, else in the checkpoint's own dtype. Raises InputError if there is
    no such model, its files are damaged, or it is already sliced."""
    with _reading("the model", name, "config.json and weights"):
        if hasattr(AutoConfig.from_pretrained(name), "stt"):
            raise InputError(f"{name} is already sliced: give the dense model, or load it with stt.load")
        dtype = "auto" if autocast_dtype else torch.float32
        model, loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
        if loaded["missing_keys"]:
            raise InputError(f"the weights of {name} lack {len(loaded['missing_keys'])} tensors of a "
                             f"{type(model).__name__}, the first {min(loaded['missing_keys'])!r}: give its own weights")
    return model.to(device)


def load_trained(name: str, autocast_dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """As `load_model`, but the model may be sliced, and a run folder stands for its checkpoint."""
    folder = model_folder(name)
    if checkpoint.is_sliced(Path(folder)):
        return checkpoint.load(folder, device, None if autocast_dtype else torch.float32)
    return load_model(folder, autocast_dtype, device)


def load_unrounded(name: str, like: PreTrainedModel | None = None) -> tuple[PreTrainedModel, set[str]]:
    """The dense model in the class its config names, or built `like` another one, in float32 or wider, so that no
    weight is rounded; and the tensors that its files lack or have in another shape.

    Raises InputError if there is no such model, its files are damaged, it is sliced, or of another type than `like`.
    """
    folder = model_folder(name)
    with _reading("the model", name, "config.json and weights"), _quiet():
        config = AutoConfig.from_pretrained(folder)
        if hasattr(config, "stt"):
            raise InputError(f"{name} is sliced, so that its weights are not those of the dense model: give what `stt "
                             "export --to dense` makes of it")
        if like is not None and config.model_type != like.config.model_type:
            raise InputError(f"{name} is of type {config.model_type} and the other model {like.config.model_type}: "
                             "give two models of one kind")
        kind = checkpoint.named_class((config.architectures or ["no architecture"])[0], name) if like is None else \
            type(like)
        config = config if like is None else copy.deepcopy(like.config)
        dtype = torch.promote_types(config.dtype or torch.float32, torch.float32)
        model, loaded = kind.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True,
                                             ignore_mismatched_sizes=True)
    return model, {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}


def model_folder(name: str) -> str:
    """The checkpoint of a run folder; any other name as it is."""
    folder = Path(name).expanduser() / "checkpoint"
    return str(folder) if folder.is_dir() else name


def check_decoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError for a model that is no decoder (a token sees later ones), whose vocabulary is smaller than the
    tokenizer's, or whose weights give NaN."""
    rows = check_vocabulary(model, tokenizer)
    ids = torch.arange(3, 9, device=model.device).view(1, -1) % rows  # (1, T)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % rows
    with torch.no_grad(), evaluating(model):
        logits, other = (model(input_ids=each).logits[:, :-1] for each in (ids, changed))
    if not logits.isfinite().all():
        raise InputError(f"the weights of this {type(model).__name__} give NaN or infinite outputs: give intact ones")
    tolerance = 1e-5 if logits.dtype == torch.float32 else 0.05  # experts may group tokens differently, in few digits
    if not torch.allclose(logits, other, rtol=tolerance, atol=tolerance * float(logits.abs().max())):
        raise InputError(f"{type(model).__name__} is no decoder (its tokens see later ones): give a causal model")


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens the model embeds. Raises InputError if the tokenizer has more."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens and the model {rows}: use those of one model")
    return rows


# ---------------------------------------------------------------- classifiers


@dataclass(frozen=True)
class Classes:
    """What a classifier is loaded for: `names` of its classes (none: one quantity to predict), of texts or images. The
    layer that yields them is drawn with `seed`."""

    modality: str
    names: tuple[str, ...]
    seed: int
    without_dropout: bool = False


def load_classifier(name: str, classes: Classes, autocast_dtype: torch.dtype | None, device: torch.device,
                    pad_token_id: int | None = None) -> PreTrainedModel:
    """The dense classifier, its output layer always new; without autocast all float32, else in the checkpoint's dtype.

    Raises InputError if there is no such model, it is of the other modality, damaged, or already sliced.
    """
    with _reading("the model", name, "config.json and weights"), _quiet():
        config = _classifier_config(name, classes, pad_token_id)
        torch.manual_seed(classes.seed)
        model, loaded = _read_classifier(name, config, "auto" if autocast_dtype else torch.float32, classes.modality)
    output = _output_parameters(model)
    new = head_parameters(model).keys() | output
    missing = sorted(set(loaded["missing_keys"]) - new)
    if missing:
        raise InputError(f"the weights of {name} lack {len(missing)} tensors of a {type(model).__name__}, the first "
                         f"{missing[0]!r}: give its own weights")
    for tensor, given, wanted in sorted(loaded["mismatched_keys"]):
        if tensor not in output:
            raise InputError(f"{tensor!r} of {name} is {tuple(given)}, expected {tuple(wanted)}: give its own weights")
    _draw(model, output, classes.seed)
    made = sorted(new & set(loaded["missing_keys"]) | output)
    _say_new(name, classes.seed, ", ".join(made))
    return model.to(device)


@functools.cache  # once a process: the dense model is loaded again to be compared with
def _say_new(name: str, seed: int, made: str) -> None:
    logger.info("new weights, drawn with seed %d: %s", seed, made)


def _read_classifier(name: str, config: PreTrainedConfig, dtype: torch.dtype | str,
                     modality: str) -> tuple[PreTrainedModel, dict[str, object]]:
    """The model with its weights, and what from_pretrained says of them."""
    kind = AutoModelForSequenceClassification if modality == "text" else AutoModelForImageClassification
    how = {"dtype": dtype, "output_loading_info": True}
    if modality == "text" or type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return kind.from_pretrained(name, config=config, ignore_mismatched_sizes=True, **how)
    whole = _with_tower(config)
    tower, loaded = AutoModel.from_pretrained(name, **how)
    model = kind.from_config(whole, dtype=tower.dtype)
    model.vision_model.load_state_dict(tower.state_dict())
    return model, loaded


def _with_tower(tower: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the whole model that a vision tower (CLIP's, SigLIP's) is a part of, and that has a classifier.
    Raises InputError if there is none."""
    for kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        if kind.sub_configs.get("vision_config") is type(tower):
            given = {entry: getattr(tower, entry) for entry in ("id2label", "label2id", "problem_type")}
            return kind(vision_config=tower.to_dict(), **given)
    raise InputError(f"transformers has no image classifier on {type(tower).__name__}: give another model, or a text "
                     "task for a text model")


def _classifier_config(name: str, classes: Classes, pad_token_id: int | None) -> PreTrainedConfig:
    """The config of the model, for these classes."""
    config = AutoConfig.from_pretrained(name)
    if hasattr(config, "stt"):
        raise InputError(f"{name} is already sliced: give the dense model, or load it with stt.load")
    config.id2label = dict(enumerate(classes.names or ("quantity",)))
    config.label2id = {label: number for number, label in config.id2label.items()}
    config.problem_type = "single_label_classification" if classes.names else "regression"
    if pad_token_id is not None and config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = pad_token_id  # a decoder's classifier reads the last real token
    for part in (config, config.get_text_config(), *config.sub_configs):
        part = getattr(config, part) if isinstance(part, str) else part
        for entry, value in part.to_dict().items():
            if "drop" in entry and isinstance(value, float) and classes.without_dropout:
                setattr(part, entry, 0.0)
            elif entry == "use_cache":
                part.use_cache = False  # a classifier generates nothing
    return config


def _output_parameters(model: PreTrainedModel) -> set[str]:
    """Parameters whose shape follows from the number of classes."""
    config = copy.deepcopy(model.config)
    config.num_labels = model.config.num_labels + 1
    with no_init_weights(), init_empty_weights(include_buffers=False):
        other = type(model)._from_config(config)
    shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    return {name for name, parameter in model.named_parameters() if shapes[name] != parameter.shape}


def _draw(model: PreTrainedModel, parameters: Iterable[str], seed: int) -> None:
    """Initialise the layers of these parameters as the model's class does, whatever the checkpoint held of them."""
    torch.manual_seed(seed)
    for owner in sorted({name.rpartition(".")[0] for name in parameters}):
        layer = model.get_submodule(owner)
        for parameter in layer.parameters(recurse=False):
            parameter._is_hf_initialized = False
        layer._is_hf_initialized = False
        with torch.no_grad():
            model._init_weights(layer)


def check_classifier(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
    """Raises InputError if the model cannot read this batch, or its weights give NaN."""
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    try:
        with torch.no_grad(), evaluating(model), torch.autocast(model.device.type, model.dtype, model.dtype !=
                                                                torch.float32):
            logits = model(**inputs).logits  # (B, C)
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        raise InputError(f"{type(model).__name__} cannot read a batch of this data ({shapes}): "
                         f"{str(error).splitlines()[0]}; check --max_length or --image_size") from error
    if logits.shape != (len(next(iter(inputs.values()))), model.config.num_labels):
        raise InputError(f"{type(model).__name__} yields {tuple(logits.shape)}, not one number for each of "
                         f"{model.config.num_labels} classes: give a classifier")
    if not logits.isfinite().all():
        raise InputError(f"the weights of this {type(model).__name__} give NaN or infinite outputs: give intact ones")


def load_processor(name: str, image_size: int | None = None) -> BaseImageProcessor:
    """The image processor of a model, on PIL; it scales to `image_size` pixels if given. Raises InputError if there is
    none."""
    with _reading("the image processor of", name, "preprocessor_config.json"):
        processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        if image_size is None:
            return processor
        square = {"height": image_size, "width": image_size}
        crops = bool(getattr(processor, "do_center_crop", False))
        size = {"shortest_edge": image_size} if crops else square
        return AutoImageProcessor.from_pretrained(name, backend="pil", size=size, **({"crop_size": square} if crops else
                                                                                    {}))


# ---------------------------------------------------------------- tokenizers, and shapes without weights


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; its end token pads if it has no padding token. Raises InputError if there is none."""
    with _reading("the tokenizer of", name, "tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        if len(tokenizer) < 2:  # what transformers makes up where it finds no tokenizer
            raise InputError(f"the tokenizer of {name!r} has no tokens: give a folder with tokenizer.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def on_meta(name: str) -> PreTrainedModel:
    """The model class of a folder or hub id on the meta device: shapes without weights, from config.json alone."""
    with _reading("the config of", name, "config.json"):
        config = AutoConfig.from_pretrained(name)
    architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = architecture.from_config(config) if architecture is transformers.AutoModel else architecture(config)
    tie(model)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report of what a checkpoint lacks."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@contextmanager
def _reading(part: str, name: str, files: str) -> Iterator[None]:
    """What transformers raises for a folder or hub id it cannot read, as one InputError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, SafetensorError, UnpicklingError, StrictDataclassError, ValueError, TypeError,
            KeyError, ZeroDivisionError) as error:  # the last ones for a config.json of another kind, or with a 0
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"cannot load {part} {name!r} ({reason}): give a folder with {files}, or a hub id that can be "
                         "reached") from error
