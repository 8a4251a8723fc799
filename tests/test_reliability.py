"""How far a selection can be trusted: halves of the data, the margin at the cut, and which tokens count."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

import stt
from stt import budget, scores
from stt.calibrate import calibrate
from stt.errors import InputError
from stt.selecting import Budget, composition, kept, measure
from stt.sites import find_sites


def text_batch(rows: int = 8, length: int = 6, seed: int = 5) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def halves_of(ids: Tensor) -> list[list[int]]:
    """Examples by the last bit of the sha256 of their tokens."""
    bits = [int(hashlib.sha256(row.numpy().tobytes()).hexdigest(), 16) % 2 for row in ids]
    return [[i for i, bit in enumerate(bits) if bit == half] for half in (0, 1)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "modernbert", "albert"])
@pytest.mark.parametrize("score", ["activation_mean", "wanda", "contribution", "taylor"])
def test_each_half_is_measured_as_if_alone(name: str, score: str) -> None:
    model, _ = tiny.build(name, torch.float64)
    batch = text_batch()
    for row, length in enumerate((6, 3, 5, 6, 2, 4, 6, 1)):
        batch["attention_mask"][row, length:] = 0
        batch["input_ids"][row, length:] = 0
    if score == "taylor":
        batch["labels"] = batch["input_ids"].clone() if name in ("llama", "gpt2") else torch.arange(8) % 3
    real = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    parts = [[i for i, row in enumerate(real) if halves_of(row[None])[half]] for half in (0, 1)]
    assert all(parts)
    sites = find_sites(model)

    def measured(batches: list[dict[str, Tensor]]) -> object:
        return calibrate(model, sites, [scores.make(score)], batches, progress=False)

    together = measured([{key: value[:3] for key, value in batch.items()}, {key: v[3:] for key, v in batch.items()}])
    for half, rows in zip(together.halves, parts, strict=True):
        alone = measured([{key: value[rows] for key, value in batch.items()}])
        for site in sites:
            torch.testing.assert_close(half[0][site], alone.scores[0][site], rtol=1e-9, atol=1e-12)
    whole = measured([batch])
    assert whole.digest == together.digest
    for site in sites:
        torch.testing.assert_close(whole.scores[0][site], together.scores[0][site], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("method", "size"), [("stt", Budget(0.3)), ("stt", Budget(keep_ratio=0.3)),
                                              ("contribution", Budget(keep_ratio=0.25)),
                                              ("wanda", Budget(keep_ratio=0.25, across_sites=True))])
def test_the_jaccard_is_that_of_selections_made_on_the_halves(method: str, size: Budget) -> None:
    model, _ = tiny.build("llama")
    batch = text_batch(12)
    selection = kept(measure(model, [batch], None, [method], progress=False), method, size)
    a, b = (kept(measure(model, [{key: value[rows] for key, value in batch.items()}], None, [method], progress=False),
                 method, size) for rows in halves_of(batch["input_ids"]))
    for site, entry in selection.meta["reliability"].items():
        both, either = set(a[site].tolist()) & set(b[site].tolist()), set(a[site].tolist()) | set(b[site].tolist())
        assert entry["jaccard"] == pytest.approx(len(both) / len(either))
    assert selection.meta["reliability"].keys() == selection.keys()


def test_without_two_halves_or_a_cut_there_is_nothing_to_say(tmp_path: Path) -> None:
    model, batch = tiny.build("llama")
    one = {"input_ids": batch["input_ids"][:1]}
    by_one = stt.select(model, [one], keep=0.5).meta["reliability"]
    assert {entry["jaccard"] for entry in by_one.values()} == {None}
    of_all = stt.select(model, [text_batch()], keep=1.0)
    assert {tuple(entry.values()) for entry in of_all.meta["reliability"].values()} == {(1.0, None)}
    by_weights = stt.select(model, score="magnitude", keep=0.5).meta["reliability"]
    assert {entry["jaccard"] for entry in by_weights.values()} == {None}
    of_all.save(tmp_path / "selection.safetensors")
    assert stt.Selection.load(tmp_path / "selection.safetensors").meta["reliability"] == of_all.meta["reliability"]
    json.dumps(of_all.meta, allow_nan=False)


def test_a_half_without_a_token_that_counts_is_no_half() -> None:
    """All answers lie in examples of one half: the selection is made, and nothing is said of its halves."""
    model, _ = tiny.build("llama")
    batch = text_batch()
    one = halves_of(batch["input_ids"])[0]
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][one, 3:] = batch["input_ids"][one, 3:]
    for score in ("stt", "wanda"):
        selection = stt.select(model, [batch], score=score, keep=0.5, select_on="answer")
        assert {entry["jaccard"] for entry in selection.meta["reliability"].values()} == {None}
        alone = {name: value[one] for name, value in batch.items()}
        assert selection == stt.select(model, [alone], score=score, keep=0.5, select_on="answer")


def test_what_the_data_does_not_decide_has_no_halves() -> None:
    model, _ = tiny.build("llama")
    measured = measure(model, [text_batch()], None, ["stt", "random"], progress=False)
    assert {entry["jaccard"] for entry in kept(measured, "random", Budget(0.3)).meta["reliability"].values()} == {None}
    assert None not in {entry["jaccard"] for entry in kept(measured, "stt", Budget(0.3)).meta["reliability"].values()}


def test_the_digest_is_of_the_texts_however_padding_counts() -> None:
    model, _ = tiny.build("llama")
    ids = text_batch(2)["input_ids"]
    padded = {"input_ids": torch.cat([ids, ids[:, :2] * 0], 1),
              "attention_mask": torch.cat([torch.ones_like(ids), ids[:, :2] * 0], 1)}
    digests = {stt.select(model, [batch], count_padding=counts).meta["calibration"]["digest"]
               for batch in ({"input_ids": ids}, padded) for counts in (False, True)}
    assert len(digests) == 1


def test_margin_by_hand() -> None:
    score = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.5], dtype=torch.float64)
    spread = float(score.std())
    assert budget.margin(score, torch.tensor([0, 2])) == pytest.approx((4.0 - 3.5) / spread)
    assert budget.margin(score, torch.tensor([0, 2, 4])) == pytest.approx((3.5 - 2.0) / spread)
    assert budget.margin(score, torch.tensor([0, 1, 2])) == pytest.approx((4.0 - 3.5) / spread)  # 1 for another
    assert budget.margin(score, torch.tensor([1])) == 0.0
    assert budget.margin(score, torch.arange(5)) == float("inf")
    assert budget.margin(torch.ones(4), torch.tensor([0, 1])) == 0.0


# ---------------------------------------------------------------- which tokens count


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("part", ["prompt", "answer"])
def test_select_on_counts_only_the_tokens_of_that_part(name: str, part: str) -> None:
    model, _ = tiny.build(name, torch.float64)
    batch = text_batch()
    batch["attention_mask"][2, 4:] = 0
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :4] = -100
    batch["labels"][2] = -100
    batch["labels"][2, 3] = 7
    made = [scores.make("gate_product"), scores.make("activation_mean")]
    seen = calibrate(model, find_sites(model), made, [batch], progress=False, select_on=part)
    chosen = (batch["labels"] != -100) if part == "answer" else (batch["labels"] == -100)
    chosen &= batch["attention_mask"] == 1
    assert seen.tokens == int(chosen.sum())
    for site in find_sites(model).values():
        pre, hidden = [], []
        gate, down = model.get_submodule(site.gate_module), model.get_submodule(site.down_module)
        hooks = [gate.register_forward_hook(lambda module, args, output, to=pre: to.append(output)),
                 down.register_forward_pre_hook(lambda module, args, to=hidden: to.append(args[0]))]
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(seen.scores[0][site.name], hidden[0].view(8, 6, -1)[chosen].mean(0))
        torch.testing.assert_close(seen.scores[1][site.name], pre[0].view(8, 6, -1)[chosen].mean(0))


def test_select_on_refuses_what_it_cannot_know() -> None:
    model, _ = tiny.build("llama")
    batch = text_batch()
    with pytest.raises(InputError, match="select_on='answer' needs a decoder and, in every batch, `labels`"):
        stt.select(model, [batch], select_on="answer")
    with pytest.raises(InputError, match="unknown part to select on 'answers'. Did you mean 'answer'"):
        stt.select(model, [batch], select_on="answers")
    with pytest.raises(InputError, match="no token of the calibration data belongs to the answer"):
        stt.select(model, [batch | {"labels": torch.full_like(batch["input_ids"], -100)}], select_on="answer")
    with pytest.raises(InputError, match="count_padding counts every position, select_on='prompt' only some"):
        stt.select(model, [batch | {"labels": batch["input_ids"]}], select_on="prompt", count_padding=True)
    encoder, classes = tiny.build("bert")
    with pytest.raises(InputError, match="select_on='prompt' needs a decoder"):
        stt.select(encoder, [classes | {"labels": torch.zeros(len(classes["input_ids"])).long()}], select_on="prompt")


# ---------------------------------------------------------------- the pass ends at the last site


@pytest.mark.parametrize(("name", "runs"), [("llama", 0), ("gpt2", 0), ("bert", 0), ("vit", 0), ("swin", 0), ("t5", 0),
                                            ("albert", 2), ("bert-chunked", 7)])
def test_nothing_behind_the_last_site_is_computed(name: str, runs: int) -> None:
    """Not even its down projection, unless the block may be called again: ALBERT's layers share one, and chunks of the
    positions go through it one after the other."""
    model, batch = tiny.build(name.removesuffix("-chunked"))
    if name == "bert-chunked":
        batch = {"input_ids": batch["input_ids"]}
        model.config.chunk_size_feed_forward = 1
        for layer in model.bert.encoder.layer:
            layer.chunk_size_feed_forward = 1
    sites = find_sites(model)
    calls: list[str] = []
    down = model.get_submodule(list(sites.values())[-1].down_module)
    hook = down.register_forward_hook(lambda *_: calls.append("down"))
    calibrate(model, sites, [scores.make("activation_mean")], [batch], progress=False)
    hook.remove()
    assert len(calls) == runs


def test_gradients_need_the_whole_model() -> None:
    model, batch = tiny.build("llama")
    ran: list[nn.Module] = []
    sites = find_sites(model)
    hook = model.lm_head.register_forward_hook(lambda module, *_: ran.append(module))
    calibrate(model, sites, [scores.make("taylor")], [batch, batch], progress=False)
    hook.remove()
    assert len(ran) == 2


def test_the_composition_is_of_stt_alone() -> None:
    model, batch = tiny.build("llama")
    measured = measure(model, [batch], None, ["stt", "contribution"], compensate="mean", progress=False)
    by_stt, other = kept(measured, "stt", Budget(0.3), "none"), kept(measured, "contribution", Budget(0.3))
    assert not by_stt.new_values
    assert other.new_values
    assert all(sum(parts.values()) == len(by_stt[site]) for site, parts in composition(measured, by_stt).items())


# ---------------------------------------------------------------- models that run over time first


@pytest.mark.parametrize("kind", ["XLNetModel"])
def test_time_first_models_are_measured_example_by_example(kind: str) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=44)
    model = tiny.randomised(getattr(transformers, kind)(config)).double().eval()
    lengths = (6, 3, 5, 2)
    ids = text_batch(4)["input_ids"]
    mask = torch.stack([(torch.arange(6) < length).long() for length in lengths])
    sites = find_sites(model)
    assert all(site.is_time_first for site in sites.values())
    together = calibrate(model, sites, [scores.make("contribution")], [{"input_ids": ids, "attention_mask": mask}],
                         progress=False)
    alone = calibrate(model, sites, [scores.make("contribution")],
                      [{"input_ids": row[None, :length]} for row, length in zip(ids, lengths, strict=True)],
                      progress=False)
    for site in sites:
        torch.testing.assert_close(together.scores[0][site], alone.scores[0][site], rtol=1e-6, atol=1e-8)
        for a, b in zip(together.halves or (), alone.halves or (), strict=True):
            torch.testing.assert_close(a[0][site], b[0][site], rtol=1e-6, atol=1e-8)
