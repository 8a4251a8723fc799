"""FLOPs against counts by hand: one line of arithmetic per matrix product of a two-layer decoder."""
from __future__ import annotations

import pytest
import torch
import transformers.integrations.moe as moe
from torch import nn
from transformers import PretrainedConfig, Qwen2Config, Qwen2ForCausalLM

import stt
from stt.sites import find_sites
from tests.architectures.build import build as built
from tests.architectures.build import with_experts
from tests.architectures.matrix import random_units
from util.torch_flops import by_length, forward_flops, training_flops

B, T, D, F, V, LAYERS, HEADS, KV_HEADS = 2, 10, 32, 80, 64, 2, 4, 2
KV = D // HEADS * KV_HEADS
N = B * T  # tokens
PRODUCT = 2 * B * T * T * D  # all heads: queries @ keys, and as much again for weights @ values
ATTENTION = {"q_proj": 2 * N * D * D, "k_proj": 2 * N * D * KV, "v_proj": 2 * N * D * KV, "o_proj": 2 * N * D * D}
MLP = {"gate_proj": 2 * N * D * F, "up_proj": 2 * N * D * F, "down_proj": 2 * N * F * D}
HEAD = 2 * N * D * V
FORWARD = LAYERS * (sum(ATTENTION.values()) + sum(MLP.values()) + 2 * PRODUCT) + HEAD


def build(attention: str = "sdpa") -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS,
                         num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=False,
                         attn_implementation=attention, attention_dropout=0.0)
    ids = torch.randint(0, V, (B, T))
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, :3] = 0
    return Qwen2ForCausalLM(config), {"input_ids": ids, "attention_mask": mask, "labels": ids}


def train_only(model: nn.Module, *endings: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(endings))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_forward(attention):
    assert forward_flops(*build(attention)) == FORWARD


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_everything_trains(attention):
    """Backward: the gradient of the input and of the weight, each as much as the forward product."""
    assert training_flops(*build(attention)) == 3 * FORWARD


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_only_the_mlps_and_the_head_train(attention):
    model, batch = build(attention)
    train_only(model, "gate_proj.weight", "up_proj.weight", "down_proj.weight", "lm_head.weight")
    first = 2 * N * D * F * 2         # layer 0, gate and up: weights only, nothing below them trains
    first += 2 * MLP["down_proj"]     # layer 0, down: input and weight
    second = sum(ATTENTION.values())  # layer 1, frozen projections: only the gradient passes through
    second += 4 * PRODUCT             # layer 1, attention: each of its two products, towards both factors
    second += 2 * sum(MLP.values())   # layer 1, MLP: input and weight
    assert training_flops(model, batch) == FORWARD + first + second + 2 * HEAD


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_only_the_head_trains(attention):
    model, batch = build(attention)
    train_only(model, "lm_head.weight")
    assert training_flops(model, batch) == FORWARD + HEAD


def test_only_the_last_down_projection_trains():
    model, batch = build()
    train_only(model, "layers.1.mlp.down_proj.weight")
    assert training_flops(model, batch) == FORWARD + HEAD + MLP["down_proj"]


def test_attention_dropout_does_not_change_the_count():
    model, batch = build()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1  # takes another attention kernel
    assert training_flops(model.train(), batch) == 3 * FORWARD


def test_a_narrower_model_by_its_width():
    model, batch = build()
    kept = 24
    for layer in model.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = (nn.Linear(D, kept, bias=False) for _ in range(2))
        layer.mlp.down_proj = nn.Linear(kept, D, bias=False)
    assert forward_flops(model, batch) == FORWARD - LAYERS * 3 * 2 * N * D * (F - kept)


def test_a_loss_of_our_own():
    model, batch = build()

    def answer_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0][:, -1]
        return model.lm_head(hidden).logsumexp(-1).sum()

    answers = 2 * B * D * V  # the head sees one token per row
    assert training_flops(model, batch, answer_loss) == 3 * (FORWARD - HEAD + answers)


def test_convolution_and_bias():
    model = nn.Conv1d(3, 5, kernel_size=4)
    assert forward_flops(model, {"input": torch.randn(2, 3, 10)}) == 2 * 2 * 5 * 7 * 3 * 4  # 7 places


def test_counting_changes_nothing():
    model, batch = build()
    model.config.attention_dropout = 0.1
    model.train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    training_flops(model, batch)
    forward_flops(model, batch)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_training_is_counted_inside_no_grad():
    with torch.no_grad():
        assert training_flops(*build()) == 3 * FORWARD


@pytest.mark.parametrize("count", [forward_flops, training_flops])
def test_three_lengths_give_every_other(count):
    model, _ = build()

    def one(length: int) -> int:
        ids = torch.ones(1, length, dtype=torch.long)
        return count(model, {"input_ids": ids, "labels": ids})

    at = by_length(one)
    assert [at(length) for length in (1, 2, 5, 33)] == [one(length) for length in (1, 2, 5, 33)]


# ---------------------------------------------------------------- mixtures of experts


def of_mixture(config: PretrainedConfig, rows: int, length: int, kept: dict[str, int]) -> int:
    """By hand: every token meets attention, router, shared expert and head, and `num_experts_per_tok` experts of a
    layer, each of as many neurons as the layer's experts keep."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens, D = rows * length, config.hidden_size
    per_token = D * config.vocab_size
    for layer in range(config.num_hidden_layers):
        width = {name.rpartition("layers.")[2]: count for name, count in kept.items() if f"layers.{layer}." in name}
        per_token += D * head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
        per_token += length * head * config.num_attention_heads * 2  # scores, and weights @ values
        if f"{layer}.mlp" in width:  # a layer without experts
            per_token += 3 * D * width[f"{layer}.mlp"]
            continue
        per_token += D * config.num_experts
        per_token += config.num_experts_per_tok * 3 * D * width[f"{layer}.mlp.experts.0"]
        if f"{layer}.mlp.shared_expert" in width:
            per_token += 3 * D * width[f"{layer}.mlp.shared_expert"] + D  # and its own gate
    return 2 * tokens * per_token


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_experts_by_their_tokens_and_kept_widths(name: str, experts: str) -> None:
    model, batch = built(name).model, built(name).inputs
    dense = {site.name: site.width for site in find_sites(model).values()}
    units = random_units(find_sites(model))
    with_experts(model, experts)
    for kept in (dense, {site: len(ids) for site, ids in units.items()}):
        if kept is not dense:
            stt.apply(model, units)
        expected = of_mixture(model.config, *batch["input_ids"].shape, kept)
        assert forward_flops(model, batch) == expected
        assert training_flops(model, batch | {"labels": batch["input_ids"]}) == 3 * expected
    assert sum(kept.values()) < 0.8 * sum(dense.values())


def test_the_loop_in_place_of_a_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers does where torch has no grouped product for the device or the width."""
    mixture = built("mixtral")
    batch = mixture.inputs | {"labels": mixture.inputs["input_ids"]}
    with_experts(mixture.model, "grouped_mm")
    called = []
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: called.append(1))
    expected = of_mixture(mixture.model.config, *batch["input_ids"].shape,
                          {site.name: site.width for site in find_sites(mixture.model).values()})
    assert forward_flops(mixture.model, batch) == expected
    assert training_flops(mixture.model, batch) == 3 * expected
    assert called


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_on_a_gpu(dtype):
    model, batch = build()
    model, batch = model.to("cuda", dtype), {name: value.to("cuda") for name, value in batch.items()}
    assert forward_flops(model, batch) == FORWARD
    assert training_flops(model, batch) == 3 * FORWARD
