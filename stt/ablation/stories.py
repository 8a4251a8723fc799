"""New test stories of the shipped clutrr's kind: as many as a comparison needs, none of them in the shipped data."""
from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from META import DATA_SETS
from stt.arguments import CHECKOUT
from stt.errors import InputError

logger = logging.getLogger(__name__)

SEED = 1  # the shipped data has 0
OTHERS = 18  # train and validation stories that are made along with them, one for each relation, and not used


def folder_of_new(count: int, folder: Path) -> Path:
    """A data folder whose test split holds `count` new stories, made in `folder` unless it is there already; the same
    for the same count. Raises InputError if they cannot be made."""
    made = folder / f"stories-{count}"
    if not (made / "test.json").is_file():
        logger.info("making %d test stories in %s", count, made)
        command = [sys.executable, str(CHECKOUT / "scripts" / "make_clutrr"), "--out", str(made), "--seed", str(SEED),
                   "--train", str(OTHERS), "--val", str(OTHERS), "--test", str(count), "--apart_from",
                   str(DATA_SETS["clutrr"].folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{count} new test stories cannot be made ({' '.join(done.stderr.split())}): lower "
                             "--test_size.")
    found = len(json.loads((made / "test.json").read_text(encoding="utf-8")))
    if found != count:
        raise InputError(f"{made} holds {found} test stories instead of {count}: delete it.")
    return made


def check_apart(test: Iterable[object], seen: Iterable[object]) -> None:
    """Raises InputError if a test item was trained or validated on."""
    common = set(test) & set(seen)
    if common:
        raise InputError(f"{len(common)} test items are in the training or validation data: give other data.")
