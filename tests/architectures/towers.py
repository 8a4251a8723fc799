"""Batches of models with an image or audio tower: the features go where the text has that many placeholder tokens.

Legend: B batch, T tokens.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig, PreTrainedModel

Batch = dict[str, object]
BATCH, LENGTH = 2, 12


def with_placeholders(model: PreTrainedModel, text: Batch, features: Batch, count: int | None = None) -> Batch:
    """The text with `count` placeholders in front of each row, by default as many as a row of the features becomes."""
    kind = "image" if any("image" in name or "pixel" in name for name in features) else "audio"
    if count == 0:
        return text | features
    count = _count(model, kind, features) if count is None else count
    placeholders = torch.full((BATCH, count), _token(model.config, kind))
    return features | {
        "input_ids": torch.cat([placeholders, text["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(placeholders), text["attention_mask"]], dim=1),
    }


def _token(config: PreTrainedConfig, kind: str) -> int:
    """The id of the placeholder."""
    owners = (config, getattr(config, "vision_config" if kind == "image" else "audio_config", None))
    return next(value for owner in owners for name in (f"{kind}_token_id", f"{kind}_token_index")
                if (value := getattr(owner, name, None)) is not None)


def _count(model: PreTrainedModel, kind: str, features: Batch) -> int:
    """How many placeholders a row of the features stands for."""
    name = f"get_{kind}_features"
    extract = getattr(model.base_model if hasattr(model.base_model, name) else model, name)
    accepted = inspect.signature(extract).parameters
    found = extract(**{name: value for name, value in features.items() if name in accepted})
    pooled = getattr(found, "pooler_output", None)
    parts = [found.last_hidden_state] if pooled is None else pooled if isinstance(pooled, list | tuple) else [pooled]
    return sum(part.shape[:-1].numel() for part in parts) // BATCH


def square_images(vision: PreTrainedConfig) -> Batch:
    """One image a row."""
    size = vision.image_size
    return {"pixel_values": torch.randn(BATCH, getattr(vision, "num_channels", 3), size, size)}


def mel(bins: int, frames: int) -> Batch:
    """A spectrogram a row, no frame masked: (B, bins, frames)."""
    return {"input_features": torch.randn(BATCH, bins, frames), "input_features_mask": torch.ones(BATCH, frames).long()}


def whisper_like(config: PreTrainedConfig) -> Batch:
    """As long as the encoder's positions ask for."""
    return mel(config.audio_config.num_mel_bins, 2 * getattr(config.audio_config, "max_source_positions", 16))


def frames_first(frames: int, bins: int) -> Batch:
    """A spectrogram a row, no frame masked: (B, frames, bins)."""
    return {"input_features": torch.randn(BATCH, frames, bins), "input_features_mask": torch.ones(BATCH, frames).bool()}


def patches(width: int) -> Batch:
    """Sixteen flattened patches a row and their places: (B, 16, width)."""
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), dim=-1).reshape(1, 16, 2)
    return {"pixel_values": torch.rand(BATCH, 16, width), "image_position_ids": places.expand(BATCH, -1, -1)}


def phi4_images(config: PreTrainedConfig) -> Batch:
    """The whole image and one crop of it a row."""
    size, places = config.vision_config.crop_size, config.vision_config.image_size // config.vision_config.patch_size
    return {"image_pixel_values": torch.randn(BATCH, 2, 3, size, size), "image_sizes": torch.full((BATCH, 2), size),
            "image_attention_mask": torch.ones(BATCH, 2, places, places)}


def phi4_sounds(config: PreTrainedConfig) -> Batch:
    """Eight frames a token."""
    return {"audio_input_features": torch.randn(BATCH, 32, config.audio_config.input_size),
            "audio_embed_sizes": torch.full((BATCH,), 4), "audio_attention_mask": torch.ones(BATCH, 32).bool()}


Features = Callable[[PreTrainedConfig], Batch]
IMAGES: dict[str, Features] = {
    "fuyu": lambda config: {"pixel_values": torch.randn(BATCH, 6, 3 * config.patch_size ** 2)},
    "gemma3": lambda config: square_images(config.vision_config),
    "gemma4": lambda config: patches(3 * config.vision_config.patch_size ** 2),
    "gemma4_unified": lambda config: patches(3 * config.vision_config.model_patch_size ** 2),
    "git": lambda config: square_images(config.vision_config),
    "got_ocr2": lambda config: square_images(config.vision_config),
    "modernvbert": lambda config: {"pixel_values": torch.randn(BATCH, 1, 3, 16, 16)},
    "neomme": lambda config: {"pixel_values": torch.randn(BATCH * 6, 3 * config.patch_size ** 2)},
    "phi4_multimodal": phi4_images,
    "shieldgemma2": lambda config: square_images(config.vision_config),
    "t5gemma2": lambda config: square_images(config.encoder.vision_config),
    "ultravbert": lambda config: {"pixel_values": torch.randn(BATCH, 1, 3, 16, 16)},
}
SILENT_NOISE = {"sample": False}  # without it random numbers are added to what is heard
SOUNDS: dict[str, Features] = {
    "audioflamingo3": whisper_like,
    "fun_asr_nano": lambda config: frames_first(8, config.audio_config.num_mel_bins
                                                * config.audio_config.num_stacked_frames),
    "gemma4": lambda config: frames_first(32, config.audio_config.subsampling_conv_channels[0]),
    "gemma4_unified": lambda config: frames_first(4, config.audio_config.audio_embed_dim),
    "glmasr": whisper_like,
    "granite_speech": lambda config: {"input_features": torch.randn(BATCH, 12, config.encoder_config.input_dim)},
    "granite_speech_plus": lambda config: {"input_features": torch.randn(BATCH, 12, config.encoder_config.input_dim)},
    "moss_transcribe_diarize": lambda config: whisper_like(config) | {"padding_mask": torch.ones(BATCH, 160).long()},
    "musicflamingo": whisper_like,
    "nemo_speechlm": lambda config: frames_first(64, config.audio_config.asr_config.num_mel_bins),
    "phi4_multimodal": phi4_sounds,
    "qwen2_audio": lambda config: {"input_features": whisper_like(config)["input_features"],
                                   "feature_attention_mask": torch.ones(BATCH, 32).long()},
    "qwen3_asr": lambda config: mel(config.audio_config.num_mel_bins, 100),
    "vibevoice": lambda config: SILENT_NOISE | {"input_values": torch.randn(BATCH, 1, 64),
                                                "padding_mask": torch.ones(BATCH, 64).long()},
    "vibevoice_asr": lambda config: SILENT_NOISE | {"input_values": torch.randn(BATCH, 1, 64)},
    "voxtral": whisper_like,
    "voxtral_realtime": lambda config: {"input_features": torch.randn(
        BATCH, config.audio_config.num_mel_bins, LENGTH * config.audio_length_per_tok)},
}
COUNTS: dict[tuple[str, str], int] = {  # placeholders a row, where the library has no method that could say so
    ("image", "git"): 0, ("image", "phi4_multimodal"): 13, ("audio", "phi4_multimodal"): 4,
    ("audio", "musicflamingo"): 8, ("audio", "qwen2_audio"): 8, ("audio", "voxtral_realtime"): 0,
}
