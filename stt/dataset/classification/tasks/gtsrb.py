"""GTSRB: 43 German traffic signs (Stallkamp et al. 2012; hub tanganke/gtsrb).

The official layout is read too: GTSRB/Training/00000 to 00042, GTSRB/Final_Test/Images, and GT-final_test.csv with
semicolons, in that folder or above it; test pictures without a row there are left out. Its training pictures come in
tracks, many frames of one sign: whole tracks, every tenth of a class, are held out to validate on.
"""
from __future__ import annotations

import csv
from pathlib import Path

from stt.dataset.base import Splits
from stt.dataset.classification.base import Format
from stt.dataset.classification.files import Rows, picture_rows
from stt.errors import InputError

EVERY = 10


def rows(folder: Path | None) -> Splits | None:
    """The official layout, if it is that."""
    if folder is None or not (folder / "GTSRB" / "Training").is_dir():
        return None
    pictures = folder / "GTSRB" / "Final_Test" / "Images"
    places = [folder / "GT-final_test.csv", pictures / "GT-final_test.csv"]
    table = next((path for path in places if path.is_file()), None)
    if table is None:
        raise InputError(f"{folder} has no GT-final_test.csv with the classes of its test pictures.")
    with open(table, encoding="utf-8", newline="") as file:
        named = [(f"line {number} of {table}", row) for number, row in
                 enumerate(csv.DictReader(file, delimiter=";"), start=2)]
    for where, row in named:
        if not {"Filename", "ClassId"} <= row.keys():
            raise InputError(f"{where}: the columns Filename and ClassId are needed, found {', '.join(map(str, row))}.")
    test = [(where, {"image": str(pictures / row["Filename"]), "label": row["ClassId"]}) for where, row in named]
    return {**_by_track(picture_rows(folder / "GTSRB" / "Training")), "test": test}


def _by_track(pictures: Rows) -> Splits:
    """Train and validation: 00003_00010.ppm is of track 3, and tracks 5, 15, 25 ... of each class validate."""
    held_out = [int(Path(where).name.partition("_")[0]) % EVERY == EVERY // 2 for where, _ in pictures]
    return {split: [row for row, is_held in zip(pictures, held_out, strict=True) if is_held == (split == "validation")]
            for split in ("train", "validation")}


FORMAT = Format("image", ("image",), tuple(map(str, range(43))), rows=rows)
