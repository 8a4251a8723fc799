"""The batches: padded text with its mask, both sides of an encoder-decoder, images, waveforms and spectrograms.

Legend: B batch, T tokens.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .rules import FIRST_WORD, VOCABULARY
from .towers import BATCH, COUNTS, IMAGES, LENGTH, SOUNDS, Batch, with_placeholders

PADDED = 3


def text(length: int = LENGTH) -> Batch:
    """Two rows of words, the first right-padded, and the mask."""
    ids, mask = words(length), torch.ones(BATCH, length).long()
    ids[0, length - PADDED:] = 0
    mask[0, length - PADDED:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def words(length: int) -> Tensor:
    """Ids of ordinary words: (B, T)."""
    return torch.randint(FIRST_WORD, VOCABULARY - 1, (BATCH, length))


def batch_for(model: PreTrainedModel, model_type: str) -> Batch:
    """A batch this model's forward runs on."""
    if model_type in SPECIAL:
        return SPECIAL[model_type](model.config)
    accepted = inspect.signature(model.forward).parameters
    batch = MAIN[model.main_input_name](model.config)
    for kind, towers in (("image", IMAGES), ("audio", SOUNDS)):
        if model_type in towers:
            count = COUNTS.get((kind, model_type))
            batch |= with_placeholders(model, batch, towers[model_type](model.config), count)
    if "bbox" in accepted:
        batch |= {"bbox": boxes(batch["input_ids"].shape[1])}
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted:
        batch |= {"decoder_input_ids": words(5)}
    return {name: value for name, value in (batch | EXTRA.get(model_type, dict)()).items() if name in accepted}


def boxes(length: int) -> Tensor:
    """Left, top, right, bottom of every word: (B, T, 4)."""
    corners = torch.randint(0, 20, (BATCH, length, 2))
    return torch.cat([corners, corners + torch.randint(1, 20, (BATCH, length, 2))], dim=-1)


def images(config: PreTrainedConfig) -> Batch:
    """Square images of the size the configuration asks for."""
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or 32
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": torch.randn(BATCH, getattr(config, "num_channels", 3), height, width)}


def spectrograms(config: PreTrainedConfig) -> Batch:
    """(B, frames, bins), with every frame in the mask."""
    owners = (config, getattr(config, "encoder_config", None))
    bins = next(value for owner in owners for name in BINS if (value := getattr(owner, name, None)) is not None)
    return {"input_features": torch.randn(BATCH, FRAMES, bins), "attention_mask": torch.ones(BATCH, FRAMES).long()}


def flat_patches(config: PreTrainedConfig) -> Batch:
    """Nine flattened patches an image, with their mask and the shape of the image in patches."""
    vision = config.vision_config
    return {"pixel_values": torch.randn(BATCH, 9, vision.num_channels * vision.patch_size ** 2),
            "pixel_attention_mask": torch.ones(BATCH, 9).long(), "spatial_shapes": torch.full((BATCH, 2), 3)}


def codes(config: PreTrainedConfig) -> Batch:
    """A text token and an audio code of every codebook at each place: (B, T, 1 + codebooks)."""
    return {"input_ids": torch.randint(FIRST_WORD, VOCABULARY - 1, (BATCH, LENGTH, config.num_codebooks + 1))}


def codebook_rows(config: PreTrainedConfig) -> Batch:
    """A row of codes for each codebook of each sample, and what the decoder listens to: (B * codebooks, T)."""
    decoder = getattr(config, "decoder", config)
    heard = {"encoder_hidden_states": torch.randn(BATCH, 5, decoder.hidden_size)}
    return {"input_ids": torch.randint(FIRST_WORD, VOCABULARY - 1, (BATCH * decoder.num_codebooks, LENGTH))} | heard


def entities() -> Batch:
    """Two entities a row, each of two words."""
    places = torch.full((BATCH, 2, 30), -1)
    places[:, :, :2] = torch.tensor([[1, 2], [4, 5]])
    return {"entity_ids": torch.randint(1, 20, (BATCH, 2)), "entity_attention_mask": torch.ones(BATCH, 2).long(),
            "entity_position_ids": places}


def assistant(config: PreTrainedConfig) -> Batch:
    """Hidden states of the larger model and its keys and values by kind of layer: (B, heads, T, head)."""
    heads = config.text_config.num_key_value_heads
    states = {kind: (torch.randn(BATCH, heads, LENGTH, width), torch.randn(BATCH, heads, LENGTH, width))
              for kind, width in (("sliding_attention", 8), ("full_attention", 16))}
    return {"inputs_embeds": torch.randn(BATCH, LENGTH, 2 * config.backbone_hidden_size), "shared_kv_states": states,
            "position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH)}


BINS = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel")
FRAMES = 64
GLOBAL = {"global_attention_mask": torch.eye(1, LENGTH).expand(BATCH, LENGTH).long()}
MAIN: dict[str, Callable[[PreTrainedConfig], Batch]] = {
    "input_ids": lambda config: text(),
    "inputs": lambda config: text(),
    "pixel_values": images,
    "input_values": lambda config: {"input_values": torch.randn(BATCH, 400)},
    "input_features": spectrograms,
}
SPECIAL: dict[str, Callable[[PreTrainedConfig], Batch]] = {
    **dict.fromkeys(("afmoe", "bailing_hybrid", "deepseek_v4", "dots3_note", "dots3_note_text", "glm4_moe",
                     "longcat_flash", "solar_open"), lambda config: text(48)),  # enough for all experts
    "audio-spectrogram-transformer": lambda config: {"input_values": torch.randn(BATCH, config.max_length,
                                                                                 config.num_mel_bins)},
    "gemma4_unified_assistant": assistant,
    "granite_speech5_ctc": lambda config: {"input_features": torch.randn(
        BATCH, FRAMES, 4 * config.encoder_config.num_mel_bins)},
    "kyutai_speech_to_text": codes,
    "moonshine": lambda config: {"input_values": torch.randn(BATCH, 1500), "decoder_input_ids": words(5)},
    "mra": lambda config: text(64),
    "musicgen": codebook_rows,
    "musicgen_melody": codebook_rows,
    "siglip2": flat_patches,
    "speech-encoder-decoder": lambda config: {"input_values": torch.randn(BATCH, 400), "decoder_input_ids": words(5)},
    "whisper": lambda config: {"input_features": torch.randn(BATCH, config.num_mel_bins,
                                                             2 * config.max_source_positions),
                               "decoder_input_ids": words(5)},
}
EXTRA: dict[str, Callable[[], Batch]] = {
    "canine": lambda: {"output_hidden_states": True},  # its last layer writes to no other output
    "dia": lambda: {"decoder_input_ids": torch.randint(FIRST_WORD, VOCABULARY - 1, (BATCH, 5, 9))},
    "layoutlmv3": lambda: {"pixel_values": torch.randn(BATCH, 3, 16, 16)},
    "led": lambda: GLOBAL,
    "longformer": lambda: GLOBAL,
    "luke": entities,
    "roc_bert": lambda: {name: torch.randint(1, 50, (BATCH, LENGTH)) for name in ("input_shape_ids",
                                                                                  "input_pronunciation_ids")},
    "trocr": lambda: {"encoder_hidden_states": torch.randn(BATCH, 5, 32)},
    "xmod": lambda: {"lang_ids": torch.tensor([0, 1])},
}
