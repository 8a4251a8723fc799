"""A causal language model and its tokenizer, from the hub or a folder, in the dtype the run asks for."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from stt.errors import InputError
from stt.surgery import tie
from stt.trace import evaluating


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


def check_decoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError for a model that is no decoder (a token sees later ones), whose vocabulary is smaller than the
    tokenizer's, or whose weights give NaN."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens and the model {rows}: use those of one model")
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
