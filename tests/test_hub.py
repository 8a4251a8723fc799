"""Plain from_pretrained, Trainer and PEFT take a sliced model for an ordinary one."""
from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from test_any_trainer import assert_same_weights, ready, sliced, trainer
from test_checkpoint import assert_equal_outputs, assert_same, kept_units, sliced_tiny
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    T5EncoderModel,
)

import stt
from stt.errors import InputError
from stt.selection import SELECTION
from stt.surgery import train_only

CHECKOUT = Path(__file__).parents[1]
CLASSES = ["llama", "llama-bias", "gpt2", "phi3", "bert", "bert-mlm", "albert", "t5", "vit", "qwen2-tied"]


def saved(model: PreTrainedModel, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def change(path: Path, edit: Callable[[dict], object]) -> None:
    """Edit a JSON file in place."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# ---------------------------------------------------------------- one way of loading


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
@pytest.mark.parametrize("name", CLASSES)
def test_from_pretrained_is_stt_load_is_the_model_in_memory(name: str, shards: str, tmp_path: Path) -> None:
    model, batch = sliced_tiny(name)
    folder = saved(model, tmp_path, max_shard_size=shards)
    assert (folder / "model.safetensors.index.json").exists() == (shards == "20KB")
    for loaded in (stt.load(folder), type(model).from_pretrained(folder),
                   type(model).from_pretrained(folder, device_map="auto")):
        assert_same(loaded, model)
        assert_equal_outputs(loaded, model, batch)


def test_auto_classes_and_stacked_experts(tmp_path: Path) -> None:
    """transformers stores the experts one by one and stacks them as it loads, beside the narrow shared expert."""
    dense, batch = tiny.build("qwen2_moe")
    model = stt.apply(dense, kept_units(dense))
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    assert_same(loaded, model)
    for value, wanted in zip(tiny.outputs(loaded, batch), tiny.outputs(model, batch), strict=True):
        torch.testing.assert_close(value, wanted)  # a product with one row depends on where its tensor lies in memory
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.3.down_proj.weight" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("compensate", ["mean", "lstsq"])
def test_biases_of_compensation(name: str, compensate: str, tmp_path: Path) -> None:
    """One site loses nothing, so it has no bias where the class has none."""
    model, batch = tiny.build(name)
    whole, *_ = sites = stt.find_sites(model)
    keep = {site: 44 if site == whole else 20 for site in sites}
    stt.apply(model, stt.select(model, [batch], score="contribution", keep=keep, compensate=compensate))
    folder = saved(model, tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(folder), stt.load(folder)):
        assert_same(loaded, model)
        assert_equal_outputs(loaded, model, batch)
        assert loaded.config.stt == model.config.stt | {"base": None}
        if name == "llama":
            assert [layer.mlp.down_proj.bias is None for layer in loaded.model.layers] == [True, False]
        headless = AutoModel.from_pretrained(folder)
        body = getattr(model, model.base_model_prefix)
        assert_equal_outputs(headless, body, batch)


def half_precision_with_float32_trained(folder: Path) -> PreTrainedModel:
    dense, _ = tiny.build("qwen2")
    dense.save_pretrained(folder)
    model = type(dense).from_pretrained(folder, dtype=torch.bfloat16)
    stt.apply(model, kept_units(model))
    for name in train_only(model):
        model.get_parameter(name).data += 1e-6
    return model


def test_dtypes(tmp_path: Path) -> None:
    """stt.load keeps every dtype; from_pretrained knows one: the config's, which rounds, or the caller's."""
    model = half_precision_with_float32_trained(tmp_path / "dense")
    folder = saved(model, tmp_path / "sliced")
    assert_same(stt.load(folder), model)
    assert {p.dtype for p in stt.load(folder).parameters()} == {torch.float32, torch.bfloat16}
    for dtype in (None, torch.bfloat16, torch.float32, torch.float16):
        loaded = AutoModelForCausalLM.from_pretrained(folder, **({} if dtype is None else {"dtype": dtype}))
        for name, value in model.state_dict().items():
            found = loaded.state_dict()[name]
            assert found.dtype == (dtype or torch.bfloat16)
            assert torch.equal(found, value.to(found.dtype)), name
        if dtype is not None:
            assert_same(stt.load(folder, dtype=dtype), loaded)


def test_a_checkpoint_of_before_the_hook_loads(tmp_path: Path) -> None:
    model, _ = sliced_tiny("llama")
    folder = saved(model, tmp_path)
    change(folder / "config.json", lambda config: config.pop("quantization_config"))
    assert_same(stt.load(folder), model)


class TiedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 44), nn.Linear(44, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class TiedLayers(PreTrainedModel):
    """Two layers with one norm."""

    config_class, main_input_name = PretrainedConfig, "input_ids"
    _tied_weights_keys = {f"layers.1.norm.{part}": f"layers.0.norm.{part}" for part in ("weight", "bias")}

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.embedding, self.layers = nn.Embedding(97, 32), nn.ModuleList([TiedBlock(), TiedBlock()])
        self.post_init()

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"x": self.layers[1](self.layers[0](self.embedding(input_ids)))}


def test_parameters_that_layers_share(tmp_path: Path) -> None:
    model = tiny.randomised(TiedLayers(PretrainedConfig(vocab_size=97, tie_word_embeddings=True))).eval()
    stt.apply(model, kept_units(model))
    loaded = TiedLayers.from_pretrained(saved(model, tmp_path))
    assert loaded.layers[1].norm.weight is loaded.layers[0].norm.weight
    assert_same(loaded, model)


# ---------------------------------------------------------------- other classes of the same weights


def hidden(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).last_hidden_state


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_without_and_with_a_head(name: str, tmp_path: Path) -> None:
    model, batch = sliced_tiny(name)
    body = AutoModel.from_pretrained(saved(model, tmp_path / "whole"))
    expected = hidden(getattr(model, model.base_model_prefix), batch)
    assert torch.equal(hidden(body, batch), expected)
    assert [len(ids) for ids in body.stt_selection.values()] == [10, 11]
    again = AutoModel.from_pretrained(saved(body, tmp_path / "body"))
    assert_same(again, body)
    headed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", pad_token_id=0)
    assert torch.equal(hidden(getattr(headed, headed.base_model_prefix), batch), expected)
    assert headed.stt_selection.keys() == {f"{headed.base_model_prefix}.{site}" for site in body.stt_selection}
    assert_same(stt.load(saved(headed, tmp_path / "headed")), headed)


def test_one_tower(tmp_path: Path) -> None:
    model, batch = sliced_tiny("t5")
    batch.pop("decoder_input_ids")
    tower = T5EncoderModel.from_pretrained(saved(model, tmp_path / "both"))
    assert torch.equal(hidden(tower, batch), model.encoder(**batch).last_hidden_state)
    assert len(model.stt_selection) == 2 * len(tower.stt_selection) == 4
    assert_same(T5EncoderModel.from_pretrained(saved(tower, tmp_path / "tower")), tower)


# ---------------------------------------------------------------- it is an ordinary model


def test_nothing_marks_it_as_quantized(tmp_path: Path) -> None:
    model, _ = sliced_tiny("llama")
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    assert not loaded.is_quantized
    for owner, mark in [(loaded, "hf_quantizer"), (loaded, "quantization_method"), (loaded.config, "_is_quantized"),
                        (loaded.config, "quantization_config")]:
        assert not hasattr(owner, mark), mark
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.to(torch.float64).half().dtype == torch.float16
    assert loaded.model.layers[0].mlp.up_proj.out_indices.tolist() == model.stt_selection["model.layers.0.mlp"].tolist()


def test_saved_again_and_again(tmp_path: Path) -> None:
    """Also over the files it was loaded from."""
    model, batch = sliced_tiny("gpt2")
    loaded = type(model).from_pretrained(saved(model, tmp_path / "a"))
    second = saved(loaded, tmp_path / "b")
    assert_same(type(model).from_pretrained(second), model)
    for _ in range(2):
        loaded = type(model).from_pretrained(second)
        saved(loaded, second)
    assert_equal_outputs(stt.load(second), model, batch)
    stt.save(stt.load(second), second)
    assert_same(copy.deepcopy(type(model).from_pretrained(second)), model)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "a", second)]
    assert configs[0] == configs[1]
    assert configs[0]["quantization_config"]["quant_method"] == "stt"
    assert {path.suffix for path in second.iterdir()} == {".json", ".safetensors", ".md"}


def test_scatter_mode_after_loading(tmp_path: Path) -> None:
    """The channels, which are not stored with the weights, are back."""
    model, batch = sliced_tiny("phi3", inference_time=False)
    loaded = type(model).from_pretrained(saved(model, tmp_path))
    expected = tiny.outputs(loaded, batch)
    for module in loaded.modules():
        if isinstance(module, stt.STTLinear):
            module.inference_time = False
    assert_equal_outputs(loaded, model, batch)
    for one, other in zip(tiny.outputs(loaded, batch), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_trainer_saves_loads_and_goes_on(tmp_path: Path) -> None:
    """The checkpoint of a Trainer loads as the model that was trained, which another Trainer takes on."""
    model = ready(sliced())
    trainer(model, tmp_path / "first").train()
    checkpoint = tmp_path / "first" / "checkpoint-6"
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert_same_weights(loaded, model)
    ids = torch.arange(3, 11).view(1, -1)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    for name, start in (("loaded", loaded), ("memory", model), ("stt.load", stt.load(checkpoint))):
        trainer(ready(start), tmp_path / name).train()
        assert_same_weights(start, loaded)
        assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint-6"), loaded)
    assert not torch.equal(loaded.lm_head.weight, stt.load(checkpoint).lm_head.weight)


def test_lora_of_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = sliced()
    folder = saved(model, tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["up_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    assert {p.requires_grad for name, p in adapted.named_parameters() if "lora_" not in name} == {False}
    trainer(adapted, tmp_path / "run", max_steps=2).train()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 11).view(1, -1)
    expected = adapted.eval()(ids).logits
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(loaded(ids).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")(ids).logits, expected)
    merged = loaded.merge_and_unload()
    found = AutoModelForCausalLM.from_pretrained(saved(merged, tmp_path / "merged"))
    assert torch.equal(found(ids).logits, merged(ids).logits)
    torch.testing.assert_close(found(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found(ids).logits, model(ids).logits)


def test_an_adapter_of_transformers_is_saved_alone(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = AutoModelForCausalLM.from_pretrained(saved(sliced(), tmp_path / "base"))
    model.add_adapter(LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    saved(model, tmp_path / "adapter")
    assert SELECTION not in {path.name for path in (tmp_path / "adapter").iterdir()}
    ids = torch.arange(3, 11).view(1, -1)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")(ids).logits, model(ids).logits)


# ---------------------------------------------------------------- what is refused


def _other_selection(folder: Path) -> None:
    model, _ = tiny.build("phi3")
    stt.apply(model, kept_units(model)).stt_selection.save(folder / SELECTION)


def _other_sizes(folder: Path) -> None:
    model, _ = tiny.build("llama")
    stt.apply(model, {site: torch.arange(9) for site in stt.find_sites(model)}).stt_selection.save(folder / SELECTION)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no selection": (lambda folder: (folder / SELECTION).unlink(), "no selection file at"),
    "cut selection": (lambda folder: (folder / SELECTION).write_bytes((folder / SELECTION).read_bytes()[:-100]),
                      "not a readable safetensors file"),
    "another model": (_other_selection, "made for another model"),
    "other sizes": (_other_sizes, "is not the selection its config.json speaks of"),
    "another config": (lambda folder: change(folder / "config.json", lambda c: c.update(intermediate_size=50)),
                       "made for another model"),
    "newer": (lambda folder: change(folder / "config.json", lambda c: c["stt"].update(format_version=2)),
              "has format 2, this version reads up to 1"),
    "no entry": (lambda folder: change(folder / "config.json", lambda c: c.pop("stt")), "has no entry `stt`"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_in_one_sentence(damage: str, tmp_path: Path) -> None:
    folder = saved(sliced_tiny("llama")[0], tmp_path)
    break_it, message = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(InputError, match=message) as raised:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_a_state_dict_alone_is_refused(tmp_path: Path) -> None:
    model, _ = sliced_tiny("llama")
    config = AutoConfig.from_pretrained(saved(model, tmp_path))
    with pytest.raises(InputError, match="loaded from a folder or a hub id"):
        type(model).from_pretrained(None, config=config, state_dict=model.state_dict())


QUANTIZED = [{"quant_method": "bitsandbytes", "load_in_4bit": True}, BitsAndBytesConfig(load_in_8bit=True)]


@pytest.mark.parametrize("config", QUANTIZED, ids=["dict", "object"])
def test_a_quantized_model_is_neither_sliced_nor_saved(config: object, tmp_path: Path) -> None:
    model, _ = tiny.build("llama")
    selection = kept_units(model)
    model.config.quantization_config = config
    message = r"LlamaForCausalLM is quantized \(bitsandbytes\).*stt export --to hf"
    with pytest.raises(InputError, match=message):
        stt.apply(model, selection)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    model, _ = sliced_tiny("llama")
    model.config.quantization_config = config
    with pytest.raises(InputError, match=message):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=message):
        stt.save(model, tmp_path / "model")
    assert not any(tmp_path.iterdir())
    assert model.config.quantization_config is config


def test_a_sliced_checkpoint_is_not_quantized_while_it_is_loaded(tmp_path: Path) -> None:
    folder = saved(sliced_tiny("llama")[0], tmp_path)
    with pytest.raises(ValueError, match="SlicedConfig but you are passing a BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


# ---------------------------------------------------------------- before and after `import stt`

STT_FIRST = """
import sys
import stt
assert not {"torch", "transformers"} & sys.modules.keys()
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print([layer.mlp.up_proj.out_features for layer in model.model.layers])
"""
STT_LATER = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError:
    import stt
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print([layer.mlp.up_proj.out_features for layer in model.model.layers])
"""


@pytest.mark.parametrize("script", [STT_FIRST, STT_LATER], ids=["stt first", "stt later"])
def test_importing_stt_is_enough_before_or_after_transformers(script: str, tmp_path: Path) -> None:
    """Without it transformers says that it does not know the type `stt`, and raises for the shapes."""
    folder = saved(sliced_tiny("llama")[0], tmp_path)
    done = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[10, 11]\n"
    assert ("Unknown quantization type, got stt" in done.stderr) == (script is STT_LATER)
    assert ("MISMATCH" in done.stderr) == (script is STT_LATER)
