"""Tables and picture folders: rows of the splits, each with the place it stands in.

A table is a .csv (commas, quoted where needed), a .tsv (tabs, no quotes), a .jsonl or a .json file, the first line of a
.csv or .tsv its column names. A picture folder has one folder for every class.
"""
from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from pathlib import Path

from stt.dataset.base import SPLIT_FILES, Row, Splits, read_rows, split_off
from stt.dataset.classification.base import IMAGE, LABEL
from stt.dataset.classification.pictures import SUFFIXES, Picture
from stt.errors import InputError

logger = logging.getLogger(__name__)

TABLES = (".csv", ".tsv", ".jsonl", ".json")
HELD_OUT = 0.1  # of a data set that comes in one piece
Rows = list[tuple[str, Row]]


def read_folder(folder: Path) -> Splits:
    """The rows of train, validation (or valid, val, dev) and test in a folder: each a table or a folder of pictures.

    A folder that has a folder for every class instead is one piece: a fixed random tenth of it is the test set. Raises
    InputError for anything else.
    """
    if not folder.is_dir():
        raise InputError(f"data folder {folder} does not exist: give one with train, validation and test, each a table"
                         f" ({', '.join(TABLES)}) or a folder of pictures.")
    found = {split: _only(folder, names, split) for split, names in SPLIT_FILES.items()}
    if found["train"] is not None:
        return {split: read(path) for split, path in found.items() if path is not None}
    if any(path.is_dir() for path in folder.iterdir()):
        return hold_out(picture_rows(folder), folder.name)
    raise InputError(f"{folder} has no train table ({', '.join('train' + suffix for suffix in TABLES)}), no folder"
                     " train, and no folder for every class.")


def read(path: Path) -> Rows:
    """The rows of one table, or of a folder of pictures."""
    if path.is_dir():
        return picture_rows(path)
    if not path.is_file():
        raise InputError(f"no data file {str(path)!r}: give a table ({', '.join(TABLES)}) or a folder of pictures.")
    if path.suffix not in TABLES:
        raise InputError(f"{path} must be called {' or '.join(TABLES)}, or be a folder of pictures.")
    rows = read_rows(path) if path.suffix.startswith(".json") else _separated(path)
    return [(where, _with_picture(row, path.parent)) for where, row in rows]


def hold_out(rows: Rows, name: str) -> Splits:
    """A fixed random tenth of the rows becomes the test set."""
    if len(rows) < 3:
        raise InputError(f"{name} has {len(rows)} examples in one piece; a test and a validation set are held out of"
                         " them, so give at least 3, or train and test apart.")
    count = max(1, round(HELD_OUT * len(rows)))
    logger.info("%s comes in one piece: %d of %d examples are the test set and not trained on", name, count, len(rows))
    test, train = split_off(rows, count, seed=0)
    return {"train": train, "test": test}


def picture_rows(folder: Path) -> Rows:
    """One row for every picture in the folders of the classes, by class and name."""
    rows: Rows = []
    for kind in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        paths = sorted(path for path in kind.iterdir() if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise InputError(f"{kind} holds no picture ({', '.join(SUFFIXES)}): the folder of a class needs some.")
        rows += [(str(path), {IMAGE: str(path), LABEL: kind.name}) for path in paths]
    if not rows:
        raise InputError(f"{folder} holds no folder of a class with pictures in it.")
    return rows


def from_hub(hub_id: str, config: str | None, labels: tuple[str, ...], picture: str | None, label: str) -> Splits:
    """The rows of a data set on the Hugging Face hub; the column `picture` is decoded when it is needed. A test split
    whose labels are hidden (all -1, as GLUE's are) is left out."""
    from datasets import Image, load_dataset

    try:
        splits = load_dataset(hub_id, config)
    except OSError as error:  # every way the hub cannot be reached or has no such data set
        raise InputError(f"data set {hub_id} cannot be loaded from the hub ({error}): give --data_dir with train,"
                         " validation and test.") from error
    found: Splits = {}
    for split in (split for split in SPLIT_FILES if split in splits):
        data = splits[split]
        if labels and len(data) and set(data.unique(label)) == {-1}:
            continue
        if picture is not None:
            data = data.cast_column(picture, Image(decode=False))
            data = [{**row, picture: _lazily(splits[split], number, picture, hub_id)}
                    for number, row in enumerate(data.remove_columns(picture))]
        found[split] = [(f"row {number} of {hub_id}/{split}", row) for number, row in enumerate(data, start=1)]
    return found


def _lazily(data: object, number: int, column: str, hub_id: str) -> Picture:
    read: Callable[[], object] = lambda: data[number][column]  # noqa: E731
    return Picture(f"row {number + 1} of {hub_id}", read)


def _only(folder: Path, names: tuple[str, ...], split: str) -> Path | None:
    """The one table or folder of a split; None if there is none."""
    found = [path for name in names for path in (folder / name, *(folder / f"{name}{suffix}" for suffix in TABLES))
             if path.is_dir() or path.is_file() and path.suffix in TABLES]
    if len(found) > 1:
        raise InputError(f"{folder} has more than one {split} set ({', '.join(path.name for path in found)}): keep"
                         " one.")
    return found[0] if found else None


def _separated(path: Path) -> Rows:
    """The rows of a .csv or .tsv file."""
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {"delimiter": ","}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True, **style)
            rows = [(f"line {reader.line_num} of {path}", row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not valid {path.suffix[1:].upper()} ({error}).") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    if not rows:
        raise InputError(f"{path} holds no rows below a line of column names.")
    for where, row in rows:
        if None in row or None in row.values():
            columns = ", ".join(name for name in row if name is not None)
            raise InputError(f"{where} does not have as many cells as there are columns ({columns}).")
    return rows


def _with_picture(row: Row, folder: Path) -> Row:
    """The path of a picture in a table counts from the table."""
    return {**row, IMAGE: str(folder / row[IMAGE])} if isinstance(row.get(IMAGE), str) else row
