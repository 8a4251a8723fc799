"""Checkpoints that are whole or not there: written beside, synced to the disk, sealed by digests, then renamed."""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from stt.errors import InputError

MANIFEST = "manifest.json"  # {"format_version", "files": {name: {"bytes", "sha256"}}} of everything else in the folder
FORMAT_VERSION = 1
STAGING = ".saving"  # what is being written
PREFIX = "checkpoint-"


def seal(staged: Path, target: Path) -> None:
    """`staged` with its manifest, on the disk, under the name `target`; replaces what had that name."""
    manifest = {"format_version": FORMAT_VERSION, "files": {
        name: {"bytes": (staged / name).stat().st_size, "sha256": _digest(staged / name)} for name in _names(staged)}}
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*staged.rglob("*"), staged]:
        _sync(path)
    if target.exists():  # damaged, or training would not have come to this step again
        shutil.rmtree(target)
    os.rename(staged, target)
    _sync(target.parent)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None = every file is there and is, byte for byte, what was saved."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        sealed = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
        if manifest["format_version"] != FORMAT_VERSION:
            return f"its manifest has format {manifest['format_version']}, this release reads {FORMAT_VERSION}"
    except OSError:
        return "it has no manifest"
    except (ValueError, LookupError, TypeError, AttributeError):  # not JSON, not UTF-8, or another structure
        return "its manifest is not readable"
    found = _names(checkpoint)
    for name in sorted(sealed.keys() ^ found):
        return f"{name} is missing" if name in sealed else f"{name} was not saved with it"
    for name, (size, digest) in sealed.items():
        path = checkpoint / name
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _digest(path) != digest:
            return f"{name} is not what was saved"
    return None


def newest(folder: Path) -> tuple[Path, dict[str, str]]:
    """The newest checkpoint that is whole, and what is wrong with each newer one. Raises InputError if there is none.
    """
    faults: dict[str, str] = {}
    for path in reversed(in_order(folder)):
        wrong = fault(path)
        if wrong is None:
            return path, faults
        faults[path.name] = wrong
    if not faults:
        raise InputError(f"nothing to resume: {folder} holds no checkpoint; start without --resume")
    raise InputError(f"nothing to resume: every checkpoint in {folder} is damaged ("
                     f"{'; '.join(f'{name}: {wrong}' for name, wrong in faults.items())}); start again with "
                     "--overwrite")


def in_order(folder: Path) -> list[Path]:
    """The checkpoints of a run folder by step."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=step_of)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"{PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    """The step after which it was saved."""
    return int(checkpoint.name.removeprefix(PREFIX))


def retire(latest: Path, keep: int | None, best: Path | None) -> None:
    """Remove all but `best` and the `keep` newest (None = all) up to `latest`, which was just sealed: what has a later
    step was damaged when training went on from an earlier one."""
    older = [path for path in in_order(latest.parent) if step_of(path) <= step_of(latest)]
    kept = {*older[-keep if keep else 0:], best}
    for path in in_order(latest.parent):
        if path not in kept:
            shutil.rmtree(path)


def clear(folder: Path) -> None:
    """Remove what a process that was killed while saving left in a run folder."""
    if (folder / STAGING).exists():
        shutil.rmtree(folder / STAGING)


def _names(folder: Path) -> set[str]:
    """Relative names of all files but the manifest and hidden ones, which nobody here writes or reads."""
    names = {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}
    return {name.as_posix() for name in names
            if name != Path(MANIFEST) and not any(part.startswith(".") for part in name.parts)}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """A file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
