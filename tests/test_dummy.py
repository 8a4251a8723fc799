"""Made-up inputs: a decoder that classifies needs no padding token for them."""
from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import transformers
from transformers import PreTrainedModel

import stt
from stt.dummy import fitting_inputs
from stt.export import export_hf

CONFIGS = {"GPT2": tiny.GPT2, "Llama": tiny.GQA | {"pad_token_id": None}, "Qwen2": tiny.GQA | {"pad_token_id": None}}
CLASSES = [f"{name}For{task}Classification" for name in CONFIGS for task in ("Sequence", "Token")]


def build(name: str) -> PreTrainedModel:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**CONFIGS[name.partition("For")[0]], num_labels=3))
    assert model.config.pad_token_id is None
    return tiny.randomised(model.eval())


@pytest.mark.parametrize("name", CLASSES)
def test_classifiers_without_a_padding_token(name: str) -> None:
    """A sequence classifier takes one example at a time, a token classifier any batch; both have their sites."""
    model = build(name)
    ids = fitting_inputs(model)["input_ids"]
    assert len(ids) == (1 if "Sequence" in name else 2)
    assert [site.width for site in stt.find_sites(model).values()] == [tiny.NEURONS] * 2
    if "Sequence" in name:
        with pytest.raises(ValueError, match="batch sizes > 1"):
            model(input_ids=ids.expand(2, -1))


@pytest.mark.parametrize("name", CLASSES)
def test_their_export_compares_outputs(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build(name)
    stt.apply(model, {site: torch.arange(9 + i) for i, site in enumerate(stt.find_sites(model))})
    stt.save(model, tmp_path / "sliced")
    caplog.set_level("INFO")
    export_hf(tmp_path / "sliced", tmp_path / "plain")
    assert "outputs differ by" in caplog.text
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        actual, expected = type(model).from_pretrained(tmp_path / "plain")(ids).logits, model(ids).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_an_example_that_does_not_fit_is_said() -> None:
    model = build("GPT2ForSequenceClassification")
    with pytest.raises(stt.InputError, match="does not fit GPT2ForSequenceClassification .*no padding token"):
        stt.find_sites(model, example={"input_ids": torch.ones(2, 4, dtype=torch.long)})
