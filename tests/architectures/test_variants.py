"""Sliced models of many types in half precision, in several files, with tied weights; experts computed in every way."""
from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import stt
from stt.sites import find_sites

from .build import Built, build, with_experts
from .matrix import EXACT, difference, masked, random_units, run

TABLE = Path(__file__).parent.parent.parent / "docs" / "architectures.md"
FEW = ("bert", "gpt2", "mixtral", "t5")
RELOADED = (*FEW, "albert", "bart", "bloom", "convnext", "dbrx", "deepseek_v3", "gemma3", "gpt_oss", "jetmoe", "levit",
            "mobilenet_v2", "modernbert", "moshi", "nllb-moe", "phi3", "qwen2_audio", "segformer",
            "switch_transformers", "vit", "wav2vec2", "zamba2")  # every kind of block and of tying
ONE_WAY = {"dbrx", "jetmoe", "llama4", "llama4_text", "longcat_flash", "nemo_speechlm"}  # refuse or ignore the others
MIXTURES = re.findall(r"^\| (\S+) \| \w+ \| \d+ \| [^|]*experts", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
some_by_default = pytest.mark.parametrize("model_type", [
    name if name in FEW else pytest.param(name, marks=pytest.mark.matrix) for name in RELOADED])


def sliced(model_type: str, dtype: torch.dtype = torch.float32) -> tuple[Built, PreTrainedModel]:
    """The dense model with its batch, and a sliced copy."""
    built = build(model_type, dtype)
    return built, stt.apply(copy.deepcopy(built.model), random_units(find_sites(built.model)))


def ties(model: PreTrainedModel) -> set[frozenset[str]]:
    """The names of every parameter that has several."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(same) for same in names.values() if len(same) > 1}


def assert_same(loaded: PreTrainedModel, saved: PreTrainedModel, built: Built) -> None:
    """Bits, dtypes and ties of all parameters, and what comes out."""
    wanted = dict(saved.named_parameters())
    assert {name for name, _ in loaded.named_parameters()} == wanted.keys()
    for name, value in loaded.named_parameters():
        assert value.dtype == wanted[name].dtype, name
        assert torch.equal(value, wanted[name]), name
    assert ties(loaded) == ties(saved)
    implementation = saved.config._experts_implementation
    if implementation is not None and loaded.config._experts_implementation != implementation:
        with_experts(loaded, implementation)
    assert difference(run(built, loaded), run(built, saved)) <= (0.02 if built.model.dtype == torch.bfloat16 else EXACT)


@some_by_default
def test_half_precision_reloads(model_type: str, tmp_path: Path) -> None:
    """Bit for bit; outputs may differ by the rounding of other kernels, as weights lie elsewhere in memory."""
    built, model = sliced(model_type, torch.bfloat16)
    stt.save(model, tmp_path / "model")
    loaded = stt.load(tmp_path / "model")
    assert {value.dtype for value in loaded.parameters()} == {torch.bfloat16}
    assert_same(loaded, model, built)


@some_by_default
def test_several_files_reload(model_type: str, tmp_path: Path) -> None:
    built, model = sliced(model_type)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(stt.load(tmp_path), model, built)
    assert_same(type(model).from_pretrained(tmp_path).eval(), model, built)


@some_by_default
def test_tied_weights_stay_tied(model_type: str, tmp_path: Path) -> None:
    """As in the dense model: nothing that slicing replaces is tied to something else by accident, or untied."""
    built, model = sliced(model_type)
    assert {frozenset(same) for same in ties(model)} == ties(built.model)
    stt.save(model, tmp_path / "model")
    assert ties(stt.load(tmp_path / "model")) == ties(built.model)


def test_the_tied_and_the_untied_are_both_among_them() -> None:
    assert {bool(ties(build(model_type).model)) for model_type in FEW} == {True, False}


def test_the_table_names_the_mixtures() -> None:
    assert {"mixtral", "gpt_oss", "dbrx", "jetmoe", "llama4_text", "deepseek_v3"} <= set(MIXTURES)
    assert len(MIXTURES) >= 59


@pytest.mark.matrix
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_sliced_experts_are_exact_in_every_way_they_are_computed(model_type: str, experts: str) -> None:
    built = build(model_type)
    if experts == "grouped_mm" and model_type in ONE_WAY:
        with pytest.raises(ValueError, match="does not support setting experts"):
            with_experts(built.model, experts)
        return
    sites = find_sites(built.model)
    units = random_units(sites)
    expected = run(built, with_experts(masked(built.model, sites, units), "eager"))
    model = with_experts(stt.apply(copy.deepcopy(built.model), units), experts)
    assert model.config._experts_implementation == ("eager" if model_type in ONE_WAY else experts)
    assert difference(run(built, model), expected) <= EXACT
    assert difference(run(built, built.model), expected) > 1e-3
