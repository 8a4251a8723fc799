"""ARC-Easy: grade-school science questions (arxiv.org/abs/1803.05457; hub allenai/ai2_arc, configuration ARC-Easy).

Row formats: stt/dataset/multiple_choice.py.
"""
from __future__ import annotations

from stt.dataset.multiple_choice import MAX_NEW_TOKENS, extract, to_example

__all__ = ["MAX_NEW_TOKENS", "extract", "to_example"]
