"""RTE: does one sentence follow from another (arxiv.org/abs/1804.07461; hub nyu-mll/glue, rte)?

Columns sentence1, sentence2, label. GLUE hides the test labels: its validation split is the test set.
"""
from __future__ import annotations

from stt.dataset.classification.base import Format

FORMAT = Format("text", ("sentence1", "sentence2"), ("entailment", "not_entailment"))
