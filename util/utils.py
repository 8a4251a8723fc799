"""Seed, device, memory, versions, and the run folder that every recipe leaves behind."""
from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stt import stopping
from stt.errors import InputError
from util.files import write_text_atomic, writing
from util.sinks import NoSink, Sink

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
NAME_BYTES = 255  # of a file's name, at most, on every usual file system
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "tokenizers", "numpy")


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch on every device."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def pick_device() -> torch.device:
    """The first CUDA device, or the CPU where there is none."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_memory_bytes() -> int:
    """Most bytes held so far: by tensors on the GPU if one is used, else by the whole process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str]:
    """Package -> installed version, of what can change a result; packages that are not installed are left out."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of this checkout, with "-dirty" if tracked files differ from it; None outside git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return None
    changed = subprocess.run(["git", "-C", root, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def write_json_atomic(path: str | Path, value: object) -> None:
    """Writes `value` so that a reader sees the old file or the whole new one, also after a crash."""
    path = Path(path)
    write_text_atomic(path, json.dumps(finite(value, path.name), indent=2, allow_nan=False) + "\n")


def finite(value: object, where: str = "value") -> object:
    """`value` with every NaN and infinity (which JSON does not have) replaced by None, and said in the log."""
    if isinstance(value, Mapping):
        return {key: finite(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        logger.warning("%s is %s; written as null", where, value)
        return None
    return value


class RunFolder:
    """The record of one run: args.json first, metrics.jsonl while it goes, results.json last (= complete)."""

    def __init__(self, path: str | Path, overwrite: bool = False, resume: bool = False):
        """Raises InputError if the run must not be written here; touches nothing."""
        self.path, self._resume = Path(path), resume
        self.seconds = 0.0  # of training, before a resumption
        self._sink: Sink = NoSink()
        try:
            refusal = _refusal(self.path, overwrite, resume)
        except OSError as error:
            refusal = f"cannot use {self.path} as a run folder: {error.strerror}; choose another folder."
        if refusal:
            raise InputError(refusal)

    def start(self, arguments: Mapping[str, object], sink: Sink | None = None, resume_step: int = 0) -> RunFolder:
        """Makes the folder, or empties it, and writes args.json. A resumed run keeps its files and those rows of
        metrics.jsonl that belong to the steps up to `resume_step`."""
        record = {"format_version": FORMAT_VERSION, "arguments": dict(arguments), "command": sys.argv,
                  "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": versions(), "git_commit": git_commit()}
        try:
            if self.path.is_dir() and not self._resume:
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.path / "args.json", record)
            stopping.resumable_in(self.path)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}; choose another folder.") from None
        if self._resume:
            self._drop_rows_after(resume_step)
        self._sink = sink or NoSink()
        return self

    def log(self, **numbers: float) -> None:
        """One row of metrics.jsonl, one readable line, one point in W&B if asked for."""
        row, path = finite(numbers, "metrics"), self.path / "metrics.jsonl"
        with writing(path, "the last checkpoint is kept"), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        logger.info("  ".join(f"{name} {_short(value)}" for name, value in numbers.items()))
        self._sink.log(row)

    def finish(self, results: Mapping[str, object]) -> None:
        """Writes results.json: from now on the run is complete, and no signal makes a failure of it."""
        stopping.ignore()
        path = self.path / "results.json"
        with writing(path, "the last checkpoint is kept"):
            write_json_atomic(path, {"format_version": FORMAT_VERSION, **results})
        self._sink.finish()

    def _drop_rows_after(self, step: int) -> None:
        """The validation of that step is repeated, so its row goes, too."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = [row for row in map(_row, lines) if row is not None and row.get("step", 0) < step + ("loss" in row)]
        with writing(path, "the last checkpoint is kept"):
            write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        self.seconds = max((row.get("seconds", 0.0) for row in rows), default=0.0)


def _refusal(path: Path, overwrite: bool, resume: bool) -> str | None:
    """Why a run must not be written to `path`; None = it may."""
    for part in path.parts:
        if len(os.fsencode(part)) > NAME_BYTES:
            return f"{part} cannot be a folder: its name is longer than {NAME_BYTES} bytes; choose a shorter one."
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            return f"{place} is a file, so {path} cannot be a run folder; choose another folder."
    if not path.is_dir() or all(inside.name.endswith(".part") for inside in path.iterdir()):  # killed while starting
        return None
    if not (path / "args.json").is_file():
        return f"{path} holds files that no run of ours wrote; choose another folder."
    if overwrite:
        return None
    if (path / "results.json").exists():
        return f"{path} already holds a finished run; --overwrite replaces it, --run_name or --output_dir avoids it."
    if any(path.glob("checkpoint*")) and not resume:
        return f"{path} holds an unfinished run; --resume goes on with it, --overwrite replaces it."
    return None


def _row(line: str) -> dict[str, float] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that was killed while writing it
        return None


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
