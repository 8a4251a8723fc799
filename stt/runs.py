"""Reads run folders back."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from stt.errors import InputError
from util.utils import FORMAT_VERSION


@dataclass(frozen=True)
class Run:
    """A finished run folder, read back."""

    path: Path
    arguments: dict[str, object]
    results: dict[str, object]


def load_run(run_dir: str | Path) -> Run:
    """Reads a run folder. Raises InputError if it is not one, is an ablation's or not complete, or was written by a
    newer release."""
    folder = Path(run_dir)
    if not (folder / "args.json").is_file():
        raise InputError(f"{folder} is not a run folder (it has no args.json); give the folder a recipe wrote.")
    if not (folder / "results.json").is_file():
        if "lrs" in read_json(folder / "args.json").get("arguments", {}):
            raise InputError(f"{folder} is an ablation, which has a report of its own ({folder / 'report.md'}); the "
                             "same command again goes on with it and writes that anew.")
        raise InputError(f"the run in {folder} is not complete (it has no results.json); finish it with --resume.")
    arguments, results = read_json(folder / "args.json"), read_json(folder / "results.json")
    version = results.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{folder}/results.json has format {version}, this release reads {FORMAT_VERSION}; "
                         "update stt.")
    return Run(folder, arguments.get("arguments", {}), results)


def read_json(path: str | Path) -> dict[str, object]:
    """The JSON object in a file of a run folder. Raises InputError for a file that is missing, cut off or no object."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give the folder a recipe wrote.") from None
    except ValueError as error:  # not JSON, or not even UTF-8
        raise InputError(f"{path} is not JSON ({error}); repeat the run.") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold a JSON object, got a {type(found).__name__}; repeat the run.")
    return found
