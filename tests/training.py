"""For tests of the loop: a tiny decoder, its data, and a training of it that can be cut off and taken up again."""
from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_text import build_decoder
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments, set_seed

from stt import modes
from stt.selection import Selection
from stt.selective_optimizers.trainer import MakeOptimizer
from stt.sites import find_sites
from stt.trainers.callbacks import Record
from stt.trainers.checkpoints import newest, step_of
from stt.trainers.sft import train
from util.utils import RunFolder

gc.freeze()  # accelerate collects before every training: not all of torch and transformers again
PAD = 0
EXAMPLES = 20


class Cut(Exception):
    """The process ended here."""


def examples(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random token ids of different lengths; the last one to three tokens are labelled."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, 60, (5 + i % 4,), generator=generator).tolist()
        answer = 1 + i % 3
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - answer) + ids[-answer:]})
    return rows


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    """Batches of four, a row of the record after every step, no checkpoints."""
    settings = {"output_dir": str(folder), "per_device_train_batch_size": 4, "num_train_epochs": 1, "seed": 3,
                "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "logging_steps": 1, "save_strategy": "no",
                "lr_scheduler_type": "constant", "remove_unused_columns": False, "disable_tqdm": True,
                "logging_nan_inf_filter": False, "label_names": ["labels"], "data_seed": 3}
    return TrainingArguments(**(settings | changes))


def selection_of(model: nn.Module, seed: int = 0) -> Selection:
    """A random third of the neurons of every site."""
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(model)
    widths = {name: site.width for name, site in sites.items()}
    return Selection({name: torch.randperm(width, generator=generator)[:width // 3] for name, width in widths.items()},
                     {"widths": widths})


def prepared(mode: str = "stt", dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """The tiny decoder, ready to train in a mode of the recipe; `dropout` of the attention and of the LoRA inputs."""
    model = build_decoder(vocabulary=60)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    row = modes.MODES[mode]
    set_seed(5)
    modes.prepare(row, model, selection_of(model, seed) if row.score else None, modes.Lora(4, 8, dropout), "train")
    return model


def run(folder: Path, resume: bool = False, log: Callable[..., None] | None = None,
        model: nn.Module | None = None, validate: Callable[[], float] | None = None,
        make_optimizer: MakeOptimizer | None = None, **changes: object) -> dict[str, Tensor]:
    """What the recipes do: start the run folder, train, and give the weights."""
    record = RunFolder(folder, resume=resume)
    step = step_of(newest(folder)[0]) if resume else 0
    model = prepared() if model is None else model
    record.start({}, resume_step=step)
    settings = {"save_strategy": "epoch", "save_steps": 0, "save_total_limit": 2, "num_train_epochs": 2} | changes
    set_seed(3)
    train(model, examples(EXAMPLES), PAD, arguments(folder, **settings), log or record.log, validate, resume,
          record.seconds, make_optimizer=make_optimizer)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def rows(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def cut_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends before the step after `step`."""
    def before(self: Record, args: object, state: TrainerState, control: object, **_: object) -> None:
        if state.global_step == step:
            raise Cut

    monkeypatch.setattr(Record, "on_step_begin", before)


def exit_code(work: Callable[[], object], said: Path) -> int:
    """Of a process that is forked to do `work`. Minus the signal if one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(forked(work, said), 0)[1])


def forked(work: Callable[[], object], said: Path) -> int:
    """The id of a process that does `work` and ends with what it gives (None: 0), or with 1 after a traceback; its
    stderr is appended to `said`."""
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115  (instead of pytest's)
    code = 1
    try:
        code = work() or 0
    finally:  # whatever happened, the child must not go on as pytest
        if sys.exc_info()[0] is not None:
            os.write(2, traceback.format_exc().encode())
        os._exit(code)
