"""What trains and what does not, in which dtype; heads, tied and untied; counting parameters by hand."""
from __future__ import annotations

import copy
import inspect

import pytest
import tiny
import torch
from torch import nn

import stt
from stt.errors import InputError
from stt.sites import find_sites
from stt.surgery import (
    count_parameters,
    head_is_tied,
    head_parameters,
    override_forward,
    replace_module,
    restore_forward,
    sliced_parameters,
    untie_head,
)

HEADS = {
    "qwen2": ["lm_head.weight"],
    "qwen2-tied": ["model.embed_tokens.weight"],
    "gpt2": ["transformer.wte.weight"],
    "phi": ["lm_head.weight", "lm_head.bias"],
    "bert": ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"],
    "bert-mlm": ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias",
                 "cls.predictions.transform.dense.weight", "cls.predictions.transform.dense.bias",
                 "cls.predictions.transform.LayerNorm.weight", "cls.predictions.transform.LayerNorm.bias"],
    "roberta": ["classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight",
                "classifier.out_proj.bias"],
    "distilbert": ["pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"],
    "vit": ["classifier.weight", "classifier.bias"],
    "t5": ["shared.weight"],
    "mt5": ["shared.weight"],
}
UNITS = [0, 3, 4, 17, 40]


def sliced(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict]:
    model, batch = tiny.build(name, dtype)
    return stt.apply(model, dict.fromkeys(find_sites(model), UNITS)), batch


def trains(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("name", HEADS)
def test_head_parameters(name: str) -> None:
    assert sorted(head_parameters(tiny.build(name)[0])) == sorted(HEADS[name])


@pytest.mark.parametrize("name", ["qwen2-tied", "gpt2", "bert-mlm", "t5"])
def test_untying_a_head(name: str) -> None:
    model, batch = tiny.build(name)
    assert head_is_tied(model)
    assert not head_is_tied(tiny.build("qwen2")[0])
    assert not head_is_tied(tiny.build("vit")[0])
    with torch.no_grad():
        expected = tiny.outputs(model, batch)[0]
    embedding = model.get_input_embeddings().weight
    untie_head(model)
    assert not head_is_tied(model)
    assert model.config.tie_word_embeddings is False
    assert model.get_input_embeddings().weight is embedding
    with torch.no_grad():
        assert torch.equal(tiny.outputs(model, batch)[0], expected)
        model.get_output_embeddings().weight.zero_()
    assert embedding.abs().sum() > 0
    untied = model.get_output_embeddings().weight
    untie_head(model)
    assert model.get_output_embeddings().weight is untied


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("head", ["train", "freeze", "untie"])
def test_train_only(name: str, head: str) -> None:
    model, batch = sliced(name, torch.bfloat16)
    narrow = set(sliced_parameters(model))
    expected = narrow | (set(HEADS[name]) if head != "freeze" else set())
    if head == "untie" and name in ("qwen2-tied", "gpt2", "t5", "mt5", "bert-mlm"):
        expected -= {HEADS[name][0]}
        expected |= {"cls.predictions.decoder.weight" if name == "bert-mlm" else "lm_head.weight"}
    chosen = stt.train_only(model, head=head)
    assert set(chosen) == expected == set(trains(model))
    assert chosen == [key for key, _ in model.named_parameters() if key in expected]
    for key, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if key in expected else torch.bfloat16)


def test_named_parameters_replace_the_default() -> None:
    model, _ = sliced("qwen2")
    attention = "model.layers.0.self_attn.q_proj.weight"
    assert stt.train_only(model, [attention]) == [attention, "lm_head.weight"]
    assert stt.train_only(model, [attention], head="freeze") == [attention]
    assert trains(model) == [attention]
    assert set(stt.train_only(model)) == {*sliced_parameters(model), "lm_head.weight"}


def test_mistakes_change_nothing() -> None:
    model, _ = sliced("qwen2-tied", torch.bfloat16)
    before = trains(model), [p.dtype for p in model.parameters()]
    for options, message in (
            ({"head": "trian"}, "unknown head policy 'trian'. Did you mean 'train'"),
            ({"parameters": ["model.layers.0.mlp.gate_proj.wieght"]}, "unknown parameter .* Did you mean 'model"),
            ({"parameters": [], "head": "freeze"}, "nothing would train"),
            ({"parameters": ["nope"], "head": "untie"}, "unknown parameter 'nope'")):
        with pytest.raises(InputError, match=message):
            stt.train_only(model, **options)
        assert before == (trains(model), [p.dtype for p in model.parameters()])
        assert head_is_tied(model)


def test_a_dense_model_has_only_its_head_to_train() -> None:
    model, _ = tiny.build("bert")
    assert sliced_parameters(model) == []
    with pytest.raises(InputError, match="nothing would train: the model has no STTLinear layer"):
        stt.train_only(model, head="freeze")
    with pytest.raises(InputError, match="no STTLinear layer"):
        stt.train_only(model)  # the head alone is not what was asked for
    assert set(stt.train_only(model, [])) == set(HEADS["bert"])  # unless it is


@pytest.mark.parametrize(("name", "head"), [("qwen2", 97 * 32), ("qwen2-tied", 97 * 32), ("phi", 97 * 33)])
def test_count_parameters(name: str, head: int) -> None:
    model, _ = sliced(name)
    mlp = 2 * (3 * 5 * 32 if name != "phi" else 5 * 33 + 5 * 32 + 32)
    total = sum({id(p): p.numel() for p in model.parameters()}.values())
    assert count_parameters(model) == {"total": total, "trained": total, "trained_without_head": total - head}
    stt.train_only(model)
    assert count_parameters(model) == {"total": total, "trained": mlp + head, "trained_without_head": mlp}
    stt.train_only(model, head="freeze")
    assert count_parameters(model) == {"total": total, "trained": mlp, "trained_without_head": mlp}


def test_an_untied_head_counts_twice_and_only_one_is_trained() -> None:
    model, _ = sliced("qwen2-tied")
    before = count_parameters(model)["total"]
    stt.train_only(model, head="untie")
    assert count_parameters(model)["total"] == before + 97 * 32
    assert not model.get_input_embeddings().weight.requires_grad


def test_replace_module_at_every_depth() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2)])}))
    first, second = nn.Identity(), nn.Identity()
    replace_module(model, "0", first)
    replace_module(model, "1.a.0", second)
    assert model[0] is first
    assert model[1]["a"][0] is second


def test_an_overridden_forward_follows_copies_and_comes_off():
    def doubled(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 2 * type(module).forward(module, x)

    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    plain = layer(x)
    override_forward(layer, doubled)
    assert list(inspect.signature(layer.forward).parameters) == ["x"]
    twin = copy.deepcopy(layer)
    nn.init.zeros_(layer.weight)
    assert torch.equal(twin(x), 2 * plain)
    assert not torch.equal(layer(x), 2 * plain)
    replica = twin._replicate_for_data_parallel()  # what nn.DataParallel makes for each GPU
    assert replica.forward.args == (replica,)
    restore_forward(twin)
    assert torch.equal(twin(x), plain)
    assert not {"forward", "_replicate_for_data_parallel"} & vars(twin).keys()
