"""The table of all types finds what it is there to find: what raises, is not exact, not covered or without effect."""
from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

import stt
from stt.errors import InputError
from stt.sites import find_sites

from . import matrix, page
from .build import build
from .coverage import Coverage, coverage
from .expected import failures
from .matrix import Row, measured
from .worker import Worker

GOOD = Row("bert", "BertForMaskedLM", 2, "plain", 0, Coverage(6, 6, (), ()), 0.5, (), 0.0, 0.0, 1e-7, 1e-7, 1e-7)
WIDTH_REASON = "BertForMaskedLM has no config entry that gives its feed-forward blocks, and nothing else, another width"


def test_a_good_row_has_no_failure() -> None:
    assert not failures(GOOD)


@pytest.mark.parametrize(("change", "said"), [
    ({"error": "ERROR: TypeError: no"}, "ERROR: TypeError: no"),
    ({"blocks": 0}, "nothing is sliced"),
    ({"model_type": "resnet"}, "is sliced, and was refused"),
    ({"left_out": 1}, "1 blocks are left out"),
    ({"whole": 1e-7}, "with all neurons kept it differs by 1.0e-07"),
    ({"sliced": 1e-4}, "sliced it differs by 1.0e-04"),
    ({"sliced": float("nan")}, "sliced it differs by nan"),
    ({"effect": 1e-5}, "masking a site changes only 1.0e-05"),
    ({"silent": ("layer.0",)}, "masking layer.0 changes nothing"),
    ({"coverage": Coverage(6, 5, (), ("layer.0.bias",))}, "not sliced and not named: layer.0.bias"),
    ({"coverage": Coverage(6, 5, ("head.bias",), ())}, "named as left out: head.bias"),
    ({"coverage": Coverage(0, 0, (), ())}, "0 axes of a known feed-forward width"),
    ({"reloaded": None}, "reloaded it differs by None"),
    ({"reloaded": 1e-4}, "reloaded it differs by 0.0001"),
    ({"exported": None}, "exported it differs by None"),
    ({"exported": 1e-4}, "exported it differs by 0.0001"),
    ({"reason": WIDTH_REASON}, "why not: BertFor"),
])
def test_every_fault_is_one(change: dict[str, object], said: str) -> None:
    assert any(sentence.startswith(said) for sentence in failures(dataclasses.replace(GOOD, **change)))


def test_what_raises_is_a_row_and_the_table_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    def broken(model_type: str) -> matrix.Built:
        if model_type == "gpt2":
            raise RuntimeError("no gpt2\ntoday")
        return build(model_type)

    monkeypatch.setattr(matrix, "build", broken)
    assert page.write(tmp_path / "table.md", ["gpt2", "resnet", "bloom"]) == 1
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| gpt2 | GPT2LMHeadModel |" in table
    assert "| ERROR: RuntimeError: no gpt2 |" in table
    assert "| bloom | BloomForCausalLM | 2 | plain | 6/6 | 0 |" in table
    assert [line for line in capsys.readouterr().err.splitlines() if "ERROR" in line] == \
        ["gpt2: ERROR: RuntimeError: no gpt2"]
    assert page.write(tmp_path / "table.csv", ["resnet"]) == 0


def test_an_export_that_does_not_load_is_a_row(tmp_path: Path) -> None:
    class Broken(Worker):
        def run(self, folder: Path, model_class: str, inputs: dict[str, object]) -> list[torch.Tensor]:
            raise InputError(f"the exported {model_class} does not load without stt")

    with Broken() as worker:
        row = measured("bert", worker, tmp_path)
    assert row.error.startswith("ERROR: InputError: the exported BertForMaskedLM does not load without stt")
    assert row.reloaded == 0.0


def test_coverage_is_counted_from_the_shapes() -> None:
    built = build("llama")  # gate, up and down of two layers
    sites = find_sites(built.model)
    units = {name: torch.arange(3) for name in sites}
    whole = stt.apply(copy.deepcopy(built.model), units)
    assert coverage(built, whole, (), ()) == Coverage(6, 6, (), ())
    first, second = sites
    part = stt.apply(copy.deepcopy(built.model), {first: units[first]})
    names = tuple(f"{second}.{name}_proj.weight" for name in ("gate", "up", "down"))
    assert coverage(built, part, (), ()) == Coverage(6, 3, (), names)
    assert coverage(built, part, names[:1], ()) == Coverage(6, 3, names[:1], names[1:])
    assert coverage(built, part, (), [f"{second}."]) == Coverage(6, 3, names, ())


def test_fused_and_transposed_widths_are_seen() -> None:
    for model_type, axes in (("phi3", 4), ("gpt2", 6), ("mixtral", 4), ("dbrx", 6), ("moshi", 4)):
        built = build(model_type)
        assert coverage(built, built.model, (), ()).axes == axes, model_type
