"""Multiple choice, for ARC-Easy, ARC-Challenge and OpenBookQA: the question, one line a choice; the answer is a letter.

Rows, one of:
- hub: `question` (ARC) or `question_stem` (OpenBookQA), `choices` {"text": [...], "label": [...]}, `answerKey`. Labels
  1-4, which part of ARC uses, become letters like all others: the first choice is A.
- LLM-Adapters: `instruction` "… question: Q Answer1: … Answer2: … Answer format: …", `answer` "answer2".
"""
from __future__ import annotations

import re
import string
from collections.abc import Sequence

from stt.dataset.base import Example, Row, make_example, text_field
from stt.errors import InputError

MAX_NEW_TOKENS = 8
_INSTRUCTION = re.compile(r"question:\s*(.+?)\s*(Answer1:.+?)\s*Answer format:", re.DOTALL)
_LETTER = re.compile(r"(?<!\w)[A-Z](?![\w'’])")


def to_example(row: Row, where: str) -> Example:
    if "instruction" in row:
        question, texts, right = _read_instruction(row, where)
    else:
        question, texts, right = _read_hub_row(row, where)
    letters = string.ascii_uppercase[:len(texts)]
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    return make_example("\n".join([question, *lines, "Answer:"]), letters[right], letters, where)


def extract(response: str, example: Example) -> str | None:
    """The first capital that stands alone and is one of the choices; a lone small letter counts too."""
    alone = response.strip().strip("().").upper()
    if alone in example.choices:
        return alone
    return next((letter for letter in _LETTER.findall(response) if letter in example.choices), None)


def _read_hub_row(row: Row, where: str) -> tuple[str, Sequence[str], int]:
    question = text_field(row, "question_stem" if "question_stem" in row else "question", where)
    choices = row.get("choices")
    if not isinstance(choices, dict):
        raise InputError(f"{where}: field 'choices' must be {{\"text\": [...], \"label\": [...]}}, got {choices!r}.")
    texts, labels = choices.get("text"), choices.get("label")
    if not _are_texts(texts) or not _are_texts(labels) or len(texts) != len(labels) or len(set(labels)) != len(labels):
        raise InputError(f"{where}: 'choices' must have 2 to 26 texts and as many different labels, got {choices!r}.")
    key = text_field(row, "answerKey", where)
    if key not in labels:
        raise InputError(f"{where}: answerKey {key!r} is none of its choices ({', '.join(labels)}).")
    return question, [text.strip() for text in texts], labels.index(key)


def _are_texts(values: object) -> bool:
    return (isinstance(values, list) and 2 <= len(values) <= len(string.ascii_uppercase)
            and all(isinstance(value, str) and value.strip() for value in values))


def _read_instruction(row: Row, where: str) -> tuple[str, Sequence[str], int]:
    match = _INSTRUCTION.search(text_field(row, "instruction", where))
    if match is None:
        raise InputError(f"{where}: the instruction holds no \"question: … Answer1: … Answer format:\".")
    _, *pieces = re.split(r"Answer(\d+):", match[2])  # number, text, number, text …
    texts = [text.strip() for text in pieces[1::2]]
    if pieces[::2] != [str(number) for number in range(1, len(texts) + 1)] or not _are_texts(texts):
        raise InputError(f"{where}: the choices must be Answer1 … AnswerN, each with a text.")
    labels = [f"answer{number}" for number in range(1, len(texts) + 1)]
    answer = text_field(row, "answer", where)
    if answer not in labels:
        raise InputError(f"{where}: answer {answer!r} is none of its choices ({', '.join(labels)}).")
    return match[1], texts, labels.index(answer)
