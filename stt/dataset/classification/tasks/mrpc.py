"""MRPC: do two sentences say the same (Dolan and Brockett 2005; hub nyu-mll/glue, mrpc)?

Columns sentence1, sentence2, label. GLUE hides the test labels: its validation split is the test set.
"""
from __future__ import annotations

from stt.dataset.classification.base import Format

FORMAT = Format("text", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1"))
