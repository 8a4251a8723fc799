"""What happens between the steps of training: the record, the checks, and when to save and to stop."""
from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import SaveStrategy

from stt import stopping
from stt.errors import TrainingFailed
from stt.selective_optimizers.gradients import is_finite
from stt.selective_optimizers.trainer import selective_in
from stt.trainers.checkpoints import in_order


def failure(what: str, state: TrainerState, folder: Path) -> str:
    """The sentence for a number that is none: when, and what is left."""
    return (f"{what} became NaN or infinite at step {state.global_step + 1}, before its update; {last_good(folder)}. "
            "Lower --lr or check the data, and start again with --overwrite")


def last_good(folder: Path) -> str:
    """Which checkpoint is left, in words."""
    kept = in_order(folder)
    return f"{kept[-1]} is the last good checkpoint" if kept else "there is no checkpoint yet"


class Bar(ProgressCallback):
    """Trainer's progress bar without the numbers, which go to the record."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        pass


class Record(TrainerCallback):
    """Writes what Trainer logs into the run's record, and stops before an update that is not a number."""

    def __init__(self, log: Callable[..., None], seconds_before: float = 0.0):
        self.write = log
        self.started = time.perf_counter() - seconds_before

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None,
               **_: object) -> None:
        seconds = time.perf_counter() - self.started
        if "loss" in logs:
            numbers = {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs}
            self.write(step=state.global_step, epoch=round(state.epoch, 4), seconds=seconds, **numbers)
        elif "eval_accuracy" in logs:
            self.write(step=state.global_step, epoch=round(state.epoch, 4), validation_accuracy=logs["eval_accuracy"])

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                              model: nn.Module | None = None, optimizer: Optimizer | None = None,
                              **_: object) -> None:
        if args.fp16:  # an overflow is expected there: the gradient scaler skips the step
            return
        selective = selective_in(optimizer)
        kept = selective.kept_gradients() if selective else []
        if not is_finite([p.grad for p in model.parameters() if p.grad is not None] + kept):
            raise TrainingFailed(failure("the gradient", state, Path(args.output_dir)))


class Saving(TrainerCallback):
    """Saves after the last step of every epoch, before its evaluation (which a resumption from there repeats), every
    `save_steps` (0 = never), and before a stop that was asked for."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        is_stopping = any_rank(stopping.requested(), args.device)
        if is_stopping:
            stopping.request("another process")
        is_due = ends_epoch(state) or bool(args.save_steps) and state.global_step % args.save_steps == 0
        control.should_save = is_stopping or is_due and args.save_strategy != SaveStrategy.NO
        control.should_training_stop |= is_stopping

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        control.should_save = False  # it is saved already


def ends_epoch(state: TrainerState) -> bool:
    """Whether the last step was the last of an epoch, or of all."""
    return state.global_step >= state.max_steps or state.epoch == int(state.epoch)


def any_rank(claim: bool, device: torch.device) -> bool:
    """Whether it is true of any process; then all do the same after the same step."""
    if not distributed.is_initialized():
        return claim
    flag = torch.tensor(float(claim), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag.item())
