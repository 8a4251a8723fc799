"""CLUTRR: the family relation of two people in a story, one of 18 classes (arxiv.org/abs/1908.06177).

Rows as in stt/dataset/clutrr.py: story, query, target_text. The story and the question are two texts.
"""
from __future__ import annotations

from stt.dataset.base import Row
from stt.dataset.classification.base import Format
from stt.dataset.clutrr import to_example
from stt.dataset.kinship import RELATIONS


def texts(row: Row, where: str) -> tuple[tuple[str, ...], object]:
    """(story, question) and the relation."""
    example = to_example(row, where)
    story, _, question = example.prompt.rpartition("\n")
    return (story, question), example.label


FORMAT = Format("text", ("story", "query"), tuple(RELATIONS), texts=texts)
