#!/usr/bin/env python
"""How fast and how large training and inference on 30 % of the neurons are, beside a model that was built that narrow.

    python benchmarks/neurons.py --quick --json out.json      4 minutes: ours against the natively narrow model
    python benchmarks/neurons.py --out benchmarks/RESULTS.md   all rows, all tables
    python benchmarks/neurons.py --device cuda --out GPU.md    bfloat16 autocast, larger shapes, peak memory

The natively narrow model is the limit to compare with: transformers builds it with the kept width, it holds the same
weights, and it trains the same parameters the ordinary way, `model(**batch).loss`. Everything in one table runs in one
process, alternating, in an order that rotates from round to round. A ratio is the median over the rounds of the ratio
within the round, in brackets its 95 % interval. Before anything is timed, all rows are checked to give equal losses and
gradients; rows that do not are refused.
"""
from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from benchmarks.measure import Outcome
    from benchmarks.sizes import Plan
    from benchmarks.table import Table

LIMITS = {"step_vs_narrow": 1.03, "answer_only_step_vs_narrow": 0.70, "saved_activations_vs_narrow": 0.78,
          "selection_vs_forward": 1.00, "selection_vs_forward_152k": 0.75, "prefill_vs_narrow": 1.02,
          "decode_vs_narrow": 1.02, "encoder_step_vs_narrow": 1.03, "encoder_step_vs_narrow_bert": 1.03}


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # of the profiler that counts bytes; read with torch
    import torch
    import transformers

    from benchmarks import machine
    from benchmarks.sizes import plan
    from util.utils import write_json_atomic

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    load_before = machine.load()
    outcome = run(plan(args.device, args.quick), device, args.clock)
    told = {"machine": machine.described(device), "threads": torch.get_num_threads(), "clock": args.clock,
            "load": {"before": load_before, "after": machine.load()}, "versions": machine.software(),
            "sizes": outcome.sizes}
    tables = [limits_table(outcome), *([] if args.quick else outcome.tables)]
    print("\n".join(table.markdown() for table in tables))
    if args.json:
        write_json_atomic(args.json, {**numbers(outcome), **told})
    if args.out:
        command = shlex.join(["python", "benchmarks/neurons.py", *(sys.argv[1:] if argv is None else argv)])
        Path(args.out).write_text(document(command, [limits_table(outcome), *outcome.tables], told), encoding="utf-8")
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only ours and the natively narrow model, fewer rounds")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--threads", type=int, default=1,
                        help="threads of PyTorch on the CPU (default: 1, steadier beside other work)")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: processor time, for one thread "
                        "on a busy machine (default: wall)")
    parser.add_argument("--json", metavar="FILE", help="write ratios, intervals and the circumstances here")
    parser.add_argument("--out", metavar="FILE.md", help="write the tables and the circumstances here, in Markdown")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if args.clock == "cpu" and args.device != "cpu":
        parser.error("--clock cpu does not see the time of a GPU: leave it out")
    for file in (args.json, args.out):
        if file and not Path(file).resolve().parent.is_dir():
            parser.error(f"cannot write {file}: its folder does not exist")
    return args


def run(plan: Plan, device: torch.device, clock: str) -> Outcome:
    """Everything of the plan; the models of one measurement are gone before the next. Raises TooLarge at once."""
    from benchmarks import measure, memory

    for size in (*plan.decoders, *plan.answers):
        memory.layers_that_fit(size, memory.free_bytes(device))
    setting = measure.Setting(plan, device, clock, time.perf_counter() + plan.total_seconds)
    outcome = measure.Outcome({}, [], {})
    for sizes, measured in ((plan.decoders, measure.decoder), (plan.encoders, measure.encoder),
                            (plan.answers, measure.answer_only), (plan.selections, measure.selection)):
        for size in sizes:
            print(f"{time.strftime('%H:%M:%S')} measuring: {size.name}", file=sys.stderr)
            outcome.add(measured(size, setting))
    return outcome


def numbers(outcome: Outcome) -> dict[str, object]:
    """Each key, its interval and its number of rounds."""
    medians = {key: ratio.median for key, ratio in outcome.ratios.items()}
    intervals = {f"{key}_interval": [ratio.low, ratio.high] for key, ratio in outcome.ratios.items()}
    return {**medians, **intervals, "rounds": {key: ratio.rounds for key, ratio in outcome.ratios.items()}}


def limits_table(outcome: Outcome) -> Table:
    """The ratios beside their limits."""
    from benchmarks.table import Table

    table = Table("Ratios and their limits", ("", "median", "95 % interval", "rounds", "limit", ""))
    for key, ratio in outcome.ratios.items():
        limit = LIMITS.get(key)
        verdict = "" if limit is None else "within" if ratio.median <= limit else "over"
        table.rows.append((key, f"{ratio.median:.3f}", f"{ratio.low:.3f} – {ratio.high:.3f}", str(ratio.rounds),
                           None if limit is None else f"{limit:.2f}", verdict))
    return table


def document(command: str, tables: Sequence[Table], told: Mapping[str, Mapping[str, object]]) -> str:
    """Command, circumstances, how it is measured, tables: Markdown."""
    software = ", ".join(f"{name} {version}" for name, version in told["versions"].items() if version)
    lines = ["# Benchmark of the neurons family", "", f"    {command}", "",
             "- " + ", ".join(f"{name}: {value}" for name, value in told["machine"].items()),
             f"- load average over 1, 5, 15 minutes: before {told['load']['before']}, after {told['load']['after']}",
             f"- {software}", "", __doc__.split("\n\n", 2)[2]]
    return "\n".join([*lines, *(table.markdown() for table in tables)])


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, instead of this folder
    sys.exit(main())
