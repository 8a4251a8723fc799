"""Wall time of the parts of a run."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Value = TypeVar("Value")


class Clock:
    """Seconds of named laps, and since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._laps: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        """Seconds of a lap, and of the whole, that were spent in an earlier process."""
        self._laps[name] = self._laps.get(name, 0.0) + seconds
        self._started -= seconds

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._laps[name] = self._laps.get(name, 0.0) + time.perf_counter() - started

    def timed(self, name: str, work: Callable[[], Value]) -> Callable[[], Value]:
        """`work`, every call of which is a lap."""
        def lap() -> Value:
            with self.lap(name):
                return work()
        return lap

    def seconds(self) -> dict[str, float]:
        """Each lap, and "total" up to now."""
        return {**self._laps, "total": time.perf_counter() - self._started}
