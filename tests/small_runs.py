"""Runs of the recipe that take seconds: the shipped model on a little of the shipped data."""
from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import train_llm
from stt import cli
from stt.arguments import CHECKOUT
from stt.llm_arguments import LLMArgs

SHIPPED = CHECKOUT / "models" / "stt-tiny"


def small_flags(folder: Path) -> list[str]:
    """Flags for a run of seconds: 24 training stories, 8 to validate and to test, a short text, all in `folder`."""
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        rows = json.loads((CHECKOUT / "datasets" / "clutrr" / f"{split}.json").read_text())
        (folder / f"{split}.json").write_text(json.dumps(rows[:count]))
    (folder / "text.md").write_text((SHIPPED / "heldout.txt").read_text()[:2000])
    return ["--data_dir", str(folder), "--ppl_text", str(folder / "text.md"), "--train_batch", "4", "--num_epoch", "2",
            "--active_sample_ratio", "0.5", "--log_interval", "1"]


def run(small: list[str], folder: Path, *flags: str) -> int:
    """The exit code of a run in folder/run. It measures its speed on two tokens instead of sixteen."""
    with mock.patch("stt.evaluate.llm.NEW_TOKENS", 2):
        return cli.run(train_llm.main, LLMArgs, [*small, "--output_dir", str(folder), "--run_name", "run", *flags])


def results(folder: Path) -> dict:
    """Its results.json."""
    return json.loads((folder / "run" / "results.json").read_text())
