"""The four examples of selective optimizers, on real digits: they learn, and what they keep is enough."""
from __future__ import annotations

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BUDGETS = {"vit_no_trainer": 4000, "vit_trainer": 4000, "vit_lora_no_trainer": 2000, "vit_lora_trainer": 2000}
METHODS = {"vit_no_trainer": "id3", "vit_trainer": "pafi", "vit_lora_no_trainer": "pafi", "vit_lora_trainer": "id3"}


@pytest.mark.parametrize("name", BUDGETS)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    main = importlib.import_module(name).main
    found = main(["--method", METHODS[name], "--epochs", "1", "--summary", str(tmp_path / "summary.pt")])
    words = capsys.readouterr().out
    assert f"weights trained: {BUDGETS[name]}" in words
    assert words.count(f"accuracy {found:.1%}") >= 2  # trained, and loaded into the base
    assert found > 0.2  # a tenth by chance
    assert (tmp_path / "summary.pt").stat().st_size < 12 * BUDGETS[name] + 30_000
