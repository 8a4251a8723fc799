"""Pictures that are decoded when they are needed: a file, the bytes of a hub row, an array."""
from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stt.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Picture:
    """`read` decodes it; `where` begins every complaint."""

    where: str
    read: Callable[[], Image]

    def open(self) -> Image:
        """The decoded picture, in RGB. Raises InputError for what is no picture, or one that is cut off."""
        try:
            return self.read().convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # all that PIL raises for damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self.where} is no picture that can be read ({reason}): replace or remove it.") from None


def picture_of(value: object, where: str) -> Picture:
    """A path, the bytes or the array that a row holds, or the picture itself."""
    if isinstance(value, Picture):
        return value
    if isinstance(value, str | Path):
        return of_file(Path(value))
    if isinstance(value, Mapping) and (value.get("bytes") or value.get("path")):  # a hub row, not decoded
        data, path = value.get("bytes"), value.get("path")
        return Picture(where, lambda: _opened(io.BytesIO(data))) if data else of_file(Path(path))
    raise InputError(f"{where}: the picture must be a path, got {value!r:.60}.")


def of_file(path: Path) -> Picture:
    """The picture in a file. Raises InputError if there is none."""
    if not path.is_file():
        raise InputError(f"there is no picture {path}.")
    return Picture(str(path), lambda: _opened(path))


def check_readable(pictures: Sequence[Picture]) -> None:
    """Decode every picture once. Raises InputError for the first that cannot be."""
    from tqdm import tqdm

    for picture in tqdm(pictures, desc="checking the pictures", unit="picture", leave=False, disable=None):
        picture.open()


def _opened(source: Path | io.BytesIO) -> Image:
    from PIL import Image

    image = Image.open(source)
    image.load()
    return image
