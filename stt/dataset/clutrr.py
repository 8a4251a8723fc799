"""CLUTRR: name the family relation between two people of a short story (arxiv.org/abs/1908.06177).

Rows, ours and the official ones alike: `story` (names in [brackets]), `query` "('A', 'B')", `target_text` (B is A's …,
one of 18 relations) and, if present, `target` (its number). Other fields are not read. Default folder: datasets/clutrr.
"""
from __future__ import annotations

import ast
import re

from stt.dataset.base import Example, Row, make_example, text_field
from stt.dataset.kinship import RELATIONS
from stt.errors import InputError

MAX_NEW_TOKENS = 16

_RELATION = re.compile(rf"({'|'.join(RELATIONS)})(?![\w-])")  # to the end of the word: no "son" in "son-in-law"
_IN_LAW = re.compile(r"[\s\u2010\u2011-]+in[\s\u2010\u2011-]+law\b")  # "son in law" and typographic hyphens


def to_example(row: Row, where: str) -> Example:
    first, second = _query(row, where)
    label = text_field(row, "target_text", where)
    example = make_example(_prompt(text_field(row, "story", where), first, second), label, RELATIONS, where)
    number = row.get("target", RELATIONS.index(label))
    if number != RELATIONS.index(label):
        raise InputError(f"{where}: target {number!r} is not the number of target_text {label!r}"
                         f" ({RELATIONS.index(label)}).")
    return example


def extract(response: str, example: Example) -> str | None:
    """The relation the first line begins with; "daughter-in-law" is never a "daughter"."""
    first_line = response.strip().split("\n")[0].casefold()
    match = _RELATION.match(_IN_LAW.sub("-in-law", first_line))
    return match[1] if match and match[1] in example.choices else None


def _prompt(story: str, first: str, second: str) -> str:
    story = story.replace("[", "").replace("]", "")
    return f"{story}\nHow is {second} related to {first}? {second} is {first}'s"


def _query(row: Row, where: str) -> tuple[str, str]:
    text = text_field(row, "query", where)
    try:
        query = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        query = None
    if not (isinstance(query, tuple) and len(query) == 2 and all(isinstance(name, str) and name for name in query)):
        raise InputError(f"{where}: query must be a pair of names like \"('A', 'B')\", got {text!r}.")
    return query
