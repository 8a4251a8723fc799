"""Scores of single weights: one file, one name; higher = train."""
from __future__ import annotations

import importlib
import pkgutil

from stt.errors import InputError, unknown_name
from stt.selective_optimizers.scores.base import WeightScore


def names() -> list[str]:
    """Names of all scores of weights, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def make(name: str, **options: object) -> WeightScore:
    """The score called `name`. Raises InputError for an unknown one, and for an option it does not have."""
    if name not in names():
        raise unknown_name("score of weights", name, names())
    kind = importlib.import_module(f"stt.selective_optimizers.scores.{name}").make
    unknown = options.keys() - kind.__dataclass_fields__.keys()
    if unknown:
        raise InputError(f"the score {name!r} has no option {min(unknown)!r}: it has "
                         f"{', '.join(kind.__dataclass_fields__) or 'none'}")
    return kind(**options)
