"""An unmodified transformers.Trainer, as a user writes it, trains a sliced model, resumes, and leaves what loads."""
from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_text import build_decoder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

import stt
from stt.surgery import restore_forward

WORDS, LENGTH = 60, 8


class TheirTrainer(Trainer):
    """A subclass with a loss method of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 4:
            raise KeyboardInterrupt


def texts(count: int, seed: int) -> datasets.Dataset:
    """Texts of one length, one to four labelled tokens each, and a column that no model takes."""
    ids = torch.randint(3, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [[-100] * (LENGTH - 1 - i % 4) + row[LENGTH - 1 - i % 4:] for i, row in enumerate(ids)]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels, "topic": ["sea"] * count})


def sliced() -> nn.Module:
    """Select, then apply."""
    model = build_decoder(vocabulary=WORDS)
    batches = list(torch.randint(3, WORDS, (2, 4, LENGTH), generator=torch.Generator().manual_seed(0)))
    return stt.apply(model, stt.select(model, batches, keep=0.5))


def ready(model: nn.Module) -> nn.Module:
    stt.train_only(model)
    return stt.chunked_loss(model)


def trainer(model: nn.Module, folder: Path, kind: type[Trainer] = Trainer, **changes: object) -> Trainer:
    """Six steps of two accumulated batches, a checkpoint every third."""
    options = {"callbacks": changes.pop("callbacks", None), "compute_metrics": changes.pop("compute_metrics", None)}
    settings = {"output_dir": str(folder), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
                "num_train_epochs": 2, "learning_rate": 1e-2, "save_steps": 3, "logging_steps": 1, "report_to": [],
                "use_cpu": True, "disable_tqdm": True, "seed": 5}
    return kind(model=model, args=TrainingArguments(**(settings | changes)), train_dataset=texts(24, seed=1),
                eval_dataset=texts(6, seed=2), **options)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    found, expected = one.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", [Trainer, TheirTrainer])
def test_interrupted_and_resumed_equals_uninterrupted(kind, tmp_path):
    """And what is saved along the way and at the end loads as the model that was trained."""
    start = sliced()
    whole = ready(copy.deepcopy(start))
    trainer(whole, tmp_path / "whole", kind).train()
    moved = {name for name, value in whole.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    assert moved == {name for name, parameter in whole.named_parameters() if parameter.requires_grad}
    with pytest.raises(KeyboardInterrupt):
        trainer(ready(copy.deepcopy(start)), tmp_path / "cut", kind, callbacks=[Interrupt()]).train()
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    resumed = ready(stt.load(checkpoint))
    trainer(resumed, tmp_path / "cut", kind).train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(resumed, whole)
    whole.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "whole" / "checkpoint-6", tmp_path / "cut" / "checkpoint-6"):
        loaded = stt.load(folder)
        assert_same_weights(loaded, whole)
        assert loaded.stt_selection == whole.stt_selection


def plain(model: nn.Module, folder: Path, **changes: object) -> nn.Module:
    """The reference: the same steps with the loss of all logits, written in the trainer."""
    class Plain(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            logits = model(**inputs).logits[:, :-1].flatten(0, 1)
            return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    trainer(model, folder, Plain, **changes).train()
    return model


@pytest.mark.parametrize("changes", [{}, {"max_grad_norm": 0.0, "optim": "sgd", "activation_checkpointing": True}])
def test_any_trainer_takes_the_plain_steps(changes, tmp_path):
    expected = sliced()
    stt.train_only(expected)
    plain(expected, tmp_path, **changes)
    for kind in (Trainer, TheirTrainer):
        model = ready(sliced())
        found = trainer(model, tmp_path, kind, **changes)
        assert found.model_accepts_loss_kwargs
        found.train()
        for (name, one), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=name)


def test_evaluation_gets_its_logits(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"rows": len(prediction.label_ids)}

    model = ready(sliced())
    found = trainer(model, tmp_path, compute_metrics=metrics).evaluate()
    restore_forward(model)
    expected = trainer(model, tmp_path, compute_metrics=metrics).evaluate()
    assert seen == 2 * [(6, LENGTH, WORDS)]
    assert found["eval_loss"] == expected["eval_loss"]


def test_autocast(tmp_path):
    """Accelerate puts its autocast around our forward, which stays the loss of the next trainer."""
    model = ready(sliced())
    trainer(model, tmp_path, bf16=True).train()
    batch = {name: torch.tensor(texts(4, seed=3)[name]) for name in ("input_ids", "labels")}
    output = stt.chunked_loss(model).train()(**batch)
    assert output.logits is None
    assert model.eval()(**batch).logits.shape == (4, LENGTH, WORDS)
    restore_forward(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert output.loss == stt.chunked_loss(model).train()(**batch).loss
    assert output.loss != model(**batch).loss


def adapted(model: nn.Module, config: object) -> nn.Module:
    from peft import get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, config)


def configs() -> dict[str, object]:
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig

    lora = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return {"mlp": LoraConfig(target_modules=["up_proj", "down_proj"], **lora),
            "attention and trained head": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **lora),
            "head": LoraConfig(target_modules=["lm_head"], **lora),
            "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
            "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")}


def losses(model: nn.Module, loss: object) -> tuple[float, dict[str, Tensor]]:
    model.train().zero_grad()
    value = loss(model)
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", configs())
def test_peft_before_and_after(name, tmp_path):
    """An adapted sliced model has the loss and gradients of all its logits, and trains."""
    batch = {key: torch.tensor(texts(4, seed=3)[key]) for key in ("input_ids", "labels")}

    def reference(model: nn.Module) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits[:, -LENGTH:-1]  # virtual tokens come first
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        value, gradients = losses(adapted(sliced(), configs()[name]), reference)
        before = adapted(stt.chunked_loss(sliced()), configs()[name])
        after = stt.chunked_loss(adapted(sliced(), configs()[name]))
    for model in (before, after):
        found, slopes = losses(model, lambda model: model(**batch).loss)
        assert found == pytest.approx(value, abs=1e-5)
        assert slopes.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(slopes[key], gradient, rtol=1e-4, atol=1e-5, msg=key)
        assert model(**batch).logits is None
        trainer(model, tmp_path / name, max_steps=2).train()
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """In bf16; accelerate's one state of the process, which other tests share, is new before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_wraps_and_unwraps_the_forward(accelerator: Accelerator) -> None:
    """Under bf16 autocast accelerate replaces model.forward, and puts a method in its place when it unwraps."""
    model, batch = tiny.build("llama")
    batch = {**batch, "labels": batch["input_ids"]}
    expected = model(**batch).loss
    wrapped = accelerator.prepare_model(stt.chunked_loss(model).train())
    torch.testing.assert_close(wrapped(**batch).loss, expected, rtol=0.02, atol=0.02)
    assert stt.chunked_loss(wrapped) is wrapped
    bare = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    torch.testing.assert_close(bare(**batch).loss, expected)
    assert bare(**batch).logits is None
    assert bare.eval()(**batch).logits is not None
