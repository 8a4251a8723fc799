"""The published trackers: their arguments, their names, what a second call does, and the sets they return."""
from __future__ import annotations

import inspect
import logging
import math

import pytest
import tiny
import torch
from torch import Tensor, nn

import stt
from stt.ablation_tracker import AblationTracker
from stt.errors import InputError
from stt.gate_product_tracker import GateProductTracker
from stt.selection import Selection
from stt.sites import find_sites
from stt.stt_tracker import STTTracker
from stt.wanda_adapt_tracker import WandaAdaptTracker

NAMES = {
    "qwen2": "model_layers_{}_mlp_gate_proj",
    "phi3": "model_layers_{}_mlp_gate_up_proj",
    "gpt2": "transformer_h_{}_mlp_c_fc",
    "opt": "model_decoder_layers_{}_fc1",
    "bert": "bert_encoder_layer_{}_intermediate_dense",
    "vit": "vit_layers_{}_mlp_fc1",
}


def batches(seed: int, count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, tiny.VOCABULARY, (2, 6), generator=generator),
             "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])} for _ in range(count)]


def statistics(model: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Of every layer of a llama: pre-activations, hidden values and inputs of all real tokens, each (N, ...)."""
    rows: dict[str, dict[str, list[Tensor]]] = {}
    hooks = []
    for name, mlp in ((f"model.layers.{i}.mlp", layer.mlp) for i, layer in enumerate(model.model.layers)):
        seen = rows[name] = {"x": [], "pre": [], "hidden": []}
        hooks.append(mlp.gate_proj.register_forward_pre_hook(lambda m, args, seen=seen: seen["x"].append(args[0])))
        hooks.append(mlp.gate_proj.register_forward_hook(lambda m, args, out, seen=seen: seen["pre"].append(out)))
        hooks.append(mlp.down_proj.register_forward_pre_hook(lambda m, args, seen=seen: seen["hidden"].append(args[0])))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for hook in hooks:
        hook.remove()
    masks = [batch["attention_mask"].bool() for batch in data]
    return {name: {key: torch.cat([value[mask] for value, mask in zip(values, masks, strict=True)]).double()
                   for key, values in seen.items()} for name, seen in rows.items()}


def best(values: Tensor, count: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda i: (-values[i].item(), i))[:count])


def weights(model: nn.Module, site: str) -> Tensor:
    return model.get_submodule(site).gate_proj.weight.detach().double().abs()


# ---------------------------------------------------------------- what they select


@pytest.fixture
def llama() -> nn.Module:
    return tiny.build("llama")[0]


@pytest.mark.parametrize(("threshold", "ratio"), [(0.01, 0.1), (-0.1, 0.3), (1.0, 0.02), (0.5, 1.0)])
def test_stt_is_the_union_of_two_rankings(llama: nn.Module, threshold: float, ratio: float) -> None:
    data = batches(0)
    selection = STTTracker(llama, None, threshold, ratio).get_active_indices(data)
    k = max(1, int(ratio * 44))
    for site, seen in statistics(llama, data).items():
        by_mean = best(seen["pre"].mean(0), k)
        by_rate = best((seen["pre"] >= threshold).double().mean(0), k)
        assert set(selection[site].tolist()) == by_mean | by_rate
        assert k <= len(selection[site]) <= 2 * k
    assert isinstance(selection, Selection)


def test_absolute_rate(llama: nn.Module) -> None:
    data = batches(0)
    selection = STTTracker(llama, threshold=1.0, topk_ratio=0.2, use_abs_for_rate=True).get_active_indices(data)
    for site, seen in statistics(llama, data).items():
        by_rate = best((seen["pre"].abs() >= 1.0).double().mean(0), 8)
        assert set(selection[site].tolist()) == best(seen["pre"].mean(0), 8) | by_rate
    assert selection != STTTracker(llama, threshold=1.0, topk_ratio=0.2).get_active_indices(data)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("scan_batches", [None, 1, 2, 99])
def test_wanda(llama: nn.Module, norm: str, scan_batches: int | None) -> None:
    data = batches(1)
    options = {} if norm == "l2" else {"norm": norm}  # the paper's is the default
    selection = WandaAdaptTracker(llama, topk_ratio=0.25, **options).get_wanda_indices(iter(data), scan_batches)
    for site, seen in statistics(llama, data[:scan_batches]).items():
        sizes = seen["x"].abs().sum(0) if norm == "l1" else seen["x"].square().sum(0).sqrt()
        assert set(selection[site].tolist()) == best(weights(llama, site) @ sizes, 11)


@pytest.mark.parametrize("by_rate", [False, True])
def test_ablation(llama: nn.Module, by_rate: bool) -> None:
    data = batches(2)
    tracker = AblationTracker(llama, threshold=0.5, topk_ratio=0.25)
    alone = tracker.get_active_indices(data, use_activation_rate=by_rate)
    counts = {"model.layers.0.mlp": 5, "model_layers_1_mlp_gate_proj": 17}
    matched = tracker.get_active_indices_with_budget(data, counts, use_activation_rate=by_rate)
    for site, seen in statistics(llama, data).items():
        score = (seen["pre"] >= 0.5).double().mean(0) if by_rate else seen["pre"].mean(0)
        assert set(alone[site].tolist()) == best(score, 11)
        assert set(matched[site].tolist()) == best(score, 5 if "0" in site else 17)
    assert alone.meta["method"] == ("activation_rate" if by_rate else "activation_mean")


def test_gate_product(llama: nn.Module) -> None:
    data = batches(3)
    tracker = GateProductTracker(llama, topk_ratio=0.25)
    alone = tracker.get_active_indices(data)
    budget = {site: len(ids) for site, ids in STTTracker(llama, topk_ratio=0.2).get_active_indices(data).items()}
    matched = tracker.get_active_indices_with_budget(data, budget)
    for site, seen in statistics(llama, data).items():
        assert set(alone[site].tolist()) == best(seen["hidden"].mean(0), 11)
        assert set(matched[site].tolist()) == best(seen["hidden"].mean(0), budget[site])


# ---------------------------------------------------------------- how they are called


def test_published_arguments() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(STTTracker).parameters.items()}
    assert defaults == {"model": inspect.Parameter.empty, "tokenizer": None, "threshold": 0.01, "topk_ratio": 0.10,
                        "device": None, "verbose": False, "use_abs_for_rate": False}
    for published, names in (
            (WandaAdaptTracker, ["model", "tokenizer", "topk_ratio", "device", "verbose"]),
            (STTTracker.get_active_indices, ["self", "dataloader"]),
            (WandaAdaptTracker.get_wanda_indices, ["self", "dataloader", "scan_batches"])):
        assert list(inspect.signature(published).parameters)[:len(names)] == names
    assert stt.STTTracker is STTTracker


@pytest.mark.parametrize("name", NAMES)
def test_layer_names_are_the_published_ones(name: str) -> None:
    model, batch = tiny.build(name)
    tracker = STTTracker(model)
    names = tracker.get_layer_name_map()
    assert list(names) == [NAMES[name].format(i) for i in (0, 1)]
    assert list(names.values()) == list(find_sites(model)) == list(tracker.get_active_indices([batch]))


def test_collect_then_compute(llama: nn.Module) -> None:
    tracker = STTTracker(llama)
    with pytest.raises(InputError, match="nothing was measured yet: call collect"):
        tracker.compute_layerwise_active_indices()
    with pytest.raises(InputError, match="nothing was measured yet"):
        tracker.kept_with_budget({})
    tracker.collect(batches(0))
    assert tracker.compute_layerwise_active_indices() == STTTracker(llama).get_active_indices(batches(0))


@pytest.mark.parametrize("kind", [STTTracker, WandaAdaptTracker, AblationTracker, GateProductTracker])
def test_a_second_call_starts_afresh(llama: nn.Module, kind: type) -> None:
    tracker = kind(llama, topk_ratio=0.3)
    first, second = tracker.get_active_indices(batches(0)), tracker.get_active_indices(batches(9, 5))
    fresh = kind(llama, topk_ratio=0.3).get_active_indices(batches(9, 5))
    assert second == fresh
    assert second.meta == fresh.meta
    assert first != second
    assert second.meta["calibration"]["tokens"] == 50
    assert tracker.get_active_indices(batches(0)) == first


def test_a_failed_call_leaves_the_last_result(llama: nn.Module) -> None:
    tracker = STTTracker(llama)
    first = tracker.get_active_indices(batches(0))
    with pytest.raises(InputError, match="the calibration data is empty"):
        tracker.get_active_indices([])
    assert tracker.compute_layerwise_active_indices() == first


@pytest.mark.parametrize("kind", [STTTracker, WandaAdaptTracker, AblationTracker, GateProductTracker])
@pytest.mark.parametrize("ratio", [0, -1, 1.5, math.nan])
def test_bad_ratio_fails_before_any_data(llama: nn.Module, kind: type, ratio: float) -> None:
    with pytest.raises(InputError, match=r"topk_ratio must be in \(0, 1\], got"):
        kind(llama, topk_ratio=ratio)


def test_no_batch_to_scan(llama: nn.Module) -> None:
    for scan in (0, -1):
        with pytest.raises(InputError, match=f"scan_batches must be at least 1 or None for all, got {scan}"):
            WandaAdaptTracker(llama).get_wanda_indices(batches(0), scan)


def test_device_and_verbose(llama: nn.Module, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "stt"):
        STTTracker(llama).get_active_indices(batches(0))
        assert (caplog.messages, capfd.readouterr()) == ([], ("", ""))
        selection = STTTracker(llama, device=torch.device("cpu"), verbose=True).get_active_indices(batches(0))
    assert caplog.messages == [f"stt: {selection!r}"]
    assert capfd.readouterr().out == ""


def test_strings_use_the_trackers_tokenizer(llama: nn.Module) -> None:
    texts = ["w5 w6 w7", "w9 w20 w21 w22 w23 w24"]
    tracker = STTTracker(model=llama, tokenizer=tiny.tokenizer(), threshold=0.01, topk_ratio=0.3, verbose=False)
    selection = tracker.get_active_indices(dataloader=[texts])
    assert selection == tracker.get_active_indices(dataloader=texts)
    assert selection.meta["calibration"]["tokens"] == 9
    wanda = WandaAdaptTracker(llama, tiny.tokenizer())
    assert wanda.get_wanda_indices(texts) == wanda.get_wanda_indices([texts])
    assert wanda.get_wanda_indices(texts[1:] * 20, 1) == wanda.get_wanda_indices(texts[1:])


def test_meta_says_where_the_selection_comes_from(llama: nn.Module) -> None:
    meta = STTTracker(llama, threshold=0.2, topk_ratio=0.3).get_active_indices(batches(0)).meta
    assert (meta["method"], meta["threshold"], meta["topk_ratio"], meta["keep_ratio"]) == ("stt", 0.2, 0.3, None)
    assert meta["widths"] == {f"model.layers.{i}.mlp": 44 for i in (0, 1)}
    assert meta["fingerprint"] == find_sites(llama).fingerprint
    assert (meta["calibration"]["examples"], meta["calibration"]["tokens"]) == (6, 30)
    assert meta["versions"]["torch"] == torch.__version__
    backwards = dict(reversed(list(STTTracker(llama).get_active_indices(batches(0)).items())))
    assert list(stt.apply(llama, Selection(backwards, meta)).stt_selection) == list(meta["widths"])
    assert llama.stt_selection.meta == meta


def test_selection_works_where_published_code_used_a_dict(llama: nn.Module) -> None:
    tracker = STTTracker(llama, topk_ratio=0.1)
    active = tracker.get_active_indices(batches(0))
    names = tracker.get_layer_name_map()
    underscored = {key: active[site].tolist() for key, site in names.items()}
    from stt.stt_transformer import STTTransformer

    for given in (active, dict(active), underscored):
        assert STTTransformer(llama, given, names).selection == active
