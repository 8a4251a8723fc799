"""QNLI: does a sentence answer a question (arxiv.org/abs/1804.07461; hub nyu-mll/glue, qnli)?

Columns question, sentence, label. GLUE hides the test labels: its validation split is the test set.
"""
from __future__ import annotations

from stt.dataset.classification.base import Format

FORMAT = Format("text", ("question", "sentence"), ("entailment", "not_entailment"))
