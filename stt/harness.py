"""Standard benchmarks by EleutherAI's lm-evaluation-harness, on a model of ours: sliced or not, a run or a folder."""
from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stt.errors import InputError

if TYPE_CHECKING:
    import torch
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESULTS = "harness.json"


def check_installed() -> None:
    """Raises InputError where there is no harness."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("--harness needs lm-eval, which is not installed: pip install -e '.[eval]' -c "
                         "requirements.txt")


def run_harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str],
                folder: str | None = None, shots: int | None = None, limit: int | None = None, batch_size: int = 8,
                autocast_dtype: torch.dtype | None = None, samples: bool = False) -> dict[str, object]:
    """What the harness returns: `results`, `configs`, `versions`, `n-samples`, ..., and with `samples` every answer.

    `folder` holds task files (YAML) beside the harness's own, `shots` examples stand before each question (None: as the
    task says), `limit` questions of a task are asked (None: all). Raises InputError for a task that neither has.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _tasks(tasks, folder)
    adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=autocast_dtype)
    return simple_evaluate(adapter, tasks=manager.match_tasks(list(tasks)), num_fewshot=shots, limit=limit,
                           task_manager=manager, log_samples=samples, bootstrap_iters=1000)


def _tasks(names: Sequence[str], folder: str | None) -> TaskManager:
    """An index that knows all of these tasks: of `folder` alone if it has them, for the harness's own are thousands of
    files and take half a minute."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if all(map(own.match_tasks, ([name] for name in names))):
            return own
    manager = TaskManager(include_path=folder)
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise InputError(f"lm-evaluation-harness has no task {name!r}: "
                             + (f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists all."))
    return manager


def evaluate_folder(name: str, tasks: Sequence[str], folder: str | None, shots: int | None, limit: int | None,
                    batch_size: int, precision: str, out: str | None) -> tuple[str, Path]:
    """The harness's table for a run, folder or hub id, and the file its numbers are written to: `out`, or harness.json
    in the folder. Raises InputError, before anything runs, for what cannot be loaded or written."""
    check_installed()
    path = Path(out) if out else Path(name).expanduser() / RESULTS
    if not path.parent.is_dir():
        raise InputError(f"no folder {str(path.parent)!r} for {path.name}; give a file in an existing one as --out.")
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"no folder {folder!r} with task files; give an existing one as --include.")
    from lm_eval.utils import make_table

    from stt.loading import compute_dtype, load_tokenizer, load_trained, model_folder
    from util.utils import pick_device, versions, write_json_atomic

    device = pick_device()
    dtype = compute_dtype(precision, device)
    model, tokenizer = load_trained(name, dtype, device), load_tokenizer(model_folder(name))
    found = run_harness(model.eval(), tokenizer, tasks, folder, shots, limit, batch_size, dtype)
    write_json_atomic(path, {"model": name, "limit": limit, "versions": versions(), **_numbers(found)})
    return make_table(found) + (make_table(found, "groups") if found.get("groups") else ""), path


def _numbers(found: Mapping[str, object]) -> dict[str, object]:
    """The part of the harness's answer that says how well the model did, and on what."""
    kept = ("results", "groups", "n-shot", "n-samples", "higher_is_better")
    return {**{key: found[key] for key in kept if key in found}, "task_versions": found["versions"]}
