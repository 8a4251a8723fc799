"""Distillation is its formula: value and gradients beside all logits of both models."""
from __future__ import annotations

import math

import pytest
import small_runs
import tiny
import tiny_text
import torch
from test_loss import Logits, assert_same, build, measured
from test_packing import made
from test_sft import PAD, arguments, examples, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import stt
from stt.dataset import encode_all, load_task
from stt.distill import Teacher, check_vocabulary
from stt.errors import InputError
from stt.llm_arguments import LLMArgs
from stt.loss import answer_nll, chunked_loss
from stt.packing import find_packing
from stt.selection import Selection
from stt.surgery import restore_forward
from stt.trainers.sft import train
from util.torch_flops import forward_flops


def other_model(name: str = "qwen2", dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model of the same architecture with other weights."""
    model, _ = build(name, dtype)
    torch.manual_seed(9)
    return tiny.randomised(model)


def slow(model: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], weight: float, temperature: float) -> Tensor:
    """The formula, summed over the labelled tokens: all logits of both models, one token after the other."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    own, aim = model(**inputs).logits, teacher(**inputs).logits.detach()
    total = torch.zeros((), dtype=own.dtype)
    for row, time in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        z, v, answer = own[row, time], aim[row, time], batch["labels"][row, time + 1]
        p, q = torch.softmax(z / temperature, 0), torch.softmax(v / temperature, 0)
        hard = -torch.log(torch.softmax(z, 0)[answer])
        total = total + (1 - weight) * hard + weight * temperature**2 * (q * (q / p).log()).sum()
    return total


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (0.3, 2.5), (1.0, 0.7)])
@pytest.mark.parametrize(("name", "teacher_name"), [("qwen2", "qwen2"), ("qwen2-tied", "gemma2"), ("phi", "cohere"),
                                                    ("gemma2", "phi"), ("cohere", "qwen2"), ("gpt2", "qwen2")])
def test_value_and_gradients_are_the_formulas(name, teacher_name, weight, temperature, monkeypatch):
    """Biases, capped and scaled logits, padding; chunks that do not divide the number of labels."""
    monkeypatch.setattr("stt.chunked.CHUNK_ROWS", 3)
    model, batch = build(name)
    teacher = other_model(teacher_name).eval()
    items = 11
    expected = measured(model.train(), lambda: slow(model, teacher, batch, weight, temperature) / items)
    chunked_loss(model, Teacher.of(teacher, weight, temperature))
    assert_same(measured(model, lambda: model(**batch, num_items_in_batch=items).loss), expected, 1e-12)


@pytest.mark.parametrize("changed", ["model", "teacher"])
def test_heads_that_are_no_plain_product(changed, monkeypatch):
    monkeypatch.setattr("stt.chunked.CHUNK_ROWS", 3)
    model, batch = build("qwen2")
    teacher = other_model("phi").eval()
    {"model": model, "teacher": teacher}[changed].lm_head.register_forward_hook(lambda module, inputs, out: out / 2)
    expected = measured(model, lambda: slow(model, teacher, batch, 0.4, 2.0))
    chunked_loss(model, Teacher.of(teacher, 0.4, 2.0))
    assert_same(measured(model, lambda: model(**batch, num_items_in_batch=1).loss), expected, 1e-12)


def test_packed_examples_have_the_same_teacher():
    model, _ = build("qwen2")
    teacher, data = other_model().eval(), made([5, 9, 3, 6])
    for row in data:
        row["labels"][0] = -100
    rows = [{name: torch.tensor([values]) for name, values in row.items()} for row in data]
    expected = measured(model, lambda: sum(slow(model, teacher, row, 0.4, 2.0) for row in rows))
    chunked_loss(model, Teacher.of(teacher, 0.4, 2.0))
    batch = find_packing(model, data).collate(PAD)(data)
    assert_same(measured(model, lambda: model(**batch, num_items_in_batch=1).loss), expected, 1e-10)


def test_all_logits_of_neither_model_exist(monkeypatch):
    monkeypatch.setattr("stt.chunked.CHUNK_ROWS", 2)
    model, batch = build("qwen2", share=1.0)
    chunked_loss(model, Teacher.of(other_model(), 0.5, 1.0))
    with Logits() as found:
        model(**batch).loss.backward()
    assert found.rows == 2


def test_a_model_learns_nothing_from_itself():
    """KL = 0 and no gradient but rounding; batches without labels give 0."""
    model, batch = build("qwen2")
    chunked_loss(model, Teacher.of(build("qwen2")[0], 1.0, 3.0))
    loss, gradients = measured(model, lambda: model(**batch).loss)
    assert abs(loss) < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients.values())
    assert model(**batch | {"labels": torch.full_like(batch["labels"], -100)}).loss.item() == 0


def test_the_teacher_is_no_part_of_the_model(tmp_path):
    """It is frozen, drops nothing, stays what it was, and neither evaluation nor a checkpoint knows of it."""
    model, teacher = tiny_model(), other_model("gpt2", torch.float32).train()  # which has dropout
    teacher.resize_token_embeddings(60)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    names = list(model.state_dict())
    teach = Teacher.of(teacher, 0.5, 2.0)
    losses = []
    for _ in range(2):
        again = tiny_model()
        train(again, examples(8), PAD, arguments(tmp_path), lambda **row: losses.append(row["loss"]), teach=teach)
    assert losses[:2] == losses[2:]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    ids = torch.randint(3, 60, (2, 6))
    plain = answer_nll(model, {"input_ids": ids}, ids)
    chunked_loss(model, teach)
    assert answer_nll(model, {"input_ids": ids}, ids) == plain
    assert list(model.state_dict()) == names
    restore_forward(model)


def test_accumulation_is_one_large_batch(tmp_path):
    found = []
    for size, accumulated in ((8, 1), (2, 4)):
        model, losses = tiny_model(), []
        train(model, examples(8), PAD, arguments(tmp_path, per_device_train_batch_size=size, optim="sgd",
                                                 gradient_accumulation_steps=accumulated, max_grad_norm=0.0),
              lambda losses=losses, **numbers: losses.append(numbers["loss"]),
              teach=Teacher.of(tiny_text.build_decoder(60, layers=1), 0.5, 2.0))
        found.append((losses, [p.detach() for p in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_flops_are_a_forward_pass_with_the_head_at_the_labels():
    teacher = Teacher.of(build("qwen2", torch.float32)[0])
    data = made([5, 9, 12])
    body = sum(forward_flops(teacher.model.model, {"input_ids": torch.tensor([row["input_ids"]])}) for row in data)
    labels = sum(label != -100 for row in data for label in row["labels"][1:])
    assert teacher.flops(data, 3) == 3 * (body + 2 * labels * tiny.HIDDEN * tiny.VOCABULARY)


def test_another_vocabulary_is_refused():
    model, tokenizer = tiny_model(), tiny_text.build_tokenizer()
    with pytest.raises(InputError, match="another vocabulary .*60 outputs.*give a teacher of the same tokenizer"):
        check_vocabulary(tiny_text.build_decoder(61), tokenizer, model, tokenizer)
    with pytest.raises(InputError, match="another vocabulary"):
        check_vocabulary(model, tokenizer, model, tiny.tokenizer())
    check_vocabulary(model, tokenizer, model, tiny_text.build_tokenizer())


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (1.5, 1.0), (0.5, 0.0), (0.5, math.inf)])
def test_numbers_out_of_range(weight, temperature):
    with pytest.raises(InputError, match="a weight in"):
        Teacher.of(tiny_model(), weight, temperature)
    with pytest.raises(InputError, match="distill_"):
        LLMArgs(distill="kl", distill_weight=weight, distill_temperature=temperature)


@pytest.mark.parametrize("flag", [{"teacher": "base"}, {"distill_weight": 0.1}, {"distill_temperature": 2.0}])
def test_a_teacher_needs_distillation(flag):
    with pytest.raises(InputError, match=f"{next(iter(flag))} is about a teacher, and there is none"):
        LLMArgs(**flag)


def test_a_run_learns_from_another_run(tmp_path, capsys):
    """The teacher is the sliced checkpoint of a run; the student's examples are packed."""
    teacher = AutoModelForCausalLM.from_pretrained(small_runs.SHIPPED, dtype=torch.float32)
    site = next(iter(stt.find_sites(teacher)))
    stt.apply(teacher, Selection({site: range(50)}))
    tokenizer = AutoTokenizer.from_pretrained(small_runs.SHIPPED)
    stt.save(teacher, tmp_path / "teacher" / "checkpoint", tokenizer)
    small = [*small_runs.small_flags(tmp_path), "--num_epoch", "1", "--no_eval_epochs", "--mode", "lora", "--pack",
             "--distill", "kl"]
    assert small_runs.run(small, tmp_path, "--teacher", str(tmp_path / "teacher")) == 0
    found = small_runs.results(tmp_path)
    rows = encode_all(load_task("clutrr", tmp_path).train, tokenizer, 256)[0]
    assert found["flops"]["teacher"] == Teacher.of(stt.load(tmp_path / "teacher" / "checkpoint")).flops(rows, 1)
    assert found["training_tokens_per_second"] > 0
    assert found["truncation"] == {"max_length": 256, **{
        split: {"examples": count, "prompts_cut": 0, "answers_left_out": 0, "examples_left_out": 0}
        for split, count in (("train", 24), ("validation", 8), ("test", 8))}}
    report = (tmp_path / "run" / "report.md").read_text()
    assert "256 tokens; nothing cut or left out" in report
    assert "tokens a second, padding and validation aside" in report
    assert small_runs.run(small, tmp_path, "--overwrite", "--teacher", str(tmp_path)) == 2
    assert "cannot load the model" in capsys.readouterr().err


def test_a_teacher_of_another_class_and_width():
    """Only the vocabulary is common."""
    config = LlamaConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=20, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=64)
    teacher = tiny.randomised(LlamaForCausalLM(config)).double().eval()
    model, batch = build("qwen2")
    expected = measured(model, lambda: slow(model, teacher, batch, 0.5, 1.0))
    chunked_loss(model, Teacher.of(teacher))
    assert_same(measured(model, lambda: model(**batch, num_items_in_batch=1).loss), expected, 1e-12)
