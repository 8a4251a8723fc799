"""One score = one file = one name. `make(name)` finds it; the folder is the registry."""
from __future__ import annotations

import importlib
import pkgutil

from stt.errors import unknown_name
from stt.scores.base import Score


def names() -> list[str]:
    """Names of all scores, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def make(name: str, **options: object) -> Score:
    """The score called `name`, with its options. Raises InputError for an unknown name."""
    if name not in names():
        raise unknown_name("score", name, names())
    return importlib.import_module(f"stt.scores.{name}").make(**options)
