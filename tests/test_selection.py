"""Selection: set algebra against Python sets, files bitwise, every wrong file and wrong id refused in a sentence."""
from __future__ import annotations

import copy
import json
import pickle
import random
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

import stt
from stt.errors import InputError
from stt.selection import FORMAT_VERSION, Selection
from stt.stt_tracker import STTTracker
from stt.stt_transformer import STTTransformer

WIDTHS = {"layers.2": 30, "layers.10": 40, "layers.1": 20}  # an order that no sorting makes


def drawn(seed: int, least: int = 0) -> Selection:
    generator = random.Random(seed)
    units = {site: generator.sample(range(width), generator.randint(least, width)) for site, width in WIDTHS.items()}
    return Selection(units, {"widths": WIDTHS, "fingerprint": "f", "method": "drawn", "seed": seed})


def sets(selection: Selection) -> dict[str, set[int]]:
    return {site: set(ids.tolist()) for site, ids in selection.items()}


# ---------------------------------------------------------------- the value


def test_ids_are_sorted_int64_in_the_given_order_of_sites() -> None:
    selection = Selection({"b": [5, 1, 3], "a": torch.tensor([2, 0], dtype=torch.int32), "c": ()})
    assert {site: ids.tolist() for site, ids in selection.items()} == {"b": [1, 3, 5], "a": [0, 2], "c": []}
    assert list(selection) == ["b", "a", "c"]
    assert len(selection) == 3
    assert all(ids.dtype == torch.int64 for ids in selection.values())
    assert selection.meta == {"format_version": FORMAT_VERSION}


def test_equality_is_about_units_only() -> None:
    selection = drawn(0)
    assert selection == Selection(dict(selection))
    assert selection == copy.deepcopy(selection) == pickle.loads(pickle.dumps(selection))
    assert selection != Selection({**selection, "layers.1": [0]})
    assert selection != Selection({"layers.1": selection["layers.1"]})
    assert selection != dict(selection)
    with pytest.raises(TypeError, match="unhashable"):
        hash(selection)


def test_a_selection_cannot_be_assigned_to() -> None:
    with pytest.raises(TypeError):
        drawn(0)["layers.1"] = torch.tensor([1])


def test_repr_counts() -> None:
    assert repr(Selection({"a": [0, 2]}, {"widths": {"a": 4}})) == "Selection(1 sites, 2 units kept of 4)"
    assert repr(Selection({"a": [0, 2]})) == "Selection(1 sites, 2 units kept of unknown)"


@pytest.mark.parametrize(("ids", "message"), [
    ([0, 4], r"unit ids of site must be in 0\.\.3, got 0\.\.4"),
    ([-1, 2], r"unit ids of site must be in 0\.\.3, got -1\.\.2"),
    ([1, 2, 1], "unit ids of site repeat"),
    ([0.0, 1.0], "must be whole numbers, got torch.float32"),
    (torch.tensor([True, False]), "must be whole numbers, got torch.bool"),
    (["0", "1"], "must be whole numbers"),
    ([None], "must be whole numbers"),
    (None, "must be whole numbers"),
], ids=["too-high", "negative", "repeated", "floats", "mask", "strings", "nones", "none"])
def test_bad_ids(ids: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Selection({"site": ids}, {"widths": {"site": 4}})


# ---------------------------------------------------------------- set algebra


@pytest.mark.parametrize("seed", range(5))
def test_set_algebra_is_that_of_python_sets(seed: int) -> None:
    a, b = drawn(2 * seed), drawn(2 * seed + 1)
    for method, operator in (("union", set.__or__), ("intersect", set.__and__), ("minus", set.__sub__)):
        combined = getattr(a, method)(b)
        assert sets(combined) == {site: operator(sets(a)[site], sets(b)[site]) for site in WIDTHS}
        assert list(combined) == list(a)
        assert combined == getattr(a, method)({site: ids.flip(0).tolist() for site, ids in b.items()})  # a plain dict
        assert combined.meta == {"format_version": FORMAT_VERSION, "widths": WIDTHS, "fingerprint": "f"}
    for site, jaccard in a.jaccard(b).items():
        assert jaccard == len(sets(a)[site] & sets(b)[site]) / len(sets(a)[site] | sets(b)[site])
    for site, covered in a.directed_coverage(b).items():
        assert covered == len(sets(a)[site] & sets(b)[site]) / len(sets(b)[site])


def test_set_algebra_of_nothing() -> None:
    nothing, something = Selection({"a": []}), Selection({"a": [1, 2]})
    assert nothing.jaccard(nothing) == {"a": 1.0}
    assert nothing.jaccard(something) == something.jaccard(nothing) == {"a": 0.0}
    assert something.directed_coverage(nothing) == {"a": 1.0}
    assert nothing.directed_coverage(something) == {"a": 0.0}


def test_set_algebra_needs_the_same_sites() -> None:
    with pytest.raises(InputError, match="of different sites .1 sites from 'a' against 1 sites from 'b'."):
        Selection({"a": [1]}).union({"b": [1]})
    with pytest.raises(InputError, match="against 0 sites from 'none'"):
        Selection({"a": [1]}).jaccard({})


# ---------------------------------------------------------------- files


def test_save_and_load_bitwise(tmp_path: Path) -> None:
    selection = drawn(3)
    selection.save(tmp_path / "a.safetensors")
    loaded = Selection.load(tmp_path / "a.safetensors")
    assert loaded == selection
    assert list(loaded) == list(selection)
    assert loaded.meta == selection.meta
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("meta", [{}, {"widths": {"b": 9}}], ids=["no-widths", "a-width-missing"])
def test_every_site_survives_the_file(tmp_path: Path, meta: dict) -> None:
    selection = Selection({"b": [1, 2], "a": [], "c": [7]}, meta)
    selection.save(tmp_path / "a.safetensors")
    assert Selection.load(tmp_path / "a.safetensors") == selection


def test_a_measured_selection_survives_the_file(tmp_path: Path) -> None:
    model, batch = tiny.build("qwen2")
    selection = STTTracker(model, topk_ratio=0.2).get_active_indices([batch])
    selection.save(tmp_path / "selection.safetensors")
    loaded = Selection.load(tmp_path / "selection.safetensors")
    assert (loaded, loaded.meta) == (selection, selection.meta)
    stt.apply(model, loaded)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def foreign(path: Path) -> None:
    save_file({"weight": torch.ones(2)}, path)


def text(path: Path) -> None:
    path.write_text("not a selection")


def newer(path: Path) -> None:
    save_file({"a": torch.ones(1).int()}, path, {"stt": json.dumps({"format_version": FORMAT_VERSION + 1})})


def damaged_meta(path: Path) -> None:
    save_file({"a": torch.ones(1).int()}, path, {"stt": "{"})


def other_meta(path: Path) -> None:
    save_file({"a": torch.ones(1).int()}, path, {"stt": "[1]"})


def floats(path: Path) -> None:
    save_file({"a": torch.ones(1)}, path, {"stt": json.dumps({"format_version": 1})})


@pytest.mark.parametrize(("damage", "message"), [
    (Path.unlink, "no selection file at"),
    (truncated, "is not a readable safetensors file"),
    (lambda path: path.write_bytes(b""), "is not a readable safetensors file"),
    (text, "is not a readable safetensors file"),
    (foreign, "is a safetensors file but not a selection"),
    (newer, "has format 2, this version reads up to 1: update stt"),
    (damaged_meta, "is a safetensors file but not a selection"),
    (other_meta, "is a safetensors file but not a selection"),
    (floats, "must be whole numbers"),
], ids=["missing", "truncated", "empty", "text", "foreign", "newer", "damaged-meta", "other-meta", "floats"])
def test_wrong_files(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "selection.safetensors"
    drawn(0).save(path)
    damage(path)
    with pytest.raises(InputError, match=message):
        Selection.load(path)
    with pytest.raises(InputError, match="no selection file at"):
        Selection.load(tmp_path)


def test_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "selection.safetensors"
    drawn(0).save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        Selection({"a": [1]}, {"not json": object()}).save(path)
    assert path.read_bytes() == before


# ---------------------------------------------------------------- on a model


def test_selection_of_another_model_is_refused() -> None:
    model, batch = tiny.build("bert")
    foreign_model, _ = tiny.build("qwen2")
    selection = stt.select(model, [batch])
    before = {name: parameter.clone() for name, parameter in foreign_model.named_parameters()}
    with pytest.raises(InputError, match=r"made for another model \(2 sites of widths \[44\]; this one has 2"):
        stt.apply(foreign_model, selection)
    assert before.keys() == dict(foreign_model.named_parameters()).keys()


@pytest.mark.parametrize(("units", "message"), [
    ({}, "the selection is empty"),
    ({"model.layers.7.mlp": [1]}, "'model.layers.7.mlp' is no feed-forward site.*its 2 sites is 'model.layers.0.mlp'"),
    ({"model.layers.0.self_attn.q_proj": [1]}, "is no feed-forward site"),
    ({"model_layers_0_mlp_gate_proj": [1]}, "is no feed-forward site"),  # underscores need the map
    ({"model.layers.0.mlp": []}, "keeps no unit of model.layers.0.mlp"),
    ({"model.layers.0.mlp": [44]}, r"must be in 0\.\.43"),
    ({"model.layers.0.mlp": [3, 3]}, "repeat"),
    ({"model.layers.0.mlp": [1], "model.layers.0.mlp.gate_proj": [2]}, "model.layers.0.mlp is given twice"),
], ids=["empty", "unknown", "attention", "underscores", "no-unit", "too-high", "repeated", "twice"])
def test_bad_selections_are_refused_before_anything_changes(units: dict, message: str) -> None:
    model, batch = tiny.build("qwen2")
    modules = list(model.modules())
    expected = tiny.outputs(model, batch)[0]
    with pytest.raises(InputError, match=message):
        stt.apply(model, {"model.layers.1.mlp": [0, 1], **units} if units else {})
    assert list(model.modules()) == modules
    assert torch.equal(tiny.outputs(model, batch)[0], expected)
    assert not hasattr(model.config, "stt")


@pytest.mark.parametrize("name", ["qwen2", "bert", "gpt2", "phi3", "t5"])
def test_every_kind_of_key_names_the_same_site(name: str) -> None:
    model, batch = tiny.build(name)
    tracker = STTTracker(model)
    names = tracker.get_layer_name_map()
    sites = {site: [1, 4, 9] for site in names.values()}
    assert all("." not in key for key in names)
    found = stt.find_sites(model)
    members = [{found[site].members[i].module: ids for site, ids in sites.items()} for i in (0, -1)]
    expected = STTTransformer(model, sites).selection
    for given in ({key: sites[site] for key, site in names.items()}, *members):
        assert STTTransformer(model, given, layer_name_map=names).selection == expected
