"""Where the data sets live: task -> folder of this checkout (looked at first) and Hugging Face hub entry (next).

`--data_dir` goes before both, so a task without a row here works too.
"""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

DATASETS_FOLDER = Path(__file__).resolve().parent / "datasets"


class DataSource(NamedTuple):
    folder: Path
    hub_id: str | None = None      # None: the data is not on the hub
    hub_config: str | None = None


DATA_SETS = {
    "clutrr": DataSource(DATASETS_FOLDER / "clutrr"),  # written by scripts/make_clutrr
    "boolq": DataSource(DATASETS_FOLDER / "boolq", "google/boolq"),
    "arc-e": DataSource(DATASETS_FOLDER / "arc-e", "allenai/ai2_arc", "ARC-Easy"),
    "arc-c": DataSource(DATASETS_FOLDER / "arc-c", "allenai/ai2_arc", "ARC-Challenge"),
    "obqa": DataSource(DATASETS_FOLDER / "obqa", "allenai/openbookqa", "main"),
}
