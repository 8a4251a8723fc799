"""The command `stt VERB ...`: reports, what a model's sites are, export, sweeps. Nothing heavy is imported before a
verb runs, so that `stt --help` answers at once."""
from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from stt.arguments import Precision, check_choices, check_ranges, resolve_model
from stt.cli import run
from stt.errors import InputError, unknown_name
from stt.plan_arguments import PlanArgs
from stt.serving import multiple_for


@dataclass(frozen=True)
class ReportArgs:
    """Put finished runs side by side: a table and a figure, seeds of one configuration averaged."""

    runs: Annotated[tuple[str, ...], Positional, arg(metavar="RUN ...")]
    """run folders, as many as you like"""
    out: str | None = None
    """existing folder for comparison.md and comparison.png; None = the folder that holds the runs"""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("no run given; give the run folders to compare, as in `stt report outputs/*`.")


@dataclass(frozen=True)
class SitesArgs:
    """Show the sites of a model, of neurons and of attention heads, and what was looked at and left out."""

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """folder, hub id or alias"""
    json: bool = False
    """write JSON instead of a table"""


@dataclass(frozen=True)
class ExportArgs:
    """Turn a trained sliced model into a plain Hugging Face folder."""

    dir: Annotated[str, Positional, arg(metavar="DIR")]
    """folder of the sliced model, as stt.save writes it"""
    out: str
    """folder to write"""
    to: Literal["hf", "dense"] = "hf"
    """hf: still narrow, loads without stt; dense: its trained neurons written back into the original model"""
    multiple_of: int = 1
    """round the width up to a multiple of this, for --to hf; 128 suits a GPU"""
    runtime: Annotated[Literal["vllm", "awq", "gguf"] | None, arg(aliases=("--for",))] = None
    """what the model will run in, for --to hf: also round the width up to what that needs (docs/shipping.md)"""
    tp: int = 1
    """tensor-parallel ranks that will split the width, with --for vllm or awq"""
    base: str | None = None
    """the original model, for --to dense; None = the one the sliced model was made from"""

    def __post_init__(self) -> None:
        multiple_for(self.runtime, self.tp)
        if self.runtime is not None and self.to == "dense":
            raise InputError(f"--for {self.runtime} is about the width of a narrow model, and --to dense writes the "
                             "original width; leave one of them out.")


@dataclass(frozen=True)
class SweepArgs:
    """Run all runs of a grid file on this machine, or show where they stand."""

    action: Annotated[Literal["run", "count", "status", "table"], Positional, arg(metavar="run|count|status|table")]
    """run what is not done; count: the range of an array job; status; table: also as table.csv and table.png"""
    grid: Annotated[str, Positional, arg(metavar="GRID")]
    """the grid file (docs/sweeps.md)"""
    jobs: int = 1
    """run: how many runs at a time"""
    retry_failed: bool = False
    """run: also what failed before"""
    metric: tuple[str, ...] = ("accuracy.test",)
    """table: numbers in results.json, by dotted name; the first is drawn"""
    axis: str | None = None
    """table: the flag to draw along; None = the first axis of numbers"""
    out: str | None = None
    """table: folder for table.md, .csv and .png; None = the folder of the runs"""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise InputError(f"jobs must be 1 or more, got {self.jobs}")
        if not self.metric:
            raise InputError("metric needs a name, such as accuracy.test")
        owners = {"jobs": "run", "retry_failed": "run", "metric": "table", "axis": "table", "out": "table"}
        for name, owner in owners.items():
            if self.action != owner and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise InputError(f"{name} is about `stt sweep {owner}`, not `stt sweep {self.action}`; leave it out.")


@dataclass(frozen=True)
class EvalArgs:
    """Measure a model on standard benchmarks, by lm-evaluation-harness."""

    run: Annotated[str, Positional, arg(metavar="RUN")]
    """run folder, folder of a model (sliced or not), or hub id"""
    harness: Annotated[tuple[str, ...], arg(metavar="TASK ...")]
    """names of its tasks, as in --harness arc_easy hellaswag; `*` and `?` match several"""
    include: str | None = None
    """folder with task files (YAML) of your own"""
    shots: int | None = None
    """examples before each question; None = as the task says"""
    limit: int | None = None
    """questions of each task; None = all"""
    eval_batch: int = 8
    """examples per batch"""
    precision: Precision = "auto"
    """compute type; auto = bf16 on a GPU that has it, else fp32"""
    out: str | None = None
    """file for the numbers; None = harness.json in RUN"""

    def __post_init__(self) -> None:
        check_choices(self, {"precision": Precision})
        check_ranges(self, ((("eval_batch", "limit"), lambda x: x >= 1, "1 or more"),
                            (("shots",), lambda x: x >= 0, "0 or more")))
        if not self.harness:
            raise InputError("no task given; name those of lm-evaluation-harness, as in --harness arc_easy.")


@dataclass(frozen=True)
class VerifyArgs:
    """Check that training changed selected weights and nothing else, bit for bit; exit code 1 if it did."""

    base: Annotated[str, Positional, arg(metavar="BASE")]
    """the model before training: folder, hub id or alias"""
    tuned: Annotated[str, Positional, arg(metavar="TUNED")]
    """the model after it: run folder, folder of a model or hub id"""
    selection: Annotated[str, Positional, arg(metavar="SELECTION")]
    """file of the selection, or of the patch"""


def report(args: ReportArgs) -> None:
    """`stt report`"""
    from stt.report import compare, load_run

    for folder in args.runs:
        load_run(folder)  # raises for what is no finished run, before --out is looked at
    out = Path(args.out or os.path.commonpath([Path(folder).resolve().parent for folder in args.runs]))
    if not out.is_dir():
        raise InputError(f"no folder {str(out)!r} to write to; make it, or leave --out away.")
    try:
        tables = compare(args.runs, out / "comparison.png")
        (out / "comparison.md").write_text(tables, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {error.filename or out}: {error.strerror}; give another folder as --out.") \
            from None
    sys.stdout.write(f"{tables}\n{out / 'comparison.md'} and comparison.png\n")


def sites(args: SitesArgs) -> None:
    """`stt sites`"""
    model = resolve_model(args.model)
    from stt.loading import on_meta
    from stt.sites import describe

    found = describe(on_meta(model))
    sys.stdout.write((json.dumps(found, indent=2) if args.json else _site_table(found)) + "\n")


def export(args: ExportArgs) -> None:
    """`stt export`"""
    from stt.export import export_dense, export_hf

    if args.to == "hf":
        export_hf(args.dir, args.out, args.multiple_of, runtime=args.runtime, tp=args.tp)
    else:
        export_dense(args.dir, args.out, args.base)
    sys.stdout.write(f"{args.out}\n")


def evaluate(args: EvalArgs) -> None:
    """`stt eval`"""
    from stt.harness import evaluate_folder

    table, path = evaluate_folder(resolve_model(args.run), args.harness, args.include, args.shots, args.limit,
                                  args.eval_batch, args.precision, args.out)
    sys.stdout.write(f"{table}\n{path}\n")


def plan(args: PlanArgs) -> None:
    """`stt plan`"""
    from stt.plan import planned
    from stt.plan_table import table

    found = planned(args)
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if args.json else table(found))


def sweep(args: SweepArgs) -> int:
    """`stt sweep`"""
    from util.grid import read_grid

    grid = read_grid(args.grid)
    if args.action == "run":
        from util.sweep_local import run_all

        return run_all(grid, args.jobs, args.retry_failed)
    from util import sweep_table

    if args.action == "table":
        text = sweep_table.write_table(grid, args.metric, args.axis, Path(args.out) if args.out else None)
    else:
        text = grid.array_range if args.action == "count" else sweep_table.status(grid)
    sys.stdout.write(f"{text}\n")
    return 0


def verify(args: VerifyArgs) -> int:
    """`stt verify`"""
    base, tuned = resolve_model(args.base), resolve_model(args.tuned)
    from stt.selective_optimizers.verify import table, verify_folders

    found = verify_folders(base, tuned, args.selection)
    sys.stdout.write(table(found))
    return 0 if found.is_exact else 1


VERBS: dict[str, tuple[Callable[..., int | None], type]] = {
    "report": (report, ReportArgs), "sites": (sites, SitesArgs), "export": (export, ExportArgs),
    "eval": (evaluate, EvalArgs), "plan": (plan, PlanArgs), "sweep": (sweep, SweepArgs),
    "verify": (verify, VerifyArgs)}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `stt VERB ...` (stt/cli.py says which)."""
    verb, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if verb in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    if verb not in VERBS:
        sys.stderr.write(f"error: {unknown_name('verb', verb, VERBS)}\n")
        return 2
    act, cls = VERBS[verb]
    return run(act, cls, rest, prog=f"stt {verb}")


def _usage() -> str:
    lines = [f"  stt {verb:<8}{cls.__doc__.splitlines()[0]}" for verb, (_, cls) in VERBS.items()]
    return "\n".join(["usage: stt VERB ...", "", *lines, "", "`stt VERB --help` lists the flags of a verb.", ""])


def _site_table(found: Mapping[str, object]) -> str:
    """`found` as stt.sites.describe makes it. The experts of one stack are one row; the width of an attention is its
    units (key/value heads) x the query heads of each."""
    header = ("site", "form", "kind", "width", "members")
    stacks = [list(sites) for _, sites in itertools.groupby(found["sites"], key=lambda site: site["group"])]
    rows = [(sites[0]["name"] + (f" ... {sites[-1]['name'].rpartition('.')[2]}" if len(sites) > 1 else ""),
             sites[0]["form"], sites[0]["kind"], _width(sites[0]), ", ".join(sites[0]["members"]))
            for sites in stacks]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in (header, *rows)]
    lines += [f"{entry['units']} {'lost' if entry['is_loss'] else 'left out'}  {entry['name']}: {entry['reason']}"
              for entry in found["left_out"]]
    return "\n".join(lines)


def _width(site: Mapping[str, object]) -> str:
    """Neurons, or units times the query heads of each."""
    return f"{site['width']} x {site['heads']}" if site["units"] == "heads" else str(site["width"])
