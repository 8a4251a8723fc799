"""Grid files: which runs a sweep is made of.

A grid is a YAML file with a question, a recipe, the flags that all runs share and the axes along which they differ;
docs/sweeps.md describes it. Every run is checked against the recipe's own flags before the first one starts.
"""
from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from stt.cli import load_yaml, typed_values
from stt.errors import InputError, unknown_name

CHECKOUT = Path(__file__).resolve().parents[1]
KEYS = ("question", "command", "minutes", "output_dir", "fixed", "axes", "skip")
REQUIRED = ("question", "command", "minutes", "axes")
OURS = ("output_dir", "run_name", "resume", "overwrite")  # what the sweep itself gives a run
NOT_THE_RUN = ("use_wandb", "wandb_project", "wandb_entity", "wandb_run_name")  # same run with and without
# what a folder is called after, in this order, with what stands before the value
READABLE = {"model": "", "model_name": "", "task": "", "dataset": "", "mode": "", "score": "", "topk_ratio": "top",
            "keep_ratio": "keep", "seed": "seed"}


@dataclass(frozen=True)
class Run:
    """One run of a grid: `flags` are the typed values given to the recipe, by field name."""

    index: int
    recipe: Path
    flags: Mapping[str, object]
    folder: Path

    def command(self, *further: str) -> list[str]:
        """The command line without the interpreter."""
        given = [token for name, value in self.flags.items() for token in _tokens(name, value)]
        return [str(self.recipe), *given, "--output_dir", str(self.folder.parent), "--run_name", self.folder.name,
                *further]

    def shown(self) -> str:
        """The command line as it can be pasted into a shell."""
        return shlex.join(["python", *self.command()])


@dataclass(frozen=True)
class Grid:
    """A grid file, read: `axes` are the names of the flags that differ between runs, in the file's order."""

    path: str
    question: str
    minutes: float
    output_dir: Path
    axes: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def array_range(self) -> str:
        """What `sbatch --array` takes."""
        return f"0-{len(self.runs) - 1}"

    def run(self, index: int) -> Run:
        """Run number `index`. Raises InputError outside the grid."""
        if not 0 <= index < len(self.runs):
            raise InputError(f"run {index}, but {self.path} has {len(self.runs)} runs: 0 to {len(self.runs) - 1}")
        return self.runs[index]


def read_grid(path: str) -> Grid:
    """The grid in a file. Raises InputError for anything in it that is unknown, missing, twice or of no effect."""
    given = load_yaml(path, "grid file")
    if not isinstance(given, Mapping):
        raise InputError(f"{path} must hold the keys of a grid ({', '.join(REQUIRED)}), got {given!r:.60}")
    for key in given:
        if key not in KEYS:
            raise unknown_name(f"key in {path}:", key, KEYS)
    for key in REQUIRED:
        if not given.get(key):
            raise InputError(f"{path} has no {key}; a grid needs {', '.join(REQUIRED)} (docs/sweeps.md)")
    for key in ("question", "command", "minutes", "output_dir"):
        if not isinstance(given.get(key, ""), str):
            raise InputError(f"{path}: {key} must be one value, got a {type(given[key]).__name__}")
    recipe = _recipe(given["command"], path)
    cls = arguments_class(recipe)
    output_dir = Path(given.get("output_dir") or f"outputs/{Path(path).stem}")
    points, axes = _points(given, cls, path)
    runs = tuple(_run(index, recipe, cls, point, output_dir, path) for index, point in enumerate(points))
    _refuse_twins(runs, path)
    return Grid(path, given["question"], _minutes(given["minutes"], path), output_dir, axes, runs)


# ---------------------------------------------------------------- the recipe


def _recipe(command: str, path: str) -> Path:
    """The recipe's file, as given from where we are, else in this checkout."""
    found = next((place for place in (Path(command), CHECKOUT / command) if place.is_file()), None)
    if found is None or found.suffix != ".py":
        known = ", ".join(sorted(place.name for place in CHECKOUT.glob("*.py") if "def main(args" in place.read_text()))
        raise InputError(f"{path}: no recipe {command!r}; command is a program of this checkout ({known}) or the path "
                         "of one of yours")
    return found


def arguments_class(recipe: Path) -> type:
    """The dataclass of a recipe's flags: what its `main(args)` takes."""
    spec = importlib.util.spec_from_file_location(f"recipe_{recipe.stem}", recipe)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    cls = get_type_hints(module.main).get("args") if hasattr(module, "main") else None
    if cls is None:
        raise InputError(f"{recipe} is no recipe: it has no `main(args: SomeArgs)` that says what its flags are")
    return cls


# ---------------------------------------------------------------- the runs


def _points(given: Mapping[str, object], cls: type, path: str) -> tuple[list[dict[str, object]], tuple[str, ...]]:
    """The flags of every run, the last axis running fastest, and the names of those on an axis."""
    fixed = _values(given.get("fixed") or {}, cls, f"{path}: fixed")
    axes = _axes(given["axes"], cls, path)
    owner = dict.fromkeys(fixed, "fixed")
    for axis, choices in axes.items():
        for name in dict.fromkeys(name for choice in choices for name in choice):
            if name in owner:
                raise InputError(f"{path}: {name} is given by {owner[name]} and again by the axis {axis}; keep one.")
            owner[name] = f"the axis {axis}"
    points = [{**fixed, **{name: value for choice in choices for name, value in choice.items()}}
              for choices in itertools.product(*axes.values())]
    for rule in _rules(given.get("skip") or [], cls, path):
        left = [point for point in points if not all(point.get(name) in values for name, values in rule.items())]
        if len(left) == len(points):
            raise InputError(f"{path}: the skip rule {_words(rule)} matches no run; correct it or leave it out.")
        points = left
    if not points:
        raise InputError(f"{path}: the skip rules leave no run.")
    return points, tuple(name for name in owner if name not in fixed)


def _axes(given: object, cls: type, path: str) -> dict[str, list[dict[str, object]]]:
    """Axis -> its choices, each as flags with values."""
    if not isinstance(given, Mapping):
        raise InputError(f"{path}: axes must hold one `flag: [values]` per line, got {given!r:.60}")
    axes = {}
    for axis, choices in given.items():
        if not isinstance(choices, list) or not choices:
            raise InputError(f"{path}: the axis {axis} must be a list of one or more values, got {choices!r:.60}")
        if all(isinstance(choice, Mapping) for choice in choices):
            axes[axis] = [_values(choice, cls, f"{path}: axis {axis}") for choice in choices]
        else:
            axes[axis] = [_values({axis: choice}, cls, f"{path}: axes") for choice in choices]
    return axes


def _rules(given: object, cls: type, path: str) -> Iterator[dict[str, list[object]]]:
    """Each skip rule as flag -> the values it is about."""
    if not isinstance(given, list) or not all(isinstance(rule, Mapping) and rule for rule in given):
        raise InputError(f"{path}: skip must be a list of rules such as `- {{mode: baseline, seed: [1, 2]}}`")
    for rule in given:
        found: dict[str, list[object]] = {}
        for key, values in rule.items():
            for value in values if isinstance(values, list) else [values]:
                for name, typed in _values({key: value}, cls, f"{path}: skip").items():
                    found.setdefault(name, []).append(typed)
        yield found


def _values(given: object, cls: type, where: str) -> dict[str, object]:
    values = typed_values(given, cls, where)
    for name in OURS:
        if name in values:
            hint = "; output_dir is a key of the grid" if name == "output_dir" else ""
            raise InputError(f"{where} gives {name}, which the sweep gives every run itself; leave it out{hint}.")
    return values


def _run(index: int, recipe: Path, cls: type, point: Mapping[str, object], output_dir: Path, path: str) -> Run:
    """The run of one point; its flags must go together."""
    try:
        cls(**point)
    except InputError as error:
        raise InputError(f"{path}: run {index} ({_words(point)}): {error}") from None
    return Run(index, recipe, point, output_dir / folder_name(recipe, point))


def folder_name(recipe: Path, flags: Mapping[str, object]) -> str:
    """Readable and unique: what most tell runs apart by, then ten digits of the digest of the recipe's name and all
    flags. Neither the order of the flags nor the rest of the grid changes it, so a grid may grow."""
    counted = {name: value for name, value in flags.items() if name not in NOT_THE_RUN}
    text = json.dumps([recipe.name, counted], sort_keys=True, default=str)
    parts = [prefix + _short(flags[name]) for name, prefix in READABLE.items() if flags.get(name) is not None]
    return "-".join([*parts, hashlib.sha256(text.encode()).hexdigest()[:10]])


def _short(value: object) -> str:
    """The value as a part of a file name: the last part of a path, and no odd characters."""
    return re.sub(r"[^\w.+-]+", "_", str(value).rstrip("/").rpartition("/")[2]).lstrip(".-")[:40]


def _refuse_twins(runs: Sequence[Run], path: str) -> None:
    seen: dict[Path, Run] = {}
    for run in runs:
        twin = seen.setdefault(run.folder, run)
        if twin is not run:
            raise InputError(f"{path}: runs {twin.index} and {run.index} are the same ({_words(run.flags)}); remove "
                             "what is given twice.")


def _minutes(text: str, path: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise InputError(f"{path}: minutes (a run takes at most) must be a number above 0, got {text!r}")
    return minutes


def _tokens(name: str, value: object) -> list[str]:
    """A flag and its value for the command line; None stands for leaving the flag out."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]


def _words(flags: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in flags.items())
