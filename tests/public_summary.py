"""For tests: files as the public package selective-optimizers writes them, without it."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

PACKAGE = "selective_optimizers"


@dataclass
class SelectivePeftSummary:
    """The fields of the public class, in their order."""

    values: list
    pointers: list
    shapes: list
    bn_metadata: list
    budget_used: int


@contextmanager
def under_its_name() -> Iterator[None]:
    """As if the class stood in the public package."""
    module = ModuleType(f"{PACKAGE}.load_store")
    module.SelectivePeftSummary = SelectivePeftSummary
    with mock.patch.dict(sys.modules, {PACKAGE: ModuleType(PACKAGE), module.__name__: module}), \
            mock.patch.object(SelectivePeftSummary, "__module__", module.__name__):
        yield


def write(summary: object, path: Path, **how: object) -> Path:
    """torch.save of what may hold such a summary; the path."""
    with under_its_name():
        torch.save(summary, path, **how)
    return path
