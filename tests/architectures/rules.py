"""Makes any configuration tiny by the names of its entries: what a name means is the same in most architectures.

Widths of feed-forward blocks are numbers no other size in a model has: 44, 52, 60 ... leave 4 when divided by 8,
and so do neither the other sizes nor the doubled widths of fused projections.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from transformers import PreTrainedConfig

HIDDEN, VOCABULARY, POSITIONS, LAYERS, HEADS, FIRST_WORD = 32, 101, 64, 2, 4, 40
Value = object

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "word_embed_proj_dim",
                     "out_hidden_size", "attention_hidden_size", "encoder_hidden_size", "cross_hidden_size",
                     "lru_width", "output_hidden_size", "pooler_hidden_size", "pooler_output_size",
                     "cross_attention_hidden_size", "audio_hidden_size", "embedding_dim", "hidden_size_global",
                     "prediction_head_size", "classifier_proj_size"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
                     "num_decoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", "depth",
                     "decoder_num_hidden_layers", "speech_encoder_layers", "t2u_encoder_layers",
                     "t2u_decoder_layers", "conf_num_hidden_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
                     "decoder_attention_heads", "attention_heads", "num_encoder_attention_heads",
                     "num_decoder_attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads",
                     "cross_num_attention_heads", "speech_encoder_attention_heads", "t2u_encoder_attention_heads",
                     "t2u_decoder_attention_heads", "conf_num_attention_heads", "linear_num_value_heads",
                     "index_n_heads", "swa_num_attention_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "encoder_num_key_value_heads",
                     "decoder_num_key_value_heads", "cross_num_key_value_heads", "linear_num_key_heads",
                     "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "v_head_dim", "qk_nope_head_dim", "linear_key_head_dim",
                     "linear_value_head_dim", "cross_head_dim", "swa_head_dim", "dim_head", "d_head",
                     "linear_head_dim", "index_head_dim"), 8),
    "qk_rope_head_dim": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "rotary_dim": 4, "index_topk": 4,
    "vocab_size": VOCABULARY, "embedding_size": 16, "projection_dim": 24,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length",
                     "max_target_positions", "max_speech_positions", "max_text_positions",
                     "original_max_position_embeddings"), POSITIONS),
    "attention_window": 4, "max_source_positions": 16, "sliding_window": 4, "sliding_window_size": 4,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group",
                     "first_k_dense_replace", "num_dense_layers", "num_expert_group"), 1),
    "num_nextn_predict_layers": 0, "query_pre_attn_scalar": 8,
    "image_size": 16, "patch_size": 4, "num_mel_bins": 16, "feature_size": 16,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "o_lora_rank": 8, "o_groups": 2,
    "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "codebook_vocab_size": VOCABULARY,
    "max_encoder_position_embeddings": POSITIONS, "max_decoder_position_embeddings": POSITIONS,
    "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4,
    "state_size": 8, "chunk_size": 4, "time_step_rank": 4, "mamba_dt_rank": 4, "num_labels": 3,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "max_2d_position_embeddings": POSITIONS,
    "entity_vocab_size": 20, "entity_emb_size": 16, "context_size": 8, "adapter_rank": 8, "laurel_rank": 8,
    "router_hidden_size": 16, "subsampling_conv_channels": 8, "conv_channels": 16, "feature_projection_input_dim": 16,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "conv_depthwise_kernel_size": 3,
}
SEQUENCES: dict[str, tuple[int, ...]] = {
    "conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2),
}
WIDTHS = (
    "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "dff", "dim_ff", "mlp_dim",
    "moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
    "ffn_hidden_size", "feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size",
    "expert_ffn_hidden_size", "shared_intermediate_size", "shared_experts_intermediate_size",
    "speech_encoder_intermediate_size", "t2u_encoder_ffn_dim", "t2u_decoder_ffn_dim", "d_inner",
    "projector_hidden_size",
)
RATIOS = ("mlp_ratio", "expansion_ratio", "feedforward_mult", "intermediate_multiple_size")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
WIDTH, RATIO = "a free width", "a free width over the hidden size"
WHOLE_RATIO = 5
NEVER_NONE = ("head_dim", "num_key_value_heads", "vocab_size")
LATENT = ("head_dim", "num_key_value_heads")  # decided by multi-head latent attention itself
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


@dataclass(frozen=True)
class Ratios:
    """An override that is a list of ratios, one for each of these sizes: the widths are free ones, or those that the
    whole numbers `given` make. A single one is that number itself."""

    sizes: tuple[int, ...]
    given: tuple[int, ...] = ()


class Numbers:
    """The next free width and token id of one model; the same token name is the same id in every sub-configuration."""

    def __init__(self) -> None:
        self._widths: Iterator[int] = count(44, 8)
        self._ids: Iterator[int] = count(3)
        self._tokens: dict[str, int] = dict(TOKENS)
        self.widths: dict[str, int] = {}

    def width(self, key: str) -> int:
        """A new width, noted under its dotted key."""
        self.widths[key] = next(self._widths)
        return self.widths[key]

    def token(self, name: str) -> int:
        """The id of a special token, below every word's."""
        name = name.replace("token_index", "token_id")
        if name not in self._tokens:
            self._tokens[name] = next(self._ids)
        return self._tokens[name]


def tiny_config(kind: type[PreTrainedConfig], overrides: Mapping[str, Value], numbers: Numbers,
                prefix: str = "") -> PreTrainedConfig:
    """A tiny configuration of this class; `overrides` are entries by dotted key, and win over the rules."""
    given = {key.removeprefix(prefix): value for key, value in overrides.items()
             if key.startswith(prefix) and "." not in key.removeprefix(prefix)}
    towers = {key: value for key, value in given.items() if key in kind.sub_configs}
    own_choices = {f"{prefix}{name}.{key}": value for name, spec in kind.sub_configs_defaults.items()
                   for key, value in spec.init_kwargs.items() if isinstance(value, bool)}
    default = kind(**towers)
    latent = isinstance(vars(default).get("kv_lora_rank"), int)
    entries: dict[str, Value] = {"num_key_value_heads": HEADS} if latent else {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            entries[name] = tiny_config(type(value), own_choices | overrides, numbers, f"{prefix}{name}.")
        elif name not in given and not name.startswith("_") and not (latent and name in LATENT):
            entries |= _ruled(name, value, prefix, numbers)
    entries |= {key: value for key, value in _layer_kinds(default).items() if key not in given}
    for name, value in given.items():
        if name not in towers or value is None:
            entries[name] = _made(value, f"{prefix}{name}", numbers)
    return kind(**entries)


def _made(value: Value, key: str, numbers: Numbers) -> Value:
    """An override's value: WIDTH and RATIO stand for the next free width, Ratios for several."""
    if isinstance(value, Ratios):
        keys = [f"{key}.{index}" for index in range(len(value.sizes))] if len(value.sizes) > 1 else [key]
        if not value.given:
            return tuple(numbers.width(name) / size for name, size in zip(keys, value.sizes, strict=True))
        numbers.widths |= {name: size * ratio for name, size, ratio in zip(keys, value.sizes, value.given, strict=True)}
        return value.given if len(value.given) > 1 else value.given[0]
    if value == WIDTH:
        return numbers.width(key)
    if key.rpartition(".")[2] in WIDTHS and isinstance(value, int):
        numbers.widths[key] = value
    return numbers.width(key) / HIDDEN if value == RATIO else value


def _ruled(name: str, value: Value, prefix: str, numbers: Numbers) -> dict[str, Value]:
    """{name: what the rules say}, or nothing where no rule speaks; None stays None but for a width."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in WIDTHS and (number or value is None):
        return {name: numbers.width(prefix + name)} if value != 0 else {}
    if name in RATIOS and number and isinstance(value, float):
        return {name: numbers.width(prefix + name) / HIDDEN}
    if name in RATIOS and number:
        numbers.widths[prefix + name] = WHOLE_RATIO * HIDDEN
        return {name: WHOLE_RATIO}
    if name in SIZES and (number and value != 0 or value is None and name in NEVER_NONE):
        return {name: SIZES[name]}
    if name in SEQUENCES and isinstance(value, list | tuple):
        return {name: SEQUENCES[name]}
    if name.endswith(("_token_id", "_token_index")) and (number or isinstance(value, list)):
        return {name: numbers.token(name)}
    return {}


def _layer_kinds(default: PreTrainedConfig) -> dict[str, Value]:
    """Few layers of which every kind the default has is one: each list with an entry a layer, and the layer count."""
    name = next((name for name in LAYER_COUNTS if isinstance(vars(default).get(name), int)), None)
    if name is None or vars(default)[name] <= LAYERS:
        return {}
    lists = {key: list(value) for key, value in vars(default).items() if not key.startswith("_")
             and isinstance(value, list | tuple) and len(value) == vars(default)[name]}
    kinds = [value for value in lists.values() if all(isinstance(part, str) for part in value)]
    chosen, seen = [], set()
    for layer in range(vars(default)[name]):
        new = {(which, value[layer]) for which, value in enumerate(kinds)} - seen
        if new or (len(chosen) < LAYERS and not kinds):
            chosen.append(layer)
            seen |= new
    chosen += chosen[:1] * (LAYERS - len(chosen))
    return {name: len(chosen)} | {key: [value[layer] for layer in chosen] for key, value in lists.items()}
