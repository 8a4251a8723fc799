"""QQP: do two questions ask the same (hub nyu-mll/glue, qqp)?

Columns question1, question2, label. GLUE hides the test labels: its validation split is the test set.
"""
from __future__ import annotations

from stt.dataset.classification.base import Format

FORMAT = Format("text", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"))
