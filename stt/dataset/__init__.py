"""Tasks for decoders. One task is one file here, and its module name is its name on the command line (arc_e -> arc-e).

A task file has `to_example(row, where) -> Example`, `extract(response, example) -> label | None` and `MAX_NEW_TOKENS`.
"""
from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from META import DATA_SETS
from stt.dataset.base import (
    Encoded,
    Example,
    Splits,
    Task,
    complete_splits,
    dev_split,
    encode,
    encode_all,
    limit,
    prompt_ids,
    read_folder,
    read_hub,
    selection_subset,
    truncation,
)
from stt.dataset.own import read_own, tokenised
from stt.errors import InputError, unknown_name

__all__ = ["Encoded", "Example", "Task", "dev_split", "encode", "encode_all", "limit", "load_task", "prompt_ids",
           "read_own", "selection_subset", "task_names", "tokenised",
           "truncation"]

# files of this folder that are no task: their names start so
SHARED = ("base", "chat", "classification", "kinship", "multiple_choice", "own")


def task_names() -> list[str]:
    """The names `load_task` knows: the files of this folder."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in modules if not name.startswith(SHARED))


def load_task(name: str, data_dir: str | Path | None = None) -> Task:
    """The task with its three splits, from `data_dir`, else from the places META.py names.

    Raises InputError for an unknown name, for missing or unreadable data and for a row that does not fit the task.
    """
    if name not in task_names():
        raise unknown_name("task", name, task_names())
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    splits = {split: [module.to_example(row, where) for where, row in rows]
              for split, rows in _read(name, data_dir).items()}
    return Task(name, **complete_splits(splits, name), extract=module.extract, max_new_tokens=module.MAX_NEW_TOKENS)


def _read(name: str, data_dir: str | Path | None) -> Splits:
    if data_dir is not None:
        return read_folder(Path(data_dir).expanduser())
    if name not in DATA_SETS:
        raise InputError(f"task {name!r} has no default place for its data: give --data_dir.")
    source = DATA_SETS[name]
    if source.folder.is_dir():
        return read_folder(source.folder)
    if source.hub_id is None:
        raise InputError(f"the data of task {name!r} is missing: {source.folder} does not exist; make it with"
                         f" scripts/make_{name} or give --data_dir.")
    return read_hub(source.hub_id, source.hub_config)
