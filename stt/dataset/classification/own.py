"""Your own data for a classifier: a table with `text` (or `text_a` and `text_b`) and `label`, a table with `image` and
`label`, or a folder of pictures."""
from __future__ import annotations

import logging
from pathlib import Path

from stt.dataset.base import complete_splits
from stt.dataset.classification.base import IMAGE, LABEL, TEXTS, Format, LabelTask, check_classes, to_item
from stt.dataset.classification.files import Rows, hold_out, read
from stt.errors import InputError

logger = logging.getLogger(__name__)


def read_own(train_file: str, eval_file: str | None, is_quantity: bool = False) -> LabelTask:
    """The splits of the user's data; the task is named after `train_file`.

    `eval_file` is the test set; without it a fixed random tenth is held out. Another tenth is the validation set. The
    classes are the labels that occur in the training data, by number if all are numbers, else by alphabet.
    """
    name, rows = Path(train_file).stem, read(Path(train_file))
    splits = {"train": rows, "test": read(Path(eval_file))} if eval_file else hold_out(rows, name)
    labels = () if is_quantity else _classes(rows)
    if is_quantity:
        metrics: tuple[str, ...] = ("spearman", "pearson")
    else:
        metrics = ("accuracy", "f1" if len(labels) == 2 else "macro_f1")
    form = _format(rows, labels, metrics)
    items = {split: [to_item(row, where, form) for where, row in found] for split, found in splits.items()}
    items = complete_splits(items, name)
    check_classes(items, labels, name)
    return LabelTask(name, **items, modality=form.modality, labels=labels, metrics=metrics)


def _classes(rows: Rows) -> tuple[str, ...]:
    found = {str(row[LABEL]).strip() for where, row in rows if _has_label(row, where)}
    are_numbers = all(label.lstrip("-").isdigit() for label in found)
    labels = tuple(sorted(found, key=int if are_numbers else str))
    logger.info("%d classes: %s", len(labels), ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else ""))
    return labels


def _has_label(row: dict[str, object], where: str) -> bool:
    if row.get(LABEL) is None or not str(row[LABEL]).strip():
        raise InputError(f"{where} has no {LABEL!r}; its columns are {', '.join(map(str, row))}.")
    return True


def _format(rows: Rows, labels: tuple[str, ...], metrics: tuple[str, ...]) -> Format:
    where, row = rows[0]
    if IMAGE in row:
        return Format("image", (IMAGE,), labels, metrics)
    fields = next((names for names in TEXTS if set(names) <= row.keys()), None)
    if fields is None:
        raise InputError(f"{where} has the columns {', '.join(map(str, row))}: give {LABEL} and either text, text_a and"
                         f" text_b, or {IMAGE}.")
    return Format("text", fields, labels, metrics)
