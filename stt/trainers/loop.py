"""The training loop of every recipe: transformers.Trainer with our evaluation, our record and our checkpoints."""
from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import pickle
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler, nested_gather
from transformers.trainer_utils import unwrap_peft_model

from stt import stopping
from stt.arguments import RunArgs
from stt.errors import InputError, TrainingFailed
from stt.selective_optimizers.patch import Patch
from stt.selective_optimizers.progress import PATCH, Progress
from stt.selective_optimizers.trainer import MakeOptimizer, SelectiveTrainerMixin
from stt.trainers import checkpoints, memory, shard
from stt.trainers.callbacks import Bar, Record, Saving, any_rank, ends_epoch, failure, last_good
from util import ranks
from util.files import writing

logger = logging.getLogger(__name__)

PROGRESS = "stt_state.json"  # in a checkpoint: what goes on with it besides Trainer's own files


class RecordedTrainer(SelectiveTrainerMixin, Trainer):
    """Trainer with these differences: `evaluate` measures what `validate()` returns; a loss that is no number ends the
    training; checkpoints are sealed (stt/trainers/checkpoints.py), and hold a patch of a model of which a part trains
    in place; a batch that does not fit is trained in parts."""

    def __init__(self, *args: object, validate: Callable[[], float] | None = None, new: Collection[str] = (),
                 **kwargs: object):
        super().__init__(*args, **kwargs)
        self._in_place = Progress(self.model, new)
        self.validate = validate
        if "forward" not in vars(unwrap_peft_model(self.model)):  # else chunked_loss: it divides by the batch's tokens
            self.model_accepts_loss_kwargs = False  # Trainer would believe that BERT divides by the batch's examples
        self.folder = Path(self.args.output_dir)
        self._saves_in: Path | None = None
        self._parts = 1  # of every micro-batch
        self._batches: list[Mapping[str, Tensor]] = []  # of the present update
        self._trained: list[Mapping[str, Tensor]] = []  # micro-batches whose gradients it has

    # ------------------------------------------------------------ steps

    def _run_epoch(self, **kwargs: object) -> None:
        if self.state.global_step < self.state.max_steps:  # Trainer would take one more step after the last
            super()._run_epoch(**kwargs)

    def _get_train_sampler(self, train_dataset: Sequence[object] | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        examples = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ByLength(examples, self.train_dataset, self.args.data_seed)

    def get_batch_samples(self, *args: object) -> tuple[list[Mapping[str, Tensor]], Tensor | int | None]:
        batches, items = super().get_batch_samples(*args)
        self._batches, self._trained = batches, []
        self._announce()
        return batches, items

    def _announce(self) -> None:
        self.announce(sum(len(memory.split(batch, self._parts)) for batch in self._batches))

    def training_step(self, model: nn.Module, inputs: Mapping[str, Tensor],
                      num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a micro-batch, whose gradients are added. Out of memory, the present update begins again with its
        micro-batches in twice as many parts, and so do all later ones: the same update, unless dropout differs."""
        batches = [inputs]
        while True:
            try:
                losses = [self._step_in_parts(model, batch, num_items_in_batch) for batch in batches]
                break
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]  # the error itself would hold on to the memory
            self._halve(memory.size(inputs), reason)
            self._announce()
            model.zero_grad()
            batches = [*self._trained, inputs]
        self._trained.append(inputs)
        if any_rank(not losses[-1].isfinite(), self.args.device):
            raise TrainingFailed(failure("the loss", self.state, self.folder))
        return losses[-1]

    def _step_in_parts(self, model: nn.Module, inputs: Mapping[str, Tensor], items: Tensor | int | None) -> Tensor:
        """A loss that is a mean over examples counts as much as they are a share of the update's; Trainer takes every
        micro-batch for equally large."""
        losses, examples = [], sum(map(memory.size, self._batches))
        for part in memory.split(inputs, self._parts):
            self.current_gradient_accumulation_steps = examples / memory.size(part)
            losses.append(super().training_step(model, part, items))
        return torch.stack(losses).sum()

    def _halve(self, examples: int, reason: str) -> None:
        if self.args.world_size > 1 or examples <= self._parts:
            which = "more than one process" if self.args.world_size > 1 else "one example at a time"
            raise TrainingFailed(f"out of memory at step {self.state.global_step + 1} with {which} ({reason}); "
                                 f"{last_good(self.folder)}. Lower --train_batch or --max_length, give "
                                 "--activation_checkpointing, or take a smaller model")
        clear_device_cache(garbage_collection=True)
        self._parts *= 2
        logger.warning("out of memory at step %d (%s): micro-batches are halved to %d, as many are accumulated as make "
                       "the same update", self.state.global_step + 1, reason, -(-examples // self._parts))

    # ------------------------------------------------------------ evaluation

    def evaluate(self, eval_dataset: object = None, ignore_keys: object = None,
                 metric_key_prefix: str = "eval") -> dict[str, float]:
        with stopping.at_once():  # the last step is saved
            metrics = {f"{metric_key_prefix}_accuracy": self.validate(), "epoch": self.state.epoch}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: object) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            self._point_to_best()
        return is_best

    def _point_to_best(self) -> None:
        """Also in a run folder that was moved."""
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(checkpoints.path_of(self.folder, self.state.best_global_step))

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        wrong = checkpoints.fault(best)
        if wrong:
            raise TrainingFailed(f"the best epoch's {best} is damaged ({wrong}); start again with --overwrite")
        if (best / PATCH).is_file():
            self._in_place.go_back(Patch.load(best / PATCH), self.selective)
        else:
            super()._load_best_model()

    # ------------------------------------------------------------ checkpoints

    def _get_output_dir(self, trial: object) -> str:
        return str(self._saves_in or self.folder)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """As Trainer does, into a folder beside; sealed, it takes its place. Raises TrainingFailed if it cannot."""
        target = checkpoints.path_of(self.folder, self.state.global_step)
        staging = self.folder / checkpoints.STAGING
        try:
            with writing(target, last_good(self.folder)):
                with self._saving_in(staging):
                    super()._save_checkpoint(model, trial)
                self._point_to_best()  # which Trainer names by the folder it wrote to
                progress = self._progress()
                ranks.wait_for_all()
                if self.args.should_save:
                    self._seal(staging / target.name, target, progress)
            ranks.wait_for_all()
        finally:
            if self.args.should_save:
                checkpoints.clear(self.folder)

    def _seal(self, staged: Path, target: Path, progress: Mapping[str, object]) -> None:
        (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody reads
        (staged / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        checkpoints.seal(staged, target)
        best = self.state.best_model_checkpoint
        checkpoints.retire(target, self.args.save_total_limit, Path(best) if best else None)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.is_fsdp_enabled or not self._in_place.is_part(self.selective):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            self._in_place.patch(self.selective).save(Path(output_dir) / PATCH)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = Path(resume_from_checkpoint) / PATCH
        if not file.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        try:
            self._in_place.go_back(Patch.load(file), None)
        except InputError as error:
            raise InputError(f"{file.parent} was trained from another model ({error}): start again with --overwrite"
                             ) from error

    @contextlib.contextmanager
    def _saving_in(self, staging: Path) -> Iterator[None]:
        self._saves_in = staging
        try:
            yield
        finally:
            self._saves_in = None

    def _progress(self) -> dict[str, object]:
        loss = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        return {"loss_since_logged": loss, "step_last_logged": self._globalstep_last_logged, "parts": self._parts,
                "selection": digest_of_selection(self.model)}

    def take_up(self, checkpoint: Path) -> None:
        """Go on exactly as the training that wrote the checkpoint would have: with the loss since the last row of the
        record, and with the evaluation of the epoch that it ends."""
        progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        self._tr_loss += progress["loss_since_logged"]
        self._globalstep_last_logged, self._parts = progress["step_last_logged"], progress["parts"]
        self._point_to_best()
        if self.validate and self.args.eval_strategy == "epoch" and ends_epoch(self.state):
            self._determine_best_metric(self.evaluate(), None)

    def _issue_warnings_after_load(self, load_result: object) -> None:
        """A tied head is not in the file, and comes back by tying; anything else amiss is an error, not a warning."""
        missing = set(load_result.missing_keys) - set(self.model.all_tied_weights_keys)
        if missing or load_result.unexpected_keys:
            raise InputError(f"the checkpoint is of another model: {len(missing)} tensors are missing and "
                             f"{len(load_result.unexpected_keys)} unknown; start again with --overwrite")


class TakeUp(TrainerCallback):
    """Before the first step of a resumed training."""

    def __init__(self, trainer: RecordedTrainer, checkpoint: Path):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                       **_: object) -> None:
        self.trainer.take_up(self.checkpoint)


class ByLength(LengthGroupedSampler):
    """Examples of about the same length together, in an order that follows from the seed and the epoch alone: drawn
    from the global generator, as Trainer does, it would be another one after a resumption."""

    def __init__(self, batch_size: int, dataset: Sequence[Mapping[str, object]], seed: int):
        super().__init__(batch_size, dataset, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


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
        eval_strategy="epoch" if args.eval_epochs else "no", save_strategy="epoch", save_steps=args.save_steps,
        save_total_limit=2, load_best_model_at_end=args.select_best,
        metric_for_best_model="accuracy" if args.select_best else None, remove_unused_columns=False,
        label_names=["labels"], dataloader_pin_memory=device.type == "cuda", disable_tqdm=not sys.stderr.isatty(),
        fsdp=args.fsdp or None, fsdp_config=dict(shard.CONFIG) if args.fsdp else None)


def train(model: nn.Module, rows: Sequence[object], collate: Callable[[Sequence[object]], dict[str, Tensor]],
          arguments: TrainingArguments, log: Callable[..., None], validate: Callable[[], float] | None = None,
          resume: bool = False, seconds_before: float = 0.0,
          make_optimizer: MakeOptimizer | None = None, new: Collection[str] = ()) -> TrainerState:
    """Train what requires gradients on `rows`, batched by `collate`; the state after the last step. `seconds_before`
    were spent before a resumption. `make_optimizer` takes the place of AdamW. `new` names tensors that were drawn at
    random, and that are another time drawn otherwise.

    A stop that is asked for (stt/stopping.py) ends the process after the step and its checkpoint. Raises TrainingFailed
    for a loss or gradient that is not a number, for too little memory and for a checkpoint that cannot be written, and
    InputError if there is nothing to resume, its selection is another one, or the processes' are not the same.
    """
    check_trained_dtype(model)
    check_same_selection(model)
    checkpoint = checkpoint_of(model, Path(arguments.output_dir)) if resume else None
    try:
        trainer = RecordedTrainer(model=model, args=arguments, train_dataset=list(rows), data_collator=collate,
                                  eval_dataset=[] if validate else None, validate=validate,
                                  make_optimizer=make_optimizer, new=new,
                                  callbacks=[Record(log, seconds_before), Saving()])
        trainer.remove_callback(PrinterCallback)
        if trainer.pop_callback(ProgressCallback):
            trainer.add_callback(Bar)
        if checkpoint:
            trainer.add_callback(TakeUp(trainer, checkpoint))
        if arguments.should_save:
            checkpoints.clear(trainer.folder)
        with stopping.deferred(), logging_redirect_tqdm(), own_names(model):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except pickle.UnpicklingError as error:  # from torch.load, which Trainer allows tensors and plain values only
        raise InputError(f"{checkpoint} holds more than numbers and was not written by us: start again with "
                         "--overwrite") from error
    except torch.OutOfMemoryError as error:
        raise TrainingFailed(f"the device ran out of memory outside of a forward and backward pass: lower --eval_batch "
                             f"or take a smaller model ({str(error).splitlines()[0]})") from error
    return trainer.state


def checkpoint_of(model: nn.Module, folder: Path) -> Path:
    """The newest checkpoint that is whole. Raises InputError if there is none or it is of another selection."""
    checkpoint, _ = checkpoints.newest(folder)
    if json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))["selection"] != digest_of_selection(model):
        raise InputError(f"{checkpoint} was trained with another selection than this run makes: the model or the data "
                         "changed; start again with --overwrite")
    return checkpoint


def check_same_selection(model: nn.Module) -> None:
    """Raises InputError, on every process, if they selected differently: their gradients would be averaged all the
    same, and be those of different units."""
    if len(set(ranks.gather(digest_of_selection(model)))) > 1:
        raise InputError("the processes have models with different selections: select on one of them and give that "
                         "selection to all")


def digest_of_selection(model: nn.Module) -> str | None:
    """sha256 over the kept units of every site; None for a model that is not sliced."""
    model = unwrap_peft_model(model)
    attached = getattr(model, "stt_attached", None)
    selection = attached.selection if attached else getattr(model, "stt_selection", None)
    if selection is None:
        return None
    digest = hashlib.sha256()
    for site, ids in sorted(selection.items()):
        digest.update(json.dumps([site, ids.tolist()]).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """Checkpoints hold the parameters by the names the model has: save_pretrained writes some (ViT's, a mixture's
    experts) as older releases had them, and Trainer, which loads without from_pretrained, would know none of those."""
    before = model.__dict__.get("save_pretrained")  # a sliced model has its own
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained
        if before is not None:
            model.save_pretrained = before


def check_trained_dtype(model: nn.Module) -> None:
    """Our invariant: whatever trains is float32 (half-precision weights hardly move at fine-tuning step sizes)."""
    wrong = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    assert not wrong, f"trained parameters must be float32: {wrong[:3]}"
