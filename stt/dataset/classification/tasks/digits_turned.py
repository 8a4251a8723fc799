"""Digits lying on their side: those of digits.py, in the same splits, turned left by a quarter.

models/vit-digits has read upright digits only, and none of the test images in either view, so this is a task to adapt
it to.
"""
from __future__ import annotations

from functools import partial

import numpy

from stt.dataset.classification.base import Format
from stt.dataset.classification.tasks import digits

FORMAT = Format("image", ("image",), digits.FORMAT.labels, rows=partial(digits.rows, seen=numpy.rot90))
