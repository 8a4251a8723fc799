"""Your own data: a .json list or a .jsonl file. Every row has one of these shapes (SHAPES; docs/own_data.md):

messages (and tools)                a conversation, every answer of which is learned
prompt, completion                  two texts that follow each other as they are, or two lists of messages
instruction, output (and input)     a task and its answer
question, answer                    the same

Answers are free text: scored by their loss, and by generating the last one of a row and comparing all of it.
"""
from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stt.dataset.base import (
    IGNORED,
    VALIDATION_SHARE,
    Encoded,
    Example,
    Row,
    Task,
    Tokens,
    answer_ids,
    complete_splits,
    cut_plain,
    labelled,
    plain_ids,
    read_rows,
    split_off,
)
from stt.dataset.chat import Conversation, Message, Template, Turn
from stt.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 128  # of a generated answer, where --max_new_tokens does not say
ROLES = ("system", "user", "assistant", "tool")


class Text(NamedTuple):
    """A prompt and its answer, without a chat template."""

    where: str
    prompt: str
    answer: str

    def as_conversation(self) -> Conversation:
        """One turn of the user and one of the assistant, without white space around them."""
        return Conversation(self.where, [{"role": "user", "content": self.prompt.strip()},
                                         {"role": "assistant", "content": self.answer.strip()}])


Item = Text | Conversation


class Plain:
    """Reads texts as `Template` reads conversations. The answer ends in the tokenizer's end token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def turns(self, text: Text) -> list[Turn]:
        """The answer with its prompt; nothing if there is no answer."""
        if not text.answer.strip():
            return []
        return [Turn(plain_ids(text.prompt, self.tokenizer), answer_ids([text.answer], self.tokenizer, False)[0])]

    def fitted(self, text: Text, turn: int, room: int) -> list[int] | None:
        """The end of the prompt, in at most `room` tokens; None if that cannot be."""
        return cut_plain(plain_ids(text.prompt, self.tokenizer), self.tokenizer, room)


Readers = dict[type, Plain | Template]


class Read(NamedTuple):
    """A row of the file as token ids."""

    item: Item
    turns: list[Turn]
    rows: list[Encoded]
    was_cut: bool  # a prompt lost its beginning
    n_lost: int    # answers that do not fit


# ---------------------------------------------------------------- from files to rows


def read_own(train_file: str, eval_file: str | None, max_new_tokens: int | None) -> Task[Item]:
    """The splits of the user's files, not tokenised yet; the task is named after `train_file`.

    `eval_file` is the test set; without it a fixed random tenth of the training file is, and is not trained on. Another
    tenth is the validation set. Raises InputError for a file or row that cannot be used.
    """
    name, splits = Path(train_file).stem, {"train": _items(train_file)}
    if eval_file is not None:
        splits["test"] = _items(eval_file)
    else:
        count = len(splits["train"])
        if count < 3:
            raise InputError(f"{train_file} has {count} rows; without --eval_file a test and a validation set are held"
                             " out of it, so give at least 3, or another file for --eval_file.")
        n_test = max(1, round(VALIDATION_SHARE * count))
        logger.info("no --eval_file: %d of %d rows of %s are the test set and not trained on", n_test, count, name)
        splits["test"], splits["train"] = split_off(splits["train"], n_test, seed=0)
    return Task(name, **complete_splits(splits, name), extract=extract, max_new_tokens=max_new_tokens or MAX_NEW_TOKENS)


def extract(response: str, example: Example) -> str:
    """All of the response, without white space around it."""
    return response.strip()


def to_item(row: Row, where: str) -> Item:
    """The row in the first shape that fits. Raises InputError if none does."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half a character ({error.reason}): write it as UTF-8.") from error
    found = [name for name, value in row.items() if value is not None]
    for names, read in SHAPES.items():
        if set(names) <= set(found):
            return read(row, where)
    shapes = ", or ".join(" and ".join(names) for names in SHAPES)
    raise InputError(f"{where} has the fields {', '.join(found) or '(none)'}: give {shapes}.")


def _items(path: str) -> list[Item]:
    if not Path(path).is_file():
        raise InputError(f"no data file {path!r}: give the path of a .jsonl file, or of a .json file with a list.")
    if Path(path).suffix not in (".json", ".jsonl"):
        raise InputError(f"{path} must be called .jsonl (an object a line) or .json (a list of objects).")
    return [to_item(row, where) for where, row in read_rows(Path(path))]


def _conversation(row: Row, where: str) -> Conversation:
    return Conversation(where, _messages(row["messages"], "messages", where), _tools(row, where))


def _completion(row: Row, where: str) -> Item:
    if isinstance(row["prompt"], list):
        prompt, completion = (_messages(row[name], name, where) for name in ("prompt", "completion"))
        return Conversation(where, prompt + completion, _tools(row, where), first=len(prompt))
    return Text(where, _said(row, "prompt", where), _text(row["completion"], "completion", where))


def _instruction(row: Row, where: str) -> Text:
    said, given = _said(row, "instruction", where).strip(), _text(row.get("input") or "", "input", where).strip()
    return Text(where, f"{said}\n\n{given}\n" if given else f"{said}\n", _text(row["output"], "output", where).strip())


def _question(row: Row, where: str) -> Text:
    return Text(where, _said(row, "question", where).strip() + "\n", _text(row["answer"], "answer", where).strip())


SHAPES = {("messages",): _conversation, ("prompt", "completion"): _completion,
          ("instruction", "output"): _instruction, ("question", "answer"): _question}


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} must be a text, got {value!r:.60}.")
    return value


def _said(row: Row, name: str, where: str) -> str:
    if not _text(row[name], name, where).strip():
        raise InputError(f"{where}: {name} is empty, so there is nothing to answer.")
    return row[name]


def _objects(value: object, name: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise InputError(f"{where}: {name} must be a list of objects, got {value!r:.60}.")
    return value


def _tools(row: Row, where: str) -> list[Message] | None:
    return _objects(row.get("tools") or [], "tools", where) or None


def _messages(value: object, name: str, where: str) -> list[Message]:
    return [_message(message, f"{where}: message {number} of {name}")
            for number, message in enumerate(_objects(value, name, where), start=1)]


def _message(given: Message, where: str) -> Message:
    message = {name: value for name, value in given.items() if value is not None}
    if message.get("role") not in ROLES:
        raise InputError(f"{where} must have a role ({', '.join(ROLES)}) and a content, got {given!r:.80}.")
    calls = _objects(message.pop("tool_calls", []), "tool_calls", where)
    if calls and message["role"] != "assistant":
        raise InputError(f"{where}: only the assistant has tool_calls, got the role {message['role']!r}.")
    message["content"] = _text(message.get("content", "" if calls else None), "content", where)
    return message | ({"tool_calls": [_call(call, where) for call in calls]} if calls else {})


def _call(call: Message, where: str) -> Message:
    """The tool call with its arguments as an object: templates write them as JSON, and would quote a text again."""
    function = call.get("function", call)
    try:
        arguments = function.get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (AttributeError, ValueError):
        arguments = None
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}: a tool call must have a name, and arguments that are a JSON object, got"
                         f" {call!r:.80}.")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


# ---------------------------------------------------------------- from rows to token ids


def tokenised(task: Task[Item], tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool) -> Task[Example]:
    """The task as token ids, every row at most `max_length` long. Texts go through the chat template with `chat`.

    A conversation is one row if the template, given all of it, writes every answer as it does while that answer is the
    last, and if it fits; otherwise each answer is a row of its own. At most as many tokens are generated as the longest
    answer to be compared has, and as the task allows. Rows without a label are left out, and counted in the log. Raises
    InputError if none is left, or for a conversation the template refuses.
    """
    splits = {split: [item.as_conversation() if chat and isinstance(item, Text) else item
                      for item in getattr(task, split)] for split in ("train", "validation", "test")}
    readers = _readers([item for items in splits.values() for item in items], tokenizer)
    reads = {split: _read_all(items, readers, max_length, split) for split, items in splits.items()}
    train, validation, test = (kept for kept, _ in reads.values())
    longest = max(len(read.turns[-1].answer) for read in validation + test)
    new = min(task.max_new_tokens, longest)
    stops = {turn.answer[-1] for read in train + validation + test for turn in read.turns} - {tokenizer.eos_token_id}
    examples = {"train": [_example(read, read.turns[-1].prompt, tokenizer) for read in train],
                "validation": _to_answer(validation, readers, tokenizer, max_length - new, new, "validation"),
                "test": _to_answer(test, readers, tokenizer, max_length - new, new, "test")}
    left_out = {split: n_unfit + len(kept) - len(examples[split]) for split, (kept, n_unfit) in reads.items()}
    return replace(task, max_new_tokens=new, stop_ids=tuple(sorted(stops)), left_out=left_out, **examples)


def _readers(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> Readers:
    talks = [item for item in items if isinstance(item, Conversation)]
    if talks and tokenizer.chat_template is None:
        raise InputError(f"{talks[0].where} is to be read as a conversation, and the tokenizer of this model has no"
                         " chat template: give an instruction-tuned model, or texts (such as prompt and completion)"
                         " without --apply_chat_template.")
    return {Text: Plain(tokenizer), **({Conversation: Template(tokenizer)} if talks else {})}


def _read_all(items: Sequence[Item], readers: Readers, max_length: int, split: str) -> tuple[list[Read], int]:
    """The items that have a label to learn, and how many have answers of which none fits."""
    found = [_read(item, readers[type(item)], max_length) for item in items]
    kept = [read for read in found if read.rows]
    silent = sum(not read.turns for read in found)
    n_unfit = len(found) - len(kept) - silent
    reason = f"no answer: {silent}; none that fits max_length {max_length}: {n_unfit}"
    if not kept:
        raise InputError(f"of the {len(found)} {split} rows none has an answer that can be learned ({reason}): give"
                         " answers, or raise --max_length.")
    if len(kept) < len(found):
        logger.warning("%d of %d %s rows are left out (%s)", len(found) - len(kept), len(found), split, reason)
    n_lost = sum(read.n_lost for read in kept)
    if n_lost:
        logger.warning("in the other %s rows, %d answers do not fit max_length %d and are left out", split, n_lost,
                       max_length)
    return kept, n_unfit


def _read(item: Item, reader: Plain | Template, max_length: int) -> Read:
    turns = reader.turns(item)
    whole = [*turns[-1].prompt, *turns[-1].answer] if turns else []
    if len(whole) <= max_length and all(whole[:len(prompt) + len(answer)] == prompt + answer
                                        for prompt, answer in turns):
        labels = [IGNORED] * len(whole)
        for prompt, answer in turns:
            labels[len(prompt):len(prompt) + len(answer)] = answer
        return Read(item, turns, [{"input_ids": whole, "labels": labels}] if turns else [], False, 0)
    prompts = [reader.fitted(item, number, max_length - len(turn.answer)) for number, turn in enumerate(turns)]
    rows = [labelled(prompt, turn.answer) for prompt, turn in zip(prompts, turns, strict=True) if prompt is not None]
    was_cut = any(prompt not in (turn.prompt, None) for prompt, turn in zip(prompts, turns, strict=True))
    return Read(item, turns, rows, was_cut, prompts.count(None))


def _to_answer(reads: Sequence[Read], readers: Readers, tokenizer: PreTrainedTokenizerBase,
               room: int, new: int, split: str) -> list[Example]:
    """The examples with prompts of at most `room` tokens, beside which `new` ones can be generated."""
    prompts = [readers[type(read.item)].fitted(read.item, -1, room) for read in reads]
    found = [_example(read, prompt, tokenizer) for read, prompt in zip(reads, prompts, strict=True) if prompt]
    if not found:
        raise InputError(f"max_length leaves no {split} prompt any room beside {new} new tokens: raise --max_length or"
                         " lower --max_new_tokens.")
    if len(found) < len(reads):
        logger.warning("%d of %d %s rows are left out: no room for a prompt beside %d new tokens",
                       len(reads) - len(found), len(reads), split, new)
    n_cut = sum(prompt not in (read.turns[-1].prompt, None) for read, prompt in zip(reads, prompts, strict=True))
    n_long = sum(len(read.turns[-1].answer) - 1 > new for read in reads)
    if n_cut:
        logger.warning("%d of %d %s prompts are cut on the left to fit %d tokens beside %d new ones", n_cut, len(reads),
                       split, room, new)
    if n_long:
        logger.warning("%d of %d %s answers are longer than %d tokens, so none of them can be matched (raise"
                       " --max_new_tokens)", n_long, len(reads), split, new)
    return found


def _example(read: Read, prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> Example:
    answer = tokenizer.decode(read.turns[-1].answer[:-1], skip_special_tokens=True).strip()  # as a response is read
    was_cut = read.was_cut or prompt != read.turns[-1].prompt
    return Example(tokenizer.decode(prompt), answer, answer, (), Tokens(read.rows, prompt, was_cut, read.n_lost))
