"""Every supported architecture decodes to what its config promises; what cannot be sliced is refused, with a reason."""
from __future__ import annotations

import copy
import json
import math
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from tiny import HIDDEN, NEURONS
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM, WhisperConfig, WhisperForConditionalGeneration

import stt
from stt import verbs
from stt.errors import InputError
from stt.sites import Site, describe, find_sites
from tests.architectures.build import build

GLU = {name: "gate_proj" for name in (
    "llama", "llama-bias", "llama-relu", "qwen2", "qwen2-tied", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text",
    "olmo2", "cohere", "granite", "smollm3", "stablelm", "dinov2-swiglu")} | {"mt5": "wi_0"}
FUSED = {"phi3": "gate_up_proj", "glm4": "gate_up_proj", "modernbert": "Wi"}
WIDTHS = {"bloom": [4 * HIDDEN] * 2, "albert": [NEURONS], "dinov2": [2 * HIDDEN] * 2, "dinov2-swiglu": [48] * 2,
          "swin": [48, 96, 96], "t5": [NEURONS] * 4, "mt5": [NEURONS] * 4,
          **{name: [NEURONS] * 2 + [NEURONS + 6] * 2 for name in ("bart", "marian", "m2m_100")}}


def described(site: Site) -> tuple:
    return (site.name, site.kind, site.width, site.gate.tolist(),
            [(member.module, member.side, member.channels.tolist()) for member in site.members])


# ---------------------------------------------------------------- every architecture


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_blocks_are_what_the_config_promises(name: str) -> None:
    model, _ = tiny.build(name)
    sites = find_sites(model)
    kind = "glu" if name in GLU else "glu_fused" if name in FUSED else "plain"
    assert [site.kind for site in sites.values()] == [kind] * len(sites)
    assert [site.width for site in sites.values()] == WIDTHS.get(name, [NEURONS] * 2)
    assert not sites.lost
    for key, site in sites.items():
        layers = [model.get_submodule(member.module) for member in site.members]
        assert key == site.name
        assert isinstance(model.get_submodule(site.name), nn.Module)
        assert [member.side for member in site.members] == ["out"] * (len(layers) - 1) + ["in"]
        assert all(member.module.startswith(site.name) for member in site.members)
        assert site.gate_module.endswith((GLU | FUSED).get(name, ""))
        own_order = torch.arange(site.width * (2 if kind == "glu_fused" else 1))
        assert torch.equal(site.members[0].channels.T.flatten(), own_order)  # fused: all gates, then all ups
        assert torch.equal(site.gate, torch.arange(site.width))
        assert all(torch.equal(member.channels.flatten(), own_order[:site.width]) for member in site.members[1:])


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_other_dtypes_and_the_meta_device_decode_to_the_same_sites(name: str) -> None:
    expected = [described(site) for site in find_sites(tiny.build(name)[0]).values()]
    for change in (torch.bfloat16, torch.float64, "meta"):
        assert [described(site) for site in find_sites(tiny.build(name)[0].to(change)).values()] == expected


def test_half_a_billion_parameters_on_meta_in_ten_seconds() -> None:
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864,
                                             num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2))
    begin = time.perf_counter()
    sites = find_sites(model)
    assert time.perf_counter() - begin < 10  # measured: 0.7 s
    assert [site.width for site in sites.values()] == [4864] * 24


@pytest.mark.parametrize("name", tiny.REFUSED)
def test_models_without_a_sliceable_block_are_refused_with_the_reason(name: str) -> None:
    builder, reason = tiny.REFUSED[name]
    with pytest.raises(InputError, match=reason):
        find_sites(builder()[0])


def test_blocks_outside_the_layers_are_named_and_no_loss() -> None:
    left_out = find_sites(tiny.build("siglip_vision")[0]).left_out
    assert [(entry.name, entry.reason, entry.is_loss) for entry in left_out] == \
        [("head.mlp", "outside the repeated layers", False)]


# ---------------------------------------------------------------- inputs that are made up


def whisper() -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=99, num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=44,
        decoder_ffn_dim=44, encoder_attention_heads=4, decoder_attention_heads=4, max_source_positions=8,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3))


def test_inputs_are_made_up_and_an_example_is_taken_instead() -> None:
    model = whisper()
    found = [described(site) for site in find_sites(model).values()]
    example = {"input_features": torch.rand(2, 8, 16), "decoder_input_ids": torch.arange(3, 11).view(2, 4)}
    sites = find_sites(model, example)
    assert list(sites) == ["model.encoder.layers.0", "model.decoder.layers.0"]
    assert [described(site) for site in sites.values()] == found
    assert find_sites(model) is sites
    with pytest.raises(InputError, match="a batch of input_features does not fit WhisperFor.*example="):
        find_sites(model, {"input_features": torch.rand(2, 9, 16)})
    assert find_sites(model, example) is not sites  # another example may run more of the model


# ---------------------------------------------------------------- the model is left as it was


@pytest.mark.parametrize("name", ["qwen2", "bert", "t5", "vit"])
def test_model_and_random_state_are_left_as_they_were(name: str) -> None:
    model, batch = tiny.build(name)
    model.train()
    next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0].eval()
    next(model.parameters()).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    find_sites(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_buffers_that_forward_changes_are_put_back() -> None:
    class Counting(tiny.Toy):
        def __init__(self, block: Callable) -> None:
            super().__init__(block)
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("tokens", torch.zeros(1, dtype=torch.long))

        def forward(self, input_ids: Tensor, **options: object) -> dict[str, Tensor]:
            self.calls.add_(1)
            self.tokens = self.tokens + input_ids.numel()
            return super().forward(input_ids, **options)

    model = Counting(lambda: tiny.Block([(HIDDEN, NEURONS), (NEURONS, HIDDEN)], lambda x, a: F.gelu(a(x))))
    before = dict(model.named_buffers())
    find_sites(model)
    assert all(buffer is before[name] and not buffer.any() for name, buffer in model.named_buffers())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16),
                                     lambda: torch.random.fork_rng(devices=[])])
def test_sites_do_not_depend_on_the_context(context: Callable) -> None:
    expected = [described(site) for site in find_sites(tiny.build("phi3")[0]).values()]
    model, _ = tiny.build("phi3")
    with context():
        assert [described(site) for site in find_sites(model).values()] == expected


def test_sites_do_not_depend_on_the_weights_or_their_dtype() -> None:
    model, _ = tiny.build("llama-relu", torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    expected = find_sites(tiny.build("llama")[0])
    assert [described(site) for site in find_sites(model).values()] == [described(site) for site in expected.values()]


def test_result_is_cached_until_a_shape_changes() -> None:
    model, _ = tiny.build("qwen2")
    sites = find_sites(model)
    assert find_sites(model) is sites
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert [described(s) for s in find_sites(copied).values()] == [described(s) for s in sites.values()]
    stt.apply(model, {site: [0, 3, 5] for site in sites})
    assert [site.width for site in find_sites(model).values()] == [3, 3]


def test_towers_are_traced_one_by_one_where_no_batch_can_be_made_up() -> None:
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(text_config=size | {"vocab_size": 30, "max_position_embeddings": 16},
                                 vision_config=size | {"image_size": 8, "patch_size": 4}, projection_dim=8))
    found = [described(site) for site in find_sites(model).values()]
    example = {"input_ids": torch.arange(12).view(2, 6) + 3, "pixel_values": torch.rand(2, 3, 8, 8)}
    sites = find_sites(model, example)
    assert list(sites) == ["vision_model.encoder.layers.0.mlp", "text_model.encoder.layers.0.mlp"]
    assert sorted(found) == sorted(described(site) for site in sites.values())


def test_fingerprint_tells_models_apart() -> None:
    prints = {name: find_sites(tiny.build(name)[0]).fingerprint for name in ("qwen2", "phi", "bert", "t5")}
    assert len(set(prints.values())) == 4
    model = tiny.build("qwen2")[0]
    model.resize_token_embeddings(model.config.vocab_size + 3)
    assert find_sites(model).fingerprint == prints["qwen2"]  # another vocabulary, the same layers
    narrower, _ = tiny._text("Qwen2ForCausalLM", **tiny.GQA | {"intermediate_size": NEURONS - 1})
    assert find_sites(narrower).fingerprint != prints["qwen2"]


# ---------------------------------------------------------------- stt sites


def test_site_table() -> None:
    block = {"form": "linear", "kind": "glu", "width": 8, "members": ["gate", "down"], "group": "0", "units": "neurons"}
    stack = {"form": "experts", "kind": "glu_fused", "width": 4, "members": ["gate_up", "down"], "group": "e",
             "units": "neurons"}
    heads = {"form": "attention", "kind": "attention", "width": 2, "members": ["q", "o"], "group": "a",
             "units": "heads", "heads": 7}
    found = {"sites": [{"name": "layers.0.mlp", **block}, *({"name": f"e.{i}", **stack} for i in range(9)),
                       {"name": "layers.0.attention", **heads}],
             "left_out": [{"name": "layers.1", "reason": "mixes neurons", "is_loss": True, "units": "neurons"},
                          {"name": "attention", "reason": "a latent", "is_loss": False, "units": "heads"}]}
    assert [" ".join(line.split()) for line in verbs._site_table(found).splitlines()] == [
        "site form kind width members", "layers.0.mlp linear glu 8 gate, down",
        "e.0 ... 8 experts glu_fused 4 gate_up, down", "layers.0.attention attention attention 2 x 7 q, o",
        "neurons lost layers.1: mixes neurons", "heads left out attention: a latent"]


def test_the_command_lists_neurons_and_heads(capsys: pytest.CaptureFixture) -> None:
    """Of the shipped model: 384 neurons and 2 key/value heads with 2 query heads each, in 5 layers."""
    model = str(Path(__file__).parents[1] / "models" / "stt-tiny")
    assert verbs.main(["sites", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(site["name"], site["units"], site["form"], site["width"], site["heads"]) for site in found["sites"]] == [
        *((f"model.layers.{layer}.mlp", "neurons", "linear", 384, 0) for layer in range(5)),
        *((f"model.layers.{layer}.self_attn", "heads", "attention", 2, 2) for layer in range(5))]
    assert found["left_out"] == []
    assert verbs.main(["sites", model]) == 0
    assert "model.layers.4.self_attn attention attention 2 x 2 q_proj, k_proj, v_proj, o_proj" in " ".join(
        capsys.readouterr().out.split())


def test_attention_that_cannot_be_cut_is_named_with_the_reason() -> None:
    found = describe(build("deepseek_v3").model)
    assert {site["units"] for site in found["sites"]} == {"neurons"}
    said = [entry["reason"] for entry in found["left_out"] if entry["units"] == "heads"]
    assert said
    assert all("a latent" in reason for reason in said)
