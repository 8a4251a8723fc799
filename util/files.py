"""Writing files that are whole or not there, and saying in one sentence why one could not be written."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from stt import stopping
from stt.errors import NO_ROOM, NOT_ALLOWED, TrainingFailed


def write_text_atomic(path: Path, text: str) -> None:
    """Writes `text` so that a reader sees the old file or the whole new one, also after a crash. What a crash leaves
    beside it is overwritten the next time."""
    part = path.with_name(f".{path.name}.part")
    with stopping.deferred():
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


@contextlib.contextmanager
def writing(path: Path, left: str) -> Iterator[None]:
    """Around writing `path`: a full disk or a folder that may not be written raises TrainingFailed, in one sentence
    that ends with what is `left`."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno not in (*NO_ROOM, *NOT_ALLOWED):
            raise
        reason = error.strerror
    except SafetensorError as error:
        reason = str(error)
    except RuntimeError as error:  # torch.save's
        if "PytorchStreamWriter" not in str(error):
            raise
        reason = "torch.save could not write all of it"
    else:
        return
    raise TrainingFailed(f"cannot write {path}: {reason}; {left}. Make room or access, and go on with --resume")
