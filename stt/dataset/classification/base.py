"""What every classification task is made of: an item, its label, what a task file says, and the items to select on."""
from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stt.dataset.base import Data, Row, Splits
from stt.dataset.classification.pictures import Picture, picture_of
from stt.errors import InputError

Modality = Literal["text", "image"]
TEXTS = (("text_a", "text_b"), ("text",))  # columns that a table may use whatever the task calls its own
IMAGE = "image"
LABEL = "label"


@dataclass(frozen=True)
class Item:
    """One thing to classify: one or two texts, or a picture. The label is the number of a class, or a quantity."""

    content: tuple[str, ...] | Picture
    label: int | float
    where: str


@dataclass(frozen=True)
class Format:
    """What a task file says. `fields` are the columns of the texts, or the one of the picture; `labels` the names of
    the classes in the order of their numbers (none: the label is a quantity to predict); the first of `metrics` is what
    epochs are compared by. `texts` makes texts and label of a row that has them in another form; `rows` reads a layout
    of the task's own from its folder (None: no folder is given) and returns None for any other layout."""

    modality: Modality
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    label: str = LABEL
    texts: Callable[[Row, str], tuple[tuple[str, ...], object]] | None = None
    rows: Callable[[Path | None], Splits | None] | None = None


@dataclass(frozen=True)
class LabelTask(Data[Item]):
    """A classification task: its splits, and what its labels mean."""

    modality: Modality
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = field(default=("accuracy",))

    @property
    def is_regression(self) -> bool:
        """True if a quantity is predicted, not a class."""
        return not self.labels


def to_item(row: Row, where: str, form: Format) -> Item:
    """The row as an item. Raises InputError for a missing column, an empty text or a label that is not known."""
    if form.texts is not None:
        texts, label = form.texts(row, where)
    elif form.modality == "image":
        columns = form.fields if form.fields[0] in row else (IMAGE,)
        return Item(picture_of(_column(row, columns[0], where), where), number_of(_label(row, form, where), form.labels,
                                                                                 where), where)
    else:
        named = next((names for names in (form.fields, *TEXTS) if set(names) <= row.keys()), form.fields)
        texts, label = tuple(_text(row, name, where) for name in named), _label(row, form, where)
        if not any(text.strip() for text in texts):
            raise InputError(f"{where}: {' and '.join(named)} are empty, so there is nothing to classify.")
    return Item(texts, number_of(label, form.labels, where), where)


def number_of(label: object, labels: Sequence[str], where: str) -> int | float:
    """The number of a class given by name or number, or a quantity if there are no classes."""
    text = str(label).strip()
    if not labels:
        try:
            quantity = float(text)
        except ValueError:
            quantity = math.nan
        if not math.isfinite(quantity):
            raise InputError(f"{where}: the label must be a finite number, got {text!r}.")
        return quantity
    if text in labels:
        return labels.index(text)
    if text.isascii() and text.isdigit() and int(text) < len(labels):
        return int(text)
    raise InputError(f"{where}: label {text!r} is not known; the classes are {_listed(labels)}, or their numbers from 0"
                     f" to {len(labels) - 1}.")


def check_classes(splits: dict[str, list[Item]], labels: Sequence[str], name: str) -> None:
    """Raises InputError if all training examples have one label: there would be nothing to learn."""
    seen = {item.label for item in splits["train"]}
    if len(seen) < 2:
        only = f" ({labels[seen.pop()]!r})" if labels and seen else ""
        raise InputError(f"all training examples of {name} have the same label{only}: give at least two classes.")


def balanced_subset(items: Sequence[Item], ratio: float, n_classes: int, seed: int) -> list[Item]:
    """What the selection looks at: int(N * ratio / C) random examples of every class, at least one, as published. A
    class that has fewer gives all; quantities are one class."""
    if not 0 < ratio <= 1:
        raise InputError(f"sample_ratio must be in (0, 1], got {ratio}.")
    by_class: dict[int | float, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        by_class[item.label if n_classes else 0].append(place)
    each = max(1, int(len(items) * ratio / max(n_classes, 1)))
    shuffled = random.Random(seed)
    chosen = [place for label in sorted(by_class)
              for place in shuffled.sample(by_class[label], min(each, len(by_class[label])))]
    return [items[place] for place in sorted(chosen)]


def _label(row: Row, form: Format, where: str) -> object:
    return _column(row, form.label if form.label in row else LABEL, where)


def _column(row: Row, name: str, where: str) -> object:
    if name not in row or row[name] is None:
        raise InputError(f"{where}: column {name!r} is missing, the row has: {', '.join(map(str, row)) or 'nothing'}.")
    return row[name]


def _text(row: Row, name: str, where: str) -> str:
    value = _column(row, name, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: column {name!r} must be a text, got {value!r:.60}.")
    return value


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= 12 else f"{', '.join(labels[:12])} and {len(labels) - 12} more"
