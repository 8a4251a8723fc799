"""Classifiers of many kinds: loaded with a new output layer, read in batches, sliced exactly, trained and scored."""
from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from classifying import KINDS, OF_IMAGES, SENTENCES, build, write_picture
from safetensors.torch import load_file
from torch.nn import functional as F

import stt
from stt import modes
from stt.dataset.classification import Item
from stt.dataset.classification.encode import TextEncoder, encoder_of
from stt.dataset.classification.pictures import of_file
from stt.errors import InputError
from stt.evaluate.latency import compare_latency
from stt.evaluate.scoring import METRICS, by_class, confusion
from stt.loading import Classes, check_classifier, load_classifier, load_processor, load_tokenizer
from stt.selecting import Budget
from stt.sites import find_sites
from stt.surgery import count_parameters, head_parameters
from stt.trainers.classify import classification_loss, with_loss
from util.torch_flops import training_flops

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


def items(kind: str, folder: Path) -> list[Item]:
    """Six examples of three classes, texts in pairs."""
    if kind in OF_IMAGES:
        return [Item(of_file(write_picture(folder / f"{n}.png", 40 * n, n)), n % 3, str(n)) for n in range(6)]
    return [Item((SENTENCES[n], SENTENCES[-n]), n % 3, str(n)) for n in range(6)]


def loaded(kind: str, folder: Path, seed: int = 1, **options):
    """(model, encoder) of a tiny model with three classes."""
    path = folder / kind if (folder / kind).exists() else build(kind, folder)
    is_image = kind in OF_IMAGES
    reader = load_processor(str(path)) if is_image else load_tokenizer(str(path))
    classes = Classes("image" if is_image else "text", ("a", "b", "c"), seed, **options)
    model = load_classifier(str(path), classes, None, CPU, None if is_image else reader.pad_token_id)
    return model, encoder_of(reader, model, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_sliced_and_reloaded(kind, folder, tmp_path):
    """The body is the checkpoint's, the output layer new and of the seed; sliced = masked dense; plain files read."""
    model, encoder = loaded(kind, folder)
    again, other = loaded(kind, folder)[0], loaded(kind, folder, seed=2)[0]
    state = model.state_dict()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())
    differing = {name for name, value in state.items() if not torch.equal(value, other.state_dict()[name])}
    assert differing
    assert differing <= set(head_parameters(model))
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}

    batch = encoder.batch(encoder.rows(items(kind, tmp_path)))
    check_classifier(model, batch)
    batch.pop("labels")
    selection = stt.select(model, [batch], keep=0.5, score="random")
    sites, masked = find_sites(model), copy.deepcopy(model)
    assert len(sites) == 2
    for name, ids in selection.items():
        gone = torch.ones(sites[name].width, dtype=torch.bool)
        gone[ids] = False
        down = masked.get_submodule(sites[name].down_module)
        with torch.no_grad():
            down.weight[gone if type(down).__name__ == "Conv1D" else (slice(None), gone)] = 0
    stt.apply(model, selection)
    with torch.no_grad():
        expected, actual = masked(**batch).logits, model(**batch).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    stt.save(model, tmp_path / "sliced", encoder.reader)
    reloaded = type(model).from_pretrained(tmp_path / "sliced").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, actual)


def test_the_checkpoint_s_body_is_kept(folder):
    """Whatever a checkpoint is of, and however its head is shaped."""
    for kind in ("bert", "bert-base", "gpt2", "clip-vision", "clip", "vit"):
        model, _ = loaded(kind, folder)
        saved = load_file(folder / kind / "model.safetensors")
        heads = head_parameters(model).keys()
        own = {name: value for name, value in model.state_dict().items() if name not in heads and "position_ids" not
               in name}
        values = {tuple(value.shape): [] for value in saved.values()}
        for value in saved.values():
            values[tuple(value.shape)].append(value)
        found = [any(torch.equal(value, other) for other in values[tuple(value.shape)]) for value in own.values()]
        assert all(found), kind


def test_without_dropout(folder):
    model, encoder = loaded("bert", folder)
    batch = encoder.batch(encoder.rows(items("bert", folder)))
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model, _ = loaded("bert", folder, without_dropout=True)
    model.train()
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_of_the_other_modality(folder):
    """One sentence for a text model on pictures and the other way round."""
    for kind, modality in (("bert", "image"), ("vit", "text"), ("siglip-vision", "text")):
        path = folder / kind if (folder / kind).exists() else build(kind, folder)
        with pytest.raises(InputError, match="give"):
            load_classifier(str(path), Classes(modality, ("a", "b"), 0), None, CPU)
    with pytest.raises(InputError, match="cannot load the image processor of"):
        load_processor(str(folder / "bert"))


def test_a_batch_that_does_not_fit(folder, tmp_path):
    model, encoder = loaded("bert", folder)
    long = {"input_ids": torch.full((1, 70), 5), "attention_mask": torch.ones(1, 70).long()}
    with pytest.raises(InputError, match=r"cannot read a batch .*input_ids \(1, 70\).*--max_length"):
        check_classifier(model, long)
    model, _ = loaded("vit", folder)
    with pytest.raises(InputError, match="--image_size"):
        check_classifier(model, {"pixel_values": torch.zeros(1, 3, 16, 16)})
    with torch.no_grad():
        model.classifier.bias.fill_(math.nan)
    with pytest.raises(InputError, match="NaN"):
        check_classifier(model, {"pixel_values": torch.zeros(1, 3, 8, 8)})


@pytest.mark.parametrize("kind", ["bert", "vit", "clip"])
def test_modes_train_comparable_parts(kind, folder, tmp_path):
    """Every mode that cuts keeps STT's sizes and trains as many parameters; the head is the same in all of them."""
    kept, trained, head = {}, {}, {}
    for name, mode in modes.MODES.items():
        model, encoder = loaded(kind, folder)
        n_head, everything = sum(p.numel() for p in head_parameters(model).values()), count_parameters(model)["total"]
        selection = None
        if mode.score:
            batches = [encoder.batch(encoder.rows(items(kind, tmp_path)))]
            selection, _ = modes.select_units(mode, model, batches, None, Budget(0.3), 0.01, seed=0)
            kept[name] = [len(ids) for ids in selection.values()]
        modes.prepare(mode, model, selection, modes.Lora(r=4), "train")
        counts = count_parameters(model)
        trained[name], head[name] = counts["trained"], counts["trained"] - counts["trained_without_head"]
        assert head[name] == n_head > 0
    assert trained["baseline"] == everything
    cutting = ("stt", "random", "wanda_adapt", "magnitude_pruning")
    assert len({tuple(kept[name]) for name in (*cutting, "stt_lora")}) == 1
    assert {trained[name] for name in cutting} == {sum((2 * 32 + 1) * n for n in kept["stt"]) + 2 * 32 + n_head}


# ---------------------------------------------------------------- batches


def test_texts_in_batches(folder):
    """Padded on the right, with the masks and token types of the texts alone; padding changes no output, and an input
    that the model does not take is left out."""
    for kind in ("bert", "gpt2", "distilbert"):
        model, encoder = loaded(kind, folder)
        rows = encoder.rows(items(kind, folder))
        batch = encoder.batch(rows)
        lengths = batch["attention_mask"].sum(1).tolist()
        assert lengths == [encoder.length(row) for row in rows]
        assert len(set(lengths)) > 1
        labels = batch.pop("labels")
        assert labels.tolist() == [0, 1, 2, 0, 1, 2]
        with torch.no_grad():
            together = model(**batch).logits
            alone = torch.cat([model(**{name: value for name, value in encoder.batch([row]).items()
                                        if name != "labels"}).logits for row in rows])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert "token_type_ids" not in loaded("distilbert", folder)[1].accepted


def test_token_types_are_those_of_the_tokenizer(folder):
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for text in SENTENCES for w in text.split()})]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    model, _ = loaded("bert", folder)
    encoder = TextEncoder(tokenizer, 32, ("input_ids", "attention_mask", "token_type_ids"))
    row = encoder.rows([Item(("the sea", "ice is cold"), 0, "")])[0]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]  # [CLS] the sea [SEP] ice is cold [SEP]
    batch = encoder.batch([row, encoder.rows([Item(("snow", "ice is"), 0, "")])[0]])
    assert batch["token_type_ids"][1].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    with torch.no_grad():
        with_types = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        without = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert not torch.equal(with_types, without)


def test_cut_texts(folder, caplog):
    _, encoder = loaded("bert", folder)
    short = TextEncoder(encoder.reader, 4, encoder.accepted)
    rows = short.rows(items("bert", folder))
    assert {short.length(row) for row in rows} == {4}
    assert "6 of 6 texts are cut on the right to fit 4 tokens" in caplog.text
    with pytest.raises(InputError, match="max_length 1 leaves no room"):
        TextEncoder(encoder.reader, 1, encoder.accepted).rows(items("bert", folder))


def test_padding_does_not_count_in_the_selection(folder):
    """The same neurons whether the texts come in one padded batch or one by one."""
    model, encoder = loaded("bert", folder)
    rows = encoder.rows(items("bert", folder))
    together = stt.select(model, [encoder.batch(rows)], topk_ratio=0.3)
    alone = stt.select(model, [encoder.batch([row]) for row in rows], topk_ratio=0.3)
    padded = stt.select(model, [encoder.batch(rows)], topk_ratio=0.3, count_padding=True)
    assert together == alone
    assert together != padded


# ---------------------------------------------------------------- loss and metrics


@pytest.mark.parametrize("kind", ["bert", "qwen2", "vit"])
def test_the_loss_of_an_accumulated_batch(kind, folder, tmp_path):
    """Micro-batches of 2 and 4, each divided by the examples of both, add up to the loss and gradient of 6."""
    model, encoder = loaded(kind, folder, without_dropout=True)
    rows = encoder.rows(items(kind, tmp_path))
    with_loss(model)
    whole, parts = encoder.batch(rows), [encoder.batch(rows[:2]), encoder.batch(rows[2:])]
    expected = F.cross_entropy(model(**{name: value for name, value in whole.items() if name != "labels"}).logits,
                               whole["labels"])
    loss = model(**whole).loss
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
    accumulated = sum(model(**part, num_items_in_batch=torch.tensor(6)).loss for part in parts)
    torch.testing.assert_close(accumulated, expected)
    others = torch.autograd.grad(accumulated, model.parameters(), allow_unused=True)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert training_flops(model, whole) > 0


def test_the_loss_of_quantities():
    logits, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.5, 2.0, 1.0])
    assert classification_loss(logits, labels).item() == pytest.approx((0.25 + 0 + 9) / 3)
    assert classification_loss(logits, labels, 5).item() == pytest.approx(9.25 / 5)


def test_metrics_by_hand():
    labels, predictions = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 1]
    tp, fp, fn, tn = 3, 1, 1, 3
    assert METRICS["accuracy"](labels, predictions) == 6 / 8
    assert METRICS["f1"](labels, predictions) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert METRICS["matthews"](labels, predictions) == pytest.approx(
        (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    three, guessed = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 0]
    by_hand = [2 * 1 / (2 * 1 + 1 + 1), 2 * 1 / (2 * 1 + 1 + 0), 2 * 2 / (2 * 2 + 0 + 1)]
    assert METRICS["macro_f1"](three, guessed) == pytest.approx(sum(by_hand) / 3)
    assert [row["f1"] for row in by_class(three, guessed, "abc")] == pytest.approx(by_hand)
    assert [row["examples"] for row in by_class(three, guessed, "abc")] == [2, 1, 3]
    assert confusion(three, guessed, 3) == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]


def test_correlations_by_hand():
    labels, predictions = [1.0, 2.0, 3.0, 5.0], [2.0, 1.0, 4.0, 40.0]
    centred = [[value - sum(values) / 4 for value in values] for values in (labels, predictions)]
    dot = sum(a * b for a, b in zip(*centred, strict=True))
    norms = math.prod(math.sqrt(sum(value**2 for value in values)) for values in centred)
    assert METRICS["pearson"](labels, predictions) == pytest.approx(dot / norms)
    assert METRICS["spearman"](labels, predictions) == pytest.approx(1 - 6 * (1 + 1) / (4 * 15))  # ranks 1234, 2134
    assert METRICS["spearman"](labels, [1.0] * 4) == METRICS["pearson"](labels, [1.0] * 4) == 0.0
    assert METRICS["matthews"]([0, 1, 1], [1, 1, 1]) == 0.0


def test_latency_is_paired(folder, tmp_path, monkeypatch):
    """A model that takes twice as long is twice as slow at every percentile."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("stt.evaluate.latency._seconds", lambda model, batch: (next(ticks), model)[1])
    batch = {"pixel_values": torch.zeros(5, 3, 8, 8)}
    found = compare_latency(2.0, 4.0, batch, rounds=4)
    assert found["ratio"] == {"seconds_per_batch_p50": 2, "seconds_per_batch_p90": 2, "seconds_per_batch_p99": 2,
                              "examples_per_second": 0.5}
    assert (found["dense"]["examples_per_second"], found["sliced"]["examples_per_second"]) == (2.5, 1.25)
    assert next(ticks) == 2 * 3 + 2 * 4
    monkeypatch.undo()
    model, _ = loaded("vit", folder)
    alone = compare_latency(model, None, batch, rounds=3)
    assert set(alone) == {"batch_size", "rounds", "dense"}
    assert 0 < alone["dense"]["seconds_per_batch_p50"] <= alone["dense"]["seconds_per_batch_p99"]
