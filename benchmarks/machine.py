"""Where a measurement was made: processor, cores, threads, load, versions, commit."""
from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from util.utils import git_commit, versions


def described(device: torch.device) -> dict[str, object]:
    """The machine, without its name."""
    said = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}"}
    if device.type == "cuda":
        said["gpu"] = torch.cuda.get_device_name(device)
    return said


def software() -> dict[str, str | None]:
    """Versions of the packages that can change a result, TRL's too if there is one, and the commit of this checkout."""
    found: dict[str, str | None] = {**versions(), "commit": git_commit()}
    try:
        found["trl"] = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        found["trl"] = None
    return found


def load() -> list[float]:
    """Processes that wanted to run, averaged over the last 1, 5 and 15 minutes."""
    return [round(average, 2) for average in os.getloadavg()]


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
