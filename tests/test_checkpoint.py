"""A sliced model survives the disk bit for bit, whatever its architecture, layout, dtypes and ties."""
from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import NEURONS
from tiny_text import build_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import stt
from stt.checkpoint import load, save
from stt.errors import InputError
from stt.selection import Selection
from stt.sites import find_sites
from stt.stt_lora import add_stt_lora
from stt.surgery import train_only


def kept_units(model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """A different number of random units at every site."""
    generator = torch.Generator().manual_seed(seed)
    counts: dict[str, int] = {}  # experts of one stack share a width
    return {name: torch.randperm(site.width, generator=generator)[:counts.setdefault(site.group, 10 + i)].sort().values
            for i, (name, site) in enumerate(find_sites(model).items())}


def sliced_tiny(name: str, dtype: torch.dtype = torch.float32, inference_time: bool = True) -> tiny.Built:
    model, batch = tiny.build(name, dtype)
    return stt.STTTransformer(model, kept_units(model), inference_time=inference_time).transform(), batch


def assert_same(actual: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Names, dtypes, bits of all parameters and buffers, which of them are one tensor, and what the library keeps."""
    for tensors in ("named_parameters", "named_buffers"):
        pairs = zip(getattr(actual, tensors)(remove_duplicate=False),
                    getattr(expected, tensors)(remove_duplicate=False), strict=True)
        for (name, value), (expected_name, wanted) in pairs:
            assert (name, value.dtype) == (expected_name, wanted.dtype)
            assert torch.equal(value, wanted), name
    assert len(list(actual.parameters())) == len(list(expected.parameters()))
    assert type(actual) is type(expected)
    assert actual.stt_selection == expected.stt_selection
    assert actual.stt_selection.meta == expected.stt_selection.meta
    assert actual.config.stt["sites"] == expected.config.stt["sites"]
    assert not actual.training


def assert_equal_outputs(actual: PreTrainedModel, expected: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    for value, wanted in zip(tiny.outputs(actual, batch), tiny.outputs(expected, batch), strict=True):
        assert torch.equal(value, wanted)


# ---------------------------------------------------------------- save -> load


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_loaded_equals_saved(name: str, tmp_path: Path) -> None:
    model, batch = sliced_tiny(name)
    assert save(model, tmp_path / "model") == tmp_path / "model"
    loaded = load(tmp_path / "model")
    assert_same(loaded, model)
    assert_equal_outputs(loaded, model, batch)


@pytest.mark.parametrize("layout", ["padded", "scatter", "padded scatter"])
@pytest.mark.parametrize("name", ["llama-bias", "phi3", "gpt2", "t5"])
def test_any_layout_is_saved_compact_and_left_alone(name: str, layout: str, tmp_path: Path) -> None:
    compact, batch = sliced_tiny(name)
    model, _ = sliced_tiny(name, inference_time="scatter" not in layout)
    if "padded" in layout:
        for module in model.modules():
            if isinstance(module, stt.STTLinear):
                module.pad_weights(16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save(model, tmp_path / "model")
    assert_same(load(tmp_path / "model"), compact)
    assert_equal_outputs(load(tmp_path / "model"), compact, batch)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_half_precision_survives(tmp_path: Path) -> None:
    dense, batch = tiny.build("qwen2-tied")
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    stt.apply(model, kept_units(model))
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.dtype == loaded.config.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(loaded, model)
    assert_equal_outputs(loaded, model, batch)


@pytest.mark.parametrize("head", ["train", "freeze", "untie"])
def test_float32_trained_parts_of_a_half_precision_model_survive(head: str, tmp_path: Path) -> None:
    dense, batch = tiny.build("qwen2-tied")
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    stt.apply(model, kept_units(model))
    trained = train_only(model, head=head)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(1e-6 * torch.randn_like(model.get_parameter(name)))
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16, torch.float32}
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (head != "untie")
    assert loaded.config.tie_word_embeddings == (head != "untie")
    assert_same(loaded, model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_outputs(loaded, model, batch)


def test_a_head_untied_by_hand_survives(tmp_path: Path) -> None:
    model, batch = sliced_tiny("bert-mlm")
    decoder = model.get_output_embeddings()
    decoder.weight = nn.Parameter(decoder.weight.detach() + 1)
    save(model, tmp_path / "model")
    assert_equal_outputs(load(tmp_path / "model"), model, batch)


def test_dtype_and_device_of_the_caller(tmp_path: Path) -> None:
    model, batch = sliced_tiny("llama", torch.float64)
    save(model, tmp_path / "model")
    half = load(tmp_path / "model", device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in half.model.rotary_emb.buffers()} == {torch.float32}
    assert load(tmp_path / "model", device="meta").lm_head.weight.is_meta
    whole = load(tmp_path / "model", dtype=torch.float64)
    assert whole.lm_head.weight.dtype == torch.float64
    torch.testing.assert_close(whole(**batch).logits, model(**batch).logits, rtol=0, atol=1e-6)  # its rotary is float32


def test_generation_config_tokenizer_and_base_travel(tmp_path: Path) -> None:
    model, _ = sliced_tiny("llama")
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=5)
    model.config.stt["base"] = "some/dense-model"
    tokenizer = build_tokenizer()
    save(model, tmp_path / "model", tokenizer)
    loaded = load(tmp_path / "model")
    assert (loaded.generation_config.max_new_tokens, loaded.generation_config.eos_token_id) == (7, 5)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("the sea").input_ids == tokenizer("the sea").input_ids
    assert loaded.config.stt["base"] == "some/dense-model"
    save(loaded, tmp_path / "again")
    assert load(tmp_path / "again").config.stt == loaded.config.stt  # not the folder it was loaded from


def test_the_config_entry_is_exact(tmp_path: Path) -> None:
    model, _ = sliced_tiny("llama")
    save(model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["stt"] == {"format_version": 1, "base": None,
                             "sites": {"model.layers.0.mlp": [10, NEURONS], "model.layers.1.mlp": [11, NEURONS]}}
    assert config["intermediate_size"] == NEURONS
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    weights = load_file(tmp_path / "model/model.safetensors")
    assert weights["model.layers.1.mlp.down_proj.weight"].shape == (tiny.HIDDEN, 11)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == \
        ["README.md", "config.json", "generation_config.json", "model.safetensors", "selection.safetensors"]


def test_training_a_loaded_model_leaves_its_file_alone(tmp_path: Path) -> None:
    model, batch = sliced_tiny("llama")
    save(model, tmp_path / "model")
    before = (tmp_path / "model/model.safetensors").read_bytes()
    loaded = load(tmp_path / "model")
    train_only(loaded)
    optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1)
    loaded(**batch).logits.square().mean().backward()
    optimizer.step()
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    save(loaded, tmp_path / "model")  # over the files it was loaded from
    assert_same(load(tmp_path / "model"), loaded)


def whisper() -> tiny.Built:
    """A model whose input cannot be made up."""
    model = tiny.randomised(WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=99, num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=44,
        decoder_ffn_dim=44, encoder_attention_heads=4, decoder_attention_heads=4, max_source_positions=8,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)).eval())
    example = {"input_features": torch.rand(2, 8, 16), "decoder_input_ids": torch.arange(3, 11).view(2, 4)}
    find_sites(model, example)
    return model, example


def test_a_model_is_loaded_with_or_without_an_example(tmp_path: Path) -> None:
    model, example = whisper()
    stt.apply(model, kept_units(model))
    save(model, tmp_path / "model")
    for given in (None, example):
        loaded = load(tmp_path / "model", example=given)
        assert_same(loaded, model)
        assert_equal_outputs(loaded, model, example)
    with pytest.raises(InputError, match="example="):
        load(tmp_path / "model", example={"input_features": example["input_features"][:, 1:]})


# ---------------------------------------------------------------- folders


def test_a_checkpoint_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = sliced_tiny("llama")
    second, _ = sliced_tiny("opt")
    (tmp_path / "model").mkdir()
    save(first, tmp_path / "model")  # an empty folder is free
    save(second, tmp_path / "model")
    assert_same(load(tmp_path / "model"), second)
    for owner, name, after in [(Selection, "save", 0), (os, "replace", 1), (os, "replace", 2)]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing_after(after, getattr(owner, name)))
            with pytest.raises(OSError, match="disk full"):
                save(first, tmp_path / "model")
        assert_same(load(tmp_path / "model"), second)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]


def failing_after(calls: int, function: Callable) -> Callable:
    """`function`, but its call number `calls` (from 0) fails."""
    count = itertools.count()

    def fail_once(*args: object) -> object:
        if next(count) == calls:
            raise OSError("disk full")
        return function(*args)
    return fail_once


def test_nothing_else_is_ever_replaced(tmp_path: Path) -> None:
    model, _ = sliced_tiny("llama")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("mine")
    tiny.build("llama")[0].save_pretrained(tmp_path / "plain")
    (tmp_path / "file").write_text("mine")
    for folder in ("notes", "plain"):
        with pytest.raises(InputError, match="is not empty"):
            save(model, tmp_path / folder)
    for below in ("file", "file/model", "file/deep/model"):
        with pytest.raises(InputError, match="file is a file"):
            save(model, tmp_path / below)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "notes", "plain"]
    assert (tmp_path / "notes/todo.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 253)  # with .part behind it, no file system takes the name
    with pytest.raises(InputError, match=r"^cannot write to .*; choose another folder$"):
        save(sliced_tiny("llama")[0], folder)
    assert not any(tmp_path.iterdir())


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    dense, _ = tiny.build("llama")
    with pytest.raises(InputError, match="LlamaForCausalLM is not sliced"):
        save(dense, tmp_path / "model")
    with pytest.raises(InputError, match="Hugging Face model is needed, got Linear"):
        save(nn.Linear(2, 2), tmp_path / "model")
    adapted, _ = sliced_tiny("llama")
    add_stt_lora(adapted, 2, 4, 0.0)
    with pytest.raises(InputError, match="merge LoRA"):
        save(adapted, tmp_path / "model")
    toy, _ = tiny.toy([(32, 44), (44, 32)], lambda x, up: up(x).relu())
    stt.apply(toy, kept_units(toy))
    with pytest.raises(InputError, match="'Toy', which transformers .* does not have"):
        save(toy, tmp_path / "model")
    assert not any(tmp_path.iterdir())


def _edit_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
    return edit


def _edit_weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
        change(weights)
        save_file(weights, folder / "model.safetensors")
    return edit


def _other_selection(name: str, seed: int = 0, more: int = 0) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        model, _ = tiny.build(name)
        units = {site: torch.arange(len(ids) + more) for site, ids in kept_units(model, seed).items()}
        stt.apply(model, units).stt_selection.save(folder / "selection.safetensors")
    return edit


def _edit_meta(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "selection.safetensors"
        meta = Selection.load(path).meta | changes
        save_file(load_file(path), path, metadata={"stt": json.dumps(meta)})
    return edit


def _cut(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-200])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    "no selection": (lambda folder: (folder / "selection.safetensors").unlink(), "no selection file at"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no sliced checkpoint at"),
    "cut weights": (_cut("model.safetensors"), "damaged or cut short"),
    "cut selection": (_cut("selection.safetensors"), "not a readable safetensors file"),
    "cut config": (_cut("config.json"), "not readable JSON"),
    "newer": (_edit_config(lambda c: c["stt"].update(format_version=2)), "has format 2, this version reads up to 1"),
    "plain": (_edit_config(lambda c: c.pop("stt")), "plain Hugging Face model.*from_pretrained"),
    "version in words": (_edit_meta(format_version="1"), "but not a selection"),
    "version true": (_edit_meta(format_version=True), "but not a selection"),
    "widths in a list": (_edit_meta(widths=[44, 44]), "but not a selection"),
    "widths in words": (_edit_meta(widths={"model.layers.0.mlp": "44"}), "but not a selection"),
    "newer selection": (_edit_meta(format_version=2, widths="elsewhere"), "has format 2, this version reads up to 1"),
    "another stt": (_edit_config(lambda c: c.update(stt="speech to text")), "plain Hugging Face model"),
    "unknown class": (_edit_config(lambda c: c.update(architectures=["LamaForCausalLM"])), "'LamaForCausalLM'"),
    "no class": (_edit_config(lambda c: c.pop("architectures")), "'no architecture'"),
    "wider config": (_edit_config(lambda c: c.update(intermediate_size=50)), "made for another model"),
    "larger vocabulary": (_edit_config(lambda c: c.update(vocab_size=50)), r"is \(97, 32\), expected \(50, 32\)"),
    "selection of another model": (_other_selection("phi3"), "made for another model"),
    "selection of other sizes": (_other_selection("llama", more=1), "is not the selection"),
    "narrower tensor": (_edit_weights(lambda w: w.update({DOWN: w[DOWN][:, :9].clone()})), r"is \(32, 9\), expected"),
    "dense tensor": (_edit_weights(lambda w: w.update({DOWN: torch.ones(32, NEURONS)})), r"is \(32, 44\), expected"),
    "absent tensor": (_edit_weights(lambda w: w.pop("model.norm.weight")), "lacks 1 tensors.*'model.norm.weight'"),
    "absent sliced tensor": (_edit_weights(lambda w: w.pop(DOWN_0)), "lacks 1 tensors.*layers.0.mlp.down_proj"),
    "foreign tensor": (_edit_weights(lambda w: w.update(extra=torch.ones(1))), "'extra'.*no such tensor"),
    "foreign bias": (_edit_weights(lambda w: w.update({DOWN[:-6] + "bias": torch.ones(32)})), "no such tensor"),
}
DOWN_0, DOWN = "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_in_one_sentence(damage: str, tmp_path: Path) -> None:
    save(sliced_tiny("llama")[0], tmp_path / "model")
    break_it, message = DAMAGES[damage]
    break_it(tmp_path / "model")
    with pytest.raises(InputError, match=message) as raised:
        load(tmp_path / "model")
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no sliced checkpoint at"):
        load(tmp_path / "nowhere")
