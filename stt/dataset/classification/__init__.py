"""Tasks for classifiers. One task is one file in tasks/, and its module name is its name on the command line.

A task file has `FORMAT`, a base.Format. Where its data lives on the hub stands in META.py.
"""
from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from META import CLASSIFICATION_DATA_SETS
from stt.dataset.base import Splits, complete_splits, dev_split, limit
from stt.dataset.classification import tasks
from stt.dataset.classification.base import Format, Item, LabelTask, balanced_subset, check_classes, to_item
from stt.dataset.classification.files import from_hub, read_folder
from stt.dataset.classification.own import read_own
from stt.dataset.classification.pictures import check_readable
from stt.errors import InputError, unknown_name

__all__ = ["Format", "Item", "LabelTask", "balanced_subset", "check_readable", "dev_split", "form_of", "limit",
           "load_task", "read_own", "task_names"]


def task_names() -> list[str]:
    """The names `load_task` knows: the files in tasks/."""
    return sorted(module.name for module in pkgutil.iter_modules(tasks.__path__))


def form_of(name: str) -> Format:
    """What the file of a task says. Raises InputError for an unknown name."""
    if name not in task_names():
        raise unknown_name("task", name, task_names())
    return importlib.import_module(f"{tasks.__name__}.{name}").FORMAT


def load_task(name: str, data_dir: str | Path | None = None) -> LabelTask:
    """The task with its three splits, from `data_dir`, else from the places META.py names.

    Raises InputError for an unknown name, for missing or unreadable data and for a row that does not fit the task.
    """
    form = form_of(name)
    folder = None if data_dir is None else Path(data_dir).expanduser()
    items = {split: [to_item(row, where, form) for where, row in rows]
             for split, rows in _read(name, form, folder).items()}
    items = complete_splits(items, name)
    check_classes(items, form.labels, name)
    return LabelTask(name, **items, modality=form.modality, labels=form.labels, metrics=form.metrics)


def _read(name: str, form: Format, folder: Path | None) -> Splits:
    source = CLASSIFICATION_DATA_SETS.get(name)
    if folder is None and source is not None and source.folder.is_dir():
        folder = source.folder
    found = None if form.rows is None else form.rows(folder)
    if found is not None:
        return found
    if folder is not None:
        return read_folder(folder)
    if source is None or source.hub_id is None:
        raise InputError(f"the data of task {name!r} is missing: give --data_dir.")
    picture = form.fields[0] if form.modality == "image" else None
    return from_hub(source.hub_id, source.hub_config, form.labels, picture, form.label)
