"""Packed examples are what they are alone: loss, gradients, and nothing of a neighbour."""
from __future__ import annotations

import math
import random

import pytest
import tiny
import torch
from test_loss import BUILDERS, DECODERS, assert_same, measured
from test_sft import PAD, arguments, examples, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from stt.errors import InputError
from stt.loss import chunked_loss
from stt.packing import WIDTH, Packing, find_packing, rows
from stt.trainers.sft import collate, train

# whatever their dtype, their norms or their eager attention sum over tokens in float32
FLOAT32 = {"gemma", "gemma2", "gemma3_text", "cohere", "gpt_neo", "gptj"}
Example = dict[str, list[int]]
REFUSED = {"bloom": "takes no position_ids", "mamba": "takes no position_ids"}
PACKED = [name for name in [*DECODERS, *tiny.MIXTURES, "bitnet"] if name not in REFUSED]
BY_MASK = {"opt": torch.bool, "falcon": torch.bool, "gpt_oss": torch.float32}


def made(lengths: list[int], seed: int = 1) -> list[Example]:
    """Random examples; about half of their tokens are labelled, the first of them too (which nothing predicts)."""
    generator = random.Random(seed)
    ids = [[generator.randrange(3, tiny.VOCABULARY) for _ in range(length)] for length in lengths]
    return [{"input_ids": row, "labels": [row[0], *(i if generator.random() < 0.5 else -100 for i in row[1:])]}
            for row in ids]


def alone(model: nn.Module, data: list[Example]) -> Tensor:
    """The reference: every example by itself, all logits, the mean over all labelled tokens that are predicted."""
    losses = []
    for row in data:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum"))
    return sum(losses) / sum(label != -100 for row in data for label in row["labels"][1:])


def without_dropout(model: nn.Module) -> nn.Module:
    """In training mode, but nothing is dropped."""
    for module in model.train().modules():
        for name in [name for name, value in vars(module).items() if name == "p" or "dropout" in name]:
            setattr(module, name, 0.0)
    return model


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for dtype in (torch.float32, torch.float64)
                                             for name in PACKED if dtype == torch.float32 or name not in tiny.MIXTURES])
def test_packed_loss_and_gradients_are_those_of_every_example_alone(name, dtype):
    model, data = without_dropout(BUILDERS[name]()[0].to(dtype)), made([5, 9, 3, 6, 12, 7, 4])
    packing = find_packing(model, data)
    assert packing.mask is BY_MASK.get(name)
    batch = packing.collate(PAD)(data)
    assert len(batch["input_ids"]) == 2
    expected = measured(model, lambda: alone(model, data))
    is_exact = dtype == torch.float64 and name not in FLOAT32
    assert_same(measured(chunked_loss(model), lambda: model(**batch).loss), expected, 1e-10 if is_exact else 1e-5)


@pytest.mark.parametrize("name", PACKED)
def test_a_neighbour_changes_nothing(name):
    """Other tokens in one example: the logits of the others are the same, those of the example itself are not."""
    model, data = BUILDERS[name]()[0].eval(), made([5, 9, 3, 6])
    packing = find_packing(model, data)
    other = [data[0], made([9], seed=2)[0], *data[2:]]
    logits = [model(**packing._batch([each], PAD), use_cache=False).logits[0] for each in (data, other)]
    change = (logits[0] - logits[1]).abs().amax(-1)  # (T,)
    assert change[5:14].max() > 0.1
    # experts may group tokens differently, which rounds differently
    assert max(change[:5].max(), change[14:].max()) <= (1e-5 if name in tiny.MIXTURES else 0)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_windows_are_of_the_example_not_of_the_row(name):
    """Attention that sees three tokens back: packed examples are longer than that, and so are rows."""
    build = BUILDERS[name]
    model = tiny._made(build.args[0], build.keywords | {"sliding_window": 3})
    data = made([5, 9, 6, 8])
    batch = find_packing(model, data).collate(PAD)(data) if name != "gpt_oss" else None
    if batch is None:  # a written-out mask knows no window
        with pytest.raises(InputError, match="GptOssForCausalLM does not keep examples in one row apart"):
            find_packing(model, data)
        return
    expected = alone(model.train(), data)
    assert chunked_loss(model)(**batch).loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_models_without_positions_are_refused(name, reason):
    with pytest.raises(InputError, match=f"does not keep examples in one row apart .*{reason}.*leave --pack out"):
        find_packing(BUILDERS[name]()[0], made([5, 9, 3]))


class Leaking(nn.Module):
    """A layer that also reads the token before, as a state or a convolution would."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self.layer(hidden + 0.01 * F.pad(hidden, (0, 0, 1, 0))[:, :-1], *args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_carried_from_token_to_token_is_found(dtype):
    model, data = BUILDERS["qwen2"]()[0].to(dtype), made([5, 9, 3])
    assert find_packing(model, data) == Packing(None)
    model.model.layers[0] = Leaking(model.model.layers[0])
    with pytest.raises(InputError, match=r"apart \(their states change by .* % beside others\): leave --pack out"):
        find_packing(model, data)


def test_rows_too_wide_for_a_model_are_refused():
    model, data = BUILDERS["gpt2"]()[0], made([40, 60, 5])  # 64 positions
    assert find_packing(model, data) == Packing(None)  # its positions start again
    of_row = model.transformer.wpe.weight
    model.transformer.wpe.forward = lambda ids: F.embedding(torch.arange(ids.shape[1])[None], of_row)
    with pytest.raises(InputError, match="it fails on a row of 105 tokens"):
        find_packing(model, data)


def test_collate():
    data = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]},
            {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, -100, 6]}]
    found = Packing(torch.bool).collate(PAD)(data)  # 9 tokens: two rows of at most 8
    assert found["input_ids"].tolist() == [[3, 4, 5, 6, PAD], [5, 6, 7, 8, 9]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert found["labels"].tolist() == [[-100, -100, -100, 6, -100], [-100, 6, 7, -100, 9]]
    assert found["attention_mask"][1, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0],
                                                            [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_example_once_and_hardly_any_padding(seed):
    generator = random.Random(seed)
    lengths = [min(256, max(8, int(generator.lognormvariate(math.log(60), 0.6)))) for _ in range(32)]
    width = WIDTH * max(lengths)
    found = rows(lengths, width)
    assert found == rows(lengths, width)
    assert sorted(i for row in found for i in row) == list(range(32))
    filled = [sum(lengths[i] for i in row) for row in found]
    assert max(filled) <= width
    assert len(found) * max(filled) <= 1.06 * sum(lengths)
    assert len(found) <= math.ceil(sum(lengths) / width) + 1


def test_rows_at_the_edges():
    assert rows([4], 4) == [[0]]
    assert rows([4, 4, 4], 8) == [[0, 2], [1]]
    assert rows([2, 3, 4, 5], 14) == [[3, 2, 1, 0]]
    with pytest.raises(InputError, match="an example of 5 tokens does not fit a row of 4"):
        rows([1, 5], 4)


@pytest.mark.parametrize("accumulated", [1, 4])
def test_training_packed_is_training(tmp_path, accumulated):
    """The same losses and weights step by step; the loss is over the labelled tokens of the accumulated batch."""
    found = []
    for is_packed in (False, True):
        model, data, record = tiny_model(), examples(16), []
        settings = arguments(tmp_path, per_device_train_batch_size=8 // accumulated, max_grad_norm=0.0, optim="sgd",
                             gradient_accumulation_steps=accumulated)
        train(model, data, PAD, settings, lambda record=record, **numbers: record.append(numbers),
              packing=find_packing(model, data) if is_packed else None)
        found.append(([row["loss"] for row in record], [p.detach() for p in model.parameters()]))
    (losses, weights), (packed_losses, packed_weights) = found
    assert len(losses) == 2
    assert packed_losses == pytest.approx(losses, abs=1e-5)
    for one, other in zip(weights, packed_weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_examples_and_labels_are_as_many():
    data = examples(16)
    padded, packed = collate(PAD)(data), Packing(None).collate(PAD)(data)
    assert (packed["labels"] != -100).sum() == (padded["labels"] != -100).sum()
    assert (packed["position_ids"] == 0).sum() - (packed["input_ids"] == PAD).sum() == 16
    assert packed["input_ids"].numel() < padded["input_ids"].numel()


def test_the_models_own_logits_are_packed_too():
    """A head that is no plain product: the model's own forward runs, and must keep no cache."""
    model, data = BUILDERS["qwen2"]()[0].double(), made([5, 9, 3])
    model.lm_head.register_forward_hook(lambda module, inputs, output: output / 2)
    expected = measured(model.train(), lambda: alone(model, data))
    batch = find_packing(model, data).collate(PAD)(data)
    assert_same(measured(chunked_loss(model), lambda: model(**batch).loss), expected, 1e-10)
