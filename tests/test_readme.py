"""The documentation tells the truth: its snippets run, its files exist, CI runs its command."""
from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "docs/tutorials.md", "docs/scores.md"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (CHECKOUT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


SNIPPETS = [(page, i) for page in PAGES for i in range(len(blocks(page, "python")))]


@pytest.mark.parametrize(("page", "number"), SNIPPETS)
def test_snippets_run(page, number, tmp_path, monkeypatch):
    for name in ("models", "datasets"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    monkeypatch.chdir(tmp_path)
    code = compile(blocks(page, "python")[number], f"{page} block {number}", "exec", dont_inherit=True)
    exec(code, {"__name__": "snippet"})


def test_quick_start_is_short():
    assert sum(bool(line.strip()) for line in blocks("README.md", "python")[0].splitlines()) <= 15


def test_file_tree_is_true():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, flags=re.DOTALL).group(1)
    folder = Path()
    for line in tree.splitlines():
        names = re.findall(r"[\w/]+\.py|[\w-]+/(?:[\w-]+/?)*", line.split("   ")[0])
        folder = Path() if not line.startswith(" ") else folder
        for name in names:
            assert (CHECKOUT / folder / name).exists(), folder / name
        if not line.startswith(" ") and line.startswith("stt/"):
            folder = Path("stt")


def test_links_lead_somewhere():
    for page in [*PAGES, *(str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "docs").glob("*.md"))]:
        text = (CHECKOUT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert ((CHECKOUT / page).parent / target).exists(), f"{page}: {target}"


def test_ci_runs_the_readme_command(tmp_path):
    """With python3 and pip replaced by echo, .ci/run prints the command that the README gives."""
    command = re.search(r"<!-- test command -->\n```bash\n(.*?)\n```", README).group(1)
    first_line = subprocess.run(["bash", ".ci/run"], cwd=CHECKOUT, capture_output=True, text=True, timeout=60,
                                env={"PATH": f"{_fakes(tmp_path)}:/usr/bin:/bin"}, check=False).stdout.splitlines()[0]
    assert first_line == f"+ {command}"


def _fakes(folder: Path) -> Path:
    """A python3 that fails at once, so that nothing is installed."""
    fake = folder / "python3"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    return folder


def test_the_scores_in_short_are_those_of_the_whole_tables():
    whole = [cells(line) for line in (CHECKOUT / "docs" / "scores.md").read_text(encoding="utf-8").splitlines()]
    short = [cells(line) for line in README.splitlines() if line.startswith("| ") and " → " in line][1:]
    assert len(short) > 5
    for name, compensation, *numbers in short:
        known = {cell for row in whole if row[:2] == [name, compensation] for cell in row[2:]}
        assert known >= set(numbers), name


def cells(line: str) -> list[str]:
    """The cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.split("|")[1:-1]]
