"""IMDB: is a film review positive (Maas et al. 2011; hub stanfordnlp/imdb)? Columns text, label."""
from __future__ import annotations

from stt.dataset.classification.base import Format

FORMAT = Format("text", ("text",), ("neg", "pos"))
