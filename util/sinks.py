"""Where the rows of a run go besides metrics.jsonl: nowhere, or Weights & Biases."""
from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

logger = logging.getLogger(__name__)

TIMEOUTS = {"init_timeout": 15, "login_timeout": 15, "finish_timeout": 60}  # seconds


class Sink(Protocol):
    """Takes rows of numbers."""

    def log(self, row: Mapping[str, object]) -> None: ...

    def finish(self) -> None: ...


class NoSink:
    """Takes rows and keeps none."""

    def log(self, row: Mapping[str, object]) -> None:
        pass

    def finish(self) -> None:
        pass


class WandbSink:
    """A W&B run whose failures are warnings, never the end of the training run."""

    def __init__(self, run: Sink, failure: type[Exception]):
        self._run, self._failure = run, failure

    def log(self, row: Mapping[str, object]) -> None:
        self._attempt(lambda: self._run.log(row))

    def finish(self) -> None:
        self._attempt(self._run.finish)

    def _attempt(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (self._failure, OSError) as error:
            logger.warning("W&B stopped: %s", error)
            self._run = NoSink()


def wandb_sink(project: str, entity: str | None, name: str, config: Mapping[str, object]) -> Sink:
    """A W&B run: online, else offline, else nothing; a warning says which and why."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        logger.warning("no W&B log: %s (pip install wandb)", error)
        return NoSink()
    settings = wandb.Settings(**TIMEOUTS)
    for mode in (None, "offline"):  # None = as configured on this machine, usually online
        try:
            run = wandb.init(project=project, entity=entity, name=name, config=dict(config), mode=mode,
                             settings=settings)
            return WandbSink(run, wandb.Error)
        except (wandb.Error, OSError) as error:
            logger.warning("no W&B run %s: %s", "with mode=offline" if mode else "online, trying offline", error)
    return NoSink()
