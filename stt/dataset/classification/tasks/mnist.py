"""MNIST: handwritten digits (LeCun et al. 1998; hub ylecun/mnist)."""
from __future__ import annotations

from stt.dataset.classification.base import Format

FORMAT = Format("image", ("image",), tuple("0123456789"))
