"""The flags of llm_ablation.py: those of train_llm.py, the published ones of the ablation, and ours."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from tyro.conf import arg

from stt import arguments
from stt.ablation.flags import AblationFlags, new_stories, one_step_size, run_name
from stt.llm_arguments import LLMArgs, resolved

# What `None` stands for: minutes with the shipped model; with a real one what was published, and enough runs.
QUICK = {"mode": "stt,magnitude_pruning,random", "lrs": "1e-3,3e-3,1e-2,3e-2", "seeds": 1, "num_epoch": 1,
         "train_size": 1280, "train_batch": 32, "schedule": True, "recovery_lr": 1e-3}
REAL = {"mode": "baseline", "lrs": "1e-5,3e-5,1e-4,3e-4", "seeds": 5, "num_epoch": 10,
        "train_size": 0, "train_batch": 8, "schedule": False, "recovery_lr": 1e-5}


def _open(name: str, metavar: str, *aliases: str) -> object:
    hint = f"(default: {QUICK[name]} for stt-tiny, {REAL[name]} for other models)"
    return arg(aliases=aliases, metavar=metavar, help_behavior_hint=hint)


@dataclass(frozen=True)
class LLMAblationArgs(AblationFlags, LLMArgs):
    """Compare ways to choose and train the neurons of a decoder: the same trials of the step size for every mode, then
    several seeds with the best one, and the differences with what they can detect.

    Without arguments: three modes on the shipped model and data, in minutes, with one seed. An interrupted ablation
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
    train_size: Annotated[int | None, _open("train_size", "INT")] = None
    """training examples to use, drawn with --seed; 0 = all"""
    source_task: Annotated[str | None, arg(aliases=("--source_dataset",), metavar="STR")] = None
    """the task that mode transfer selects on; it trains on --task"""
    source_dir: str | None = None
    """--data_dir of --source_task"""
    source_ratio: float | None = None
    """--active_sample_ratio of --source_task; None = the same"""

    def _check_mode(self) -> None:
        """The modes are looked up when the library is loaded (ablation/arms.py)."""

    def __post_init__(self) -> None:
        self.check_ablation()
        super().__post_init__()
        arguments.check_ranges(self, ((("source_ratio",), lambda x: 0 < x <= 1, "in (0, 1]"),))


def resolve(args: LLMAblationArgs) -> LLMAblationArgs:
    """`args` with nothing left open. Raises InputError for a model or text file that is not there, and for new stories
    where the task is another one."""
    full = resolved(one_step_size(args))
    full = replace(full, run_name=args.run_name, test_size=new_stories(full))
    return replace(full, run_name=run_name(full))
