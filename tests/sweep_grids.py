"""Grid files of runs that take seconds, and what became of their runs."""
from __future__ import annotations

import json
from pathlib import Path

import yaml

from stt import cli
from util import sweep
from util.grid import Run, read_grid

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(__file__).with_name("sweep_recipe.py")


def given(folder: Path, **changes: object) -> dict[str, object]:
    """A grid of eight runs: 2 modes x 2 step sizes x 2 seeds."""
    return {"question": "Does it work?", "command": str(RECIPE), "minutes": 2, "output_dir": str(folder / "out"),
            "fixed": {"steps": 3}, "axes": {"mode": ["stt", "random"], "lr": [0.1, 0.2], "seed": [0, 1]}} | changes


def written(folder: Path, **changes: object) -> str:
    """The path of that grid as a file; a key changed to None is left out."""
    path = folder / "grid.yaml"
    content = {key: value for key, value in given(folder, **changes).items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def task(path: str, *flags: str) -> int:
    """The exit code of `python util/sweep.py GRID FLAGS`."""
    return cli.run(sweep.main, sweep.TaskArgs, [path, *flags])


def results(run: Run) -> dict[str, object]:
    return json.loads((run.folder / "results.json").read_text())


def states(path: str) -> list[str]:
    return [sweep.Record(run).state() for run in read_grid(path).runs]
