"""The recipe with attention heads: what is kept, what moves, what is said of it, and that an interruption changes
nothing."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SHIPPED, results, run
from torch import Tensor
from transformers import AutoModelForCausalLM

from stt import verbs
from stt.checkpoint import load
from stt.heads import find_heads
from stt.llm_arguments import LLMArgs, resolved
from stt.recipe import kept_fractions
from stt.selection import Selection
from tests.attention import masked

ATTENTION = [f"model.layers.{layer}.self_attn" for layer in range(5)]
QUICK = ("--num_epoch", "1", "--no_eval_epochs", "--train_size", "12")
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def both(small, tmp_path_factory) -> Path:
    """A run that keeps half of the neurons and one of the two heads of every layer."""
    folder = tmp_path_factory.mktemp("both")
    assert run(small, folder, "--units", "both", "--keep_ratio", "0.5", "--eval_restored", *QUICK) == 0
    return folder


def before_and_after(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """What of every tensor of the shipped model a run has kept, and what it has made of it, by name. A head is 32
    channels, and two query heads read one key/value head."""
    selection = Selection.load(folder / "run" / "selection.safetensors")
    after, pairs = load(folder / "run" / "checkpoint").state_dict(), {}
    for name, value in load_file(SHIPPED / "model.safetensors").items():
        site = next((site for site in selection if name.startswith(site + ".")), None)
        if site is not None:
            size = 1 if ".mlp." in name else 64 if ".q_proj" in name or ".o_proj" in name else 32
            rows = (selection[site].unsqueeze(1) * size + torch.arange(size)).flatten()
            value = value.index_select(1 if "down_proj" in name or "o_proj" in name else 0, rows)
        pairs[name] = value, after[name]
    return pairs


def test_both_are_recorded(both: Path) -> None:
    found = results(both)
    rows = {site["name"]: site for site in found["sites"]}
    assert len(rows) == 10
    assert [(rows[name]["units"], rows[name]["width"], rows[name]["kept"], rows[name]["query_heads_of_unit"])
            for name in ATTENTION] == [("heads", 2, 1, 2)] * 5
    assert {(row["units"], row["width"], row["kept"]) for name, row in rows.items() if name not in ATTENTION} == {
        ("neurons", 384, 192)}
    assert all(row["jaccard"] is not None and row["margin"] is not None for row in rows.values())
    assert all(("both" in row) == (name not in ATTENTION) for name, row in rows.items())  # the composition
    assert found["selected_by"] == "stt, activation_norm of heads"
    kept = found["parameters"]["kept_fraction_of_units"], found["parameters"]["kept_fraction_of_heads"]
    assert kept == (0.5, 0.5) == tuple(kept_fractions(Selection.load(both / "run" / "selection.safetensors")).values())
    assert found["throughput"].keys() >= {"dense", "sliced", "ratio"}


def test_the_report_shows_both(both: Path) -> None:
    text = (both / "run" / "report.md").read_text()
    for expected in ("| neurons | 50.0 % kept in 5 sites, chosen by stt, activation_norm of heads |",
                     "| heads | 50.0 % kept in 5 sites,", "## Kept neurons", "## Kept heads", "## Composition",
                     "a key/value head with the 2 query head(s) that read it", "| model.layers.3.self_attn | 2 | 1 |"):
        assert expected in text
    assert (both / "run" / "plots" / "kept_heads.png").stat().st_size > 5000
    assert "<b>50.0 %</b><span>heads kept</span>" in (both / "run" / "report.html").read_text()
    card = (both / "run" / "checkpoint" / "README.md").read_text()
    assert "without 50.0 % of its feed-forward neurons (960 of 1,920 are kept) and 50.0 % of its attention heads " \
           "(5 of 10 are kept)" in " ".join(card.split())
    assert "| head score | `activation_norm` |" in card
    assert "--to dense" in card
    assert "--to hf" not in card


def test_the_kept_parts_and_the_head_moved(both: Path) -> None:
    moved = {name for name, (kept, trained) in before_and_after(both).items() if not torch.equal(kept, trained)}
    assert moved == {name for name in load_file(SHIPPED / "model.safetensors")
                     if ".mlp." in name or ".self_attn." in name or name == "model.embed_tokens.weight"}


def test_both_export_to_the_dense_model(both: Path, capsys: pytest.CaptureFixture) -> None:
    """The exported model without the removed heads and neurons is the run's; a plain narrow one cannot be made."""
    checkpoint = str(both / "run" / "checkpoint")
    assert verbs.main(["export", checkpoint, "--to", "hf", "--out", str(both / "hf")]) == 2
    assert "keeps some of the attention heads" in capsys.readouterr().err
    assert not (both / "hf").exists()
    assert verbs.main(["export", checkpoint, "--to", "dense", "--out", str(both / "dense")]) == 0
    sliced, dense = load(checkpoint), AutoModelForCausalLM.from_pretrained(both / "dense")
    assert dense.num_parameters() == results(both)["parameters"]["dense"]
    selection = sliced.stt_selection
    cut = masked(dense, find_heads(dense), {name: selection[name] for name in ATTENTION})
    with torch.no_grad():
        for layer, block in enumerate(cut.model.layers):
            removed = torch.ones(384).index_fill(0, selection[f"model.layers.{layer}.mlp"], 0).nonzero().flatten()
            block.mlp.down_proj.weight[:, removed] = 0
        torch.testing.assert_close(sliced(IDS).logits, cut(IDS).logits, rtol=0, atol=1e-4)  # logits of about 20
        assert (dense(IDS).logits - cut(IDS).logits).abs().max() > 0.1


def test_heads_alone(small, tmp_path) -> None:
    """No neuron is removed, none moves; the whole share of heads is kept, as one head of two is the least."""
    assert run(small, tmp_path, "--units", "heads", "--mode", "random", "--heads_ratio", "0.1", *QUICK) == 0
    found = results(tmp_path)
    assert {(site["units"], site["kept"], site["jaccard"]) for site in found["sites"]} == {("heads", 1, None)}
    assert found["selected_by"] == "random of heads"
    assert found["flops"]["selection"] == 0  # it looks at no data
    moved = {name for name, (kept, trained) in before_and_after(tmp_path).items() if not torch.equal(kept, trained)}
    assert not [name for name in moved if ".mlp." in name]
    assert len(moved) == 5 * 7 + 1
    text = (tmp_path / "run" / "report.md").read_text()
    assert "## Kept heads" in text
    assert "## Kept neurons" not in text
    assert "## Composition" not in text


def test_interrupted_and_resumed_equals_uninterrupted(small, tmp_path, monkeypatch) -> None:
    """Bitwise: weights and answers, with adapters on neurons and on heads, which both move."""
    flags = ("--units", "both", "--mode", "stt_lora", "--lora_dropout", "0.1", "--no_eval_epochs",
             "--train_size", "8")
    assert run(small, tmp_path / "whole", *flags) == 0

    def stop(self, args, state, control, **_):
        if state.epoch >= 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stt.trainers.loop.Record.on_epoch_begin", stop)
        assert run(small, tmp_path / "cut", *flags) == 130
    assert run(small, tmp_path / "cut", *flags, "--heads_ratio", "1", "--resume") == 2
    assert run(small, tmp_path / "cut", *flags, "--resume") == 0
    one, other = (load_file(tmp_path / each / "run" / "checkpoint" / "model.safetensors") for each in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    answers = [json.loads((tmp_path / each / "run" / "outputs.json").read_text()) for each in ("whole", "cut")]
    assert answers[0] == answers[1]
    pairs = before_and_after(tmp_path / "whole")
    assert {".".join(name.split(".")[3:]) for name, (kept, trained) in pairs.items() if not torch.equal(kept, trained)
            and ".layers." in name} >= {f"self_attn.{each}_proj.weight" for each in "qkvo"}


def test_run_names_differ() -> None:
    common = {"model": str(SHIPPED)}
    names = [resolved(LLMArgs(**common, **given)).run_name for given in (
        {}, {"units": "heads"}, {"units": "both"}, {"units": "both", "heads_ratio": 0.5})]
    assert names[1:] == [f"stt-tiny-clutrr-stt-top0.3-{part}-seed42" for part in ("heads", "both", "both-heads0.5")]
    assert len(set(names)) == 4
