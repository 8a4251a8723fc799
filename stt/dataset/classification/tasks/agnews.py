"""AG News: the section of a news item (arxiv.org/abs/1509.01626; hub fancyzhx/ag_news). Columns text, label."""
from __future__ import annotations

from stt.dataset.classification.base import Format

FORMAT = Format("text", ("text",), ("World", "Sports", "Business", "Sci/Tech"))
