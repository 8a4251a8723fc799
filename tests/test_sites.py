"""Every supported architecture decodes to what its config promises; what cannot be sliced is refused, with a reason."""
from __future__ import annotations

import copy
import math
import pickle
import random
import time
from collections.abc import Callable

import pytest
import tiny
import torch
from tiny import HIDDEN, NEURONS
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM, WhisperConfig, WhisperForConditionalGeneration

import stt
from stt.errors import InputError
from stt.sites import Site, find_sites

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


# ---------------------------------------------------------------- structures no real architecture has


def up_first(x: Tensor, fused: nn.Linear) -> Tensor:
    up, gate = fused(x).chunk(2, -1)
    return up * F.silu(gate)


def pairs(x: Tensor, fused: nn.Linear) -> Tensor:
    y = fused(x)
    return F.silu(y[..., ::2]) * y[..., 1::2]


def relu_pairs_up_first(x: Tensor, fused: nn.Linear) -> Tensor:
    y = fused(x)
    return y[..., ::2] * F.relu(y[..., 1::2])


ONE, TWO, FUSED_TWO = [(HIDDEN, NEURONS)], [(HIDDEN, NEURONS)] * 2, [(HIDDEN, 2 * NEURONS)]
DOWN = [(NEURONS, HIDDEN)]
RANGE = list(range(NEURONS))


@pytest.mark.parametrize(("shapes", "middle", "kind", "gate_module", "gate"), [
    (FUSED_TWO, up_first, "glu_fused", "0", [NEURONS + i for i in RANGE]),
    (FUSED_TWO, pairs, "glu_fused", "0", [2 * i for i in RANGE]),
    (FUSED_TWO, relu_pairs_up_first, "glu_fused", "0", [2 * i + 1 for i in RANGE]),
    (TWO, lambda x, a, b: a(x) * F.relu(b(x)), "glu", "1", RANGE),
    (TWO, lambda x, a, b: F.relu(a(x)) * b(x), "glu", "0", RANGE),
    (TWO, lambda x, a, b: a(x) * F.relu(b(x)).square(), "glu", "1", RANGE),
    (TWO, lambda x, a, b: a(x) * b(x).sigmoid(), "glu", "1", RANGE),
    (TWO, lambda x, a, b: a(x) * b(x), "glu", "0", RANGE),  # bilinear: neither bends, the first counts
    (ONE, lambda x, a: F.softplus(a(x)), "plain", "0", RANGE),  # not 0 at 0
    (ONE, lambda x, a: a(x), "plain", "0", RANGE),
], ids=["up-first", "pairs", "relu-pairs", "relu-second", "relu-first", "relu2", "sigmoid", "bilinear", "softplus",
        "linear"])
def test_gate_and_channels_of_unusual_blocks(shapes: list, middle: Callable, kind: str, gate_module: str,
                                             gate: list) -> None:
    model, _ = tiny.toy(shapes + DOWN, middle)
    for site in find_sites(model).values():
        assert (site.kind, site.gate_module[-1], site.gate.tolist()) == (kind, gate_module, gate)


class ScaledBlock(tiny.Block):
    def __init__(self) -> None:
        super().__init__(ONE + DOWN, lambda x, a: a(x))
        self.scale = nn.Parameter(torch.rand(NEURONS))
        self.middle = lambda x, a: F.gelu(a(x)) * self.scale


class RolledBlock(ScaledBlock):
    """A parameter as wide as the block that does not belong to its neurons one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = lambda x, a: F.gelu(a(x)) * (self.scale + self.scale.roll(1))


def test_a_parameter_of_every_neuron_goes_with_it() -> None:
    model, batch = tiny.Toy(ScaledBlock), {"input_ids": torch.arange(14).view(2, 7)}
    sites = find_sites(model)
    assert [(site.form, [member.tensor for member in site.along]) for site in sites.values()] == \
        [("conv", [f"layers.{i}.scale"]) for i in (0, 1)]
    kept = torch.tensor([0, 3, 5, 40])
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for layer in masked.layers:
            layer.linears[1].weight[:, ~torch.isin(torch.arange(NEURONS), kept)] = 0
        expected = masked(**batch)["logits"]
        stt.apply(model, dict.fromkeys(sites, kept))
        torch.testing.assert_close(model(**batch)["logits"], expected, rtol=0, atol=1e-6)
    assert model.layers[0].scale.shape == (4,)


def test_one_number_a_position_is_no_part_of_the_block() -> None:
    model, _ = tiny.toy(ONE + [(HIDDEN, 1)] + DOWN, lambda x, a, b: F.gelu(a(x)) * b(x).sigmoid())
    assert [[member.module for member in site.members] for site in find_sites(model).values()] == \
        [[f"layers.{i}.linears.0", f"layers.{i}.linears.2"] for i in (0, 1)]


@pytest.mark.parametrize(("shapes", "middle", "reason"), [
    (ONE, lambda x, a: F.layer_norm(a(x), (NEURONS,)), "mixes neurons"),
    (ONE, lambda x, a: a(x) * a(x).mean(-1, keepdim=True), "used elsewhere|mixes neurons"),
    (ONE, lambda x, a: F.gelu(a(x)).roll(3, -1), "change places"),
    (ONE, lambda x, a: F.gelu(a(x)).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2), "change places"),
    (ONE, lambda x, a: F.gelu(a(x)) + F.gelu(a(2 * x)), "used elsewhere"),
    (ONE, lambda x, a: F.gelu(a(x)).cumsum(1), "mixes positions"),
], ids=["norm", "mean", "roll", "shuffle", "called-twice", "mixes-tokens"])
def test_inexact_blocks_are_refused_with_the_reason(shapes: list, middle: Callable, reason: str) -> None:
    model, _ = tiny.toy(shapes + DOWN, middle)
    with pytest.raises(InputError, match=reason):
        find_sites(model)


def test_a_neuron_that_also_reaches_both_its_neighbours_is_refused() -> None:
    """On average every channel reaches its own place: only the third probe tells."""
    spread = torch.eye(NEURONS)
    inner = torch.arange(1, NEURONS - 1)
    spread[inner, inner - 1] = spread[inner, inner + 1] = 0.5
    with pytest.raises(InputError, match="mixes neurons"):
        find_sites(tiny.toy(ONE + DOWN, lambda x, a: a(x) @ spread)[0])


def test_more_kinds_of_refusal() -> None:
    with pytest.raises(InputError, match="reads the parameter layers.0.scale"):
        find_sites(tiny.Toy(RolledBlock))
    concatenated, _ = tiny.toy(TWO + [(2 * NEURONS, HIDDEN)], lambda x, a, b: torch.cat([F.gelu(a(x)), b(x)], -1))
    with pytest.raises(InputError, match="channel counts"):
        find_sites(concatenated)


def test_activation_that_leaves_the_block_is_no_site() -> None:
    class Leaking(tiny.Block):
        def forward(self, x: Tensor) -> Tensor:
            hidden = F.gelu(self.linears[0](x))
            return self.linears[1](hidden) + hidden[..., :HIDDEN]

    with pytest.raises(InputError, match="no feed-forward site"):
        find_sites(tiny.Toy(lambda: Leaking(ONE + DOWN, lambda x, a: x)))


def test_two_blocks_never_share_a_projection() -> None:
    model, _ = tiny.toy(ONE + [(NEURONS, NEURONS)] + DOWN, lambda x, a, b: F.gelu(b(F.gelu(a(x)))))
    sites = find_sites(model)
    used = [member.module for site in sites.values() for member in site.members]
    assert len(sites) == 2
    assert len(set(used)) == len(used)
    assert sites.lost


def test_activation_that_is_returned_is_no_site() -> None:
    class Returning(tiny.Toy):
        def forward(self, input_ids: Tensor, **_: object) -> dict[str, Tensor]:
            x = self.embedding(input_ids)
            hidden = [F.gelu(layer.linears[0](x)) for layer in self.layers]
            return {"logits": self.head(x + self.layers[0].linears[1](hidden[0])
                                        + self.layers[1].linears[1](hidden[1])), "hidden": hidden[1]}

    assert list(find_sites(Returning(lambda: tiny.Block(ONE + DOWN, lambda x, a: x)))) == ["layers.0.linears"]


def test_forward_may_ask_a_weight_for_its_device_and_draw_random_numbers() -> None:
    class Curious(tiny.Toy):
        def forward(self, input_ids: Tensor, **options: object) -> dict[str, Tensor]:
            noise = torch.rand(input_ids.shape, device=self.head.weight.device) > 2
            return super().forward(input_ids + noise.to(self.device), **options)

    model = Curious(lambda: tiny.Block(ONE + DOWN, lambda x, a: F.gelu(a(x))))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    expected = [described(site) for site in find_sites(model).values()]
    assert torch.equal(torch.get_rng_state(), before)
    model.__dict__.pop("_stt_sites")
    assert [described(site) for site in find_sites(model.to("meta")).values()] == expected


@pytest.mark.parametrize("share", ["module", "weight"])
def test_tied_layers_in_two_places_are_one_site(share: str) -> None:
    """Each place must become narrow: the outputs are those of the dense model with the other neurons masked."""
    model, batch = tiny.toy(ONE + DOWN, lambda x, a: F.gelu(a(x)))
    first, second = (layer.linears for layer in model.layers)
    if share == "module":
        second[0], second[1] = first[0], first[1]
    else:
        second[0].weight, second[1].weight = first[0].weight, first[1].weight
    if share == "weight":
        second[0].bias, second[1].bias = first[0].bias, first[1].bias
    sites = find_sites(model)
    assert [(name, site.form, site.calls) for name, site in sites.items()] == [("layers.0.linears", "shared", 2)]
    kept = torch.tensor([0, 3, 5, 40])
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.layers[0].linears[1].weight[:, ~torch.isin(torch.arange(NEURONS), kept)] = 0
        expected = masked(**batch)["logits"]
        stt.apply(model, {"layers.0.linears": kept})
        torch.testing.assert_close(model(**batch)["logits"], expected, rtol=0, atol=1e-6)
    assert {tuple(linear.weight.shape) for layer in model.layers for linear in layer.linears} == {(4, 32), (32, 4)}


def test_one_block_called_twice_is_one_site() -> None:
    model, _ = tiny.toy(ONE + DOWN, lambda x, a: F.gelu(a(x)))
    model.layers[1] = model.layers[0]
    assert list(find_sites(model)) == ["layers.0.linears"]


def test_small_side_blocks_are_left_out_by_name() -> None:
    class WithAdapter(tiny.Block):
        def __init__(self) -> None:
            super().__init__(ONE + DOWN, lambda x, a: F.gelu(a(x)))
            self.adapter = nn.ModuleList([nn.Linear(HIDDEN, 4), nn.Linear(4, HIDDEN)])

        def forward(self, x: Tensor) -> Tensor:
            x = F.layer_norm(x + super().forward(x), (HIDDEN,))
            return self.adapter[1](self.adapter[0](x).relu())

    sites = find_sites(tiny.Toy(WithAdapter))
    assert list(sites) == ["layers.0.linears", "layers.1.linears"]
    assert [(entry.name, entry.reason) for entry in sites.left_out] == \
        [(f"layers.{i}.adapter", "a small side block") for i in (0, 1)]


# ---------------------------------------------------------------- inputs that cannot be made up


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

    model = Counting(lambda: tiny.Block(ONE + DOWN, lambda x, a: F.gelu(a(x))))
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
