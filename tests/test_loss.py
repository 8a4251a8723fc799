"""The chunked loss is the plain one: F.cross_entropy of all the model's logits, in value and in every gradient."""
from __future__ import annotations

import copy
import inspect
import logging
import math
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import stt
from stt.errors import InputError
from stt.loss import answer_nll
from stt.selective_optimizers.leaf import Leaf
from stt.surgery import restore_forward, untie_head
from util.torch_flops import training_flops

DECODERS = [name for name, build in tiny.ARCHITECTURES.items()
            if build.args[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()]
EXPERTS = ["mixtral", "qwen2_moe", "qwen2_moe-dense-layer"]  # their products of experts know no float64
BUILDERS: dict[str, Callable[[], tiny.Built]] = {
    **tiny.ARCHITECTURES, **tiny.MIXTURES, **{name: build for name, (build, _) in tiny.REFUSED.items()},
    "granite-scaled": partial(tiny._text, "GraniteForCausalLM", **tiny.GQA, logits_scaling=8.0),
    "hyperclovax": partial(tiny._text, "HyperCLOVAXForCausalLM", **tiny.GQA, logits_scaling=0.25),
    "gemma3-capped": partial(tiny._text, "Gemma3ForCausalLM", **tiny.GQA, head_dim=8, final_logit_softcapping=2.0),
    "bart-decoder": partial(tiny._text, "BartForCausalLM", **tiny.BART | {"is_encoder_decoder": False}),
}
EVERY = [*DECODERS, *EXPERTS, "mamba", "bitnet", "granite-scaled", "hyperclovax", "gemma3-capped"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def build(name: str, dtype: torch.dtype = torch.float64, share: float = 0.5) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in training mode and a batch with labels at about a `share` of its positions."""
    model, batch = BUILDERS[name]()
    random = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    return model.to(dtype).train(), {**batch, "labels": batch["input_ids"].masked_fill(random >= share, -100)}


def plain_loss(model: nn.Module, batch: dict[str, Tensor], items: int | None = None) -> Tensor:
    """The reference: all logits, then the sum over labelled ones divided by their number, or by `items`."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    total = F.cross_entropy(logits, labels, reduction="sum")
    return total / (items or int((labels != -100).sum()))


def measured(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and every gradient; dropout draws the same numbers each time."""
    model.zero_grad()
    torch.manual_seed(0)
    value = loss()
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]],
                tolerance: float) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance, check_dtype=False)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=tolerance, atol=tolerance, msg=name)


def assert_equals_plain(model: nn.Module, batch: dict[str, Tensor], tolerance: float = 1e-12,
                        items: int | None = None, **extra: object) -> None:
    expected = measured(model, lambda: plain_loss(model, batch, items))
    stt.chunked_loss(model)
    assert_same(measured(model, lambda: model(**batch, **extra).loss), expected, tolerance)
    assert model(**batch, **extra).logits is None


class Logits(TorchDispatchMode):
    """How many rows of logits any tensor that is made holds."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.shape[-1:] == (tiny.VOCABULARY,) and not func.is_view:
            self.rows = max(self.rows, made.numel() // tiny.VOCABULARY)
        return made


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in EVERY for dtype in TOLERANCE
                                             if not (name in EXPERTS and dtype == torch.float64)])
def test_every_decoder_has_the_plain_loss_and_gradients(name, dtype, monkeypatch):
    monkeypatch.setattr("stt.chunked.CHUNK_ROWS", 3)
    model, batch = build(name, dtype)
    tolerance = 1e-6 if name == "mamba" else TOLERANCE[dtype]  # its logits are float32 in any case
    assert_equals_plain(model, batch, tolerance)


@pytest.mark.parametrize("name", EVERY)
def test_all_logits_never_exist(name, monkeypatch):
    monkeypatch.setattr("stt.chunked.CHUNK_ROWS", 2)
    model, batch = build(name, torch.float32, share=1.0)
    with Logits() as own:
        model(**batch).loss.backward()
    stt.chunked_loss(model)
    with Logits() as chunked:
        model(**batch).loss.backward()
    assert (own.rows, chunked.rows) == (batch["labels"].numel(), 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ["qwen2-tied", "phi", "cohere"])
def test_a_head_that_trains_in_place(name, dtype, tolerance, monkeypatch):
    """Some of its weights, or in half precision all of them, beside others: in chunks, too."""
    monkeypatch.setattr("stt.chunked.CHUNK_ROWS", 2)
    model, batch = build(name, dtype, share=1.0)
    head = [name for name, p in model.named_parameters() if p is model.get_output_embeddings().weight]
    always = head if dtype == torch.bfloat16 else []
    stt.attach(model, stt.select_weights(model, score="random", budget=0.8, always=always))
    assert_equals_plain(model, batch, tolerance)
    assert all(leaf.values.grad.any() for leaf in model.modules() if isinstance(leaf, Leaf))
    with Logits() as chunked:
        model(**batch).loss.backward()
    assert chunked.rows == 2


@pytest.mark.parametrize("items", [None, 5, torch.tensor(5)])
@pytest.mark.parametrize("rows", [1, 3, 512])
@pytest.mark.parametrize("name", ["qwen2-tied", "phi", "gemma2", "cohere"])
def test_chunks_and_items(name, rows, items, monkeypatch):
    monkeypatch.setattr("stt.chunked.CHUNK_ROWS", rows)
    model, batch = build(name)
    assert_equals_plain(model, batch, items=None if items is None else 5, num_items_in_batch=items)
    restore_forward(model)
    own = model.float()(**batch, num_items_in_batch=items).loss
    torch.testing.assert_close(stt.chunked_loss(model)(**batch, num_items_in_batch=items).loss, own)


@pytest.mark.parametrize("trains", ["lm_head", "model", "layers.1.mlp", "bias"])
@pytest.mark.parametrize("name", ["phi", "gemma2", "qwen2-tied"])
def test_only_what_trains_gets_a_gradient(name, trains):
    model, batch = build(name)
    if trains == "lm_head":
        untie_head(model)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(trains in key)
    if any(p.requires_grad for p in model.parameters()):
        assert_equals_plain(model, batch)


def test_a_frozen_head_costs_no_weight_gradient():
    model, batch = build("qwen2")
    stt.chunked_loss(model)
    trained = training_flops(model, batch)
    model.lm_head.requires_grad_(False)
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert trained - training_flops(model, batch) == 2 * labelled * tiny.HIDDEN * tiny.VOCABULARY


def test_no_labelled_position_is_a_loss_of_zero():
    for own_logits in (False, True):
        model, batch = build("phi")
        if own_logits:
            model.lm_head.register_forward_hook(lambda *_: None)
        stt.chunked_loss(model)
        batch["labels"][:, 1:] = -100  # what the first token holds is never asked for
        loss, gradients = measured(model, lambda model=model, batch=batch: model(**batch).loss)
        assert loss == 0
        assert gradients.keys() == dict(model.named_parameters()).keys()
        assert not any(gradient.any() for gradient in gradients.values())


def test_everything_else_is_the_models_own_forward():
    model, batch = build("qwen2")
    labels = batch.pop("labels")
    before, own = model(**batch).logits, inspect.signature(model.forward).parameters
    assert stt.chunked_loss(model) is model
    assert torch.equal(model(**batch).logits, before)  # training, no labels
    named = list(inspect.signature(model.forward).parameters.values())
    assert [p.name for p in named[:-1]] == list(own)[:-1]  # what a trainer keeps of a batch
    assert named[-1].kind is inspect.Parameter.VAR_KEYWORD  # what a trainer passes the number of items by
    evaluated = model.eval()(**batch, labels=labels, num_items_in_batch=3)
    assert torch.equal(evaluated.logits, before)
    restore_forward(model)
    torch.testing.assert_close(evaluated.loss, model(**batch, labels=labels, num_items_in_batch=3).loss)
    assert model.train()(**batch, labels=labels).logits is not None


def test_arguments_reach_the_body():
    model, batch = build("qwen2")
    places = torch.arange(tiny.LENGTH).expand(2, -1) * 2
    restored = copy.deepcopy(model)
    stt.chunked_loss(model)
    for extra in ({"position_ids": places}, {"use_cache": True}, {"output_hidden_states": True},
                  {"shift_labels": batch["labels"]}, {"ignore_index": 7, "labels": batch["labels"] % 97}):
        expected, found = restored(**batch | extra), model(**batch | extra)
        torch.testing.assert_close(found.loss.float(), expected.loss.float())
        assert len(found.hidden_states or ()) == len(expected.hidden_states or ())
    torch.testing.assert_close(model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss,
                               model(**batch).loss)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    found = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert found == model(**batch).loss == model(**batch, return_dict=False)[0]


def with_lora_head(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    untie_head(model)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), model)
    return model


def with_hook(model: nn.Module) -> nn.Module:
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def with_normalised_head(model: nn.Module) -> nn.Module:
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


@pytest.mark.parametrize("is_installed_first", [True, False])
@pytest.mark.parametrize("change", [with_lora_head, with_hook, with_normalised_head])
def test_other_heads_use_the_models_own_logits(change, is_installed_first, caplog):
    model, batch = build("gemma2", torch.float32)
    batch["labels"] = torch.tensor([[-100] * 4 + [5, 6, 7], [-100] * 6 + [8]])  # predicted at positions 3, 4, 5
    if is_installed_first:
        expected = copy.deepcopy(model)
        torch.manual_seed(3)
        change(stt.chunked_loss(model))
        torch.manual_seed(3)
        change(expected)
        value = measured(expected, lambda: plain_loss(expected, batch))
        assert_same(measured(model, lambda: model(**batch).loss), value, 1e-5)
    else:
        with caplog.at_level(logging.INFO, "stt.loss"):
            assert_equals_plain(change(model), batch, 1e-5)
        assert "uses the model's own logits at the labelled positions" in caplog.text
    with Logits() as chunked:
        model(**batch).loss.backward()
    assert chunked.rows == 6  # three positions of two examples


class Variant(Qwen2ForCausalLM):
    """A forward as users write them: no keyword arguments, and one argument of its own."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                temperature: float | None = None, return_dict: bool = True) -> CausalLMOutput:
        hidden = self.before(self.model(input_ids=input_ids, attention_mask=attention_mask)[0])
        logits = self.after(self.lm_head(hidden)) / (temperature or 1.0)
        loss = None if labels is None else self.loss_function(logits, labels, tiny.VOCABULARY)
        return CausalLMOutput(loss=loss, logits=logits)

    before = after = staticmethod(lambda value: value)


OTHERS = {"HalvedStates": {"before": staticmethod(lambda hidden: hidden / 2)},
          "WavingLogits": {"after": staticmethod(torch.sin)},
          "DroppedStates": {"before": lambda self, hidden: self.dropout(hidden)}}  # evaluation does not show it


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_head_on_a_body_uses_the_own_logits(kind, caplog):
    model, batch = build("qwen2")
    model.__class__ = type(kind, (Variant,), OTHERS[kind])
    if kind == "DroppedStates":
        model.dropout = nn.Dropout(0.5)
    with caplog.at_level(logging.INFO, "stt.loss"):
        assert_equals_plain(model, batch)
    assert f"the loss of {kind} uses the model's own logits" in caplog.text


def test_an_argument_that_the_body_does_not_know(caplog):
    model, batch = build("qwen2")
    model.__class__ = Variant
    with caplog.at_level(logging.INFO, "stt.loss"):
        assert_equals_plain(model, batch)
        assert_equals_plain(model, batch | {"temperature": 2.0})
        assert_equals_plain(model, batch)
    assert not caplog.text
    assert torch.equal(model.eval()(**batch, num_items_in_batch=3).logits, model(**batch).logits)


def test_logits_of_ten_thousands():
    model, batch = build("qwen2")
    model.lm_head.weight.data *= 1e4
    assert_equals_plain(model, batch, 1e-8)  # gradients of about 1000


def test_router_losses_are_refused():
    for name in EXPERTS:
        model, batch = build(name, torch.float32)
        model.config.output_router_logits = True
        with pytest.raises(InputError, match="routers' balancing loss"):
            stt.chunked_loss(model)
        model.config.output_router_logits = False
        stt.chunked_loss(model)
        with pytest.raises(InputError, match="routers' balancing loss"):
            model(**batch, output_router_logits=True)


@pytest.mark.parametrize(("name", "message"), [
    ("t5", "T5ForConditionalGeneration is no decoder"), ("bart", "is no decoder"), ("bert", "is no decoder"),
    ("vit", "is no decoder"), ("bert-mlm", "loss of BertForMaskedLM is not the cross-entropy of its logits and the"),
    ("bart-decoder", "loss of BartForCausalLM is not")])  # it does not shift its labels
def test_other_models_are_refused(name, message):
    model = BUILDERS[name]()[0]
    with pytest.raises(InputError, match=message):
        stt.chunked_loss(model)
    assert "forward" not in vars(model)


def test_mistakes():
    model, batch = build("qwen2")
    model.forward = partial(type(model).forward, model)
    with pytest.raises(InputError, match="replaced already: call chunked_loss before"):
        stt.chunked_loss(model)
    restore_forward(model)
    stt.chunked_loss(stt.chunked_loss(model))  # twice is once
    with pytest.raises(InputError, match=r"labels have shape \(2, 6\) and the model's states \(2, 7\)"):
        model(**batch | {"labels": batch["labels"][:, 1:]})
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="for one backward pass"):
        loss.backward()


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return math.sqrt(sum((found[name] - expected[name]).square().sum().item() for name in expected))


@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied", "phi", "gemma2", "gpt2"])
def test_autocast_is_as_near_as_the_plain_loss(name, monkeypatch):
    """The error of bf16 beside float32: no greater than that of the model's own logits under autocast, but for luck."""
    monkeypatch.setattr("stt.chunked.CHUNK_ROWS", 3)
    model, batch = build(name, torch.float32)
    exact = measured(model, lambda: plain_loss(model, batch))
    with torch.autocast("cpu", torch.bfloat16):
        own = measured(model, lambda: plain_loss(model, batch))
        stt.chunked_loss(model)
        found = measured(model, lambda: model(**batch).loss)
    assert found[0].dtype == torch.float32
    assert abs(found[0] - exact[0]) < abs(own[0] - exact[0]) + 0.01
    assert {gradient.dtype for gradient in found[1].values()} == {torch.float32}
    assert distance(found[1], exact[1]) < 1.2 * distance(own[1], exact[1])


@pytest.mark.parametrize("head", ["train", "freeze"])
def test_a_half_precision_body_with_a_trained_head(head):
    model, batch = build("qwen2", torch.bfloat16)
    stt.train_only(model, ["model.layers.1.mlp.up_proj.weight"], head)
    stt.chunked_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = measured(model, lambda: model(**batch).loss)
        restore_forward(model)
        own, expected = measured(model, lambda: plain_loss(model, batch))
    assert loss == pytest.approx(own.item(), abs=0.02)
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        assert (gradients[key] - gradient).norm() < 0.05 * gradient.norm(), key


def test_gradient_checkpointing_copies_and_pickles():
    model, batch = build("qwen2-tied")
    expected = measured(model, lambda: plain_loss(model, batch))
    stt.chunked_loss(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.lm_head.weight.data.zero_()  # the copy is another model
        assert_same(measured(other, lambda other=other, batch=batch: other(**batch).loss), expected, 1e-12)
        model.load_state_dict(other.state_dict())
    model.activation_checkpointing_enable()
    assert_same(measured(model, lambda: model(**batch).loss), expected, 1e-12)


def test_compiled():
    model, batch = build("qwen2", torch.float32)
    expected = measured(model, lambda: plain_loss(model, batch))
    compiled = torch.compile(stt.chunked_loss(model), backend="eager")
    assert_same(measured(model, lambda: compiled(**batch).loss), expected, 1e-5)


def slow_nll(model: nn.Module, batch: dict[str, Tensor]) -> list[float]:
    """-log p of every labelled token, example by example without padding."""
    found = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        logits = model.eval()(input_ids=ids[mask == 1][None]).logits[0]
        found += [-torch.log_softmax(logits[t - 1], -1)[labels[t]].item() for t in range(1, int(mask.sum()))
                  if labels[t] != -100]
    return found


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2", "falcon", "opt", "cohere"])
def test_answer_nll(name, monkeypatch):
    monkeypatch.setattr("stt.chunked.CHUNK_ROWS", 2)
    model, batch = build(name)
    batch["labels"][batch["attention_mask"] == 0] = -100
    expected = slow_nll(model, batch)
    model.train().get_output_embeddings().eval()
    modes = [module.training for module in model.modules()]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    for change in (lambda model: model, stt.chunked_loss):
        total, count = answer_nll(change(model), inputs, batch["labels"])
        assert count == len(expected)
        assert total == pytest.approx(math.fsum(expected), abs=1e-9)
    assert [module.training for module in model.modules()] == modes
    assert answer_nll(model, inputs, torch.full_like(batch["labels"], -100)) == (0.0, 0)
