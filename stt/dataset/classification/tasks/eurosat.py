"""EuroSAT: the use of the land in a satellite picture (arxiv.org/abs/1709.00029; hub blanchon/EuroSAT_RGB).

The official archive has one folder for every class and no splits: a fixed random tenth of it is the test set.
"""
from __future__ import annotations

from stt.dataset.classification.base import Format

NAMES = ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
         "Residential", "River", "SeaLake")
FORMAT = Format("image", ("image",), NAMES)
