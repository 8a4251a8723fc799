"""docs/tutorial.ipynb runs from top to bottom, and what it shows is what it computes."""
from __future__ import annotations

import re

import nbformat
from nbclient import NotebookClient

from stt.arguments import CHECKOUT

NOTEBOOK = CHECKOUT / "docs" / "tutorial.ipynb"


def printed(notebook: nbformat.NotebookNode) -> str:
    """Everything its cells have printed."""
    return "".join(output.text for cell in notebook.cells for output in cell.get("outputs", [])
                   if output.output_type == "stream" and output.name == "stdout")


def test_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shown = nbformat.read(NOTEBOOK, as_version=4)
    ran = nbformat.read(NOTEBOOK, as_version=4)
    for name in ("models", "datasets"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    NotebookClient(ran, timeout=280, resources={"metadata": {"path": tmp_path}}).execute()
    text = printed(ran)
    assert "difference after loading: 0.0" in text
    assert text.splitlines()[:6] == printed(shown).splitlines()[:6]
    before, after = map(float, re.search(r"([\d.]+)% before, ([\d.]+)% after", text).groups())
    assert before < 30 < after
    assert sum("image/png" in output.get("data", {}) for cell in ran.cells for output in cell.get("outputs", [])) == 3
