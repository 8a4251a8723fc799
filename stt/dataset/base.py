"""What every decoder task is made of: an example, its token ids, its splits, and the files its rows come from."""
from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from stt.dataset.chat import cut_left, end_id, render
from stt.errors import InputError
from stt.words import lost

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED = -100           # label of a token that is not trained on (torch cross entropy's ignore_index)
VALIDATION_SHARE = 0.1   # of train, when the data has no validation split
SPLIT_FILES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}

Item = TypeVar("Item")   # an example, or what becomes one (stt/dataset/own.py)
SomeData = TypeVar("SomeData", bound="Data")
Row = Mapping[str, object]
Encoded = dict[str, list[int]]  # input_ids and labels (IGNORED: not trained on) of what is read at once
Splits = dict[str, list[tuple[str, Row]]]  # split -> (where the row stands, the row); "where" begins every complaint


class Tokens(NamedTuple):
    """An example as token ids: what is trained on (a conversation may take several rows), what an answer is generated
    from, whether a prompt lost its beginning, and how many answers are left out because they do not fit."""

    rows: list[Encoded]
    prompt: list[int]
    was_cut: bool
    n_lost: int = 0


@dataclass(frozen=True)
class Example:
    """One question. The model reads `prompt` and must go on with exactly `answer`, then end."""

    prompt: str
    answer: str               # with its leading space, without the end token
    label: str                # what `Task.extract` must find in the response
    choices: tuple[str, ...]  # every label this question allows; none: any text
    tokens: Tokens | None = field(default=None, compare=False, repr=False)  # set: not tokenised by the rules below


@dataclass(frozen=True)
class Data(Generic[Item]):
    """The three splits of a task."""

    name: str
    train: list[Item]
    validation: list[Item]
    test: list[Item]


@dataclass(frozen=True)
class Task(Data[Item]):
    """A task's data, and how a label is read out of a response (None: the response names no label)."""

    extract: Callable[[str, Example], str | None]
    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()  # tokens that end an answer, besides the tokenizer's end token
    left_out: Mapping[str, int] = field(default_factory=dict)  # split -> examples of which no answer fits max_length


def make_example(prompt: str, label: str, choices: Sequence[str], where: str) -> Example:
    """An example whose answer is a space and the label. Raises InputError if the label is none of the choices."""
    if label not in choices:
        raise InputError(f"{where}: label {label!r} is none of its choices ({', '.join(choices)}).")
    return Example(prompt, f" {label}", label, tuple(choices))


# --------------------------------------------------------------------------------------------------------------------
# Token ids: the same prompt ids at training and at evaluation, loss on the answer and the end token only
# --------------------------------------------------------------------------------------------------------------------


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool = False) -> list[int]:
    """The prompt's token ids, cut on the left so that the longest of the example's choices still fits `max_length`.

    The choices, not the true answer, set the cut: at evaluation a prompt must not tell how long its answer is.
    """
    return _tokens(example, tokenizer, max_length, chat).prompt


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool = False) -> Encoded:
    """`input_ids` = prompt, answer, end token; `labels` = the same, IGNORED on the prompt. At most `max_length` long.

    Prompt and answer are tokenised apart, so the prompt equals `prompt_ids`. With `chat` the prompt is one user turn of
    the tokenizer's chat template, and the answer loses its leading space.
    """
    return _tokens(example, tokenizer, max_length, chat).rows[0]


def encode_all(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int,
               chat: bool = False) -> tuple[list[Encoded], int]:
    """Every example encoded, and how many prompts had to be cut (no example is ever dropped)."""
    if not examples:
        raise InputError("there are no examples to encode: the data is empty.")
    encoded = [_tokens(example, tokenizer, max_length, chat) for example in examples]
    n_truncated = sum(tokens.was_cut for tokens in encoded)
    if n_truncated:
        logger.warning("%d of %d prompts are cut on the left to fit %d tokens", n_truncated, len(encoded), max_length)
    return [row for tokens in encoded for row in tokens.rows], n_truncated


def truncation(task: Task[Example], tokenizer: PreTrainedTokenizerBase, max_length: int,
               chat: bool = False) -> dict[str, dict[str, int]]:
    """What `max_length` takes away, by split: `examples` that stay, how many of them lost the beginning of a prompt
    (`prompts_cut`), `answers_left_out` of them, and `examples_left_out` because none of their answers fits. No answer
    is ever cut. Says in the log what is lost."""
    found = {}
    for split in SPLIT_FILES:
        encoded = [_tokens(example, tokenizer, max_length, chat) for example in getattr(task, split)]
        found[split] = {"examples": len(encoded), "prompts_cut": sum(tokens.was_cut for tokens in encoded),
                        "answers_left_out": sum(tokens.n_lost for tokens in encoded),
                        "examples_left_out": task.left_out.get(split, 0)}
    logger.info("to fit max_length %d: %s", max_length, lost(found))
    return found


def labelled(prompt: list[int], answer: list[int]) -> Encoded:
    """The row that trains `answer` after `prompt`."""
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def _tokens(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool) -> Tokens:
    if example.tokens is not None:
        return example.tokens
    prompt, was_cut = _fit_prompt(example, tokenizer, max_length, chat)
    return Tokens([labelled(prompt, answer_ids([example.answer], tokenizer, chat)[0])], prompt, was_cut)


def answer_ids(answers: Sequence[str], tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[list[int]]:
    """The ids of each answer and of the model's real end token."""
    end = end_id(tokenizer)
    texts = [answer.removeprefix(" ") if chat else answer for answer in answers]
    return [[*ids, end] for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids]


def _fit_prompt(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int,
                chat: bool) -> tuple[list[int], bool]:
    """The prompt's ids and whether they were cut. A beginning-of-sequence token stays."""
    answers = answer_ids([example.answer, *(f" {choice}" for choice in example.choices)], tokenizer, chat)
    room = max_length - max(map(len, answers))
    ids = _chat_ids(example.prompt, tokenizer) if chat else plain_ids(example.prompt, tokenizer)
    if len(ids) <= room:
        return ids, False
    if not chat:
        cut = cut_plain(ids, tokenizer, room)
    else:  # the template's own turns stay
        cut = cut_left(example.prompt, tokenizer, room, lambda text: _chat_ids(text, tokenizer))
    if cut is None:
        alone = ", the chat template alone is longer" if chat else ""
        raise InputError(f"max_length {max_length} leaves no room for a prompt{alone}: an answer with its end token"
                         f" takes {max_length - room} tokens; raise --max_length.")
    return cut, True


def plain_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a prompt outside a template."""
    ids = tokenizer(prompt, verbose=False).input_ids
    while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text; a prompt must stay open
        ids = ids[:-1]
    return ids


def cut_plain(ids: list[int], tokenizer: PreTrainedTokenizerBase, room: int) -> list[int] | None:
    """The last `room` ids, after the beginning-of-sequence token if there was one; None if no other would be left."""
    begin = ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []
    return begin + ids[max(len(ids) - room, 0) + len(begin):] if room > len(begin) else None


def _chat_ids(content: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.chat_template is None:
        raise InputError("--apply_chat_template needs a tokenizer with a chat template, and this one has none:"
                         " leave the flag out or use an instruction-tuned model.")
    text = render(tokenizer, [{"role": "user", "content": content}], None, True, "a prompt")
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # the template writes its own BOS


# --------------------------------------------------------------------------------------------------------------------
# Subsets: every choice is made from a seed, keeps the order of the data, and never looks at the labels
# --------------------------------------------------------------------------------------------------------------------


def selection_subset(examples: Sequence[Example], ratio: float, seed: int) -> list[Example]:
    """The random `ratio` of the examples that scores are computed on (`--active_sample_ratio`); at least one."""
    if not 0 < ratio <= 1:
        raise InputError(f"active_sample_ratio must be in (0, 1], got {ratio}.")
    if not examples:
        raise InputError("there are no examples to select on: the data is empty.")
    return split_off(examples, max(1, round(ratio * len(examples))), seed)[0]


def dev_split(task: SomeData, fraction: float, seed: int) -> SomeData:
    """The task with a random `fraction` of train as its test set (`--dev_mode`): the real test set is not in it."""
    if not 0 < fraction < 1:
        raise InputError(f"the part of train held out by --dev_mode must be in (0, 1), got {fraction}.")
    if len(task.train) < 2:
        raise InputError(f"--dev_mode needs at least 2 training examples, task {task.name!r} has {len(task.train)}.")
    count = min(max(1, round(fraction * len(task.train))), len(task.train) - 1)
    test, train = split_off(task.train, count, seed)
    logger.info("--dev_mode: %d of %d training examples of %s are the test set", count, len(task.train), task.name)
    return replace(task, train=train, test=test)


def limit(task: SomeData, train_size: int, seed: int) -> SomeData:
    """The task with `train_size` random training examples; 0 = all. A bigger size only adds to a smaller one."""
    if train_size < 0:
        raise InputError(f"train_size must be 0 (all) or more, got {train_size}.")
    if train_size > len(task.train):
        logger.warning("train_size %d: task %s has only %d examples", train_size, task.name, len(task.train))
    if train_size == 0 or train_size >= len(task.train):
        return task
    return replace(task, train=split_off(task.train, train_size, seed)[0])


def limit_validation(task: SomeData, size: int, seed: int) -> SomeData:
    """The task with `size` random validation examples; 0 = all, as where there are no more."""
    if size == 0 or size >= len(task.validation):
        return task
    return replace(task, validation=split_off(task.validation, size, seed)[0])


def complete_splits(splits: dict[str, list[Item]], name: str) -> dict[str, list[Item]]:
    """Train, validation and test. Without a test split validation takes its place (BoolQ on the hub publishes no test
    labels); without a validation split a fixed random tenth of train becomes it. Both are logged."""
    for split, examples in splits.items():
        if not examples:
            raise InputError(f"the {split} split of task {name!r} is empty.")
    if "train" not in splits or not {"test", "validation"} & set(splits):
        raise InputError(f"the data of task {name!r} needs a train and a test split, found:"
                         f" {', '.join(splits) or 'none'}.")
    train, validation, test = splits["train"], splits.get("validation"), splits.get("test")
    if test is None:
        logger.info("%s has no test split: its validation split is the test set", name)
        test, validation = validation, None
    if validation is None:
        if len(train) < 2:
            raise InputError(f"task {name!r} has no validation split, and its one training example cannot be split.")
        count = max(1, round(VALIDATION_SHARE * len(train)))
        logger.info("%s has no validation split: %d of %d training examples become it", name, count, len(train))
        validation, train = split_off(train, count, seed=0)
    return {"train": train, "validation": validation, "test": test}


def split_off(examples: Sequence[Item], count: int, seed: int) -> tuple[list[Item], list[Item]]:
    """`count` random examples and the rest, both in the order of the data; for one seed the counts are nested."""
    shuffled = list(range(len(examples)))
    random.Random(seed).shuffle(shuffled)
    taken = set(shuffled[:count])
    return ([example for i, example in enumerate(examples) if i in taken],
            [example for i, example in enumerate(examples) if i not in taken])


# --------------------------------------------------------------------------------------------------------------------
# Rows: from a folder of JSON or JSONL files, or from the hub
# --------------------------------------------------------------------------------------------------------------------


def text_field(row: Row, name: str, where: str) -> str:
    """The text of a field. Raises InputError if it is missing, empty or no text."""
    if name not in row:
        raise InputError(f"{where}: field {name!r} is missing, the row has: {', '.join(map(str, row)) or 'nothing'}.")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: field {name!r} must be a text, got {value!r}.")
    return value.strip()


def read_folder(folder: Path) -> Splits:
    """The rows of train, validation (or valid, val, dev) and test, each one .json (a list) or .jsonl file.

    A single file whose name merely begins with "train" (train_2000.json) is taken as train.
    """
    if not folder.is_dir():
        raise InputError(f"data folder {folder} does not exist: give a folder with train, validation and test as .json"
                         f" or .jsonl files.")
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jsonl"))
    found = {split: [path for path in files if path.stem in names] for split, names in SPLIT_FILES.items()}
    if not found["train"]:
        found["train"] = [path for path in files if path.stem.startswith("train")]
    for split, paths in found.items():
        if len(paths) > 1:
            raise InputError(f"{folder} has more than one {split} file ({', '.join(path.name for path in paths)}):"
                             f" keep one.")
    if not found["train"]:
        raise InputError(f"{folder} has no train.json or train.jsonl.")
    return {split: read_rows(paths[0]) for split, paths in found.items() if paths}


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """The objects of a JSON list or of a JSONL file, each with its place ("row 3 of …", counted from 1)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = _lines(text, path) if path.suffix == ".jsonl" else _numbered(json.loads(text), path)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid {path.suffix[1:].upper()} ({error}).") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    if not values:
        raise InputError(f"{path} holds no rows.")
    for where, row in values:
        if not isinstance(row, dict):
            raise InputError(f"{where} must be a JSON object, got {type(row).__name__}.")
    return values


def _lines(text: str, path: Path) -> list[tuple[str, Row]]:
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append((f"line {number} of {path}", json.loads(line)))
            except json.JSONDecodeError as error:  # whose own "line 1" would mislead
                raise InputError(f"{path} is not valid JSONL (line {number}, column {error.colno}: {error.msg})."
                                 ) from error
    return found


def _numbered(rows: object, path: Path) -> list[tuple[str, Row]]:
    if not isinstance(rows, list):
        raise InputError(f"{path} must be a JSON list of objects, got {type(rows).__name__}; a file with one object a"
                         f" line must be called .jsonl.")
    return [(f"row {number} of {path}", row) for number, row in enumerate(rows, start=1)]


def read_hub(hub_id: str, config: str | None) -> Splits:
    """The rows of a data set on the Hugging Face hub (needs the network or a filled cache)."""
    from datasets import load_dataset

    try:
        splits = load_dataset(hub_id, config)
    except OSError as error:  # every way the hub cannot be reached or has no such data set
        raise InputError(f"data set {hub_id} cannot be loaded from the hub ({error}): give --data_dir with train,"
                         f" validation and test as .json or .jsonl files.") from error
    return {split: [(f"row {number} of {hub_id}/{split}", row) for number, row in enumerate(splits[split], start=1)]
            for split in SPLIT_FILES if split in splits}
