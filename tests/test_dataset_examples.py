"""Examples as token ids, labels read out of responses, subsets: one prompt at training and evaluation, exact labels."""
from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_text import EXPECTED, build_tokenizer
from tokenizers.processors import TemplateProcessing

from stt import dataset
from stt.dataset import Example, Task, boolq, clutrr, multiple_choice
from stt.dataset.base import limit_validation
from stt.errors import InputError

TASKS = sorted(EXPECTED)


def examples(count: int) -> list[Example]:
    return [Example(f"question {i}", " yes", "yes", ("yes", "no")) for i in range(count)]


def small_task(train: int = 20) -> Task:
    test = [Example("a real test question", " no", "no", ("yes", "no"))]
    return Task("boolq", examples(train), test, test, boolq.extract, 8)


# --------------------------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("max_length", [512, 40])
def test_training_prompt_is_the_evaluation_prompt(name: str, bos: bool, chat: bool, max_length: int) -> None:
    tokenizer, example = build_tokenizer(bos, chat=True), EXPECTED[name]
    row = dataset.encode(example, tokenizer, max_length, chat)
    prompt = dataset.prompt_ids(example, tokenizer, max_length, chat)
    answer = row["input_ids"][len(prompt):]
    assert row["input_ids"][:len(prompt)] == prompt
    assert row["labels"] == [-100] * len(prompt) + answer  # only the answer and the end token are trained on
    assert len(row["input_ids"]) <= max_length
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == (example.answer.strip() if chat else example.answer)
    if max_length == 512 and chat:
        messages = [{"role": "user", "content": example.prompt}]
        assert prompt == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    elif max_length == 512:
        assert tokenizer.decode(prompt) == ("<begin>" if bos else "") + example.prompt


@pytest.mark.parametrize("bos", [False, True])
def test_a_long_prompt_is_cut_on_the_left_and_reported(bos: bool) -> None:
    tokenizer = build_tokenizer(bos)
    example = replace(EXPECTED["boolq"], prompt="a very long passage " * 50 + EXPECTED["boolq"].prompt)
    rows, n_truncated = dataset.encode_all([example, EXPECTED["boolq"]], tokenizer, 60)
    assert n_truncated == 1
    assert len(rows[0]["input_ids"]) == 60
    full, longest_answer = tokenizer(example.prompt).input_ids, max(len(tokenizer.tokenize(t)) for t in (" yes", " no"))
    room, begin = 60 - longest_answer - 1, full[:1] if bos else []
    expected = begin + full[len(full) - room + len(begin):] + tokenizer(" yes", add_special_tokens=False).input_ids
    assert rows[0]["input_ids"] == expected + [tokenizer.eos_token_id]


def test_the_cut_does_not_tell_the_answer() -> None:
    tokenizer, example = build_tokenizer(), EXPECTED["clutrr"]
    prompts = {tuple(dataset.prompt_ids(replace(example, label=label, answer=f" {label}"), tokenizer, 30))
               for label in clutrr.RELATIONS}
    assert len(prompts) == 1


def test_a_cut_chat_prompt_keeps_the_turns_of_its_template() -> None:
    tokenizer = build_tokenizer(chat=True)
    example = replace(EXPECTED["boolq"], prompt="a very long passage ☀ " * 50 + EXPECTED["boolq"].prompt)
    text = tokenizer.decode(dataset.prompt_ids(example, tokenizer, 80, chat=True))
    assert text.startswith("<turn>user\n")
    assert text.endswith("is the sea salty?\nAnswer:<end>\n<turn>assistant\n")
    assert len(dataset.encode(example, tokenizer, 80, chat=True)["input_ids"]) <= 80
    template = tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True,
                                             return_dict=False)
    with pytest.raises(InputError, match="chat template alone"):
        dataset.encode(example, tokenizer, len(template) + 2, chat=True)


def test_a_tokenizer_that_ends_every_text_leaves_the_prompt_open() -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", tokenizer.eos_token_id)])
    prompt = dataset.prompt_ids(EXPECTED["boolq"], tokenizer, 100)
    assert tokenizer.decode(prompt) == EXPECTED["boolq"].prompt


def test_what_cannot_be_encoded() -> None:
    tokenizer = build_tokenizer()
    with pytest.raises(InputError, match="max_length 2 leaves no room for a prompt"):
        dataset.encode(EXPECTED["clutrr"], tokenizer, 2)
    with pytest.raises(InputError, match="chat template"):
        dataset.encode(EXPECTED["boolq"], tokenizer, 64, chat=True)
    with pytest.raises(InputError, match="no examples to encode"):
        dataset.encode_all([], tokenizer, 64)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        dataset.encode(EXPECTED["boolq"], tokenizer, 64)


# ------------------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize(("response", "label"), [
    (" sister", "sister"), ("sister", "sister"), ("  Sister.", "sister"), ("\nsister\nbrother", "sister"),
    (" daughter-in-law", "daughter-in-law"), (" daughter in law.", "daughter-in-law"),
    (" son\u2011in\u2011law", "son-in-law"), (" daughter-in-la", None), (" daughter-", None), (" son, in law", "son"),
    (" sons", None), (" grandson", "grandson"), (" granddaughter of", "granddaughter"), (" the sister", None),
    (" cousin", None), ("", None), ("\n", None), (" daughter brother", "daughter"),
    (" mother-in-law's", "mother-in-law"),
])
def test_relation(response: str, label: str | None) -> None:
    assert clutrr.extract(response, EXPECTED["clutrr"]) == label


def test_every_relation_reads_as_itself() -> None:
    for relation in clutrr.RELATIONS:
        for response in (f" {relation}", f"{relation}\n", f" {relation}. He", f" {relation.upper()}"):
            assert clutrr.extract(response, EXPECTED["clutrr"]) == relation


@pytest.mark.parametrize(("response", "label"), [
    (" B", "B"), ("B.", "B"), ("(C)", "C"), ("b", "B"), (" (b).", "B"), ("The answer is C", "C"), ("E or B", "B"),
    ("E", None), ("Because", None), ("a fire", None), ("", None), ("A's B", "B"), ("BC", None), ("\n\nA\n", "A"),
    ("Answer: D", "D"),
])
def test_letter(response: str, label: str | None) -> None:
    assert multiple_choice.extract(response, EXPECTED["obqa"]) == label


@pytest.mark.parametrize(("response", "label"), [
    (" yes", "yes"), ("No.", "no"), ("TRUE", "yes"), (" false, yes", "no"), ("I know", None), ("", None),
    ("the answer is no", "no"), ("yesterday", None), ("not", None),
])
def test_yes_or_no(response: str, label: str | None) -> None:
    assert boolq.extract(response, EXPECTED["boolq"]) == label


# ---------------------------------------------------------------------------------------------------------- subsets


@pytest.mark.parametrize(("ratio", "count"), [(1, 100), (0.29, 29), (0.01, 1), (1e-9, 1), (0.5, 50)])
def test_selection_subset(ratio: float, count: int) -> None:
    data = examples(100)
    subset = dataset.selection_subset(data, ratio, seed=3)
    assert len(subset) == count
    assert subset == dataset.selection_subset(data, ratio, seed=3)
    assert subset == sorted(subset, key=data.index)
    assert len(set(subset)) == count
    if 1 < count < 100:
        assert subset != dataset.selection_subset(data, ratio, seed=4)


@pytest.mark.parametrize("ratio", [0, -1, 1.5, float("nan"), float("inf")])
def test_selection_subset_refuses(ratio: float) -> None:
    with pytest.raises(InputError, match=r"must be in \(0, 1\]"):
        dataset.selection_subset(examples(3), ratio, seed=0)
    with pytest.raises(InputError, match="data is empty"):
        dataset.selection_subset([], 0.5, seed=0)


def test_dev_split_never_shows_the_test_set() -> None:
    task = small_task(20)
    dev = dataset.dev_split(task, 0.25, seed=1)
    assert (len(dev.train), len(dev.test)) == (15, 5)
    assert sorted(dev.train + dev.test, key=task.train.index) == task.train
    assert not set(dev.test) & set(task.test)
    assert dev == dataset.dev_split(task, 0.25, seed=1) != dataset.dev_split(task, 0.25, seed=2)
    assert len(dataset.dev_split(small_task(2), 0.99, seed=0).train) == 1


def test_dev_split_refuses() -> None:
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(InputError, match="held out by --dev_mode"):
            dataset.dev_split(small_task(), fraction, seed=0)
    with pytest.raises(InputError, match="at least 2 training examples"):
        dataset.dev_split(small_task(1), 0.1, seed=0)


def test_limit() -> None:
    task = small_task(20)
    assert dataset.limit(task, 0, seed=1) is task
    assert dataset.limit(task, 50, seed=1) is task
    five, ten = (dataset.limit(task, size, seed=1).train for size in (5, 10))
    assert (len(five), len(ten)) == (5, 10)
    assert set(five) < set(ten)
    assert dataset.limit(task, 10, seed=2).train != ten
    with pytest.raises(InputError, match="train_size"):
        dataset.limit(task, -1, seed=1)


def test_limit_validation() -> None:
    task = small_task(20)
    assert limit_validation(task, 0, seed=1) is task
    few = limit_validation(replace(task, validation=task.train), 5, seed=1)
    assert len(few.validation) == 5
    assert set(few.validation) < set(task.train)
    assert few.train == task.train
