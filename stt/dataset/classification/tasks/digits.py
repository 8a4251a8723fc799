"""Digits: 1797 handwritten digits of 8 x 8 pixels (UCI; they come with scikit-learn, sklearn.datasets.load_digits).

Fixed random splits, 1257 to train, 180 to validate and 360 to test. Who wrote which digit is not known, so people have
written both training and test images.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy

from stt.dataset.base import Splits, split_off
from stt.dataset.classification.base import Format
from stt.dataset.classification.pictures import Picture

N_TEST, N_VALIDATION = 360, 180
INK = 16  # the value of a black pixel
Seen = Callable[[numpy.ndarray], numpy.ndarray]


def rows(folder: Path | None, seen: Seen = lambda pixels: pixels) -> Splits | None:
    """The digits of scikit-learn, unless a folder is given; `seen` is what becomes of the pixels (0 to 255) of each."""
    if folder is not None:
        return None
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = numpy.round(data.images * (255 / INK)).astype(numpy.uint8)  # (N, 8, 8)
    test, others = split_off(range(len(pixels)), N_TEST, seed=0)
    validation, train = split_off(others, N_VALIDATION, seed=0)
    rows = [(f"digit {place}", {"image": _picture(seen(pixels[place]), place), "label": int(data.target[place])})
            for place in range(len(pixels))]
    return {split: [rows[place] for place in places] for split, places in
            (("train", train), ("validation", validation), ("test", test))}


def _picture(pixels: numpy.ndarray, place: int) -> Picture:
    from PIL import Image

    return Picture(f"digit {place}", partial(Image.fromarray, numpy.ascontiguousarray(pixels)))


FORMAT = Format("image", ("image",), tuple("0123456789"), rows=rows)
