"""Configuration entries of speech models and of models with several towers that the rules do not reach."""
from __future__ import annotations

from .overrides_text import GEMMA4
from .rules import Ratios, Value

GRANITE_SPEECH: dict[str, Value] = {
    "encoder_config.hidden_dim": 32, "encoder_config.input_dim": 16, "encoder_config.output_dim": 8,
    "encoder_config.dim_head": 8, "encoder_config.max_pos_emb": 16, "encoder_config.conv_kernel_size": 3,
    "window_size": 6, "downsample_rate": 3,
}
CODEC: dict[str, Value] = {"num_filters": 8, "downsampling_ratios": (2, 2), "depths": (1, 1, 1), "hidden_size": 16,
                           "ffn_expansion": Ratios((8,), (5,))}
SECOND_CODEC: dict[str, Value] = CODEC | {"ffn_expansion": Ratios((8,), (7,))}


def _under(tower: str, entries: dict[str, Value]) -> dict[str, Value]:
    """The entries of one tower."""
    return {f"{tower}.{key}": value for key, value in entries.items()}


TOWERS: dict[str, dict[str, Value]] = {
    "audio-spectrogram-transformer": {"frequency_stride": 4, "time_stride": 4, "max_length": 16},
    "fun_asr_nano": {"text_config.hidden_size": 144, "adaptor_config.hidden_size": 144,
                     "adaptor_config.intermediate_size": 36},
    "gemma3": {"mm_tokens_per_image": 4, "vision_config.vision_use_head": False},
    "gemma4": {"vision_config": {}, "audio_config": {}, **_under("text_config", GEMMA4),
               "vision_config.pooling_kernel_size": 2, "vision_config.position_embedding_size": 16,
               "audio_config.subsampling_conv_channels": (8, 4), "audio_config.output_proj_dims": 32},
    "gemma4_unified": {"vision_config": {}, "audio_config": {}, "text_config.global_head_dim": 16,
                       "vision_config.pooling_kernel_size": 2, "vision_config.mm_embed_dim": 24,
                       "vision_config.mm_posemb_size": 16, "vision_config.output_proj_dims": 24,
                       "audio_config.audio_embed_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glmasr": {"audio_config.intermediate_size": 128},
    "gemma4_unified_assistant": {
        "backbone_hidden_size": 24, "text_config.global_head_dim": 16, "text_config.num_kv_shared_layers": 2,
        "text_config.num_hidden_layers": 4, "text_config.layer_types": ["sliding_attention", "full_attention"] * 2},
    "got_ocr2": {"vision_config.output_channels": 16, "vision_config.window_size": 2,
                 "vision_config.global_attn_indexes": (1,), "image_seq_length": 16},
    "granite_speech": GRANITE_SPEECH,
    "granite_speech_plus": GRANITE_SPEECH,
    "kyutai_speech_to_text": {"ffn_dim": 88, "codec_config.num_filters": 8, "codec_config.upsampling_ratios": [2, 2],
                              "codec_config.codebook_dim": 16, "codec_config.upsample_groups": 32,
                              "codec_config.vector_quantization_hidden_dimension": 16,
                              "codec_config.num_quantizers": 4, "num_codebooks": 4},
    "granite_speech5_ctc": {"encoder_config.num_key_value_heads": 4},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moss_transcribe_diarize": {"audio_merge_size": 4},
    "nemo_speechlm": {  # its fused projections are cut in three equal parts when loaded
        "text_config.n_groups": 4, "audio_config.asr_config.num_key_value_heads": 4,
        "audio_config.diarization_config.audio_config.num_key_value_heads": 4,
        "word_timestamp_config.num_key_value_heads": 4},
    "phi4_multimodal": {"vision_config.crop_size": 16, "vision_config.feature_layer": -1,
                        "audio_config.num_blocks": 2, "audio_config.input_size": 16,
                        "audio_config.ext_pw_out_channel": 32, "audio_config.depthwise_separable_out_channel": 32,
                        "audio_config.nemo_conv_channels": 8},
    "qwen3_asr": {"audio_config.output_dim": 32, "audio_config.downsample_hidden_size": 8},
    "shieldgemma2": {"mm_tokens_per_image": 4, "vision_config.vision_use_head": False, "yes_token_index": 20,
                     "no_token_index": 21},
    "t5gemma2": {"encoder.mm_tokens_per_image": 4, "encoder.vision_config.vision_use_head": False},
    "vibevoice": {**_under("audio_config", CODEC), **_under("semantic_model_config", SECOND_CODEC),
                  "diffusion_head_config.latent_size": 16, "diffusion_head_config.frequency_embedding_size": 16},
    "vibevoice_asr": {**_under("acoustic_tokenizer_encoder_config", CODEC),
                      **_under("semantic_tokenizer_encoder_config", SECOND_CODEC), "acoustic_tokenizer_chunk_size": 64},
    "voxtral": {"audio_token_id": 5, "audio_config.intermediate_size": 128},
}
