"""The training loop of every recipe: transformers.Trainer with our evaluation and our record."""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from stt.arguments import RunArgs
from stt.errors import InputError, TrainingFailed


class RecordedTrainer(Trainer):
    """`evaluate` measures what `validate()` returns; a loss that is no number ends the training."""

    def __init__(self, *args: object, validate: Callable[[], float] | None = None, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.validate = validate

    def evaluate(self, eval_dataset: object = None, ignore_keys: object = None,
                 metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics = {f"{metric_key_prefix}_accuracy": self.validate(), "epoch": self.state.epoch}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def training_step(self, *args: object, **kwargs: object) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise TrainingFailed(failure("the loss", self.state, Path(self.args.output_dir)))
        return loss

    def _issue_warnings_after_load(self, load_result: object) -> None:
        """A tied head is not in the file, and comes back by tying; anything else amiss is an error, not a warning."""
        missing = set(load_result.missing_keys) - set(self.model.all_tied_weights_keys)
        if missing or load_result.unexpected_keys:
            raise InputError(f"the checkpoint is of another model: {len(missing)} tensors are missing and "
                             f"{len(load_result.unexpected_keys)} unknown; start again with --overwrite")


def failure(what: str, state: TrainerState, folder: Path) -> str:
    """The sentence for a number that is none: when, and what is left."""
    kept = get_last_checkpoint(str(folder))
    left = f"{kept} is the last good checkpoint" if kept else "there is no checkpoint yet"
    return (f"{what} became NaN or infinite at step {state.global_step + 1}, before its update; {left}. "
            "Lower --lr or check the data, and start again with --overwrite")


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
                              model: nn.Module | None = None, **_: object) -> None:
        if args.fp16:  # an overflow is expected there: the gradient scaler skips the step
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not torch.stack([g.isfinite().all() for g in gradients]).all():
            raise TrainingFailed(failure("the gradient", state, Path(args.output_dir)))


def training_arguments(args: RunArgs, folder: Path, device: torch.device,
                       autocast_dtype: torch.dtype | None, group_by_length: bool = False) -> TrainingArguments:
    """What transformers.Trainer is told: a checkpoint after every epoch, and no reporting but ours."""
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=args.train_batch, num_train_epochs=args.num_epoch,
        train_sampling_strategy="group_by_length" if group_by_length else "random",
        gradient_accumulation_steps=args.gradient_accumulation_steps, learning_rate=args.lr, weight_decay=args.wd,
        max_grad_norm=args.max_grad_norm, lr_scheduler_type="linear" if args.schedule else "constant",
        warmup_steps=args.warmup_ratio if args.schedule else 0, seed=args.seed, data_seed=args.seed,
        bf16=autocast_dtype is torch.bfloat16, fp16=autocast_dtype is torch.float16, use_cpu=device.type == "cpu",
        logging_steps=args.log_interval, logging_first_step=True, logging_nan_inf_filter=False, report_to=[],
        eval_strategy="epoch" if args.eval_epochs else "no", save_strategy="epoch", save_total_limit=2,
        load_best_model_at_end=args.select_best, metric_for_best_model="accuracy" if args.select_best else None,
        remove_unused_columns=False, label_names=["labels"], dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=not sys.stderr.isatty())


def train(model: nn.Module, rows: Sequence[object], collate: Callable[[Sequence[object]], dict[str, Tensor]],
          arguments: TrainingArguments, log: Callable[..., None], validate: Callable[[], float] | None = None,
          resume: bool = False, seconds_before: float = 0.0) -> TrainerState:
    """Train what requires gradients on `rows`, batched by `collate`; the state after the last step. `seconds_before`
    were spent before a resumption.

    Raises TrainingFailed for a loss or gradient that is not a number or for too little memory, and InputError if there
    is nothing to resume.
    """
    check_trained_dtype(model)
    try:
        trainer = RecordedTrainer(model=model, args=arguments, train_dataset=list(rows), data_collator=collate,
                                  eval_dataset=[] if validate else None, validate=validate,
                                  callbacks=[Record(log, seconds_before)])
        trainer.remove_callback(PrinterCallback)
        if trainer.pop_callback(ProgressCallback):
            trainer.add_callback(Bar)
        checkpoint = last_checkpoint(Path(arguments.output_dir)) if resume else None
        with logging_redirect_tqdm():
            trainer.train(resume_from_checkpoint=checkpoint)
    except torch.OutOfMemoryError as error:
        raise TrainingFailed(f"the device ran out of memory: halve --train_batch and double "
                             f"--gradient_accumulation_steps ({str(error).splitlines()[0]})") from error
    return trainer.state


def last_checkpoint(folder: Path) -> str:
    """The newest checkpoint folder. Raises InputError if there is none."""
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise InputError(f"nothing to resume: {folder} holds no checkpoint; start without --resume")
    return found


def check_trained_dtype(model: nn.Module) -> None:
    """Our invariant: whatever trains is float32 (half-precision weights hardly move at fine-tuning step sizes)."""
    wrong = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    assert not wrong, f"trained parameters must be float32: {wrong[:3]}"
