"""CLEVR, counted: how many things does a picture show, 3 to 10 (VTAB, arxiv.org/abs/1910.04867)?

On the hub clip-benchmark/wds_vtab-clevr_count_all with columns webp and cls; in a table image and label.
"""
from __future__ import annotations

from stt.dataset.classification.base import Format

NAMES = ("three", "four", "five", "six", "seven", "eight", "nine", "ten")
FORMAT = Format("image", ("webp",), NAMES, label="cls")
