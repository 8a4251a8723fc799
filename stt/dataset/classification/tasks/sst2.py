"""SST-2: is a phrase of a film review positive (Socher et al. 2013; hub nyu-mll/glue, sst2)?

Columns sentence, label. GLUE hides the test labels: its validation split is the test set.
"""
from __future__ import annotations

from stt.dataset.classification.base import Format

FORMAT = Format("text", ("sentence",), ("negative", "positive"))
