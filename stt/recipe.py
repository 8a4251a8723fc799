"""What the training recipes have in common: a run from its opening to its report, its selection and how that is
recorded, resuming, and what stands in the results."""
from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stt.arguments import RunArgs
from stt.errors import InputError
from util import ranks
from util.clock import Clock
from util.utils import RunFolder, git_commit, pick_device, set_seed, versions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

    from stt.batches import Batch
    from stt.evaluate.classifier import ClassifierJudge
    from stt.evaluate.llm import Judge
    from stt.modes import Mode
    from stt.selection import Selection
    from stt.selective_optimizers.recipe import Growing
    from util.sinks import Sink

logger = logging.getLogger(__name__)

SELECTION = "selection.safetensors"
GPU_MULTIPLE = 128  # kept neurons of a site are padded to a multiple of this for inference on a GPU
DEV_SHARE = 0.1  # of the training data, held out by --dev_mode
# between a run and its resumption
MAY_CHANGE = ("resume", "overwrite", "eval_restored", "log_interval", "save_steps", "activation_checkpointing",
              "output_dir", "ppl_text", "use_wandb", "wandb_project", "wandb_entity", "wandb_run_name")
PARTS_OF_UPDATE = ("train_batch", "gradient_accumulation_steps")  # so may these, if an update keeps its size
Row = TypeVar("Row")


@dataclass(frozen=True)
class Run:
    """A run of resolved flags: its mode, where it computes and in which dtype, its folder, the step it goes on from
    (0: the start), and its clock."""

    args: RunArgs
    mode: Mode
    device: torch.device
    autocast_dtype: torch.dtype | None
    folder: RunFolder
    step: int
    clock: Clock
    growing: Growing | None = None  # makes the optimizer that chooses weights as it trains

    @property
    def path(self) -> Path:
        return self.folder.path

    def check(self, model: PreTrainedModel) -> None:
        """Raises InputError for a model that cannot be sliced, or not be trained in as little memory, as asked for."""
        from stt.modes import check_sites
        from stt.trainers.memory import check_can_recompute

        args = self.args
        if self.mode.chooses_units:
            check_sites(model, args.partial, args.units)
        if args.activation_checkpointing:
            check_can_recompute(model)

    def begin(self, selection: Selection | None) -> None:
        """The first write: the run folder, and the selection in it."""
        self.folder.start(asdict(self.args), wandb(self.args), self.step)
        if selection is not None:
            ranks.on_first(lambda: selection.save(self.path / SELECTION))
        self.clock.add("training", self.folder.seconds)

    def prepare(self, model: PreTrainedModel, selection: Selection | None) -> dict[str, int]:
        """The model sliced, adapted and frozen as the mode says; the numbers of parameters it trains."""
        from stt import modes
        from stt.selective_optimizers import recipe as in_place
        from stt.surgery import count_parameters
        from stt.trainers.memory import recompute

        args = self.args
        if self.mode.is_in_place:
            in_place.prepare(model, selection, args.head)
        else:
            lora = modes.Lora(args.lora_r, args.lora_alpha, args.lora_dropout)
            modes.prepare(self.mode, model, selection, lora, args.head, args.tune_attn)
        if args.activation_checkpointing:
            recompute(model)
        if self.growing:
            return self.growing.counts(model)
        return {name: count for name, count in count_parameters(model).items() if name != "total"}

    def deploy(self, model: PreTrainedModel, selection: Selection | None, judge: Judge | ClassifierJudge,
               has_new_head: bool = False) -> tuple[dict[str, float], int]:
        """The trained model as it is measured and shipped: adapters merged, what trained in place written into the run
        folder as a patch, its sites padded to widths that serve. What it keeps, in parameters and shares, and the FLOPs
        of an inference before padding."""
        from stt import modes
        from stt.surgery import count_parameters, pad_sites

        if self.args.activation_checkpointing:
            model.activation_checkpointing_disable()
        if self.mode.is_in_place:
            self._write_patch(model, selection, has_new_head)
            selection = None  # nothing is removed
        modes.merge_adapters(model)
        kept, flops = count_parameters(model)["total"], judge.inference_flops(model)
        pad_sites(model, GPU_MULTIPLE if self.device.type == "cuda" else 1)
        return {"kept": kept, **kept_fractions(selection)}, flops

    def _write_patch(self, model: PreTrainedModel, selection: Selection | None, has_new_head: bool) -> None:
        """What was trained, by how much, and for weights chosen in training which they are. The base model has no
        values of a new head."""
        from stt.selective_optimizers import recipe as in_place
        from stt.selective_optimizers.progress import PATCH
        from stt.surgery import head_parameters
        from util.files import writing

        patch = in_place.finished(model, self.growing, head_parameters(model) if has_new_head else ())
        with writing(self.path / PATCH, "the last checkpoint is kept"):
            if ranks.is_first():
                patch.save(self.path / PATCH)
                if selection is None:
                    patch.selection.save(self.path / SELECTION)

    def sites(self, before: list[dict[str, object]]) -> list[dict[str, object]]:
        """The sites for the record: those known `before` the training, or what was chosen in it."""
        return self.growing.tensors if self.growing else before

    def finish(self, results: Mapping[str, object]) -> None:
        """The report, results.json last, and a summary on the terminal."""
        from stt import report

        if ranks.is_first():
            report.write_report(self.path, results)
            self.folder.finish(results)
            lines = [*report.summary_lines(results), f"report: {self.path / 'report.html'}"]
            sys.stdout.write("\n".join(lines) + "\n")


def open_run(args: RunArgs) -> Run:
    """The run of these flags; writes nothing. Raises InputError if it must not be written, or cannot be resumed or
    sharded."""
    from stt import modes
    from stt.loading import compute_dtype
    from stt.selective_optimizers.recipe import Growing

    hide_bars()
    device, clock = pick_device(), Clock()
    set_seed(args.seed)
    mode = modes.find(args.mode, args.score)
    check_can_shard(args, device)
    folder = RunFolder(path_of(args), args.overwrite, args.resume)
    step = resumed_step(folder.path, args) if args.resume else 0
    growing = Growing(args) if mode.trains == "growing" else None
    return Run(args, mode, device, compute_dtype(args.precision, device), folder, step, clock, growing)


def path_of(args: RunArgs) -> Path:
    """The run folder of resolved flags."""
    return Path(args.output_dir) / args.run_name


def hide_bars() -> None:
    """No progress bars of transformers where nobody would see them move."""
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def check_can_shard(args: RunArgs, device: torch.device) -> None:
    """Raises InputError if a model is to be sharded where accelerate would silently train copies of it."""
    if args.fsdp and device.type != "cuda":
        raise InputError("fsdp shards a model over GPUs, and there is none here; leave it out: torchrun alone trains a "
                         "copy in every process.")
    if args.fsdp and ranks.world() == 1:
        raise InputError("fsdp shards a model over several processes, and this is one; start with torchrun "
                         "--nproc_per_node N, or leave it out.")


def batches_of(rows: Sequence[Row], size: int, collate: Callable[[Sequence[Row]], Batch]) -> list[Batch]:
    """The batches that this process selects on: its share of all, of `size` rows or of so few that each process has
    one."""
    size = min(size, max(len(rows) // ranks.world(), 1))
    return [collate(part) for part in ranks.share([rows[i:i + size] for i in range(0, len(rows), size)])]


def select(run: Run, model: PreTrainedModel, judge: Judge | ClassifierJudge, rows: Sequence[Row],
           collate: Callable[[Sequence[Row]], Batch], tokenizer: PreTrainedTokenizerBase | None,
           select_on: str = "all") -> tuple[Selection, list[dict[str, object]], int]:
    """The selection on the rows, of which every process takes its share and the first decides; its sites for the
    record; and the FLOPs of making it.

    Raises InputError if a resumed run would select otherwise than it did.
    """
    from stt.modes import select_units
    from stt.selecting import Budget, measured_for
    from stt.selective_optimizers import recipe as in_place

    args = run.args
    if run.mode.trains == "weights":
        with run.clock.lap("selection"):
            selection = ranks.broadcast(in_place.choose(model, run.mode.score, args))
        check_same_selection(run, selection)
        return selection, in_place.described(selection, model), 0
    compensate = args.compensate or "none"
    size = Budget(args.topk_ratio, args.keep_ratio, width=args.width, multiple_of=args.multiple_of,
                  heads_keep=args.heads_ratio)
    batches = batches_of(rows, args.eval_batch, collate)
    with run.clock.lap("selection"):
        selection, composition = ranks.broadcast(select_units(
            run.mode, model, batches, tokenizer, size, args.active_threshold, args.seed, args.count_padding, select_on,
            compensate, args.min_tokens, args.units))
        sites = described_sites(selection, composition)
    check_same_selection(run, selection)
    methods, head_score = measured_for(["stt", run.mode.score], args.units)
    return selection, sites, judge.selection_flops(model, rows, methods, compensate, head_score)


def check_same_selection(run: Run, selection: Selection) -> None:
    """Raises InputError if a resumed run does not select what it did."""
    from stt.selection import Selection

    before = run.path / SELECTION
    if run.args.resume and Selection.load(before).without_new_values() != selection.without_new_values():
        raise InputError(f"{before} is not what this run selects now: the model or the data changed; start "
                         "again with --overwrite")


def described_sites(selection: Selection, composition: Mapping[str, Mapping[str, int]]) -> list[dict[str, object]]:
    """The sites of a selection for the record; says in the log how far halves of the data agree on them."""
    from stt.report import agreement_lines
    from stt.selecting import routed_to

    sites = [{"name": name, "width": selection.widths[name], "kept": len(ids), **units_of(selection, name),
              **composition.get(name, {}), **selection.meta["reliability"][name], **routed_to(selection, name)}
             for name, ids in selection.items()]
    logger.info("\n".join(agreement_lines(sites)))
    return sites


def units_of(selection: Selection, site: str) -> dict[str, object]:
    """What the units of a site are, and of heads how many query heads one unit has."""
    if site not in selection.heads:
        return {"units": "neurons"}
    return {"units": "heads", "query_heads_of_unit": selection.heads[site]}


def described(run: Run, task: str, *more: str) -> dict[str, object]:
    """What a run was, for its results: flags that tell runs apart, versions and device; `more` are words on what the
    recipe selects by."""
    args = run.args
    return {"mode": args.mode, "model": args.model, "task": task, "seed": args.seed,
            "in_place": run.mode.is_in_place,
            "selected_by": selected_by(args, run.mode, *more), "head": args.head, "dev_mode": args.dev_mode,
            "versions": versions(), "git_commit": git_commit(), "device": str(run.device), "processes": ranks.world()}


def selected_by(args: RunArgs, mode: Mode, *more: str) -> str | None:
    """What chose the units, in words; `more` are words of the recipe's own."""
    from stt.head_scores import matching

    if mode.score is None:
        return None
    parts = [*([] if args.units == "heads" else [mode.score]),
             *([] if args.compensate in (None, "none") else [f"compensated by {args.compensate}"]),
             *([] if args.units == "neurons" else [f"{matching(mode.score)} of heads"]),
             *([] if mode.trains != "growing" else ["at every step"]),
             *more, *([] if args.preset == "published" else [f"preset {args.preset}"])]
    return ", ".join(parts)


def kept_fraction(selection: Selection | None, units: str = "neurons") -> float:
    """Share of the neurons (or "heads") of all sites that are kept; 1 if none were chosen from."""
    sites = [] if selection is None else [site for site in selection if (site in selection.heads) == (units == "heads")]
    return sum(len(selection[site]) for site in sites) / sum(selection.widths[site] for site in sites) if sites else 1.0


def kept_fractions(selection: Selection | None) -> dict[str, float]:
    """The shares for the results: of neurons, and of heads where they were chosen from."""
    of_heads = {"kept_fraction_of_heads": kept_fraction(selection, "heads")} if selection and selection.heads else {}
    return {"kept_fraction_of_units": kept_fraction(selection), **of_heads}


def resumed_step(folder: Path, args: RunArgs) -> int:
    """The step of the newest whole checkpoint; says which ones are damaged. Raises InputError if there is none, or if
    the run was started with other flags."""
    from stt.trainers.checkpoints import newest, step_of

    checkpoint, faults = newest(folder)
    check_same_flags(folder, args)
    for name, fault in faults.items():
        logger.warning("%s is damaged (%s): going on from %s", folder / name, fault, checkpoint.name)
    return step_of(checkpoint)


def is_finished(args: RunArgs) -> bool:
    """Whether there is nothing left to resume; says where the report is. Raises InputError if the run was started with
    other flags."""
    folder = path_of(args)
    if not (args.resume and (folder / "results.json").is_file()):
        return False
    check_same_flags(folder, args)
    if ranks.is_first():
        sys.stdout.write(f"already finished: {folder / 'report.html'}\n")
    return True


def check_same_flags(folder: Path, args: RunArgs) -> None:
    """Raises InputError if the run in `folder` was started with other flags than `args`. Of an update's examples the
    parts of a process and of a forward pass may change together, as the number of processes does."""
    from stt.runs import read_json

    record = read_json(folder / "args.json")
    before = record.get("arguments")
    before = before if isinstance(before, dict) else {}
    was, now = update_size(before, record.get("processes", 1)), update_size(asdict(args), ranks.world())
    may_change = (*MAY_CHANGE, *(PARTS_OF_UPDATE if was == now else ()))
    for name, value in asdict(args).items():
        if name not in may_change and before.get(name) != value:
            raise InputError(f"the run in {folder} was started with {name} {before.get(name)!r}, now it is {value!r}: "
                             "resume with the same flags, or start another run")
    if was != now:
        logger.warning("an update was made of %s examples, and is of %s with %d processes now: another "
                       "--train_batch or --gradient_accumulation_steps keeps it", was, now, ranks.world())


def update_size(arguments: Mapping[str, object], processes: object) -> int | None:
    """Examples of one optimizer step; None if the record does not say."""
    factors = [*(arguments.get(name) for name in PARTS_OF_UPDATE), processes]
    return math.prod(factors) if all(type(factor) is int for factor in factors) else None


def wandb(args: RunArgs) -> Sink:
    """The W&B run if asked for, of the first process, else nothing."""
    from util.sinks import NoSink, wandb_sink

    if not args.use_wandb or not ranks.is_first():
        return NoSink()
    return wandb_sink(args.wandb_project, args.wandb_entity, args.wandb_run_name or args.run_name, asdict(args))


def ship(model: PreTrainedModel, reader: PreTrainedTokenizerBase | BaseImageProcessor, folder: Path,
         is_sliced: bool) -> None:
    """The trained model and its tokenizer or image processor, for stt.load or plain from_pretrained; no value is
    rounded. Raises TrainingFailed if it cannot be written."""
    from stt import checkpoint
    from stt.surgery import widest_dtype
    from util.files import writing

    with writing(folder, "the last checkpoint is kept"):
        if is_sliced:
            checkpoint.save(model, folder, reader)
        else:
            model.to(widest_dtype(model.parameters())).save_pretrained(folder)
            reader.save_pretrained(folder)
