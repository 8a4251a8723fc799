"""A causal language model and its tokenizer, from the hub or a folder, in the dtype the run asks for."""
from __future__ import annotations

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stt.errors import InputError
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
    try:
        config = AutoConfig.from_pretrained(name)
        if hasattr(config, "stt"):
            raise InputError(f"{name} is already sliced: give the dense model, or load it with stt.load")
        dtype = "auto" if autocast_dtype else torch.float32
        model, loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
        if loaded["missing_keys"]:
            raise InputError(f"the weights of {name} lack {len(loaded['missing_keys'])} tensors of a "
                             f"{type(model).__name__}, the first {min(loaded['missing_keys'])!r}: give its own weights")
    except (OSError, RuntimeError, SafetensorError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot load the model {name!r} ({_first_line(error)}): give a folder with config.json and "
                         "weights, or a hub id that can be reached") from error
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
    if not torch.allclose(logits, other, rtol=1e-5, atol=1e-5 * float(logits.abs().max())):
        raise InputError(f"{type(model).__name__} is no decoder (its tokens see later ones): give a causal model")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; its end token pads if it has no padding token. Raises InputError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot load the tokenizer of {name!r} ({_first_line(error)}): give a folder with "
                         "tokenizer.json, or a hub id that can be reached") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def on_meta(name: str) -> PreTrainedModel:
    """The model class of a folder or hub id on the meta device: shapes without weights, from config.json alone."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read the config of {name!r} ({_first_line(error)}): give a folder with config.json, "
                         "or a hub id that can be reached") from error
    architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    with torch.device("meta"):
        return architecture.from_config(config) if architecture is transformers.AutoModel else architecture(config)
