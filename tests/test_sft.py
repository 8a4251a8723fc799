"""The training loop: its loss, what it records, where it stops."""
from __future__ import annotations

import math

import pytest
import tiny
import torch
from tiny_text import build_decoder
from torch import nn
from torch.optim import AdamW
from training import PAD, arguments, examples
from transformers import default_data_collator

from stt.errors import InputError, TrainingFailed
from stt.loss import chunked_loss
from stt.selective_optimizers.wrap import get_selective_optimizer
from stt.trainers import loop, memory
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


# ---------------------------------------------------------------- numbers that are none


def unchanged(model, before) -> bool:
    return all(torch.equal(p.nan_to_num(), before[name].nan_to_num()) and torch.equal(p.isnan(), before[name].isnan())
               for name, p in model.named_parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_pixels_stop_before_the_update(bad, tmp_path):
    """In the second micro-batch of the second update, which leaves the first update alone."""
    model, batch = tiny.build("vit")
    data = [{"pixel_values": batch["pixel_values"][0].clone(), "labels": torch.tensor(i % 2)} for i in range(8)]
    data[6]["pixel_values"][0, 0, 0] = bad
    states = []
    with pytest.raises(TrainingFailed, match="the loss became NaN or infinite at step 2, before its update"):
        loop.train(model, data, default_data_collator, arguments(
            tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            train_sampling_strategy="sequential"), lambda **_: states.append({
                name: p.detach().clone() for name, p in model.named_parameters()}))
    assert len(states) == 1
    assert unchanged(model, states[0])


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_bad_gradient_stops_before_the_update(micro_batch, tmp_path):
    """The loss is a number and its gradient is none, in either of two accumulated micro-batches."""
    model, calls = tiny_model(), []
    weight = model.model.layers[0].mlp.down_proj.weight

    def spoil(gradient):
        calls.append(1)
        return gradient * math.nan if len(calls) - 1 == micro_batch else gradient

    weight.register_hook(spoil)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(TrainingFailed, match="the gradient became NaN or infinite at step 1, before its update"):
        train(model, examples(8), PAD, arguments(tmp_path, gradient_accumulation_steps=2), lambda **_: None)
    assert len(calls) == 2
    assert unchanged(model, before)


# ---------------------------------------------------------------- out of memory


def fits(limit, monkeypatch, from_step=0):
    """Forward passes of more than `limit` examples do not fit, from that step on; sizes of those that did."""
    real, sizes = loop.RecordedTrainer.compute_loss, []

    def loss(self, model, inputs, *args, **kwargs):
        size = len(inputs["labels"])
        if size > limit and self.state.global_step >= from_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        sizes.append(size)
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(loop.RecordedTrainer, "compute_loss", loss)
    return sizes


@pytest.mark.parametrize("limit", [4, 3, 1])
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(limit, tmp_path, monkeypatch, caplog):
    """From the second update on, whose first micro-batch of eight fits before the memory goes."""
    changes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0,
               "num_train_epochs": 2, "learning_rate": 1e-3}

    def trained():
        model, seen = tiny_model(), []
        train(model, examples(40), PAD, arguments(tmp_path, **changes), lambda **row: seen.append(row))
        return [p.detach().clone() for p in model.parameters()], seen

    weights, seen = trained()
    sizes = fits(limit, monkeypatch, from_step=1)
    for one, other in zip(*(found[0] for found in ((weights, seen), trained())), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    rows = trained()[1]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in seen], abs=1e-5)
    assert sizes[:2] == [8, 8]
    assert set(sizes[2:sizes.index(8, 2)]) == {min(limit, 2) if limit < 4 else 4}
    said = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert said[0] == ("out of memory at step 2 (CUDA out of memory. Tried to allocate 2 GiB): micro-batches are "
                       "halved to 4, as many are accumulated as make the same update")


def trained_classifier(folder, batch, accumulated):
    """The weights of a classifier after three epochs of seven examples, without dropout."""
    model, _ = tiny.build("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = torch.randint(3, 90, (7, 6), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(ids)]
    changes = {"optim": "sgd", "num_train_epochs": 3, "per_device_train_batch_size": batch, "max_grad_norm": 0.0,
               "gradient_accumulation_steps": accumulated}
    loop.train(model, data, default_data_collator, arguments(folder, **changes), lambda **_: None)
    return [p.detach().clone() for p in model.parameters()]


def test_a_mean_counts_by_its_examples(tmp_path, monkeypatch):
    """Micro-batches of three, three and one; parts of four and three."""
    expected = trained_classifier(tmp_path, 7, 1)
    found = [trained_classifier(tmp_path, 3, 3)]
    with monkeypatch.context() as patch:
        sizes = fits(4, patch)
        found.append(trained_classifier(tmp_path, 7, 1))
    assert sizes == [4, 3] * 3
    for weights in found:
        for one, other in zip(expected, weights, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_out_of_memory_within_the_backward_pass(tmp_path):
    """Half of the gradients of the micro-batch are there, and must not count twice."""
    weights = []
    for fails in (False, True):
        model, calls = tiny_model(), []

        def hook(gradient, fails=fails, calls=calls):
            calls.append(1)
            if fails and len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return gradient

        model.model.layers[0].mlp.down_proj.weight.register_hook(hook)
        train(model, examples(16), PAD, arguments(tmp_path, gradient_accumulation_steps=2, optim="sgd",
                                                  max_grad_norm=0.0), lambda **_: None)
        weights.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gather", ["backward", "step"])
def test_out_of_memory_while_weights_are_chosen(gather, tmp_path, monkeypatch):
    """The optimizer that takes gradients in the backward pass is told of the additional passes; 3 updates, the last of
    one micro-batch."""
    trained = []
    for limit in (8, 3):
        fits(limit, monkeypatch, from_step=1)
        model = tiny_model()
        train(model, examples(40), PAD, arguments(tmp_path, per_device_train_batch_size=8,
                                                  gradient_accumulation_steps=2, num_train_epochs=1),
              lambda **_: None, make_optimizer=lambda model, steps: get_selective_optimizer(AdamW, "id3")(
                  model.parameters(), lr=1e-3, budget=301, max_steps=steps, gather=gather))
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert int((trained[0] != torch.cat([p.detach().flatten() for p in tiny_model().parameters()])).sum()) == 301
    torch.testing.assert_close(*trained, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gather", ["backward", "step"])
def test_a_gradient_that_is_no_number_ends_the_choosing_of_weights(gather, tmp_path):
    model = tiny_model()
    model.model.layers[0].mlp.down_proj.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingFailed, match="the gradient became NaN or infinite at step 1"):
        train(model, examples(4), PAD, arguments(tmp_path), lambda **_: None,
              make_optimizer=lambda model, steps: get_selective_optimizer(AdamW, "id3")(
                  model.parameters(), lr=1e-3, budget=301, max_steps=steps, gather=gather))


def test_one_example_that_does_not_fit_ends_the_training(tmp_path, monkeypatch):
    fits(0, monkeypatch)
    with pytest.raises(TrainingFailed, match="out of memory at step 1 with one example at a time .CUDA out of memory. "
                                             "Tried to allocate 2 GiB.; there is no checkpoint yet. Lower"):
        train(tiny_model(), examples(4), PAD, arguments(tmp_path), lambda **_: None)


def test_out_of_memory_elsewhere_is_one_sentence(tmp_path):
    def validate():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(TrainingFailed, match="outside of a forward and backward pass: lower --eval_batch"):
        train(tiny_model(), examples(4), PAD, arguments(tmp_path, eval_strategy="epoch"), lambda **_: None, validate)


def test_parts_of_a_micro_batch():
    batch = {"a": torch.arange(14).view(7, 2), "b": torch.arange(7), "scale": torch.ones(1), "labels": torch.arange(7)}
    assert [memory.size(part) for part in memory.split(batch, 2)] == [4, 3]
    assert [memory.size(part) for part in memory.split(batch, 16)] == [1] * 7
    for name in ("a", "b"):
        assert torch.equal(torch.cat([part[name] for part in memory.split(batch, 4)]), batch[name])
