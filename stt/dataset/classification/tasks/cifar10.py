"""CIFAR-10: small pictures of ten kinds of things (Krizhevsky 2009; hub uoft-cs/cifar10)."""
from __future__ import annotations

from stt.dataset.classification.base import Format

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FORMAT = Format("image", ("img",), NAMES)
