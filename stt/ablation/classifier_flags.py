"""The flags of classifier_ablation.py: those of train_classifier.py, the published ones of the ablation, and ours."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from tyro.conf import arg

from stt.ablation.flags import AblationFlags, new_stories, one_step_size, run_name
from stt.classifier_arguments import FOR_REAL_MODELS, FOR_SHIPPED_MODEL, ClassifierArgs, resolved
from stt.errors import InputError

# What `None` stands for: minutes with the shipped model; with a real one what was published, and enough runs.
QUICK = {**FOR_SHIPPED_MODEL, "mode": "stt,magnitude_pruning,random", "lrs": "3e-4,1e-3,3e-3,1e-2", "seeds": 1,
         "num_epoch": 5, "recovery_lr": 1e-3}
REAL = {**FOR_REAL_MODELS, "mode": "baseline", "lrs": "1.5e-5,5e-5,1.5e-4,5e-4", "seeds": 5, "recovery_lr": 1e-5}
for _numbers in (QUICK, REAL):
    del _numbers["lr"]


def _open(name: str, metavar: str, *aliases: str) -> object:
    hint = f"(default: {QUICK[name]} for vit-digits, {REAL[name]} for other models)"
    return arg(aliases=aliases, metavar=metavar, help_behavior_hint=hint)


@dataclass(frozen=True)
class ClassifierAblationArgs(AblationFlags, ClassifierArgs):
    """Compare ways to choose and train the neurons of a classifier of texts or images: the same trials of the step size
    for every mode, then several seeds with the best one, and the differences with what they can detect.

    Without arguments: three modes on the shipped models/vit-digits, in minutes, with one seed. An interrupted ablation
    goes on where it stopped. docs/ablations.md explains the modes and how to read the tables.
    """

    for_shipped_model: ClassVar[dict[str, object]] = QUICK
    for_real_models: ClassVar[dict[str, object]] = REAL

    mode: Annotated[str | None, _open("mode", "A,B,...")] = None
    """what to compare, separated by commas: baseline (= finetune) | lora | stt | stt_lora | stt_attn |
    magnitude_pruning | wanda_adapt | gateprod | activation_mean_value | activation_rate | random | a score's name |
    mag_tp | wanda_tp | ns_activeset | ns_sigma | transfer | scores (stt and all it must beat) | calibration"""
    lr: Annotated[float | None, arg(aliases=("--learning_rate",), metavar="FLOAT")] = None
    """one step size for every mode, without trials"""
    num_epoch: Annotated[int | None, _open("num_epoch", "INT", "--num_epochs")] = None
    """passes over the training data"""
    source_task: Annotated[str | None, arg(aliases=("--source_dataset",), metavar="STR")] = None
    """the task that mode transfer selects on; it trains on --task"""

    def _check_mode(self) -> None:
        """The modes are looked up when the library is loaded (ablation/arms.py)."""

    def _check_published(self) -> None:
        """Published flags that say nothing, or of a mode that is not compared."""
        if self.mag_use_tracker_budget is False:
            raise InputError("every mode keeps as many neurons as STT, so that they compare; leave "
                             "no_mag_use_tracker_budget out.")
        by_magnitude = {"magnitude_pruning", "mag_tp", "magnitude", "scores"} & set((self.mode or "").split(","))
        for name in ("mag_norm", "mag_use_tracker_budget"):
            if getattr(self, name) is not None and not by_magnitude:
                raise InputError(f"{name} is about the modes magnitude_pruning and mag_tp, and neither is compared; "
                                 "leave it out.")

    def __post_init__(self) -> None:
        self.check_ablation()
        super().__post_init__()


def resolve(args: ClassifierAblationArgs) -> ClassifierAblationArgs:
    """`args` with nothing left open. Raises InputError for a model that is not there, for no task, and for new stories
    where the task is another one."""
    full = resolved(one_step_size(args))
    full = replace(full, run_name=args.run_name, test_size=new_stories(full))
    return replace(full, run_name=run_name(full))
