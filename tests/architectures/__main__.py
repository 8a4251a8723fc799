"""One row a model type; a failure is a row too.

    python -m tests.architectures --list [--types bert,gpt2]    the tiny models: do they run, and the same after loading
    python -m tests.architectures --out matrix.csv              what slicing does to each (or matrix.md, as a page)

Exits with 1 if anything is wrong with a type: it raises, is not exact, does not reload, is not exported though its
configuration has an entry for the width, or has a block that is neither sliced nor named.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from tests.tiny import outputs

from . import page
from .build import Built, build
from .matrix import FAILURES
from .overrides import NOT_BUILDABLE
from .types import class_name, model_types


@dataclass
class Row:
    """What is known of one type; None where it did not get that far."""

    model_type: str
    model_class: str
    parameters: int | None = None
    widths: str = ""
    not_run: str = ""
    finite: bool | None = None
    deterministic: bool | None = None
    reloads: bool | None = None
    seconds: float = 0.0
    error: str = ""


def row(model_type: str) -> Row:
    """Builds, runs twice, saves, loads and runs again."""
    found, started = Row(model_type, class_name(model_type)), time.perf_counter()
    try:
        _fill(found, build(model_type))
    except FAILURES as error:
        lines = str(error).strip().splitlines() or [""]
        found.error = f"{type(error).__name__}: {lines[0]}"
    found.seconds = time.perf_counter() - started
    return found


def _fill(found: Row, built: Built) -> None:
    """The numbers, as far as they can be had."""
    found.parameters = sum(parameter.numel() for parameter in built.model.parameters())
    found.widths = " ".join(f"{key}={width}" for key, width in built.widths.items())
    found.not_run = " ".join(built.not_run)
    first = run(built)
    found.finite = bool(first) and all(bool(value.isfinite().all()) for value in first)
    found.deterministic = _equal(first, run(built))
    found.reloads = _close(first, run(reloaded(built)))


def run(built: Built) -> list[Tensor]:
    """Everything floating-point the model returns on its batch."""
    with torch.no_grad():
        return outputs(built.model, built.inputs)


def reloaded(built: Built) -> Built:
    """The same model saved and loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        built.model.save_pretrained(folder)
        model = type(built.model).from_pretrained(folder, dtype=built.model.dtype).eval()
    return Built(model, built.inputs, built.widths, built.not_run)


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def _close(first: list[Tensor], second: list[Tensor]) -> bool:
    """Equal but for rounding: loaded weights lie elsewhere in memory, and other kernels may serve them."""
    return len(first) == len(second) and all(
        float((one - other).abs().max()) <= 1e-6 * max(1.0, float(one.abs().max()))
        for one, other in zip(first, second, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Prints or writes the table; 1 if a type that should build did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print a row for every model type")
    what.add_argument("--out", metavar="FILE", type=Path, help="slice every type and write the table: .csv or .md")
    parser.add_argument("--types", help="only these model types, separated by commas")
    chosen = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = tqdm(chosen.types.split(",") if chosen.types else model_types(), file=sys.stderr)
    if chosen.out:
        return page.write(chosen.out, names)
    rows = [row(name) for name in names]
    for one in rows:
        print("\t".join("" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
                        for value in vars(one).values()))
    print(f"{sum(bool(one.finite) for one in rows)} of {len(rows)} run, "
          f"{sum(bool(one.deterministic) for one in rows)} the same twice, "
          f"{sum(bool(one.reloads) for one in rows)} the same after loading")
    return int(any(not one.finite and one.model_type not in NOT_BUILDABLE for one in rows))


if __name__ == "__main__":
    sys.exit(main())
