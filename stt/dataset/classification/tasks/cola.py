"""CoLA: is a sentence grammatical (arxiv.org/abs/1805.12471; hub nyu-mll/glue, cola)? By Matthews' correlation.

Columns sentence, label. GLUE hides the test labels: its validation split is the test set.
"""
from __future__ import annotations

from stt.dataset.classification.base import Format

FORMAT = Format("text", ("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy"))
