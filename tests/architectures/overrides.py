"""What the rules do not reach: configuration entries by model type, and the types that cannot be built here."""
from __future__ import annotations

from .overrides_text import TEXT
from .overrides_towers import TOWERS
from .overrides_vision import VISION
from .rules import HIDDEN, Value

NOT_BUILDABLE: dict[str, str] = {
    "timm_wrapper": "needs the package timm",
    "timm_backbone": "needs the package timm",
    "layoutlmv2": "needs the package detectron2",
    "dinat": "needs the package natten",
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "transformers 5.23.0 refuses every configuration: its check asks that all layers share keys "
                        "and values, its constructor that not all do",
}

OVERRIDES: dict[str, dict[str, Value]] = TEXT | VISION | TOWERS

NOT_WIDTHS: dict[str, tuple[str, ...]] = {  # entries that are named like a width and make none in the class built
    "clip": ("text_config.intermediate_size",),
    "falcon_mamba": ("intermediate_size",),
    "mamba": ("intermediate_size",),
    "metaclip_2": ("text_config.intermediate_size",),
    "moshi": ("audio_encoder_config.intermediate_size", "depth_decoder_config.ffn_dim"),
    "mpt": ("expansion_ratio",),
    "seamless_m4t": ("speech_encoder_intermediate_size", "t2u_encoder_ffn_dim", "t2u_decoder_ffn_dim"),
    "seamless_m4t_v2": ("speech_encoder_intermediate_size", "t2u_encoder_ffn_dim", "t2u_decoder_ffn_dim"),
    "siglip": ("text_config.intermediate_size",),
    "siglip2": ("text_config.intermediate_size",),
}
CODED_WIDTHS: dict[str, tuple[int, ...]] = {  # that the model's own code makes of other entries
    **dict.fromkeys(("bloom", "flaubert", "mpt", "openai-gpt", "xlm"), (4 * HIDDEN,)),
    "convnext": (4 * 12, 4 * 20),
    "dinov3_convnext": (4 * 12, 4 * 20, 4 * 28, 4 * 36),
    "mobilevitv2": (7 * 16, 7 * 24 // 16 * 16, 7 * 32),
}
NOT_RUN: dict[str, tuple[str, ...]] = {  # modules the model's own forward never calls
    "kyutai_speech_to_text": ("codec_model",),
    "nemo_speechlm": ("model.word_timestamp_encoder",),
    "nllb-moe": tuple(f"model.{side}.layers.1.ffn.experts.expert_{index}" for side in ("encoder", "decoder")
                      for index in (2, 3)),  # transformers 5.23.0 takes the 0 and 1 of its mask for expert numbers
    "vibevoice": ("model.audio_tower.decoder", "model.diffusion_head", "model.semantic_tokenizer_encoder"),
}
NO_EFFECT: dict[str, tuple[str, ...]] = {  # modules that run, and whose small changes no output shows
    "blt": ("model.patcher",),  # it only says where patches begin
    "modernvbert": ("model.vision_model.head",),
    "nemo_speechlm": ("model.audio_tower.diarization_model",),  # it only says who speaks, above a threshold
    "phi4_multimodal": ("model.embed_tokens_extend.image_embed.img_processor.head",),
    "siglip": ("vision_model.head",),
    "siglip2": ("vision_model.head",),
}
IDLE: dict[str, tuple[str, ...]] = {  # experts that no token of the batch is sent to
    "mistral4": ("model.layers.1.mlp.experts.2",),
    "zaya": ("model.layers.1.mlp.experts.3",),
}
