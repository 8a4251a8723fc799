"""One score = one file = one name; the folder is the registry. Scores may also live outside the library: an installed
package names them as entry points of the group "stt.scores", and `package.module:Score` names any other."""
from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import EntryPoint, entry_points

from stt.errors import InputError, unknown_name
from stt.scores.base import Score

GROUP = "stt.scores"
NEEDS = {"weights", "inputs", "outputs", "hidden", "gradients"}


def names() -> list[str]:
    """Names of all scores of the library and of installed packages, sorted."""
    own = {m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"}
    return sorted(own | {point.name for point in entry_points(group=GROUP)})


def make(name: str, **options: object) -> Score:
    """The score called `name` (or `package.module:Score`), with its options.

    Raises InputError for an unknown name, and for what cannot be imported or is no score.
    """
    if ":" in name:
        return _outside(EntryPoint(name, name, GROUP), name, options)
    if name not in names():
        raise unknown_name("score", name, names())
    outside = entry_points(group=GROUP, name=name)
    if outside:
        return _outside(next(iter(outside)), name, options)
    return importlib.import_module(f"stt.scores.{name}").make(**options)


def _outside(point: EntryPoint, name: str, options: dict[str, object]) -> Score:
    try:
        kind = point.load()
    except (ImportError, NameError, AttributeError, SyntaxError, TypeError, ValueError, LookupError, OSError,
            RuntimeError) as error:  # whatever its module does when it is imported
        raise InputError(f"cannot load the score {name!r} ({error}): give package.module:Class, importable from here "
                         "(PYTHONPATH)") from error
    score = kind(**options) if isinstance(kind, type) and issubclass(kind, Score) else None
    if score is None or not score.needs or set(score.needs) - NEEDS:
        raise InputError(f"{name!r} is no score: it must be a @dataclass, a subclass of stt.scores.base.Score, with "
                         f"`needs` among {', '.join(sorted(NEEDS))}")
    return score
