"""The training loop: its loss, what it records, where it stops."""
from __future__ import annotations

import math

import pytest
import torch
from tiny_text import build_decoder
from training import PAD, arguments, examples

from stt.errors import InputError, TrainingFailed
from stt.loss import chunked_loss
from stt.trainers.loop import check_trained_dtype
from stt.trainers.sft import collate, train


def tiny_model():
    return build_decoder(vocabulary=60)


def slow_loss(model, rows) -> float:
    """Mean over all labelled tokens of -log p(token | its past), one unpadded example at a time."""
    losses = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        for position, label in enumerate(row["labels"]):
            if label != -100:
                losses.append(-torch.log_softmax(logits[position - 1], -1)[label].item())
    return sum(losses) / len(losses)


def test_loss_is_the_mean_over_labelled_tokens():
    model, rows = tiny_model(), examples(7)
    loss = chunked_loss(model.train())(**collate(PAD)(rows)).loss
    assert loss.item() == pytest.approx(slow_loss(model.eval(), rows), abs=1e-5)


def test_collate_pads_on_the_right():
    batch = collate(PAD)([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_accumulation_equals_one_large_batch(tmp_path):
    """The loss is divided by the labelled tokens of the whole accumulated batch, not batch by batch."""
    weights, losses = [], []
    for batch_size, accumulated in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model, rows = tiny_model(), []
        train(model, examples(8), PAD, arguments(tmp_path, per_device_train_batch_size=batch_size, optim="sgd",
                                                 gradient_accumulation_steps=accumulated, max_grad_norm=0.0),
              lambda rows=rows, **numbers: rows.append(numbers))
        weights.append([p.detach().clone() for p in model.parameters()])
        losses.append([row["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_first_loss_in_the_record_is_the_slow_loss(tmp_path):
    model, rows, data = tiny_model(), [], examples(4)
    expected = slow_loss(model.eval(), data)
    train(model, data, PAD, arguments(tmp_path), lambda **numbers: rows.append(numbers))
    assert rows[0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert [row["step"] for row in rows] == [1]


def test_validation_accuracy_is_recorded_each_epoch(tmp_path):
    rows, answers = [], iter([0.25, 0.5])
    train(tiny_model(), examples(4), PAD, arguments(tmp_path, num_train_epochs=2, eval_strategy="epoch"),
          lambda **numbers: rows.append(numbers), validate=lambda: next(answers))
    assert [row["validation_accuracy"] for row in rows if "validation_accuracy" in row] == [0.25, 0.5]


def test_nan_stops_before_the_update(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(TrainingFailed, match="NaN or infinite at step 1"):
        train(model, examples(4), PAD, arguments(tmp_path), lambda **_: None)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.isnan(), before[name].isnan())
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())


def test_half_precision_weights_never_train():
    with pytest.raises(AssertionError, match="must be float32"):
        check_trained_dtype(tiny_model().bfloat16())


def test_the_forward_is_the_models_own_again(tmp_path):
    """After training, under autocast too, and after training that failed."""
    model = tiny_model()
    for changes in ({}, {"bf16": True}):
        train(model, examples(4), PAD, arguments(tmp_path, **changes), lambda **_: None)
        assert "forward" not in vars(model)
    with pytest.raises(InputError, match="nothing to resume"):
        train(model, examples(4), PAD, arguments(tmp_path), lambda **_: None, resume=True)
    assert "forward" not in vars(model)
    assert model.train()(**collate(PAD)(examples(4))).logits is not None
