"""Exported folders are ordinary Hugging Face models: they load and compute the same where this library is not there."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_checkpoint import kept_units, sliced_tiny, whisper
from tiny import NEURONS
from tiny_text import build_tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import stt
from stt import export, widths
from stt.errors import InputError
from stt.export import export_dense, export_hf
from stt.sites import find_sites
from stt.surgery import train_only
from tests.architectures.worker import Worker

NO_CONFIG_ENTRY = {"bloom": "128 to 11",  # 4 x hidden, in code
                   "dinov2-swiglu": "48 to 11",  # rounded, in code
                   "siglip_vision": "44 to 11"}  # the entry is also the width of the pooling head
CHANGED = {**{name: {"n_inner": 11} for name in ("gpt2", "gptj", "gpt_bigcode")}, "opt": {"ffn_dim": 11},
           "falcon": {"ffn_hidden_size": 11}, "distilbert": {"hidden_dim": 11}, "albert": {"intermediate_size": 10},
           "t5": {"d_ff": 13}, "mt5": {"d_ff": 13}, "dinov2": {"mlp_ratio": 1}, "swin": {"mlp_ratio": 10 / 16},
           **{name: {"encoder_ffn_dim": 11, "decoder_ffn_dim": 13} for name in ("bart", "marian", "m2m_100")}}


def saved(model: PreTrainedModel, folder: Path) -> Path:
    stt.save(model, folder / "sliced")
    return folder / "sliced"


def assert_close_outputs(actual: PreTrainedModel, expected: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    for value, wanted in zip(tiny.outputs(actual, batch), tiny.outputs(expected, batch), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5 * max(1.0, wanted.abs().max().item()))


# ---------------------------------------------------------------- --to hf


@pytest.mark.parametrize("name", [name for name in tiny.ARCHITECTURES if name not in NO_CONFIG_ENTRY])
def test_exported_model_is_plain_narrow_and_equal(name: str, tmp_path: Path) -> None:
    model, batch = sliced_tiny(name)
    if name == "marian":  # its sinusoidal positions are computed, never stored
        for stack in (model.model.encoder, model.model.decoder):
            model._init_weights(stack.embed_positions)
    assert export_hf(saved(model, tmp_path), tmp_path / "hf") == tmp_path / "hf"
    config = json.loads((tmp_path / "hf/config.json").read_text())
    changed = CHANGED.get(name, {"intermediate_size": 11})
    assert {key: config[key] for key in changed} == changed
    assert "stt" not in config
    assert_close_outputs(type(model).from_pretrained(tmp_path / "hf"), model, batch)


@pytest.mark.parametrize("name", NO_CONFIG_ENTRY)
def test_models_without_a_config_entry_are_refused(name: str, tmp_path: Path) -> None:
    checkpoint = saved(sliced_tiny(name)[0], tmp_path)
    with pytest.raises(InputError, match=rf"{NO_CONFIG_ENTRY[name]}\).*--to dense.*stt.load") as raised:
        export_hf(checkpoint, tmp_path / "hf")
    assert "\n" not in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["sliced"]


def test_exported_models_load_where_stt_cannot_be_imported(tmp_path: Path) -> None:
    auto = {"qwen2-tied": "CausalLM", "phi3": "CausalLM", "gpt2": "CausalLM", "bert": "SequenceClassification",
            "t5": "Seq2SeqLM", "vit": "ImageClassification"}
    with Worker() as worker:
        for name, task in auto.items():
            folder = tmp_path / name
            model, batch = sliced_tiny(name)
            export_hf(saved(model, folder), folder / "hf")
            logits = worker.run(folder / "hf", f"AutoModelFor{task}", batch)[0]
            torch.testing.assert_close(logits, tiny.outputs(model, batch)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("multiple_of", "width"), [(1, 11), (8, 16), (128, NEURONS)])
def test_width_is_rounded_up_but_never_beyond_the_dense_one(multiple_of: int, width: int, tmp_path: Path) -> None:
    model, batch = sliced_tiny("phi3")
    export_hf(saved(model, tmp_path), tmp_path / "hf", multiple_of)
    plain = type(model).from_pretrained(tmp_path / "hf")
    assert plain.config.intermediate_size == width
    assert_close_outputs(plain, model, batch)
    fused = plain.model.layers[0].mlp.gate_up_proj.weight.view(2, width, -1)
    assert torch.equal(fused[:, :10].flatten(0, 1), model.model.layers[0].mlp.gate_up_proj.weight)
    assert not fused[:, 10:].any()


@pytest.mark.parametrize(("name", "runtime", "tp", "multiple_of", "width"), [
    ("llama", "vllm", 1, 1, 16), ("llama", "vllm", 2, 3, 48), ("llama", "awq", 2, 1, 256), ("llama", "gguf", 1, 8, 256),
    ("phi3", "vllm", 4, 1, 32), ("phi3", "awq", 1, 1, 128), ("gpt2", "gguf", 1, 1, 256), ("opt", "awq", 1, 1, 128)])
def test_width_for_a_runtime(name: str, runtime: str, tp: int, multiple_of: int, width: int, tmp_path: Path,
                             caplog: pytest.LogCaptureFixture) -> None:
    """A multiple of what it needs and of what was asked, beyond the 44 of the dense model where it must be."""
    model, batch = sliced_tiny(name)
    checkpoint = saved(model, tmp_path)
    caplog.set_level("INFO")
    export_hf(checkpoint, tmp_path / "hf", multiple_of, runtime=runtime, tp=tp)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    changed = CHANGED.get(name, {"intermediate_size": 11})
    assert {key: config[key] for key in changed} == dict.fromkeys(changed, width)
    assert_close_outputs(type(model).from_pretrained(tmp_path / "hf"), model, batch)
    before, after = (sum(value.nbytes for value in load_file(folder / "model.safetensors").values())
                     for folder in (checkpoint, tmp_path / "hf"))
    assert f"padding adds {after - before:,} bytes to the {before:,} of the kept weights" in caplog.text


def test_a_runtime_that_cannot_have_its_width(tmp_path: Path) -> None:
    """A block left out keeps its dense width; dinov2's config takes whole multiples of the hidden size only."""
    model, _ = tiny.build("llama")
    stt.apply(model, {"model.layers.1.mlp": [3, 5, 8]})
    left_out = saved(model, tmp_path)
    with pytest.raises(InputError, match="gguf with tp 1 needs .* of 256, and this model can only have 44: select all"):
        export_hf(left_out, tmp_path / "hf", runtime="gguf")
    whole = saved(sliced_tiny("dinov2")[0], tmp_path / "dinov2")
    with pytest.raises(InputError, match="vllm with tp 3 needs .* of 24, and this model can only have 32"):
        export_hf(whole, tmp_path / "hf", runtime="vllm", tp=3)
    with pytest.raises(InputError, match="64 to 128.*--to dense"):
        export_hf(whole, tmp_path / "hf", runtime="awq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dinov2", "sliced"]


def test_a_site_left_out_of_the_selection_keeps_the_dense_width(tmp_path: Path) -> None:
    model, batch = tiny.build("llama")
    stt.apply(model, {"model.layers.1.mlp": [3, 5, 8]})
    export_hf(saved(model, tmp_path), tmp_path / "hf", multiple_of=8)
    plain = type(model).from_pretrained(tmp_path / "hf")
    assert plain.config.intermediate_size == NEURONS
    assert_close_outputs(plain, model, batch)


@pytest.mark.parametrize("twin", ["vocab_size", "max_position_embeddings", "hidden_size", "bos_token_id"])
def test_an_equal_value_elsewhere_in_the_config_is_left_alone(twin: str, tmp_path: Path) -> None:
    config = tiny.GQA | {"vocab_size": 120, "intermediate_size": 64, "hidden_size": 32, "max_position_embeddings": 80}
    model, _ = tiny._text("LlamaForCausalLM", **config | {twin: 64})
    stt.apply(model, kept_units(model))
    export_hf(saved(model, tmp_path), tmp_path / "hf")
    plain = type(model).from_pretrained(tmp_path / "hf")
    assert plain.config.intermediate_size == 11
    assert getattr(plain.config, twin) == 64
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    assert_close_outputs(plain, model, inputs)


def test_an_unset_width_is_set(tmp_path: Path) -> None:
    model, batch = tiny._text("GPT2LMHeadModel", **tiny.GPT2 | {"n_inner": None})
    stt.apply(model, kept_units(model))
    export_hf(saved(model, tmp_path), tmp_path / "hf")
    plain = type(model).from_pretrained(tmp_path / "hf")
    assert plain.config.n_inner == 11
    assert_close_outputs(plain, model, batch)


def test_ratios_give_exactly_the_width() -> None:
    """A model makes its width as int(hidden * ratio): 49 * (1 / 49) is less than 1."""
    for hidden in range(1, 80):
        for width in range(1, 4 * hidden):
            (ratio, given), *whole = widths._ratios(4, {hidden}, {4 * hidden: width})
            assert int(hidden * ratio) == given[4 * hidden] == width
            assert all(int(hidden * ratio) == given[4 * hidden] >= width for ratio, given in whole)


def test_a_whole_ratio_that_cannot_shrink_is_refused(tmp_path: Path) -> None:
    model, _ = tiny.build("dinov2")
    stt.apply(model, {name: range(40) for name in find_sites(model)})
    with pytest.raises(InputError, match=r"no config entry .*64 to 40\)"):
        export_hf(saved(model, tmp_path), tmp_path / "hf")


def test_a_width_in_a_nested_config_is_found(tmp_path: Path) -> None:
    text = {key: tiny.GQA[key] for key in tiny.GQA if not key.startswith("pad")} | {"head_dim": 8}
    vision = tiny.VIT | {"intermediate_size": NEURONS + 9}
    del vision["num_labels"]
    model, batch = tiny._text("Gemma3ForConditionalGeneration", text_config=text, vision_config=vision,
                              mm_tokens_per_image=4, image_token_index=96, boi_token_index=95, eoi_token_index=94)
    stt.apply(model, kept_units(model))
    export_hf(saved(model, tmp_path), tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["text_config"]["intermediate_size"] == 11
    assert config["vision_config"]["intermediate_size"] == NEURONS + 9
    assert_close_outputs(type(model).from_pretrained(tmp_path / "hf"), model, batch)


@pytest.mark.parametrize(("trained", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_exported_dtype_holds_every_value(trained: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    dense, batch = tiny.build("qwen2-tied")
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    stt.apply(model, kept_units(model))
    if trained:
        train_only(model, head="untie")
        with torch.no_grad():
            model.lm_head.weight += 1e-4
    export_hf(saved(model, tmp_path), tmp_path / "hf")
    plain = type(model).from_pretrained(tmp_path / "hf")
    assert {p.dtype for p in plain.parameters()} == {dtype}
    assert ("lm_head.weight" in load_file(tmp_path / "hf/model.safetensors")) is trained
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is not trained
    assert_close_outputs(plain.float(), model.float(), batch)


@pytest.mark.parametrize("command", [export_hf, export_dense])
def test_tokenizer_and_generation_config_come_along(command: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    tiny.build("llama")[0].save_pretrained(tmp_path / "dense")
    model, _ = sliced_tiny("llama")
    model.generation_config.max_new_tokens = 7
    model.config.stt["base"] = str(tmp_path / "dense")
    tokenizer = build_tokenizer(chat=True)
    stt.save(model, tmp_path / "sliced", tokenizer)
    command(tmp_path / "sliced", tmp_path / "out")
    assert type(model).from_pretrained(tmp_path / "out").generation_config.max_new_tokens == 7
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("the sea").input_ids == tokenizer("the sea").input_ids
    assert again.chat_template == tokenizer.chat_template
    assert not (tmp_path / "out/selection.safetensors").exists()


def test_an_export_that_does_not_compute_the_same_is_not_written(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved(sliced_tiny("llama")[0], tmp_path)
    plain_model = export._plain_model

    def wrong(*args: object) -> PreTrainedModel:
        model = plain_model(*args)
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
        return model

    monkeypatch.setattr(export, "_plain_model", wrong)
    with pytest.raises(InputError, match="differs from the sliced one by .* nothing was written"):
        export_hf(checkpoint, tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["sliced"]


@pytest.mark.parametrize("command", [export_hf, export_dense])
def test_bad_folders_are_refused(command: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    model, _ = sliced_tiny("llama")
    checkpoint = saved(model, tmp_path)
    tiny.build("llama")[0].save_pretrained(tmp_path / "plain")
    (tmp_path / "file").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for source, out, message in [(tmp_path / "nowhere", tmp_path / "out", "no sliced checkpoint at"),
                                 (tmp_path / "plain", tmp_path / "out", "plain Hugging Face model"),
                                 (checkpoint, tmp_path / "plain", "is not empty"),
                                 (checkpoint, checkpoint, "is not empty"),
                                 (checkpoint, tmp_path / "file/out", "file is a file")]:
        with pytest.raises(InputError, match=message):
            command(source, out)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_model_that_needs_an_example_is_exported_with_it(tmp_path: Path) -> None:
    model, example = whisper()
    dense, _ = whisper()
    dense.save_pretrained(tmp_path / "dense")
    units = kept_units(model)
    checkpoint = saved(stt.apply(model, units), tmp_path)
    export_hf(checkpoint, tmp_path / "hf", example=example)
    assert_close_outputs(type(model).from_pretrained(tmp_path / "hf"), model, example)
    export_dense(checkpoint, tmp_path / "out", tmp_path / "dense", example)
    restored, wanted = type(model).from_pretrained(tmp_path / "out"), dense.model.encoder.layers[0].fc1.weight.clone()
    wanted.data[units["model.encoder.layers.0"]] = model.model.encoder.layers[0].fc1.weight.data
    assert torch.equal(restored.model.encoder.layers[0].fc1.weight, wanted)


@pytest.mark.parametrize("multiple_of", [0, -8, 1.5, "8"])
def test_multiple_of_must_be_a_positive_whole_number(multiple_of: object, tmp_path: Path) -> None:
    checkpoint = saved(sliced_tiny("llama")[0], tmp_path)
    with pytest.raises(InputError, match="multiple_of must be a whole number of at least 1"):
        export_hf(checkpoint, tmp_path / "hf", multiple_of)


# ---------------------------------------------------------------- --to dense


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "t5", "vit", "bloom"])
def test_untouched_checkpoint_exports_the_dense_model(name: str, tmp_path: Path) -> None:
    dense, batch = tiny.build(name)
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense")
    stt.apply(model, kept_units(model))
    assert export_dense(saved(model, tmp_path), tmp_path / "out") == tmp_path / "out"
    plain = type(dense).from_pretrained(tmp_path / "out")
    assert "stt" not in json.loads((tmp_path / "out/config.json").read_text())
    for value, wanted in zip(tiny.outputs(plain, batch), tiny.outputs(dense, batch), strict=True):
        assert torch.equal(value, wanted)


def test_trained_values_reach_the_dense_model_unrounded(tmp_path: Path) -> None:
    dense, _ = tiny.build("qwen2-tied")
    dense.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense")
    stt.apply(model, kept_units(model))
    train_only(model, head="untie")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight += 1e-6
        model.lm_head.weight += 1e-6
    export_dense(saved(model, tmp_path), tmp_path / "out")
    plain = type(dense).from_pretrained(tmp_path / "out")
    expected = dense.model.layers[0].mlp.down_proj.weight.float()
    ids = model.stt_selection["model.layers.0.mlp"]
    expected[:, ids] = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(plain.model.layers[0].mlp.down_proj.weight, expected)
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)
    assert torch.equal(plain.model.embed_tokens.weight, dense.model.embed_tokens.weight.float())


def test_a_base_without_the_trained_head_will_do(tmp_path: Path) -> None:
    dense, batch = tiny.build("bert")
    dense.bert.save_pretrained(tmp_path / "body")
    model = stt.apply(tiny.build("bert")[0], kept_units(dense))
    export_dense(saved(model, tmp_path), tmp_path / "out", base=tmp_path / "body")
    assert torch.equal(type(dense).from_pretrained(tmp_path / "out")(**batch).logits, dense(**batch).logits)


def test_bad_bases_are_refused(tmp_path: Path) -> None:
    checkpoint = saved(sliced_tiny("llama")[0], tmp_path)
    tiny.build("opt")[0].save_pretrained(tmp_path / "opt")
    tiny._text("LlamaForCausalLM", **tiny.GQA | {"intermediate_size": 50})[0].save_pretrained(tmp_path / "wider")
    for base, message in [(None, "does not say which dense model"),
                          (tmp_path / "nowhere", "cannot load the dense model .*nowhere"),
                          (checkpoint, "is a sliced checkpoint itself"),
                          (tmp_path / "opt", "has no model.layers.0.mlp.down_proj.weight"),
                          (tmp_path / "wider", "cannot load the dense model .*wider")]:
        with pytest.raises(InputError, match=message) as raised:
            export_dense(checkpoint, tmp_path / "out", base)
        assert "\n" not in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["opt", "sliced", "wider"]
