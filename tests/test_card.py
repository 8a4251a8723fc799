"""The model card says how a model was sliced and how to load it, in the form the hub reads."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from test_checkpoint import kept_units, sliced_tiny
from tiny_text import build_tokenizer

import stt
from stt.card import card

RESULTS = {"task": "clutrr", "mode": "stt", "accuracy": {"test": 0.75, "n": 450, "majority": None},
           "perplexity": {"dense": 4.2686, "trained": 5.5}}


def test_front_matter_is_what_the_hub_parses() -> None:
    model, _ = sliced_tiny("llama")
    model.config.stt["base"] = "some/dense-model"
    model.add_model_tags(["sea", "pruned"])
    data = ModelCard(card(model)).data
    assert data.to_dict() == {"library_name": "transformers", "base_model": "some/dense-model",
                              "tags": ["select-then-train", "pruned", "sea"]}


@pytest.mark.parametrize("base", [None, "folder", "not a/hub/id"])
def test_a_base_that_is_not_on_the_hub_is_not_linked(base: str | None, tmp_path: Path) -> None:
    model, _ = sliced_tiny("llama")
    (tmp_path / "folder").mkdir()
    model.config.stt["base"] = str(tmp_path / "folder") if base == "folder" else base
    text = card(model)
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert str(tmp_path) not in text


def test_what_it_says() -> None:
    """Counts by hand: 10 and 11 of 44 neurons in two blocks of BART's encoder, 12 and all 50 in its decoder."""
    model, batch = tiny.build("bart")
    sites = list(stt.find_sites(model))
    selection = stt.select(model, [batch], score="magnitude", keep=0.5, seed=7)
    kept = {site: selection[site][:count] for site, count in zip(sites[:3], (10, 11, 12), strict=True)}
    stt.apply(model, stt.Selection(kept, selection.meta))
    text = card(model)
    assert "without 55.9 % of its feed-forward neurons (83 of 188 are kept)" in text  # 105 / 188
    assert "| 44 | 2 | 10 | 10.5 | 11 | 23.9 % |" in text  # 10.5 / 44
    assert "| 50 | 2 | 12 | 31 | 50 | 62.0 % |" in text
    assert "| method | `magnitude` |" in text
    assert "| seed | `7` |" in text
    assert f"| calibration digest | `{selection.meta['calibration']['digest']}` |" in text
    assert f"| torch | `{torch.__version__}` |" in text
    assert "BartForConditionalGeneration.from_pretrained" in text
    assert "Results" not in text


@pytest.mark.parametrize("results", [RESULTS, "cut", [], None])
def test_results_of_the_run_the_checkpoint_is_in(results: object, tmp_path: Path) -> None:
    model, _ = sliced_tiny("llama")
    stt.save(model, tmp_path / "run" / "checkpoint")
    first = (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    if results is not None:
        (tmp_path / "run" / "results.json").write_text("{" if results == "cut" else json.dumps(results))
    stt.load(tmp_path / "run" / "checkpoint").save_pretrained(tmp_path / "elsewhere" / "copy")
    text = (tmp_path / "elsewhere" / "copy" / "README.md").read_text()
    assert "## Results" not in first
    assert ("## Results" in text) == (results is RESULTS)
    if results is RESULTS:
        rows = [line for line in text.splitlines() if line.startswith(("| task", "| mode", "| acc", "| perp"))]
        assert rows == ["| task | clutrr |", "| mode | stt |", "| accuracy, test | 75.0 % |",
                        "| perplexity, dense | 4.27 |", "| perplexity, trained | 5.5 |"]


def test_results_of_the_dense_model_are_not_its_own(tmp_path: Path) -> None:
    dense, _ = tiny.build("llama")
    dense.save_pretrained(tmp_path / "run" / "checkpoint")
    (tmp_path / "run" / "results.json").write_text(json.dumps(RESULTS))
    model = type(dense).from_pretrained(tmp_path / "run" / "checkpoint")
    stt.apply(model, kept_units(model)).save_pretrained(tmp_path / "elsewhere" / "sliced")
    assert "## Results" not in (tmp_path / "elsewhere" / "sliced" / "README.md").read_text()


def test_a_card_that_is_there_stays(tmp_path: Path) -> None:
    model, _ = sliced_tiny("llama")
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    stt.save(model, tmp_path, build_tokenizer())  # replaces the folder whole
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "transformers"


def test_the_code_of_the_card_runs(tmp_path: Path) -> None:
    model, batch = sliced_tiny("llama")
    model.save_pretrained(tmp_path)
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code.replace("FOLDER_OR_HUB_ID", str(tmp_path)), names)
    assert torch.equal(names["model"](**batch).logits, model(**batch).logits)
