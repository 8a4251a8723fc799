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

# of train_classifier.py; "digits" comes with scikit-learn and needs no row
CLASSIFICATION_DATA_SETS = {
    "clutrr": DATA_SETS["clutrr"],
    **{name: DataSource(DATASETS_FOLDER / name, "nyu-mll/glue", name)
       for name in ("mrpc", "qnli", "sst2", "cola", "rte", "stsb", "qqp")},
    "agnews": DataSource(DATASETS_FOLDER / "agnews", "fancyzhx/ag_news"),
    "imdb": DataSource(DATASETS_FOLDER / "imdb", "stanfordnlp/imdb"),
    "clevr_count": DataSource(DATASETS_FOLDER / "clevr_count", "clip-benchmark/wds_vtab-clevr_count_all"),
    "eurosat": DataSource(DATASETS_FOLDER / "eurosat", "blanchon/EuroSAT_RGB"),
    "gtsrb": DataSource(DATASETS_FOLDER / "gtsrb", "tanganke/gtsrb"),
    "cifar10": DataSource(DATASETS_FOLDER / "cifar10", "uoft-cs/cifar10"),
    "cifar100": DataSource(DATASETS_FOLDER / "cifar100", "uoft-cs/cifar100"),
    "mnist": DataSource(DATASETS_FOLDER / "mnist", "ylecun/mnist"),
}
