"""The script behind the README's table: its marks, and that it stops at a failed run."""
from __future__ import annotations

from pathlib import Path

import pytest
from scripts_loader import load_script

compare_modes = load_script("compare_modes")
BEGIN, END = compare_modes.MARKS


def test_the_table_replaces_what_stands_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for table in ("new\n", "newer\n"):
        compare_modes.write_between_marks(page, table)
        assert page.read_text() == f"before\n{BEGIN}\n{table}{END}\nafter\n"


def test_the_readme_has_the_marks_once() -> None:
    text = (compare_modes.CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index(BEGIN) < text.index("| baseline |") < text.index(END)


def test_a_failed_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_modes.main(["--modes", "stt", "--heads", "train", "--seeds", "1", "--jobs", "1", "--output_dir",
                               str(tmp_path), "--flags", "--task nowhere"]) == 1
    assert "stt-train-seed0" in capsys.readouterr().err
    assert "unknown task 'nowhere'" in (tmp_path / "stt-train-seed0.log").read_text()
    assert not (tmp_path / "stt-train-seed0").exists()
