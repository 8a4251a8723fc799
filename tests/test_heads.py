"""Attention heads as units: found by structure, sliced exactly, reloaded; what cannot be cut is refused with the
reason."""
from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, T5Config, T5EncoderModel

import stt
from stt.errors import InputError
from stt.export import export_hf
from stt.heads import find_heads
from stt.sites import find_sites
from tests import tiny
from tests.architectures.build import build, randomised
from tests.architectures.matrix import difference, run
from tests.architectures.matrix import masked as with_masked_neurons
from tests.attention import Row, buildable, failures, masked, measured, random_units
from tests.attention_page import committed, sizes, why
from tests.test_architectures import USED

REFUSED = {"convnext": "nothing in it attends", "deepseek_v3": "a latent", "longformer": "was not executed",
           "olmo2": "a norm across all heads", "deepseek_v4": "in groups of channels", "jetmoe": "a stack of matrices",
           "mobilevitv2": "weighted by itself", "mra": "cannot be followed", "perceiver": "never called",
           "squeezebert": "in groups of channels", "wavlm": "inside one function of PyTorch",
           "xlnet": "a stack of matrices"}
LEFT_OUT = {  # beside sites
    "canine": "a single position", "reformer": "cannot be followed", "siglip": "outside the repeated layers"}
ONLY_TWO = {  # of few units one can be kept: of two, one
    "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "glm4_moe", "gpt_oss", "granite", "llama", "llama4_text",
    "mistral", "mixtral", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2"}
STRUCTURES = {  # (units, query heads of a unit) in each site
    "bert": [(4, 1)] * 2, "gpt2": [(4, 1)] * 2, "gpt_neox": [(4, 1)] * 2, "bloom": [(4, 1)] * 2, "llama": [(2, 2)] * 2,
    "phi3": [(2, 2)] * 2, "falcon": [(4, 1)] * 2, "bart": [(4, 1)] * 6, "albert": [(4, 1)], "qwen3_next": [(2, 2)],
    "swin": [(2, 1), (2, 1), (4, 1)]}
CACHED = ["llama", "gpt2", "bloom", "falcon", "phi3", "bart", "gpt_oss"]
TOLERANCE = 1e-5


@pytest.mark.parametrize("model_type", sorted(USED - REFUSED.keys()))
def test_sliced_is_masked_and_reloads(model_type: str) -> None:
    row = measured(model_type)
    assert not row.reason
    assert not failures(row)
    assert all(0 < kept < units for kept, units in zip(row.kept, row.units, strict=True))
    if model_type not in ONLY_TWO and len(row.kept) > 1:
        assert len(set(row.kept)) > 1


@pytest.mark.parametrize(("model_type", "reason"), REFUSED.items())
def test_refused_with_the_reason(model_type: str, reason: str) -> None:
    row = measured(model_type)
    assert re.search(f"no attention site in .*{reason}", row.reason)
    assert not row.silent


@pytest.mark.matrix
@pytest.mark.parametrize("model_type", buildable())
def test_every_type_is_as_the_table_says(model_type: str) -> None:
    """docs/attention.md, which `python -m tests.attention --out docs/attention.md` writes again."""
    row = measured(model_type)
    assert not failures(row)
    assert (sizes(row), why(row)) == committed()[model_type]


GOOD = Row("bert", "BertForMaskedLM", [4], [2], [1], effect=0.5, whole=0.0, sliced=1e-7, reloaded=1e-7)


@pytest.mark.parametrize(("change", "said"), [
    ({"error": "ERROR: TypeError: no"}, "ERROR"), ({"silent": ["layer.0"]}, "layer.0 attends, and is neither"),
    ({"no_effect": ["layer.0"]}, "masking layer.0 changes nothing"), ({"effect": 1e-6}, "masking a site changes only"),
    ({"whole": 1e-7}, "with all units kept"), ({"sliced": 1e-4}, "sliced it differs"),
    ({"reloaded": 1e-4}, "reloaded it differs"), ({"model_type": "pixio"}, "reloaded it differs")])
def test_every_fault_of_a_row_is_one(change: dict[str, object], said: str) -> None:
    assert not failures(GOOD)
    assert [sentence.startswith(said) for sentence in failures(dataclasses.replace(GOOD, **change))] == [True]


@pytest.mark.parametrize(("model_type", "reason"), LEFT_OUT.items())
def test_left_out_with_the_reason(model_type: str, reason: str) -> None:
    assert any(reason in entry.reason for entry in find_heads(build(model_type).model).left_out)


@pytest.mark.parametrize(("model_type", "structure"), STRUCTURES.items())
def test_units_and_their_query_heads(model_type: str, structure: list[tuple[int, int]]) -> None:
    sites = find_heads(build(model_type).model)
    assert [(site.width, site.heads) for site in sites.values()] == structure


def test_a_position_bias_that_later_layers_read_stays_whole() -> None:
    """The first layer of T5 makes it for all of them."""
    sites = find_heads(build("t5").model)
    assert list(sites) == ["encoder.block.1.layer.0.SelfAttention", "decoder.block.1.layer.0.SelfAttention",
                           "decoder.block.1.layer.1.EncDecAttention"]
    assert {entry.name.split(".")[2] for entry in sites.left_out} == {"0"}


def test_every_later_layer_reads_the_whole_bias() -> None:
    """Also behind a layer that has read a part of it."""
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, num_heads=4, d_ff=44, num_layers=4)
    model = randomised(T5EncoderModel(config).requires_grad_(False)).eval()
    sites = find_heads(model)
    units = {name: torch.tensor([place, 3]) for place, name in enumerate(sites)}
    assert len(units) == 3
    ids = torch.arange(12).view(2, 6)
    sliced = stt.apply(copy.deepcopy(model), units)(ids)[0]
    assert difference([sliced], [masked(model, sites, units)(ids)[0]]) <= TOLERANCE
    assert difference([sliced], [model(ids)[0]]) > 1e-4


def test_linear_attention_is_named() -> None:
    sites = find_heads(build("qwen3_next").model)
    assert [entry.reason for entry in sites.left_out] == [
        "a convolution stands between the projections (linear attention or a state-space layer)"]


def test_all_query_heads_of_one_key_are_units() -> None:
    """The key and the value (8 rows each) stay behind the rows of the kept queries."""
    model = build("falcon").model
    name, dense = next(iter(find_heads(model))), copy.deepcopy(model)
    layer = stt.apply(model, {name: [1, 3]}).get_submodule(f"{name}.query_key_value")
    rows = [*range(8, 16), *range(24, 32), *range(32, 48)]
    assert torch.equal(layer.weight, dense.get_submodule(f"{name}.query_key_value").weight[rows])


def test_the_same_sites_without_weights() -> None:
    built = build("llama")
    with torch.device("meta"):
        empty = type(built.model)(built.model.config)
    assert [str(site) for site in find_heads(empty).values()] == [
        str(site) for site in find_heads(built.model).values()]


def test_what_a_module_has_kept_of_a_forward_pass_is_forgotten() -> None:
    """LeViT looks its position biases up once: here before its heads are cut."""
    built = build("levit")
    sites = find_heads(built.model)
    units = random_units(sites)
    run(built, built.model)
    kept = [module.attention_bias_cache for module in built.model.modules() if hasattr(module, "attention_bias_cache")]
    assert all(kept)
    sliced = stt.apply(copy.deepcopy(built.model), units)
    assert difference(run(built, sliced), run(built, masked(built.model, sites, units))) <= TOLERANCE


def test_neurons_are_found_as_before() -> None:
    built = build("gpt2")
    before = {name: str(site) for name, site in find_sites(copy.deepcopy(built.model)).items()}
    find_heads(built.model)
    assert {name: str(site) for name, site in find_sites(built.model).items()} == before


# ---------------------------------------------------------------- used as any sliced model


@pytest.mark.parametrize("model_type", CACHED)
def test_generates_as_the_masked_model(model_type: str) -> None:
    """Token by token, with a cache."""
    built = build(model_type)
    sites = find_heads(built.model)
    units = random_units(sites)
    made = [model.generate(built.inputs["input_ids"], max_new_tokens=6, min_new_tokens=6, do_sample=False,
                           output_logits=True, return_dict_in_generate=True).logits
            for model in (stt.apply(copy.deepcopy(built.model), units), masked(built.model, sites, units))]
    assert difference(list(made[0]), list(made[1])) <= TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "phi3", "bart", "gpt_oss"])
def test_another_implementation_of_attention_agrees(model_type: str) -> None:
    built = build(model_type)
    sites = find_heads(built.model)
    units = random_units(sites)
    sliced = stt.apply(copy.deepcopy(built.model), units)
    sliced.set_attn_implementation("eager")
    assert difference(run(built, sliced), run(built, masked(built.model, sites, units))) <= TOLERANCE


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("model_type", ["bloom", "phi3"])
def test_copies_compute_the_same(model_type: str, copied: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    """An attention with an argument cut for it, and one with sizes of its own."""
    built = build(model_type)
    sliced = stt.apply(built.model, random_units(find_heads(built.model)))
    assert difference(run(built, copied(sliced)), run(built, sliced)) == 0.0


def test_neurons_and_heads_together() -> None:
    built = build("llama")
    heads, neurons = find_heads(built.model), find_sites(built.model)
    of_heads = random_units(heads)
    of_neurons = {name: torch.arange(0, site.width, 3) for name, site in neurons.items()}
    sliced = stt.apply(copy.deepcopy(built.model), of_heads | of_neurons)
    expected = with_masked_neurons(masked(built.model, heads, of_heads), neurons, of_neurons)
    assert difference(run(built, sliced), run(built, expected)) <= TOLERANCE


def test_only_what_was_cut_trains() -> None:
    built = build("gpt2")
    name = next(iter(find_heads(built.model)))
    trained = stt.train_only(stt.apply(built.model, {name: [0, 2]}), head="freeze")
    assert trained == [f"{name}.{layer}" for layer in ("c_attn.weight", "c_attn.bias", "c_proj.weight")]


def test_restored_into_the_dense_model() -> None:
    built = build("llama")
    dense = copy.deepcopy(built.model)
    sliced = stt.apply(copy.deepcopy(built.model), random_units(find_heads(built.model)))
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.self_attn.q_proj.weight += 1.0
    kept = sliced.stt_selection["model.layers.0.self_attn"]
    stt.restore(sliced, dense)
    first = (model.model.layers[0].self_attn.q_proj.weight for model in (dense, built.model))
    added = (next(first) - next(first)).view(2, -1).mean(1)  # by unit
    torch.testing.assert_close(added, torch.ones(2).index_fill(0, kept, 0.0), rtol=0, atol=1e-6)


def test_no_plain_folder_has_such_heads(tmp_path: Path) -> None:
    built = build("llama")
    stt.save(stt.apply(built.model, random_units(find_heads(built.model))), tmp_path / "sliced")
    with pytest.raises(InputError, match="attention heads .*--to dense"):
        export_hf(tmp_path / "sliced", tmp_path / "plain")


# ---------------------------------------------------------------- structures of no real architecture


class Attention(nn.Module):
    """Two heads of 16 channels; `arranged` makes (B, T, H, D) of a projection, `after` changes what is read."""

    def __init__(self, arranged: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = lambda x: x):
        super().__init__()
        self.arranged, self.after = arranged, after
        self.q, self.k, self.v, self.o = (nn.Linear(tiny.HIDDEN, tiny.HIDDEN) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.arranged(layer(x)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.o(self.after(x.flatten(2)))


def heads_of_toy(*parts: Callable[[Tensor], Tensor]) -> list[int]:
    model = tiny.Toy(lambda: Attention(*parts))
    return [site.width for site in find_heads(model).values()]


def test_a_toy_with_heads_one_after_the_other() -> None:
    assert heads_of_toy(lambda x: x.unflatten(-1, (-1, tiny.HIDDEN // 2))) == [2, 2]


def test_scattered_heads_are_refused() -> None:
    model = tiny.Toy(lambda: Scattered(lambda x: x.unflatten(-1, (-1, 2)).transpose(-1, -2)))
    with pytest.raises(InputError, match="not of equal size, one after the other"):
        find_heads(model)


class Scattered(Attention):
    """Channel c belongs to head c % 2, also in what the output projection reads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.arranged(layer(x)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(x.permute(0, 2, 3, 1).flatten(2))


def test_a_norm_behind_the_heads_is_refused() -> None:
    with pytest.raises(InputError, match="mixes the heads"):
        heads_of_toy(lambda x: x.unflatten(-1, (-1, tiny.HIDDEN // 2)), lambda x: F.layer_norm(x, (tiny.HIDDEN,)))


def test_a_fixed_number_of_heads_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be given another number of heads"):
        heads_of_toy(lambda x: x.unflatten(-1, (2, tiny.HIDDEN // 2)))


class Numbered(Attention):
    """Reads its number of heads, and keeps another number of that size."""

    def __init__(self) -> None:
        super().__init__(lambda x: x)
        self.heads = self.place = 2

    def forward(self, x: Tensor) -> Tensor:
        self.arranged = lambda x: x.unflatten(-1, (self.heads, tiny.HIDDEN // 2))
        return super().forward(x)


def test_only_the_numbers_that_must_change_do() -> None:
    model = tiny.Toy(Numbered)
    sites = find_heads(model)
    assert [(size.module, size.name) for size in sites["layers.0"].sizes] == [("", "heads")]


class Scaled(Numbered):
    """Of the right shape with fewer heads, but not of the right values."""

    def forward(self, x: Tensor) -> Tensor:
        self.after = lambda x: x * self.heads
        return super().forward(x)


def test_values_that_depend_on_the_number_of_heads_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be given another number of heads"):
        find_heads(tiny.Toy(Scaled))


def test_layers_that_share_a_projection_are_refused() -> None:
    model = tiny.Toy(lambda: Attention(lambda x: x.unflatten(-1, (-1, tiny.HIDDEN // 2))))
    model.layers[1].k = model.layers[0].k
    with pytest.raises(InputError, match="layers.0.o: .* also used elsewhere; layers.1.o: .* also used elsewhere"):
        find_heads(model)


def test_attention_of_a_class_that_hides_its_projections_is_named() -> None:
    with pytest.raises(InputError, match="layers.0.attention: its projections are inside one function"):
        find_heads(tiny.Toy(Opaque))


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(tiny.HIDDEN, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Optional(nn.Module):
    """Attends to something else if it is given that, and asks another expert if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = (Attention(lambda x: x.unflatten(-1, (-1, tiny.HIDDEN // 2))) for _ in range(2))
        self.expert, self.idle = (nn.Sequential(nn.Linear(tiny.HIDDEN, tiny.HIDDEN)) for _ in range(2))

    def forward(self, x: Tensor, state: Tensor | None = None, is_hard: bool = False) -> Tensor:
        x = self.expert(self.own(x))
        if state is not None:
            x = self.other(x + state)
        return self.idle(x) if is_hard else x


def test_attention_that_was_never_called_is_named() -> None:
    """An idle expert is not."""
    sites = find_heads(tiny.Toy(Optional))
    assert list(sites) == ["layers.0.own", "layers.1.own"]
    assert [entry.name for entry in sites.left_out] == ["layers.0.other", "layers.1.other"]
    assert all("never called by the dummy input" in entry.reason for entry in sites.left_out)


class OnlyHeads(tiny.Toy):
    """A model with attention alone."""

    def __init__(self, config: PretrainedConfig | None = None):
        super().__init__(lambda: Attention(lambda x: x.unflatten(-1, (-1, tiny.HIDDEN // 2))))
        self.config = config or self.config
        self.post_init()


@torch.no_grad()
def test_a_model_without_feed_forward_sites(tmp_path: Path) -> None:
    model, ids = OnlyHeads(), torch.arange(3, 13).view(2, 5)
    sites, dense = find_heads(model), copy.deepcopy(model)
    with pytest.raises(InputError, match="no feed-forward site"):
        find_sites(model)
    units = {"layers.0": torch.tensor([1]), "layers.1": torch.tensor([0])}
    sliced = stt.apply(model, units)
    expected = masked(dense, sites, units)(ids)["logits"]
    assert difference([sliced(ids)["logits"]], [expected]) <= TOLERANCE
    assert difference([expected], [dense(ids)["logits"]]) > 1e-3
    sliced.save_pretrained(tmp_path)
    assert torch.equal(OnlyHeads.from_pretrained(tmp_path)(ids)["logits"], sliced(ids)["logits"])
    sliced.layers[0].o.weight += 1.0
    stt.restore(sliced, dense)
    assert torch.equal(dense.layers[0].o.weight[:, 16:], sliced.layers[0].o.weight)


def test_a_selection_for_a_model_with_neither() -> None:
    with pytest.raises(InputError, match="no feed-forward site"):
        stt.apply(build("resnet").model, {"layers.0": torch.tensor([0])})


def test_a_batch_that_does_not_fit() -> None:
    with pytest.raises(InputError, match="does not fit"):
        find_heads(build("llama").model, {"pixel_values": torch.zeros(2, 3, 4, 4)})
