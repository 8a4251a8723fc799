"""STS-B: how alike are two sentences, from 0 to 5 (Cer et al. 2017; hub nyu-mll/glue, stsb)? By rank correlation.

Columns sentence1, sentence2, label. GLUE hides the test labels: its validation split is the test set.
"""
from __future__ import annotations

from stt.dataset.classification.base import Format

FORMAT = Format("text", ("sentence1", "sentence2"), (), ("spearman", "pearson"))
