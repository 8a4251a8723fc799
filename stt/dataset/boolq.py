"""BoolQ: a yes/no question about a passage (arxiv.org/abs/1905.10044; hub google/boolq).

Rows: `passage`, `question`, `answer` (true or false), as on the hub and in the official train.jsonl and dev.jsonl. The
published test labels are not public, so the validation split is the test set.
LLM-Adapters rows (`instruction`, `answer` "true"/"false") are read too, but they have no passage: the model must know
the answer by heart. That is another and harder task, whose accuracies do not compare; loading it logs a warning.
"""
from __future__ import annotations

import functools
import logging
import re

from stt.dataset.base import Example, Row, make_example, text_field
from stt.errors import InputError

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 8
LABELS = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_WORD = re.compile(r"\b(yes|no|true|false)\b")
_INSTRUCTION = re.compile(r"question:\s*(.+?)\s*Answer format:", re.DOTALL)


def to_example(row: Row, where: str) -> Example:
    if "instruction" in row:
        return _without_passage(row, where)
    if not isinstance(row.get("answer"), bool):
        raise InputError(f"{where}: field 'answer' must be true or false, got {row.get('answer')!r}.")
    prompt = f"{text_field(row, 'passage', where)}\n{_question(text_field(row, 'question', where))}"
    return make_example(prompt, "yes" if row["answer"] else "no", ("yes", "no"), where)


def extract(response: str, example: Example) -> str | None:
    """The first yes or no; true and false count as them."""
    match = _WORD.search(response.casefold())
    return LABELS[match[1]] if match else None


def _question(question: str) -> str:
    return f"Question: {question.rstrip('? ')}?\nAnswer:"


def _without_passage(row: Row, where: str) -> Example:
    _warn_without_passage()
    match = _INSTRUCTION.search(text_field(row, "instruction", where))
    if match is None:
        raise InputError(f"{where}: the instruction holds no \"question: … Answer format:\".")
    answer = text_field(row, "answer", where)
    return make_example(_question(match[1]), LABELS.get(answer, answer), ("yes", "no"), where)


@functools.cache  # once a process, not once a row
def _warn_without_passage() -> None:
    logger.warning("these BoolQ rows have no passage (LLM-Adapters format): a different task than BoolQ, and its"
                   " accuracy does not compare")
