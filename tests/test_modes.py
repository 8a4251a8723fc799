"""Modes: what they keep, what they train, and that merging adapters changes nothing."""
from __future__ import annotations

import pytest
import tiny
import torch
from tiny_text import build_decoder

import stt
from stt import modes
from stt.errors import InputError
from stt.selecting import Budget
from stt.selection import Selection
from stt.surgery import head_parameters
from tests.architectures.build import build

BATCHES = list(torch.randint(3, 60, (3, 2, 9), generator=torch.Generator().manual_seed(1)))
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def prepared(name: str, **changes):
    """(mode, model ready to train, selection, names of what trains)"""
    mode, model = modes.find(name), build_decoder(vocabulary=60)
    selection = None
    if mode.score:
        selection, _ = modes.select_units(mode, model, BATCHES, None, Budget(0.3), 0.01, seed=0)
    settings = {"lora": modes.Lora(r=4, dropout=0.0), "head": "train", **changes}
    return mode, model, selection, modes.prepare(mode, model, selection, **settings)


def test_unknown_mode():
    with pytest.raises(InputError, match="Did you mean 'baseline'"):
        modes.find("basline")


def test_a_mode_by_another_score():
    """As many neurons as STT keeps in every site, and only the chosen ones compensated."""
    mode = modes.find("stt", "contribution")
    assert (mode.score, mode.trains) == ("contribution", "kept")
    assert modes.find("stt", "stt") == modes.find("stt")
    with pytest.raises(InputError, match="Did you mean 'contribution'"):
        modes.find("stt", "contributions")
    size = Budget(0.3)
    by_stt, composition = modes.select_units(modes.find("stt"), build_decoder(60), BATCHES, None, size, 0.01, seed=0)
    other, nothing = modes.select_units(mode, build_decoder(60), BATCHES, None, size, 0.01, seed=0, compensate="mean")
    assert {site: len(ids) for site, ids in other.items()} == {site: len(ids) for site, ids in by_stt.items()}
    assert other != by_stt
    assert (bool(other.new_values), bool(by_stt.new_values), bool(composition), nothing) == (True, False, True, {})


@pytest.mark.parametrize("name", modes.MODES)
def test_what_trains(name):
    """By module kind, from the names alone."""
    mode, model, _, trained = prepared(name)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trained)
    heads = set(head_parameters(model))
    body = set(trained) - heads
    assert heads <= set(trained)
    if mode.trains == "everything":
        assert set(trained) == {n for n, _ in model.named_parameters()}
    elif mode.trains == "kept":
        assert body == {n for n, _ in model.named_parameters() if ".mlp." in n}
    else:
        assert all("lora_" in n for n in body)
        places = ("gate_proj", "up_proj", "down_proj", *(() if mode.score else ATTENTION))
        assert len(body) == 2 * 2 * len(places)  # layers x (A, B) x projections
        assert all(any(place in n for n in body) for place in places)


@pytest.mark.parametrize("name", modes.MODES)
def test_a_frozen_head_trains_nothing_of_it(name):
    _, model, _, trained = prepared(name, head="freeze")
    assert trained
    assert not set(trained) & set(head_parameters(model))


def test_full_fine_tuning_with_an_untied_head_trains_the_embedding_too():
    config = build_decoder(vocabulary=60).config
    config.tie_word_embeddings = True
    model = type(build_decoder(60))(config)
    trained = modes.prepare(modes.find("baseline"), model, None, modes.Lora(), "untie")
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(trained)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["stt", "stt_lora"])
def test_tune_attn_adds_the_attention(name):
    _, _, _, without = prepared(name)
    _, model, _, trained = prepared(name, tune_attn=True)
    expected = {n for n, _ in model.named_parameters() if any(f".{place}." in n for place in ATTENTION)}
    assert set(trained) - set(without) == expected
    assert expected


def test_budgets_are_equal_and_the_random_one_depends_on_the_seed():
    kept = {}
    for name, mode in modes.MODES.items():
        if mode.score:
            for seed in (0, 1):
                selection, _ = modes.select_units(mode, build_decoder(60), BATCHES, None, Budget(0.3), 0.01, seed)
                kept[name, seed] = selection
    sizes = {key: [len(ids) for ids in selection.values()] for key, selection in kept.items()}
    assert all(size == sizes["stt", 0] for size in sizes.values())
    assert kept["stt", 0] == kept["stt", 1]
    assert kept["random", 0] != kept["random", 1]


@pytest.mark.parametrize("name", ["lora", "stt_lora"])
def test_merged_equals_unmerged(name):
    _, model, _, trained = prepared(name)
    before = build_decoder(60).double()(BATCHES[0]).logits
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name in trained and "lora_" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) / 4)
    model = model.double().eval()
    unmerged = model(BATCHES[0]).logits
    assert modes.merge_adapters(model) == (14 if name == "lora" else 6)
    assert not [n for n, _ in model.named_parameters() if "lora_" in n]
    merged = model(BATCHES[0]).logits
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-12)
    assert (merged - before).abs().max() > 1e-2  # the adapters did something


def test_partial_models_are_refused_unless_told():
    model, _ = tiny.toy([(tiny.HIDDEN, tiny.NEURONS), (tiny.NEURONS, tiny.HIDDEN)], lambda x, a: a(x).relu())
    model.layers[1].middle = lambda x, a: torch.nn.functional.layer_norm(a(x), (tiny.NEURONS,))
    with pytest.raises(InputError, match="only a part of Toy can be sliced: layers.1.linears.1 .*mixes neurons"):
        modes.check_sites(model, "refuse")
    modes.check_sites(model, "ok")


# ---------------------------------------------------------------- attention heads


def chosen(name: str, units: str, size: Budget, seed: int = 0) -> Selection:
    return modes.select_units(modes.find(name), build_decoder(60), BATCHES, None, size, 0.01, seed, units=units)[0]


@pytest.mark.parametrize("units", ["heads", "both"])
@pytest.mark.parametrize("name", ["stt", "stt_lora"])
def test_what_trains_of_heads(name, units):
    mode, model = modes.find(name), build_decoder(60)
    selection = chosen(name, units, Budget(0.3))
    trained = modes.prepare(mode, model, selection, modes.Lora(r=4, dropout=0.0), "freeze")
    places = [*ATTENTION, *(("gate_proj", "up_proj", "down_proj") if units == "both" else ())]
    if name == "stt":
        assert set(trained) == {n for n, _ in model.named_parameters() if any(f".{place}." in n for place in places)}
    else:
        assert len(trained) == 2 * 2 * len(places)  # layers x (A, B) x projections
        assert all("lora_" in n for n in trained)
        assert all(any(f".{place}." in n for n in trained) for place in places)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (8, 32)  # one of two heads of 8 channels


def test_heads_that_are_all_kept_train_too():
    model = build_decoder(60)
    selection = chosen("stt", "heads", Budget(heads_keep=1.0))
    trained = modes.prepare(modes.find("stt"), model, selection, modes.Lora(), "freeze")
    assert set(trained) == {n for n, _ in model.named_parameters() if any(f".{place}." in n for place in ATTENTION)}
    assert torch.equal(model(BATCHES[0]).logits, build_decoder(60)(BATCHES[0]).logits)


@pytest.mark.parametrize("units", ["heads", "both"])
def test_every_mode_keeps_as_many_heads_and_neurons(units):
    kept = {name: chosen(name, units, Budget(0.3, heads_keep=0.5))
            for name, mode in modes.MODES.items() if mode.score}
    sizes = {name: {site: len(ids) for site, ids in selection.items()} for name, selection in kept.items()}
    assert all(size == sizes["stt"] for size in sizes.values())
    assert {sizes["stt"][site] for site in kept["stt"].heads} == {1}
    assert {name: selection.meta["head_score"] for name, selection in kept.items()} == {
        "stt": "activation_norm", "stt_lora": "activation_norm", "magnitude_pruning": "magnitude",
        "wanda_adapt": "wanda", "random": "random"}
    assert {len({site in selection.heads for site in selection}) for selection in kept.values()} == {
        2 if units == "both" else 1}


def test_merged_equals_unmerged_with_heads():
    model, selection = build_decoder(60), chosen("stt_lora", "both", Budget(0.3))
    trained = modes.prepare(modes.find("stt_lora"), model, selection, modes.Lora(r=4, dropout=0.0), "freeze")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) / 4)
    model = model.double().eval()
    unmerged = model(BATCHES[0]).logits
    assert modes.merge_adapters(model) == 14  # 4 + 3 projections of 2 layers
    torch.testing.assert_close(model(BATCHES[0]).logits, unmerged, rtol=0, atol=1e-12)
    sliced = stt.apply(build_decoder(60).double(), selection)
    assert (unmerged - sliced(BATCHES[0]).logits).abs().max() > 1e-2  # the adapters did something


def test_models_whose_attention_is_cut_in_part_are_refused_unless_told():
    model = build("qwen3_next").model  # linear attention in some layers
    modes.check_sites(model, "refuse")
    with pytest.raises(InputError, match="only a part of Qwen3Next.*a convolution stands between.*--partial ok"):
        modes.check_sites(model, "refuse", "both")
    modes.check_sites(model, "ok", "both")
    with pytest.raises(InputError, match="no attention site in Deepseek"):
        modes.check_sites(build("deepseek_v3").model, "ok", "heads")
