"""OpenBookQA: science questions that need a little common knowledge (arxiv.org/abs/1809.02789; hub allenai/openbookqa,
configuration main; the book of facts is not used).

Row formats: stt/dataset/multiple_choice.py.
"""
from __future__ import annotations

from stt.dataset.multiple_choice import MAX_NEW_TOKENS, extract, to_example

__all__ = ["MAX_NEW_TOKENS", "extract", "to_example"]
