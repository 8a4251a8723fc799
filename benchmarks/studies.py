"""Small models and the text they are adapted to, for comparisons that train many times: the training, what is measured
of it, and a file with one row for every training."""
from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from stt.dataset import encode_all, load_task, selection_subset
from stt.errors import InputError
from stt.evaluate.generation import accuracy, generate_answers
from stt.evaluate.perplexity import perplexity
from stt.loss import chunked_loss
from stt.selective_optimizers.trainer import MakeOptimizer, SelectiveTrainerMixin
from stt.trainers.sft import Encoded, collate
from util.files import write_text_atomic

CHECKOUT = Path(__file__).resolve().parents[1]
PART = 20_000  # characters of Shakespeare that are tested on, and as many that are validated on
Row = dict[str, object]
Measure = Callable[[PreTrainedModel], float]


@dataclass(frozen=True)
class Study:
    """A model, the rows it trains on, and what is measured of it: `task` (higher is better if it is an accuracy),
    perplexity on `general` text like that of its pretraining, and what `task` is on data to choose settings by."""

    model: PreTrainedModel
    train: list[Encoded]
    select_on: Callable[[int], list[Encoded]]  # by seed
    task: Measure
    general: Measure
    batch_size: int
    schedule: str
    pad_id: int
    weight_decay: float = 0.01
    validate: Measure | None = None


def clutrr() -> Study:
    """The shipped model on the shipped task: accuracy of generated answers to the 450 test questions."""
    folder = CHECKOUT / "models" / "stt-tiny"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    task, text = load_task("clutrr", None), (folder / "heldout.txt").read_text()
    return Study(model, encode_all(task.train, tokenizer, 256)[0],
                 lambda seed: encode_all(selection_subset(task.train, 0.1, seed), tokenizer, 256)[0],
                 lambda model: accuracy(generate_answers(model, tokenizer, task, task.test, 64)),
                 lambda model: perplexity(model, tokenizer, text), 32, "linear", tokenizer.pad_token_id)


def shakespeare() -> Study:
    """A story model on Shakespeare: perplexity of the first 20 kB of a held-out tenth, and of stories; the last 20 kB
    of that tenth validate. Raises InputError where STT_TEST_DATA does not hold them."""
    hf, plays, tales = (real_data(path) for path in ("stories260k/hf", "lm_text/tinyshakespeare.txt",
                                                     "lm_text/tinystories_sample.txt"))
    tokenizer, model = AutoTokenizer.from_pretrained(hf), AutoModelForCausalLM.from_pretrained(hf)
    text, stories = plays.read_text(), tales.read_text()
    cut = int(0.9 * len(text))
    ids = tokenizer(text[:cut], add_special_tokens=False, verbose=False).input_ids
    rows = [{"input_ids": ids[i:i + 128], "labels": ids[i:i + 128]} for i in range(0, len(ids) - 127, 128)]
    return Study(model, rows, lambda seed: random.Random(seed).sample(rows, 64),
                 lambda model: perplexity(model, tokenizer, text[cut:cut + PART]),
                 lambda model: perplexity(model, tokenizer, stories), 16, "constant", 0,
                 validate=lambda model: perplexity(model, tokenizer, text[-PART:]))


def real_data(path: str) -> Path:
    """What stands at `path` under STT_TEST_DATA. Raises InputError if that is not set, or nothing is there."""
    folder = os.environ.get("STT_TEST_DATA")
    if not folder:
        raise InputError("STT_TEST_DATA is not set: set it to the folder of real data, which holds stories260k and "
                         "lm_text")
    if not (Path(folder) / path).exists():
        raise InputError(f"STT_TEST_DATA={folder} has no {path}: set it to the folder of real data")
    return Path(folder) / path


# ---------------------------------------------------------------- training


def train(study: Study, model: nn.Module, steps: int, lr: float, seed: int,
          look: Callable[[int], None] = lambda step: None, make_optimizer: MakeOptimizer | None = None) -> None:
    """`steps` steps of what trains of `model`, with AdamW or the optimizer that is made; `look` is called after each
    with its number."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=study.batch_size, max_steps=steps, learning_rate=lr,
            lr_scheduler_type=study.schedule, weight_decay=study.weight_decay, seed=seed, save_strategy="no",
            report_to=[], logging_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False)
        trainer = SelectiveTrainer(model=chunked_loss(model), args=arguments, train_dataset=study.train,
                                   data_collator=collate(study.pad_id), callbacks=[Look(look)],
                                   make_optimizer=make_optimizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


class SelectiveTrainer(SelectiveTrainerMixin, Trainer):
    """Trainer itself unless it is given a selective optimizer."""


class Look(TrainerCallback):
    """Calls `look(step)` after every step."""

    def __init__(self, look: Callable[[int], None]):
        self.look = look

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        self.look(state.global_step)


# ---------------------------------------------------------------- rows, and the page they are shown on


def read_rows(path: Path) -> list[Row]:
    """The whole rows of the file; none if there is no file."""
    return [json.loads(line) for line in _whole(path).splitlines()]


def add_row(path: Path, row: Mapping[str, object]) -> None:
    """One more row, in place of one that was being written when the process ended."""
    whole = _whole(path)
    if path.is_file() and len(whole) < len(path.read_text(encoding="utf-8")):
        write_text_atomic(path, whole)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _whole(path: Path) -> str:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text[:text.rfind("\n") + 1]


def write_between_marks(page: Path, mark: str, table: str) -> None:
    """Put `table` between the two comments of that name, in place of what is there. Raises InputError as `around`."""
    before, after = around(page, mark)
    page.write_text(f"{before}\n{table.strip()}\n{after}", encoding="utf-8")


def around(page: Path, mark: str) -> tuple[str, str]:
    """What stands on the page up to the first comment of that name, and from the last one on. Raises InputError for a
    page without them."""
    first, last = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    if not page.is_file():
        raise InputError(f"there is no page {page}: give a file that has the lines {first} and {last}")
    before, found, rest = page.read_text(encoding="utf-8").partition(first)
    if not found or last not in rest:
        raise InputError(f"{page} has no place for the table: put the lines {first} and {last} into it")
    return before + first, last + rest.split(last)[1]
