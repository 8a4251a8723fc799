"""Trained units go back into exactly their rows and columns of the dense model."""
from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import tiny
import torch
from test_checkpoint import kept_units, sliced_tiny
from tiny import NEURONS
from transformers import PreTrainedModel

import stt
from stt.checkpoint import restore
from stt.errors import InputError
from stt.sites import find_sites
from stt.stt_lora import add_stt_lora
from stt.surgery import train_only


def perturbed(model: PreTrainedModel, selected: Callable[[str], bool]) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if selected(name):
                parameter += torch.rand(parameter.shape, generator=generator).to(parameter) + 0.5
    return model


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_untouched_units_restore_the_dense_model(name: str) -> None:
    dense, _ = tiny.build(name)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    model, _ = sliced_tiny(name)
    restore(model, dense)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def rows_and_columns(name: str, ids: list[int]) -> dict[str, tuple[list[int] | None, list[int] | None]]:
    """Rows and columns (None: all) of each tensor of a block that belong to the units `ids`, written out by hand."""
    rows, columns, everything = (ids, None), (None, ids), (None, None)
    if name == "llama-bias":
        return {"gate_proj.weight": rows, "gate_proj.bias": rows, "up_proj.weight": rows, "up_proj.bias": rows,
                "down_proj.weight": columns, "down_proj.bias": everything}
    if name == "phi3":
        return {"gate_up_proj.weight": (ids + [NEURONS + i for i in ids], None), "down_proj.weight": columns}
    return {"c_fc.weight": columns, "c_fc.bias": rows, "c_proj.weight": rows, "c_proj.bias": everything}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama-bias", "phi3", "gpt2"])
def test_exactly_the_trained_rows_and_columns_change(name: str, padded: bool) -> None:
    dense, _ = tiny.build(name)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    model, _ = sliced_tiny(name)
    perturbed(model, lambda key: ".mlp." in key)
    if padded:
        for module in model.modules():
            if isinstance(module, stt.STTLinear):
                module.pad_weights(16)
    restore(model, dense)
    expected = {key: torch.zeros(value.shape, dtype=torch.bool) for key, value in before.items()}
    for site, ids in kept_units(tiny.build(name)[0]).items():
        for tensor, (rows, columns) in rows_and_columns(name, ids.tolist()).items():
            mask = expected[f"{site}.{tensor}"]
            for row in range(mask.shape[0]) if rows is None else rows:
                mask[row] = True if columns is None else mask[row].scatter(0, torch.tensor(columns), True)
    for key, value in dense.state_dict().items():
        assert torch.equal(value != before[key], expected[key]), key


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_restored_model_without_the_dropped_units_is_the_sliced_one(name: str) -> None:
    dense, batch = tiny.build(name, torch.float64)
    units = kept_units(dense)
    model = stt.apply(copy.deepcopy(dense), units)
    perturbed(model, lambda key: True)
    restore(model, dense)
    for site_name, ids in units.items():
        site = find_sites(dense)[site_name]
        mask = torch.zeros(site.width, dtype=torch.float64).index_fill(0, ids, 1)
        down = dense.get_submodule(site.down_module)
        down.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask, *args[1:]))
    for value, wanted in zip(tiny.outputs(model, batch), tiny.outputs(dense, batch), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9 * max(1.0, wanted.abs().max().item()))


def test_values_take_the_dtype_of_the_dense_model() -> None:
    model, _ = sliced_tiny("llama")
    perturbed(model, lambda key: True)
    half, whole = tiny.build("llama", torch.bfloat16)[0], tiny.build("llama")[0]
    restore(model, half)
    restore(model, whole)
    down, ids = model.model.layers[0].mlp.down_proj.weight, model.stt_selection["model.layers.0.mlp"]
    assert torch.equal(whole.model.layers[0].mlp.down_proj.weight[:, ids], down)
    assert torch.equal(half.model.layers[0].mlp.down_proj.weight[:, ids], down.bfloat16())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_an_untied_head_goes_back_without_touching_the_embedding() -> None:
    dense, _ = tiny.build("qwen2-tied")
    embedding = dense.model.embed_tokens.weight.detach().clone()
    model, _ = sliced_tiny("qwen2-tied")
    train_only(model, head="untie")
    perturbed(model, lambda key: key == "lm_head.weight")
    restore(model, dense)
    assert torch.equal(dense.model.embed_tokens.weight, embedding)
    assert torch.equal(dense.lm_head.weight, model.lm_head.weight)
    assert not dense.config.tie_word_embeddings


def test_restore_refuses_other_models_and_changes_nothing() -> None:
    model, _ = sliced_tiny("bert")
    larger_head = tiny._text("BertForSequenceClassification", **tiny.ENCODER | {"num_labels": 5})[0]
    with_biases, _ = tiny._text("LlamaForCausalLM", **tiny.GQA, attention_bias=True)
    adapted, _ = sliced_tiny("bert")
    add_stt_lora(adapted, 2, 4, 0.0)
    bert = tiny.build("bert")[0]
    for source, target, message in [(model, tiny.build("electra")[0], "made for another model"),
                                    (model, sliced_tiny("bert")[0], "made for another model"),
                                    (model, larger_head, r"'classifier.weight'.*\(3, 32\), expected \(5, 32\)"),
                                    (sliced_tiny("llama")[0], with_biases, "layers of other parameters"),
                                    (adapted, bert, "merge LoRA"), (bert, bert, "is not sliced")]:
        before = {key: value.clone() for key, value in target.state_dict().items()}
        with pytest.raises(InputError, match=message):
            restore(source, target)
        assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
