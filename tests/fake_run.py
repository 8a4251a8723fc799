"""Run folders with made-up numbers, for the tests of reports."""
from __future__ import annotations

import json
from pathlib import Path

SITES = 4
WIDTH = 200


def results(mode: str = "stt", seed: int = 0, correct: int = 210, head: str = "train",
            sites: int = SITES) -> dict[str, object]:
    """A made-up results.json: 300 test examples, 1,000,000 dense parameters."""
    selects = mode not in ("baseline", "lora")
    kept = [60 + 5 * layer for layer in range(sites)]
    found = [{"name": f"model.layers.{layer}.mlp", "width": WIDTH, "kept": units, "units": "neurons",
              "jaccard": 0.8 - layer / 100, "margin": 0.01}
             | ({"mean_only": units - 40, "both": 25, "rate_only": 15} if mode.startswith("stt") else {})
             for layer, units in enumerate(kept)] if selects else []
    speed = {"prefill_seconds": 0.5, "decode_tokens_per_second": 100.0, "latency_seconds_per_token": 0.01}
    faster = {"prefill_seconds": 0.25, "decode_tokens_per_second": 150.0, "latency_seconds_per_token": 0.0066}
    ratio = {"prefill_seconds": 0.5, "decode_tokens_per_second": 1.5, "latency_seconds_per_token": 0.66}
    return {
        "format_version": 1, "recipe": "train_llm", "mode": mode, "model": "/made/up/stt-tiny", "task": "clutrr",
        "seed": seed, "head": head, "selected_by": mode if selects else None,
        "accuracy": {"test": correct / 300, "n": 300, "correct": correct, "majority": 0.07},
        "perplexity": {"dense": 12.0, **({"sliced": 15.5} if selects else {}), "trained": 13.25 + seed / 100},
        "parameters": {"dense": 1_000_000, "kept": 700_000 if selects else 1_000_000,
                       "trained": 300_000 if selects else 1_000_000,
                       "trained_without_head": 236_000 if selects else 936_000,
                       "kept_fraction_of_units": sum(kept) / (sites * WIDTH) if selects else 1.0},
        "flops": {**({"selection": 3_000_000_000} if selects else {}), "training": 2_500_000_000_000,
                  "inference": 50_000_000},
        "throughput": {"batch_size": 8, "prompt_tokens": 64, "new_tokens": 8, "rounds": 5, "dense": speed,
                       **({"sliced": faster, "ratio": ratio} if selects else {})},
        "peak_memory_bytes": 512 * 2**20,
        "seconds": {**({"selection": 3.5} if selects else {}), "training": 95.0, "evaluation": 12.0, "total": 121.0},
        "versions": {"python": "3.11.7", "torch": "2.13.0"}, "git_commit": None, "device": "cpu", "sites": found}


def metrics() -> list[dict[str, float]]:
    """Made-up rows: 60 losses and 3 validation accuracies."""
    rows = []
    for step in range(10, 610, 10):
        loss = 2.5 * 0.995**step + 0.3 + 0.08 * ((step // 10 * 7919) % 11 - 5) / 5
        rows.append({"step": step, "epoch": step / 200, "loss": loss, "learning_rate": 1e-3 * (1 - step / 610),
                     "grad_norm": 1.0, "seconds": step * 0.15})
        if step % 200 == 0:
            rows.append({"step": step, "epoch": step / 200, "validation_accuracy": 0.2 + 0.0007 * step})
    return rows


def write(folder: Path, arguments: dict[str, object] | None = None, **numbers: object) -> Path:
    """A complete run folder; `arguments` are what the recipe was given besides mode, seed and head."""
    record = results(**numbers)
    given = {name: record[name] for name in ("mode", "seed", "head", "task")} | {"topk_ratio": 0.3} | (arguments or {})
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"format_version": 1, "arguments": given}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()))
    (folder / "results.json").write_text(json.dumps(record))
    return folder
