"""The ways a run may end early, and the sentence for an unknown name."""
from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # OSErrors that are nobody's mistake in the code
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


class InputError(ValueError):
    """The user gave something we cannot use. The message says what was given, what is accepted and what to do.

    Command-line programs print the message as one line and exit with code 2, before anything is written.
    """


class TrainingFailed(RuntimeError):
    """Training stopped on a bad number, a full device or a full disk. Command-line programs exit with code 3; the last
    good checkpoint is kept."""


def unknown_name(kind: str, given: str, known: Iterable[str]) -> InputError:
    """The error for a name nobody knows: what was asked, the nearest name whatever its case, the full list."""
    names = sorted(known)
    spelled = {name.lower(): name for name in names}
    nearest = difflib.get_close_matches(given.lower(), spelled, n=1)
    hint = f" Did you mean {spelled[nearest[0]]!r}?" if nearest else ""
    return InputError(f"unknown {kind} {given!r}.{hint} Choose one of: {', '.join(names)}.")
