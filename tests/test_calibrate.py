"""What calibration accepts, what it refuses, and that it leaves the model as it was. (Its numbers: test_scores.py.)"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, BatchFeature, BertForQuestionAnswering, PreTrainedModel

from stt import scores
from stt.calibrate import Calibration, calibrate
from stt.errors import InputError
from stt.mlps.stt_linear import STTLinear
from stt.sites import find_sites
from stt.stt_transformer import STTTransformer

NAMES = ["activation_mean", "activation_rate", "wanda", "gate_product"]
TOKENIZER = tiny.tokenizer()
TEXTS = ["w5 w9 w33 w7 w8", "w4 w60", "w11 w12 w13"]
IDS = torch.tensor([[5, 9, 33, 7, 8], [4, 60, 0, 0, 0], [11, 12, 13, 0, 0]])
MASK = (IDS != 0).long()
CLASSES = torch.tensor([0, 2, 1])
TEXT_MODELS = ["qwen2", "gpt2", "bert", "distilbert"]


def measured(model: PreTrainedModel, batches: object, names: list[str] = NAMES, **options: object) -> Calibration:
    made = [scores.make(name) for name in names]
    return calibrate(model, find_sites(model), made, batches, progress=False, **options)


def assert_same(actual: Calibration, expected: Calibration) -> None:
    for ours, theirs in zip(actual.scores, expected.scores, strict=True):
        for site, value in theirs.items():
            torch.testing.assert_close(ours[site], value, rtol=1e-5, atol=1e-6)
    assert (actual.tokens, actual.examples, actual.digest) == (expected.tokens, expected.examples, expected.digest)


# ---------------------------------------------------------------- every kind of batch


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> dict[str, object]:
        return {"input_ids": IDS[i], "attention_mask": MASK[i], "labels": CLASSES[i], "row": i}


KINDS: dict[str, Callable[[], object]] = {
    "mapping": lambda: [{"input_ids": IDS, "attention_mask": MASK}],
    "mapping-with-more": lambda: [{"input_ids": IDS, "attention_mask": MASK, "labels": CLASSES, "label": CLASSES,
                                   "text": TEXTS, "idx": CLASSES}],
    "batch-encoding": lambda: [BatchEncoding({"input_ids": IDS, "attention_mask": MASK})],
    "ids-mask": lambda: [(IDS, MASK)],
    "list-ids-mask": lambda: [[IDS, MASK]],
    "ids-mask-labels": lambda: [(IDS, MASK, IDS)],
    "ids-mask-types-labels": lambda: [(IDS, MASK, torch.zeros_like(IDS), CLASSES)],
    "ids-mask-classes": lambda: [(IDS, MASK, CLASSES)],
    "lists-of-strings": lambda: [TEXTS[:1], tuple(TEXTS[1:])],
    "plain-list-of-strings": lambda: TEXTS,
    "plain-tuple-of-strings": lambda: tuple(TEXTS),
    "text-column": lambda: [{"text": TEXTS}],
    "single-rows": lambda: [{"input_ids": IDS[i:i + 1, :n]} for i, n in enumerate((5, 2, 3))],
    "tensors": lambda: [IDS[:1], IDS[1:2, :2], IDS[2:, :3]],
    "generator": lambda: (batch for batch in [(IDS[:2], MASK[:2]), (IDS[2:], MASK[2:])]),
    "tensor-loader": lambda: DataLoader(TensorDataset(IDS, MASK, CLASSES), batch_size=2),
    "mapping-loader": lambda: DataLoader(Rows(), batch_size=2),
    "list-of-loader": lambda: list(DataLoader(Rows(), batch_size=2, shuffle=False))[:100],
    "string-loader": lambda: DataLoader(TEXTS, batch_size=2),
    "bool-mask": lambda: [{"input_ids": IDS, "attention_mask": MASK.bool()}],
    "float-mask": lambda: [{"input_ids": IDS, "attention_mask": MASK.float()}],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_every_kind_of_text_batch_gives_the_same(name: str, kind: str) -> None:
    model, _ = tiny.build(name)
    expected = measured(model, [{"input_ids": IDS, "attention_mask": MASK}])
    actual = measured(model, KINDS[kind](), tokenizer=TOKENIZER)
    assert_same(actual, expected)
    assert (actual.examples, actual.tokens) == (3, 10)


def test_a_long_list_of_strings_is_batched() -> None:
    model, _ = tiny.build("qwen2")
    texts = [" ".join(f"w{3 + (i * 7 + j) % 90}" for j in range(1 + i % 6)) for i in range(40)]
    one_by_one = measured(model, [[text] for text in texts], tokenizer=TOKENIZER)
    assert_same(measured(model, texts, tokenizer=TOKENIZER), one_by_one)


def test_strings_are_cut_to_what_the_tokenizer_allows() -> None:
    model, _ = tiny.build("bert")
    long = " ".join(["w9"] * 100)  # the model has 64 positions
    limited = tiny.tokenizer()
    limited.model_max_length = 64
    assert measured(model, [long], tokenizer=limited).tokens == 64


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_every_kind_of_image_batch_gives_the_same(name: str) -> None:
    model, batch = tiny.build(name)
    images = batch["pixel_values"]
    expected = measured(model, [{"pixel_values": images}])
    for data in ([images], [(images, CLASSES[:2])], [[images, CLASSES[:2]]], [BatchFeature({"pixel_values": images})],
                 [{"pixel_values": images, "labels": CLASSES[:2]}], DataLoader(TensorDataset(images, CLASSES[:2]))):
        assert_same(measured(model, data), expected)
    assert expected.examples == 2


def test_float_inputs_follow_the_models_dtype() -> None:
    model, batch = tiny.build("vit", torch.bfloat16)
    by_site = measured(model, [batch["pixel_values"].float()]).scores[0]
    assert all(values.isfinite().all() for values in by_site.values())


def test_embeddings_instead_of_ids() -> None:
    model, _ = tiny.build("qwen2")
    with torch.no_grad():
        embedded = model.get_input_embeddings()(IDS)
    expected = measured(model, [(IDS, MASK)])
    actual = measured(model, [{"inputs_embeds": embedded, "attention_mask": MASK}])
    for ours, theirs in zip(actual.scores, expected.scores, strict=True):
        assert all(torch.allclose(ours[site], theirs[site], atol=1e-6) for site in theirs)
    assert measured(model.to(torch.bfloat16), [{"inputs_embeds": embedded}]).examples == 3  # float32 for a bf16 model


def test_labels_of_other_tasks_are_no_input() -> None:
    """The head's own arguments do not reach the body, nor the loss."""
    config = tiny.build("bert")[0].config
    config.num_labels = 2
    model = tiny.randomised(BertForQuestionAnswering(config)).eval()
    batch = {"input_ids": IDS, "attention_mask": MASK}
    spans = {"start_positions": CLASSES, "end_positions": CLASSES}
    assert_same(measured(model, [batch | spans]), measured(model, [batch]))


# ---------------------------------------------------------------- encoder-decoders


def test_each_side_has_its_own_padding() -> None:
    model, _ = tiny.build("bart")
    torch.manual_seed(0)
    answers = torch.randint(3, 90, (3, 4))
    lengths = (4, 1, 2)
    labels = torch.stack([torch.where(torch.arange(4) < n, row, -100) for row, n in zip(answers, lengths, strict=True)])
    single = [{"input_ids": IDS[i:i + 1, :n], "labels": answers[i:i + 1, :lengths[i]]}
              for i, n in enumerate((5, 2, 3))]
    expected = measured(model, single)
    actual = measured(model, [{"input_ids": IDS, "attention_mask": MASK, "labels": labels}])
    shifted = torch.cat([torch.full((3, 1), 2), answers[:, :-1]], 1)
    masked = measured(model, [{"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": shifted,
                               "decoder_attention_mask": (labels != -100).long()}])
    for ours in (actual, masked):
        assert_same(ours, expected)
    assert len(expected.scores[0]) == 4


def test_only_the_encoders_left_padding_moves() -> None:
    """Both sides have the same shape here: labels must stay where they are."""
    model, _ = tiny.build("t5")
    labels = torch.tensor([[5, 6, 7, 8, 9], [4, 4, 3, -100, -100], [8, 7, 6, 5, -100]])
    right = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    left = {"input_ids": torch.stack([row.roll(int((row == 0).sum())) for row in IDS]), "labels": labels}
    left["attention_mask"] = (left["input_ids"] != 0).long()
    assert not torch.equal(left["input_ids"], IDS)
    assert_same(measured(model, [left], NAMES + ["taylor"]), measured(model, [right], NAMES + ["taylor"]))
    shown = {"decoder_input_ids": IDS.flip(0), "decoder_attention_mask": MASK.flip(0)}
    for batch in (left, right):
        batch.update(shown)
        del batch["labels"]
    assert_same(measured(model, [left]), measured(model, [right]))


def test_a_decoder_without_input_is_refused() -> None:
    with pytest.raises(InputError, match="has a decoder: every calibration batch needs `labels` or `decoder"):
        measured(tiny.build("t5")[0], [(IDS, MASK)])


# ---------------------------------------------------------------- mistakes


class Nothing:
    def __iter__(self) -> Iterator[Tensor]:
        return iter(())


@pytest.mark.parametrize("empty", [(), [], Nothing(), DataLoader(TensorDataset(IDS[:0]))])
def test_empty_data(empty: object) -> None:
    with pytest.raises(InputError, match="the calibration data is empty: give at least one batch"):
        measured(tiny.build("qwen2")[0], empty)


@pytest.mark.parametrize(("data", "message"), [
    ([3], "must be a mapping of tensors, a tensor, a tuple of tensors or a list of strings, got int"),
    ([[]], "must be a mapping of tensors.*got list"),
    ([[1, 2]], "must be a mapping of tensors.*got list of int"),
    ([["a", 2]], "must be a mapping of tensors.*got list of str"),
    ([{"labels": IDS}], r"must hold a tensor 'input_ids', got a mapping of labels \(Tensor\)"),
    ([{"input_ids": [[1, 2]]}], r"must hold a tensor 'input_ids', got a mapping of input_ids \(list\)"),
    ([{}], "must hold a tensor 'input_ids', got a mapping of nothing"),
    ([TEXTS], r"a batch of strings needs a tokenizer: pass tokenizer=\.\.\."),
    ([{"text": TEXTS}], "a batch of strings needs a tokenizer"),
    ([(IDS, IDS)], "the second tensor of a tuple must be the attention mask"),
    ({"input_ids": IDS}, "must be an iterable of batches, got one dict: put it into a list"),
    (BatchEncoding({"input_ids": IDS}), "must be an iterable of batches, got one BatchEncoding"),
    (IDS, "must be an iterable of batches, got one Tensor"),
    ("w4 w5", "must be an iterable of batches, got one str"),
])
def test_wrong_batches(data: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measured(tiny.build("qwen2")[0], data)


def test_padding_without_a_padding_token() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    model, _ = tiny.build("qwen2")
    with pytest.raises(InputError, match="no padding token: set tokenizer.pad_token = tokenizer.eos_token"):
        measured(model, TEXTS, tokenizer=tokenizer)
    assert measured(model, TEXTS[:1], tokenizer=tokenizer).tokens == 5


def test_a_mask_that_fits_no_row_is_refused() -> None:
    """Longformer pads to its window by itself: nobody knows which rows are real."""
    model, batch = tiny.build("longformer")
    assert batch["input_ids"].shape[1] % 4
    with pytest.raises(InputError, match="sees 16 positions but the attention mask has 14: pass a mask that fits"):
        measured(model, [batch])
    batch = {name: nn.functional.pad(value, (0, 1)) for name, value in batch.items()}
    assert measured(model, [batch]).tokens == 12


def test_a_model_that_drops_the_padding_itself() -> None:
    class Unpadding(tiny.Toy):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object) -> dict[str, Tensor]:
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            return super().forward(input_ids[real.bool()].unsqueeze(0))

    def block() -> tiny.Block:
        return tiny.Block([(tiny.HIDDEN, 44), (44, tiny.HIDDEN)], lambda x, a: a(x).relu())

    assert_same(measured(Unpadding(block), [(IDS, MASK)]), measured(tiny.Toy(block), [(IDS, MASK)]))


def test_gradients_need_labels() -> None:
    model, _ = tiny.build("bert")
    with pytest.raises(InputError, match="needs gradients, so every calibration batch needs `labels`"):
        measured(model, [(IDS, MASK)], ["taylor"])
    by_name = measured(model, [{"input_ids": IDS, "attention_mask": MASK, "labels": CLASSES}], ["taylor"])
    assert_same(measured(model, [(IDS, MASK, CLASSES)], ["taylor"]), by_name)
    headless, batch = model.bert, {"input_ids": IDS, "labels": CLASSES}
    with pytest.raises(InputError, match="BertModel has no task head"):
        measured(headless, [batch], ["taylor"])


def test_causal_models_need_no_labels_for_gradients() -> None:
    """Every real token is then a target."""
    model, _ = tiny.build("qwen2")
    labels = IDS.masked_fill(MASK == 0, -100)
    expected = measured(model, [{"input_ids": IDS, "attention_mask": MASK, "labels": labels}], ["taylor"])
    assert_same(measured(model, [(IDS, MASK)], ["taylor"]), expected)
    assert_same(measured(model, [IDS[:1], IDS[1:2, :2], IDS[2:, :3]], ["taylor"]), expected)
    answers = labels.index_fill(1, torch.tensor([1]), -100)
    only_answers = measured(model, [{"input_ids": IDS, "attention_mask": MASK, "labels": answers}], ["taylor"])
    assert not torch.allclose(only_answers.scores[0]["model.layers.0.mlp"], expected.scores[0]["model.layers.0.mlp"])


def test_a_sliced_model_is_measured_compact() -> None:
    """In scatter mode positions of the dense model would be taken for its neurons."""
    model, _ = tiny.build("phi3")
    kept = dict.fromkeys(find_sites(model), [3, 7, 8, 30])
    dense = measured(model, [(IDS, MASK)], ["magnitude", "activation_mean"])
    sliced = STTTransformer(model, kept).transform()
    with pytest.raises(InputError, match="model.layers.0.mlp is sliced and in scatter mode: set `infer"):
        measured(sliced, [(IDS, MASK)])
    for module in sliced.modules():
        if isinstance(module, STTLinear):
            module.inference_time = True
    again = measured(sliced, [(IDS, MASK)], ["magnitude", "activation_mean"])
    for site, ids in kept.items():
        torch.testing.assert_close(again.scores[0][site], dense.scores[0][site][ids])
    first = next(iter(kept))  # later layers read what the narrow first one returns
    torch.testing.assert_close(again.scores[1][first], dense.scores[1][first][kept[first]], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- the model is left as it was


def state(model: nn.Module) -> tuple:
    return ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()],
            [p.grad is None for p in model.parameters()], [(len(m._forward_hooks), len(m._forward_pre_hooks),
                                                            len(m._backward_hooks)) for m in model.modules()],
            torch.is_grad_enabled())


@pytest.mark.parametrize("names", [NAMES, ["taylor"], NAMES + ["taylor"]], ids=["no-grad", "gradients", "both"])
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(names: list[str], fails: bool) -> None:
    model, _ = tiny.build("qwen2")
    model.train()
    model.model.layers[0].eval()
    model.lm_head.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(False)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    before = state(model)
    wrong = torch.full((1, 3), 10**6)
    if fails:
        with pytest.raises(IndexError):
            measured(model, [IDS, wrong], names)
    else:
        measured(model, [IDS, IDS], names)
    assert state(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def test_scores_of_one_pass_do_not_depend_on_each_other() -> None:
    model, _ = tiny.build("phi3")
    batch = {"input_ids": IDS, "attention_mask": MASK}
    together = measured(model, [batch], NAMES + ["taylor", "magnitude", "random"])
    for name, by_site in zip(NAMES + ["taylor", "magnitude", "random"], together.scores, strict=True):
        alone = measured(model, [batch], [name]).scores[0]
        assert all(torch.allclose(alone[site], by_site[site], rtol=1e-6, atol=0) for site in by_site)


def test_the_head_is_not_computed_unless_gradients_need_it() -> None:
    model, _ = tiny.build("qwen2")
    find_sites(model)
    calls, cached = [], []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    model.model.register_forward_pre_hook(lambda _, args, named: cached.append(named["use_cache"]), with_kwargs=True)
    measured(model, [IDS])
    assert calls == []
    assert cached == [False]
    measured(model, [IDS], ["taylor"])
    assert calls == [1]


def test_a_single_text_and_labels_in_a_tuple() -> None:
    """A row with one `text` is one example; the third tensor of a tuple, shaped as the tokens, is their labels."""
    model, batch = tiny.build("llama")
    texts = ["w5 w6 w7", "w8 w9"]
    rows = calibrate(model, find_sites(model), [scores.make("gate_product")], [{"text": text} for text in texts],
                     tiny.tokenizer(), progress=False)
    assert (rows.examples, rows.tokens) == (2, 5)
    labels = batch["input_ids"].masked_fill(torch.arange(7) < 4, -100)
    mask = torch.ones_like(labels)
    named = measured(model, [{"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels}], ["taylor"])
    given = measured(model, [(batch["input_ids"], mask, labels)], ["taylor"])
    types = measured(model, [(batch["input_ids"], mask, mask)], ["taylor"])
    plain = measured(model, [(batch["input_ids"], mask)], ["taylor"])
    assert_same(given, named)
    assert_same(types, plain)
    assert not torch.allclose(*(one.scores[0]["model.layers.0.mlp"] for one in (given, plain)))


@pytest.mark.parametrize("ids", [torch.arange(3, 9), torch.zeros(0, 4).long(), torch.zeros(2, 0).long()])
def test_token_ids_that_are_no_batch(ids: Tensor) -> None:
    model, _ = tiny.build("llama")
    with pytest.raises(InputError, match=r"`input_ids` of a calibration batch must be \(examples, tokens\)"):
        measured(model, [{"input_ids": ids}], ["gate_product"])
