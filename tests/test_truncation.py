"""What --max_length takes away is counted: prompts that lose their beginning, answers and examples that do not fit."""
from __future__ import annotations

import logging
from dataclasses import replace

import fake_run
import pytest
import tiny_text

from stt import report
from stt.dataset import Task, tokenised, truncation
from stt.dataset.own import extract, to_item
from stt.errors import InputError
from stt.words import lost

NOTHING = {"prompts_cut": 0, "answers_left_out": 0, "examples_left_out": 0}


def test_a_task_counts_its_long_prompts(caplog):
    tokenizer, short = tiny_text.build_tokenizer(), tiny_text.EXPECTED["boolq"]
    lengths = (0, 4, 9, 30)
    examples = [replace(short, prompt="the sea " * times + short.prompt) for times in lengths]
    room = 60 - 1 - max(len(tokenizer(f" {choice}").input_ids) for choice in short.choices)
    n_cut = sum(len(tokenizer(example.prompt).input_ids) > room for example in examples)
    assert 0 < n_cut < len(lengths)
    with caplog.at_level(logging.INFO):
        found = truncation(Task("boolq", examples, examples[:1], examples[-2:], extract, 4), tokenizer, 60)
    assert found == {"train": NOTHING | {"examples": 4, "prompts_cut": n_cut}, "validation": NOTHING | {"examples": 1},
                     "test": NOTHING | {"examples": 2, "prompts_cut": min(n_cut, 2)}}
    assert f"to fit max_length 60: train: {n_cut} of 4 prompts cut; test: " in caplog.text
    with pytest.raises(InputError, match="leaves no room for a prompt"):
        truncation(Task("boolq", examples, examples, examples, extract, 4), tokenizer, 2)


def test_own_data_counts_what_is_left_out():
    """A prompt that is cut, an answer that alone is too long, a conversation that loses one of two answers, and a row
    without an answer, which no length would save."""
    tokenizer = tiny_text.build_tokenizer(chat=True)
    talk = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "no " * 90},
            {"role": "user", "content": "yes"}, {"role": "assistant", "content": "no"}]
    rows = ({"prompt": "a very long passage " * 30, "completion": " yes"}, {"prompt": "x", "completion": " no" * 90},
            {"prompt": "2 + 2 =", "completion": " 4"}, {"messages": talk}, {"prompt": "x", "completion": " "})
    items = [to_item(row, "here") for row in rows]
    task = tokenised(Task("own", items, items[2:3], items[:3], extract, 4), tokenizer, 40, chat=False)
    found = truncation(task, tokenizer, 40)
    assert found["train"] == {"examples": 3, "prompts_cut": 2, "answers_left_out": 1, "examples_left_out": 1}
    assert found["validation"] == NOTHING | {"examples": 1}
    assert found["test"] == NOTHING | {"examples": 2, "prompts_cut": 1, "examples_left_out": 1}


def test_a_test_prompt_is_cut_to_leave_room_for_new_tokens():
    """It fits max_length with its own answer, but not beside as many tokens as are generated."""
    tokenizer = tiny_text.build_tokenizer()
    long, short = {"prompt": "sea " * 8, "completion": " 4"}, {"prompt": "2", "completion": " the sea is salt water"}
    items = [to_item(row, "here") for row in (long, short)]
    new = len(tokenizer(short["completion"]).input_ids) + 1
    room = len(tokenizer(long["prompt"]).input_ids) + len(tokenizer(long["completion"]).input_ids) + 1
    task = tokenised(Task("own", items, items, items, extract, 64), tokenizer, room, chat=False)
    assert task.max_new_tokens == new > 2
    found = truncation(task, tokenizer, room)
    assert [found[split]["prompts_cut"] for split in ("train", "validation", "test")] == [0, 1, 1]


def test_words_and_the_report():
    counts = {"train": {"examples": 900, "prompts_cut": 3, "answers_left_out": 2, "examples_left_out": 1},
              "test": NOTHING | {"examples": 80, "examples_left_out": 4}, "validation": NOTHING | {"examples": 9}}
    said = "train: 3 of 900 prompts cut, 2 answers left out, 1 examples left out; test: 4 examples left out"
    assert lost(counts) == said
    assert lost({"train": NOTHING | {"examples": 9}}) == "nothing cut or left out"
    results = fake_run.results() | {"truncation": {"max_length": 1024, **counts}, "training_tokens_per_second": 12345.6}
    lines = [line.split(maxsplit=1) for line in report.summary_lines(results)]
    assert ["max_length", f"1,024 tokens; {said}"] in lines
    assert ["training", "speed  12.3 k tokens a second, padding and validation aside"] in lines
