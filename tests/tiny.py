"""Random two-layer models of every supported architecture, small enough to build in milliseconds.

Every parameter is drawn anew, biases and norm weights too, so that a forgotten bias or a swapped channel shows. Sizes
that could be confused differ: 32 hidden, 44 neurons, 97 tokens.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

HIDDEN, NEURONS, VOCABULARY, LENGTH = 32, 44, 97, 7
Built = tuple[PreTrainedModel, dict[str, Tensor]]

DECODER = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
           "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GQA = DECODER | {"intermediate_size": NEURONS, "num_key_value_heads": 2}
ENCODER = DECODER | {"intermediate_size": NEURONS, "num_labels": 3}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_inner": NEURONS, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": NEURONS, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
BART = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_ffn_dim": NEURONS, "decoder_ffn_dim": NEURONS + 6, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
VIT = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": NEURONS,
       "image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 3}


def _text(model_class: str, **config: object) -> Built:
    """Right-padded token ids with their mask."""
    model = _made(model_class, config)
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (2, LENGTH)), "attention_mask": torch.ones(2, LENGTH).long()}
    inputs["attention_mask"][0, 5:] = 0
    inputs["input_ids"][0, 5:] = 0
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 4))
    return model, inputs


def _vision(model_class: str, **config: object) -> Built:
    model = _made(model_class, config)
    size = config.get("image_size", 32)
    return model, {"pixel_values": torch.randn(2, 3, size, size)}


def _made(model_class: str, config: dict[str, object]) -> PreTrainedModel:
    kind = getattr(transformers, model_class)
    torch.manual_seed(0)
    model = kind(kind.config_class(**config)).eval()
    return randomised(model)


def randomised(model: nn.Module) -> nn.Module:
    """Weights as wide as keeps activations near 1; norm weights near what they were; nothing is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else parameter + 0.2 * noise)
    return model


ARCHITECTURES: dict[str, Callable[[], Built]] = {
    # decoders
    "llama": partial(_text, "LlamaForCausalLM", **GQA),
    "llama-bias": partial(_text, "LlamaForCausalLM", **GQA, mlp_bias=True),
    "llama-relu": partial(_text, "LlamaForCausalLM", **GQA, hidden_act="relu"),
    "qwen2": partial(_text, "Qwen2ForCausalLM", **GQA),
    "qwen2-tied": partial(_text, "Qwen2ForCausalLM", **GQA, tie_word_embeddings=True),
    "qwen3": partial(_text, "Qwen3ForCausalLM", **GQA, head_dim=8),
    "mistral": partial(_text, "MistralForCausalLM", **GQA, head_dim=8),
    "gemma": partial(_text, "GemmaForCausalLM", **GQA, head_dim=8),
    "gemma2": partial(_text, "Gemma2ForCausalLM", **GQA, head_dim=8),
    "gemma3_text": partial(_text, "Gemma3ForCausalLM", **GQA, head_dim=8),
    "phi": partial(_text, "PhiForCausalLM", **GQA),
    "phi3": partial(_text, "Phi3ForCausalLM", **GQA),
    "gpt2": partial(_text, "GPT2LMHeadModel", **GPT2),
    "gpt_neo": partial(_text, "GPTNeoForCausalLM", vocab_size=VOCABULARY, hidden_size=HIDDEN, num_layers=2, num_heads=4,
                       intermediate_size=NEURONS, max_position_embeddings=64,
                       attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2),
    "gpt_neox": partial(_text, "GPTNeoXForCausalLM", **DECODER, intermediate_size=NEURONS),
    "gptj": partial(_text, "GPTJForCausalLM", **GPT2, rotary_dim=4),
    "gpt_bigcode": partial(_text, "GPTBigCodeForCausalLM", **GPT2),
    "opt": partial(_text, "OPTForCausalLM", **DECODER, ffn_dim=NEURONS, word_embed_proj_dim=HIDDEN),
    "bloom": partial(_text, "BloomForCausalLM", vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=2, n_head=4),
    "falcon": partial(_text, "FalconForCausalLM", vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2,
                      num_attention_heads=4, ffn_hidden_size=NEURONS, bias=True, bos_token_id=1, eos_token_id=2),
    "olmo2": partial(_text, "Olmo2ForCausalLM", **GQA),
    "starcoder2": partial(_text, "Starcoder2ForCausalLM", **GQA),
    "cohere": partial(_text, "CohereForCausalLM", **GQA),
    "glm4": partial(_text, "Glm4ForCausalLM", **GQA, head_dim=8),
    "granite": partial(_text, "GraniteForCausalLM", **GQA),
    "smollm3": partial(_text, "SmolLM3ForCausalLM", **GQA),
    "stablelm": partial(_text, "StableLmForCausalLM", **GQA),
    # encoders
    "bert": partial(_text, "BertForSequenceClassification", **ENCODER),
    "bert-mlm": partial(_text, "BertForMaskedLM", **ENCODER),
    "roberta": partial(_text, "RobertaForSequenceClassification", **ENCODER),
    "xlm-roberta": partial(_text, "XLMRobertaForSequenceClassification", **ENCODER),
    "camembert": partial(_text, "CamembertForSequenceClassification", **ENCODER),
    "distilbert": partial(_text, "DistilBertForSequenceClassification", vocab_size=VOCABULARY, dim=HIDDEN, n_layers=2,
                          n_heads=4, hidden_dim=NEURONS, max_position_embeddings=64, num_labels=3),
    "albert": partial(_text, "AlbertForSequenceClassification", **ENCODER, embedding_size=16),
    "electra": partial(_text, "ElectraForSequenceClassification", **ENCODER, embedding_size=16),
    "deberta-v2": partial(_text, "DebertaV2ForSequenceClassification", **ENCODER, relative_attention=True,
                          position_buckets=8, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
                          share_att_key=True),
    "modernbert": partial(_text, "ModernBertForSequenceClassification", **ENCODER, cls_token_id=1, sep_token_id=2,
                          mlp_bias=True),
    "mpnet": partial(_text, "MPNetForSequenceClassification", **ENCODER),
    "esm": partial(_text, "EsmForSequenceClassification", **ENCODER, mask_token_id=4),
    "longformer": partial(_text, "LongformerForSequenceClassification", **ENCODER, attention_window=4),
    # encoder-decoders
    "t5": partial(_text, "T5ForConditionalGeneration", **T5),
    "mt5": partial(_text, "MT5ForConditionalGeneration", **T5, feed_forward_proj="gated-gelu"),
    "bart": partial(_text, "BartForConditionalGeneration", **BART),
    "marian": partial(_text, "MarianMTModel", **BART),
    "m2m_100": partial(_text, "M2M100ForConditionalGeneration", **BART),
    # vision
    "vit": partial(_vision, "ViTForImageClassification", **VIT),
    "deit": partial(_vision, "DeiTForImageClassification", **VIT),
    "beit": partial(_vision, "BeitForImageClassification", **VIT),
    "dinov2": partial(_vision, "Dinov2ForImageClassification", **VIT | {"mlp_ratio": 2}),
    "dinov2-swiglu": partial(_vision, "Dinov2ForImageClassification", **VIT | {"mlp_ratio": 2}, use_swiglu_ffn=True),
    "swin": partial(_vision, "SwinForImageClassification", image_size=16, patch_size=2, embed_dim=16, depths=[1, 2],
                    num_heads=[2, 4], window_size=2, mlp_ratio=3.0, num_labels=3),
    "clip_vision": partial(_vision, "CLIPVisionModel", **VIT),
    "siglip_vision": partial(_vision, "SiglipVisionModel", **VIT),
}

MOE = GQA | {"num_experts_per_tok": 2}
MIXTURES: dict[str, Callable[[], Built]] = {  # of stacked experts; grouped products know no float64
    "mixtral": partial(_text, "MixtralForCausalLM", **MOE, num_local_experts=4),
    "qwen2_moe": partial(_text, "Qwen2MoeForCausalLM", **MOE, num_experts=4, moe_intermediate_size=20,
                         shared_expert_intermediate_size=36, decoder_sparse_step=1),
    "qwen2_moe-dense-layer": partial(_text, "Qwen2MoeForCausalLM", **MOE, num_experts=4, moe_intermediate_size=20,
                                     shared_expert_intermediate_size=36, mlp_only_layers=[0]),
    "gpt_oss": partial(_text, "GptOssForCausalLM", **MOE, num_local_experts=4, head_dim=8),
    "dbrx": partial(_text, "DbrxForCausalLM", vocab_size=VOCABULARY, d_model=HIDDEN, n_heads=4, n_layers=2,
                    max_seq_len=64, attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
                    ffn_config={"ffn_hidden_size": NEURONS, "moe_num_experts": 4, "moe_top_k": 2,
                                "hidden_size": HIDDEN}),
    "llama4_text": partial(_text, "Llama4ForCausalLM", **MOE | {"num_experts_per_tok": 1}, num_local_experts=4,
                           head_dim=8, intermediate_size_mlp=52),
}
REFUSED: dict[str, tuple[Callable[[], Built], str]] = {  # builder, the reason in the error
    "mamba": (partial(_text, "MambaForCausalLM", vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2,
                      state_size=4, use_mambapy=False), "no feed-forward site in MambaForCausalLM"),
    "resnet": (partial(_vision, "ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                       num_channels=3, num_labels=3), "no feed-forward site in ResNetForImageClassification"),
    "bitnet": (partial(_text, "BitNetForCausalLM", **GQA), "mixes neurons"),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Built:
    """A fresh model in evaluation mode and a batch for it."""
    model, batch = (ARCHITECTURES | MIXTURES)[name]()
    return model.to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Everything floating-point the model returns but its caches."""
    extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    return list(_floats(model(**batch, **extra)))


def _floats(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield from [value] if value.is_floating_point() else []
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _floats(part)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: "w7" is 7."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    core = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


class Toy(PreTrainedModel):
    """An embedding, two residual blocks made by `block()`, a head: for structures no real architecture has."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, block: Callable[[], nn.Module]):
        super().__init__(PretrainedConfig(vocab_size=VOCABULARY))
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([block(), block()])
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        randomised(self).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = F.layer_norm(x + layer(x), (HIDDEN,))
        return {"logits": self.head(x)}


class Block(nn.Module):
    """`middle(x, *linears)` is what the last of the linear layers reads."""

    def __init__(self, shapes: list[tuple[int, int]], middle: Callable[..., Tensor]):
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(*shape) for shape in shapes])
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.linears[-1](self.middle(x, *self.linears[:-1]))


def toy(shapes: list[tuple[int, int]], middle: Callable[..., Tensor]) -> Built:
    """A Toy of such blocks and a batch."""
    model = Toy(lambda: Block(shapes, middle))
    return model, {"input_ids": torch.randint(3, VOCABULARY, (2, LENGTH))}
