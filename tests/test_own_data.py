"""Data of one's own: every shape and every mistake, what a run learns, measures and reports of it, real files."""
from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SHIPPED, results, run
from tiny_text import build_decoder, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from stt import comparison
from stt.arguments import CHECKOUT
from stt.dataset import Example, Task, encode_all, read_own, tokenised
from stt.dataset.chat import Conversation
from stt.dataset.own import SHAPES, Text, extract, to_item
from stt.errors import InputError
from stt.evaluate.generation import generate_answers, majority_accuracy
from stt.llm_arguments import LLMArgs, resolved

ASKED, SAID = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
CHAT = {"messages": [ASKED, SAID]}
ROWS = [CHAT, {"prompt": "2 + 2 =", "completion": " 4"}, {"instruction": "Add.", "input": "2 + 2", "output": "4"},
        {"instruction": "Say four.", "output": "4"}, {"question": "2 + 2?", "answer": "4"}]


def write(path: Path, rows: object) -> str:
    """A .json list, or a .jsonl file; text as it is."""
    if not isinstance(rows, str):
        rows = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(rows, encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------- shapes and splits


@pytest.mark.parametrize(("row", "item"), [
    (CHAT, Conversation("here", [ASKED, SAID])),
    (CHAT | {"tools": [], "label": True, "prompt": None}, Conversation("here", [ASKED, SAID])),
    (CHAT | {"tools": [{"name": "f"}]}, Conversation("here", [ASKED, SAID], [{"name": "f"}])),
    (CHAT | {"prompt": "x", "completion": "y"}, Conversation("here", [ASKED, SAID])),  # the first shape that fits
    ({"prompt": " 2 + 2 =", "completion": " 4\n"}, Text("here", " 2 + 2 =", " 4\n")),  # as they are
    ({"prompt": [ASKED], "completion": [SAID]}, Conversation("here", [ASKED, SAID], None, first=1)),
    ({"instruction": "Add. ", "input": " 2 + 2", "output": "\n4"}, Text("here", "Add.\n\n2 + 2\n", "4")),
    ({"instruction": "Say four.", "input": "", "output": "4", "answer": 4.0}, Text("here", "Say four.\n", "4")),
    ({"instruction": "Say four.", "input": None, "output": "4"}, Text("here", "Say four.\n", "4")),
    ({"question": "2 + 2?", "answer": ""}, Text("here", "2 + 2?\n", "")),
    ({"messages": [{"role": "user", "content": "x", "name": None}]}, Conversation("here", [
        {"role": "user", "content": "x"}])),
])
def test_shapes(row, item) -> None:
    assert to_item(row, "here") == item


def test_the_documentation_names_every_shape() -> None:
    page = (CHECKOUT / "docs" / "own_data.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for block in re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
            for line in block.splitlines()]
    assert {next(names for names in SHAPES if set(names) <= set(row)) for row in rows} == set(SHAPES)
    for row in rows:
        to_item(row, "docs")


BAD_ROWS = {
    "no shape": ({"text": "x", "prompt": "y"}, r"has the fields text, prompt: give messages, or prompt and completion, "
                                               r"or instruction and output, or question and answer"),
    "empty": ({}, r"has the fields \(none\): give messages"),
    "messages no list": ({"messages": "hello"}, "messages must be a list of objects, got 'hello'"),
    "message no object": ({"messages": ["hello"]}, "messages must be a list of objects"),
    "role": ({"messages": [{"role": "human", "content": "x"}]},
             r"message 1 of messages must have a role \(system, user, assistant, tool\) and a content"),
    "other keys": ({"messages": [{"from": "human", "value": "x"}]}, "must have a role"),
    "content": ({"messages": [ASKED, {"role": "assistant", "content": 4}]}, "message 2 of messages: content must be a"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "content must be a text"),
    "no content": ({"messages": [{"role": "assistant"}]}, "content must be a text, got None"),
    "calls": ({"messages": [{"role": "assistant", "tool_calls": "f()"}]}, "tool_calls must be a list of objects"),
    "who calls": ({"messages": [{"role": "user", "content": "", "tool_calls": [{"name": "f"}]}]}, "only the assistant"),
    "call": ({"messages": [{"role": "assistant", "tool_calls": [{"function": "f"}]}]}, "a tool call must have a name"),
    "arguments": ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "a JSON"),
    "nameless": ({"messages": [{"role": "assistant", "tool_calls": [{"arguments": {}}]}]}, "must have a name"),
    "tools": (CHAT | {"tools": "f"}, "tools must be a list of objects, got 'f'"),
    "mixed": ({"prompt": [ASKED], "completion": "4"}, "completion must be a list of objects, got '4'"),
    "number": ({"prompt": "2 + 2 =", "completion": 4}, "completion must be a text, got 4"),
    "blank": ({"prompt": " ", "completion": "4"}, "prompt is empty, so there is nothing to answer"),
    "input": ({"instruction": "Add.", "input": [2, 2], "output": "4"}, r"input must be a text, got \[2, 2\]"),
    "answer": ({"question": "2 + 2?", "answer": ["4"]}, "answer must be a text"),
    "half a character": ({"question": "2 + 2? \ud83d", "answer": "4"}, "holds half a character"),
}


@pytest.mark.parametrize(("row", "sentence"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named(row, sentence, tmp_path) -> None:
    path = write(tmp_path / "mine.jsonl", [*ROWS, row])
    with pytest.raises(InputError, match=sentence) as caught:
        read_own(path, None, None)
    assert str(caught.value).startswith(f"line 6 of {path}")


def test_without_an_eval_file_parts_are_held_out(tmp_path, caplog) -> None:
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(40)]
    caplog.set_level(logging.INFO)
    task = read_own(write(tmp_path / "mine.json", rows), None, None)
    assert (task.name, task.max_new_tokens) == ("mine", 128)
    assert (len(task.train), len(task.validation), len(task.test)) == (32, 4, 4)
    found = [item.answer for items in (task.train, task.validation, task.test) for item in items]
    assert sorted(map(int, found)) == list(range(40))
    assert "no --eval_file: 4 of 40 rows of mine are the test set and not trained on" in caplog.text
    assert "4 of 36 training examples become it" in caplog.text
    assert read_own(str(tmp_path / "mine.json"), None, None) == task


def test_the_eval_file_is_the_test_set(tmp_path) -> None:
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(20)]
    task = read_own(write(tmp_path / "mine.jsonl", rows), write(tmp_path / "held_out.json", ROWS), 7)
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 2, 5)
    assert [item.where for item in task.test] == [f"row {i} of {tmp_path}/held_out.json" for i in range(1, 6)]
    assert task.max_new_tokens == 7


# ---------------------------------------------------------------- texts without a template


def test_texts_as_token_ids() -> None:
    """Prompt, answer and end token, tokenised apart; loss on answer and end only."""
    tokenizer = build_tokenizer(bos=True)
    items = [to_item(row, "here") for row in ROWS[1:]]
    task = tokenised(Task("own", items, items, items, extract, 64), tokenizer, 64, chat=False)
    written = [("2 + 2 =", " 4"), ("Add.\n\n2 + 2\n", "4"), ("Say four.\n", "4"), ("2 + 2?\n", "4")]
    rows = encode_all(task.train, tokenizer, 64)[0]
    for (prompt, answer), row, example in zip(written, rows, task.test, strict=True):
        before = tokenizer(prompt).input_ids
        after = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        assert row == {"input_ids": before + after, "labels": [-100] * len(before) + after}
        assert example == Example(f"<begin>{prompt}", "4", "4", ())
        assert example.tokens.prompt == before
    assert task.stop_ids == ()
    assert task.max_new_tokens == max(len(row["labels"]) - row["labels"].count(-100) for row in rows)


def test_long_texts_are_cut_on_the_left_only(caplog) -> None:
    tokenizer = build_tokenizer(bos=True)
    long = {"prompt": "a very long passage " * 30 + "Question: is the sea salty?", "completion": " yes, yes, yes"}
    items = [to_item(row, "here") for row in (long, {"prompt": "x", "completion": " no" * 90}, ROWS[1])]
    task = tokenised(Task("own", items, items, items, extract, 4), tokenizer, 40, chat=False)
    rows, n_cut = encode_all(task.train, tokenizer, 40)
    assert (len(rows), n_cut) == (2, 1)
    assert len(rows[0]["input_ids"]) == 40
    text = tokenizer.decode(rows[0]["input_ids"])
    assert text.startswith("<begin>")
    assert text.endswith("is the sea salty? yes, yes, yes<end>")
    assert [len(example.tokens.prompt) for example in task.test] == [36, len(tokenizer("2 + 2 =").input_ids)]
    assert task.test[0].prompt.startswith("<begin>")
    assert "1 of 3 train rows are left out (no answer: 0; none that fits max_length 40: 1)" in caplog.text
    assert "1 of 2 test prompts are cut on the left to fit 36 tokens beside 4 new ones" in caplog.text
    assert "1 of 2 test answers are longer than 4 tokens, so none of them can be matched" in caplog.text


def test_generation_ends_at_a_stop_token() -> None:
    """The token that a template ends a turn with, where the tokenizer's end token is another one."""
    tokenizer = build_tokenizer()
    model = build_decoder(len(tokenizer))
    examples = [Example(prompt, "x", "x", ()) for prompt in ("the sea is", "a fire is warm and", "Ada met")]
    free = []
    for example in examples:  # eight tokens, whatever they are, without a cache
        ids = tokenizer(example.prompt).input_ids
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        free.append(ids[-8:])
    stop = next(token for token in free[0][1:] if token != free[0][0])
    assert not any(tokenizer.eos_token_id in ids for ids in free)
    task = Task("own", examples, examples, examples, extract, 8, stop_ids=(stop,))
    for row, ids in zip(generate_answers(model, tokenizer, task, examples, 2), free, strict=True):
        kept = tokenizer.decode(ids[:ids.index(stop)] if stop in ids else ids, skip_special_tokens=True)
        assert (row["response"], row["prediction"], row["correct"]) == (kept, kept.strip(), False)
    assert majority_accuracy(examples, examples) is None


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="session")
def quick(tmp_path_factory) -> list[str]:
    text = tmp_path_factory.mktemp("text") / "text.md"
    text.write_text((SHIPPED / "heldout.txt").read_text()[:2000])
    return ["--ppl_text", str(text), "--train_batch", "4", "--num_epoch", "1", "--log_interval", "1"]


def slow_loss(model: torch.nn.Module, rows: list[dict[str, list[int]]]) -> float:
    """Mean of -log p(token | all before it) over the labelled tokens, one row at a time."""
    losses = []
    for row in rows:
        scores = torch.log_softmax(model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double(), -1)
        losses += [-scores[i - 1, label].item() for i, label in enumerate(row["labels"]) if label != -100]
    return sum(losses) / len(losses)


SUMS = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in (("one and one?", "it is two"), ("Who is Ada?", "a girl"))]


def test_a_run_learns_to_answer_and_to_stop(quick, tmp_path, capsys) -> None:
    """Two conversations by heart: generated word for word, and the loss of results.json is the slow one."""
    train, test = write(tmp_path / "sums.jsonl", SUMS * 60), write(tmp_path / "test.jsonl", SUMS)
    assert run(quick, tmp_path, "--train_file", train, "--eval_file", test, "--mode", "baseline",
               "--num_epoch", "4", "--lr", "3e-3", "--no_eval_epochs") == 0
    assert re.search(r"test exact match +100.0 % \(2 of 2; .*; majority class –\)", capsys.readouterr().out)
    found, folder = results(tmp_path), tmp_path / "run"
    assert (found["task"], found["accuracy"]["majority"], found["accuracy"]["n"]) == ("sums", None, 2)
    outputs = json.loads((folder / "outputs.json").read_text())
    assert [row["response"].strip() for row in outputs] == ["it is two", "a girl"]
    assert outputs[0]["prompt"] == "user:\none and one?\nassistant:\n"
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    task = tokenised(read_own(train, test, None), tokenizer, 256, chat=False)
    rows = encode_all(task.test, tokenizer, 256)[0]
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    assert found["answer_loss"] == pytest.approx(slow_loss(model, rows), rel=1e-4)
    assert found["answer_loss"] < 0.5
    report = (folder / "report.md").read_text()
    assert "| test exact match | 100.0 %" in report
    assert re.search(r"\| answer loss \| [\d.]+ nats per answer token of the test data \|", report)
    assert "test exact match</span>" in (folder / "report.html").read_text()
    table = comparison.compare([folder], tmp_path / "figure.png")
    assert "| baseline | 1 | 100.0 % |" in table
    assert "Majority class: –." in table


def test_interrupted_and_resumed_equals_uninterrupted(quick, tmp_path, monkeypatch) -> None:
    """Mixed shapes through the template, every answer wrong or right the same."""
    flags = ("--train_file", write(tmp_path / "mixed.jsonl", ROWS * 4), "--apply_chat_template", "--num_epoch", "2")
    assert run(quick, tmp_path / "whole", *flags) == 0

    def stop(self, args, state, control, **_):
        if state.epoch >= 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stt.trainers.loop.Record.on_epoch_begin", stop)
        assert run(quick, tmp_path / "cut", *flags) == 130
    assert run(quick, tmp_path / "cut", *flags[:2], "--num_epoch", "2", "--resume") == 2  # without the template
    assert run(quick, tmp_path / "cut", *flags, "--resume") == 0
    whole, cut = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    one, other = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "outputs.json").read_text() == (cut / "outputs.json").read_text()
    assert results(tmp_path / "whole")["answer_loss"] == results(tmp_path / "cut")["answer_loss"]


def test_dev_mode_and_train_size(quick, tmp_path) -> None:
    train = write(tmp_path / "mixed.jsonl", ROWS * 6)  # 30 rows: 3 to test, 3 to validate, 24 to train
    assert run(quick, tmp_path, "--train_file", train, "--dev_mode", "--train_size", "8", "--no_eval_epochs",
               "--mode", "baseline") == 0
    assert results(tmp_path)["accuracy"]["n"] == 2
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in steps if "loss" in row]) == 2
    assert "held-out exact match" in (tmp_path / "run" / "report.md").read_text()


def test_the_readme_snippet_runs(quick, tmp_path) -> None:
    page = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    name, rows, command = re.search(r"cat > (\S+) <<'END'\n(.*?)END\n\.venv/bin/python train_llm\.py (.*?)\n", page,
                                    flags=re.DOTALL).groups()
    assert command.split() == ["--train_file", name]
    assert run(quick, tmp_path, "--train_file", write(tmp_path / name, rows)) == 0
    assert results(tmp_path)["task"] == Path(name).stem


def test_the_run_is_named_after_the_file() -> None:
    args = resolved(LLMArgs(train_file="some/folder/my.sums.jsonl"))
    assert args.run_name == "stt-tiny-my.sums-stt-top0.3-seed42"
    assert args.task is None


# ---------------------------------------------------------------- mistakes on the command line


BAD = {
    "task too": (["--task", "clutrr"], "train_file takes the place of a task and its data_dir, and task is given too"),
    "data_dir too": (["--data_dir", "x"], "and data_dir is given too"),
    "no such file": (["--train_file", "nowhere.jsonl"], "no data file 'nowhere.jsonl'"),
    "a folder": (["--eval_file", "/"], "no data file '/'"),
    "no such eval file": (["--eval_file", "nowhere.jsonl"], "no data file 'nowhere.jsonl'"),
    "empty name": (["--eval_file", ""], "eval_file must not be empty"),
    "no tokens": (["--max_new_tokens", "0"], "max_new_tokens must be 1 or more, got 0"),
    "too short": (["--max_length", "2"], "none has an answer that can be learned"),
}


@pytest.mark.parametrize(("flags", "said"), BAD.values(), ids=BAD)
def test_bad_flags(flags, said, quick, tmp_path, capsys) -> None:
    train = write(tmp_path / "mine.jsonl", ROWS * 2)
    assert run(quick, tmp_path / "out", "--train_file", train, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "content", "said"), [
    ("mine.csv", "question,answer\n", "must be called .jsonl (an object a line) or .json (a list of objects)"),
    ("mine.jsonl", "", "holds no rows"), ("mine.json", "[]", "holds no rows"),
    ("mine.json", "{}", "must be a JSON list of objects, got dict"),
    ("mine.jsonl", '{"question": "x", "answer": "y"}\n\n{"question": \n', "is not valid JSONL (line 3, column "),
    ("mine.jsonl", '{"question": "x", "answer": "y"}\n["x"]\n', "line 2 of"),
    ("mine.jsonl", ROWS[:2], "has 2 rows; without --eval_file a test and a validation set are held out"),
    ("mine.jsonl", [{"question": "x", "answer": " "}] * 9, "of the 7 train rows none has an answer that can be"),
])
def test_bad_files(name, content, said, quick, tmp_path, capsys) -> None:
    assert run(quick, tmp_path / "out", "--train_file", write(tmp_path / name, content)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert not (tmp_path / "out").exists()


def test_flags_that_need_a_train_file() -> None:
    for given in ({"eval_file": "x.jsonl"}, {"max_new_tokens": 9}):
        with pytest.raises(InputError, match=f"^{next(iter(given))} is about the data of train_file"):
            LLMArgs(**given)


def test_messages_without_a_chat_template(quick, tmp_path, capsys) -> None:
    model = tmp_path / "model"
    shutil.copytree(SHIPPED, model)
    (model / "chat_template.jinja").unlink()
    train = write(tmp_path / "mine.jsonl", [*ROWS[1:] * 4, CHAT])
    assert run(quick, tmp_path / "out", "--train_file", train, "--model", str(model)) == 2
    error = capsys.readouterr().err
    assert f"line 17 of {train} is to be read as a conversation, and the tokenizer of this model has no chat" in error
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- real files


def real_rows(path: Path, count: int) -> list[dict[str, object]]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text)[:count] if path.suffix == ".json" else list(map(json.loads, text.splitlines()[:count]))


REAL = {"gsm8k/train.jsonl": lambda row: (f"{row['question'].strip()}\n", row["answer"].strip()),
        "instruct/alpaca_en_demo.json": lambda row: (
            row["instruction"].strip() + (f"\n\n{row['input'].strip()}" if row["input"].strip() else "") + "\n",
            row["output"].strip())}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_masks_of_real_files(name, chat, data_dir, tmp_path) -> None:
    """Each row is its prompt and its answer, written by hand from the raw row; the answer is all that is labelled."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    raw = real_rows(data_dir / name, 60)
    items = [to_item(row, "here") for row in raw]
    task = tokenised(Task("own", items, items, items, extract, 128), tokenizer, 4096, chat)
    rows = encode_all(task.train, tokenizer, 4096)[0]
    assert len(rows) == len(raw) == 60
    for row, given in zip(rows, raw, strict=True):
        prompt, answer = REAL[name](given)
        prompt = f"user:\n{prompt}assistant:\n" if chat else prompt
        labelled = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(row["input_ids"]) == f"{prompt}{answer}<|endoftext|>"
        assert tokenizer.decode(labelled) == f"{answer}<|endoftext|>"
        assert row["labels"] == [-100] * (len(row["labels"]) - len(labelled)) + row["input_ids"][-len(labelled):]


@pytest.mark.parametrize("name", REAL)
def test_a_run_on_a_real_file(name, data_dir, quick, tmp_path) -> None:
    rows = [row for row in real_rows(data_dir / name, 200) if len(json.dumps(row)) < 400][:40]
    train = write(tmp_path / f"real{Path(name).suffix}", rows)
    assert run(quick, tmp_path, "--train_file", train, "--max_new_tokens", "8", "--apply_chat_template") == 0
    found = results(tmp_path)
    assert (found["task"], found["mode"]) == ("real", "stt")
    assert 0 < found["answer_loss"] < 25
    assert 0 < found["accuracy"]["n"] <= 4


def test_whole_real_files_are_read(data_dir) -> None:
    task = read_own(str(data_dir / "gsm8k" / "train.jsonl"), str(data_dir / "gsm8k" / "test.jsonl"), None)
    assert (len(task.train) + len(task.validation), len(task.test)) == (7473, 1319)
    assert task.test[-1].answer.rpartition("#### ")[2].isdigit()
    chats = read_own(str(data_dir / "instruct" / "kto_en_demo.json"), None, None)
    assert all(isinstance(item, Conversation) for item in chats.train)
    with pytest.raises(InputError, match="^line 1 of .*seed_tasks.jsonl has the fields id, name, instruction, "):
        read_own(str(data_dir / "instruct" / "seed_tasks.jsonl"), None, None)
