"""Decoder tasks: every place and format their rows come from, and every bad row refused by name."""
from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path

import datasets
import pytest
from tiny_text import EXPECTED, PASSAGE, ROWS, STORY

import META
from stt import dataset
from stt.dataset import Example, boolq, clutrr, multiple_choice
from stt.errors import InputError

DATA = Path(os.environ.get("STT_TEST_DATA", "no such folder"))
needs_real_files = pytest.mark.skipif(not DATA.is_dir(), reason="set STT_TEST_DATA to the folder of real data files")
REAL = {"clutrr": "clutrr", "boolq": "llm_adapters/dataset/boolq", "arc-e": "llm_adapters/dataset/ARC-Easy",
        "arc-c": "llm_adapters/dataset/ARC-Challenge", "obqa": "llm_adapters/dataset/openbookqa"}

TASKS = sorted(ROWS)


def write(folder: Path, **files: object) -> Path:
    """train=[...] -> train.json; text is written as it is; the key train__jsonl is the file train.jsonl."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        stem, _, suffix = name.partition("__")
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{stem}.{suffix or 'json'}").write_text(text, encoding="utf-8")
    return folder


# ---------------------------------------------------------------------------------------------------------- loading


def test_the_folder_is_the_registry() -> None:
    assert dataset.task_names() == ["arc-c", "arc-e", "boolq", "clutrr", "obqa"]
    assert set(dataset.task_names()) == set(META.DATA_SETS)


@pytest.mark.parametrize("name", TASKS)
def test_local_files(name: str, tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(ROWS[name]) for _ in range(3)) + "\n\n"
    task = dataset.load_task(name, write(tmp_path, train__jsonl=lines, val=[ROWS[name]], test=[ROWS[name]] * 2))
    assert (task.name, len(task.train), len(task.validation), len(task.test)) == (name, 3, 1, 2)
    assert set(task.train + task.validation + task.test) == {EXPECTED[name]}


@pytest.mark.parametrize("name", ["boolq", "arc-e", "arc-c", "obqa"])
def test_hub_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = ("train", "validation") if name == "boolq" else ("train", "validation", "test")
    asked = []

    def load_dataset(hub_id: str, config: str | None) -> datasets.DatasetDict:
        asked.append((hub_id, config))
        return datasets.DatasetDict({split: datasets.Dataset.from_list([ROWS[name]] * 10) for split in splits})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setitem(META.DATA_SETS, name, META.DATA_SETS[name]._replace(folder=tmp_path / "absent"))
    task = dataset.load_task(name)
    assert asked == [{"boolq": ("google/boolq", None), "arc-e": ("allenai/ai2_arc", "ARC-Easy"),
                      "arc-c": ("allenai/ai2_arc", "ARC-Challenge"), "obqa": ("allenai/openbookqa", "main")}[name]]
    assert set(task.train + task.validation + task.test) == {EXPECTED[name]}
    sizes = (len(task.train), len(task.validation), len(task.test))
    assert sizes == ((9, 1, 10) if name == "boolq" else (10, 10, 10))  # BoolQ: validation is the test set


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(hub_id: str, config: str | None) -> None:
        raise ConnectionError(f"Couldn't reach '{hub_id}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setitem(META.DATA_SETS, "boolq", META.DATA_SETS["boolq"]._replace(folder=tmp_path / "absent"))
    with pytest.raises(InputError, match="google/boolq cannot be loaded.*--data_dir"):
        dataset.load_task("boolq")


def test_default_folder_and_its_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "clutrr", train=[STORY] * 3, val=[STORY], test=[STORY])
    monkeypatch.setitem(META.DATA_SETS, "clutrr", META.DataSource(folder))
    assert dataset.load_task("clutrr").test == [EXPECTED["clutrr"]]
    monkeypatch.setitem(META.DATA_SETS, "clutrr", META.DataSource(tmp_path / "absent"))
    with pytest.raises(InputError, match="absent does not exist; make it with scripts/make_clutrr or give --data_dir"):
        dataset.load_task("clutrr")


def test_llm_adapters_rows_read_like_hub_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "Choose. question: Which of these is warm?\n\nAnswer1: ice Answer2: a fire Answer3: snow\n\nAnswer format: x"
    assert multiple_choice.to_example({"instruction": text, "answer": "answer2"}, "row 1") == EXPECTED["arc-e"]
    text = "Say true or false, question: is the sea salty?\n\nAnswer format: true/false"
    boolq._warn_without_passage.cache_clear()
    for _ in range(2):
        example = boolq.to_example({"instruction": text, "answer": "false"}, "row 1")
    assert example == Example("Question: is the sea salty?\nAnswer:", " no", "no", ("yes", "no"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no passage" in caplog.text


def test_names_with_an_apostrophe() -> None:
    row = STORY | {"query": repr(("O'Neil", "Ben"))}
    assert clutrr.to_example(row, "row 1").prompt.endswith("How is Ben related to O'Neil? Ben is O'Neil's")


def test_a_missing_validation_split_is_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [PASSAGE | {"question": f"number {i}"} for i in range(30)]
    folder = write(tmp_path, train_2000=rows, test=[PASSAGE])
    with caplog.at_level(logging.INFO):
        first, second = dataset.load_task("boolq", folder), dataset.load_task("boolq", folder)
    assert first == second
    assert (len(first.train), len(first.validation)) == (27, 3)
    assert len(set(first.train) | set(first.validation)) == 30
    assert "3 of 30 training examples become it" in caplog.text


@needs_real_files
@pytest.mark.parametrize("name", TASKS)
def test_real_files(name: str) -> None:
    folder = DATA / REAL[name]
    labels = {"true": "yes", "false": "no"} | {f"answer{i + 1}": "ABCDE"[i] for i in range(5)}
    files = {path.stem.split("_")[0]: json.loads(path.read_text()) for path in folder.glob("*.json")}
    task = dataset.load_task(name, folder)
    n_train = len(files["train"])
    n_validation = len(files["val"]) if "val" in files else round(n_train / 10)
    assert len(task.validation) == n_validation
    assert len(task.train) == (n_train if "val" in files else n_train - n_validation)
    raw = [row["target_text"] if name == "clutrr" else labels[row["answer"]] for row in files["test"]]
    assert [example.label for example in task.test] == raw
    assert all(example.label in example.choices and example.answer == f" {example.label}" for example in task.train)
    assert all(task.extract(example.answer, example) == example.label for example in task.train + task.test)
    if name == "clutrr":
        assert not any(set("[]") & set(example.prompt) for example in task.train)
    elif name != "boolq":  # every choice of the file stands in the prompt
        assert [len(example.choices) for example in task.test] == [
            len(row["instruction"].rsplit("format: ", 1)[1].split("/")) for row in files["test"]]


def test_shipped_clutrr() -> None:
    task = dataset.load_task("clutrr")
    assert set(Counter(example.label for example in task.test)) == set(clutrr.RELATIONS)
    raw = json.loads((META.DATA_SETS["clutrr"].folder / "test.json").read_text())
    assert [example.label for example in task.test] == [row["target_text"] for row in raw]


# -------------------------------------------------------------------------------------------------------- bad input


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown task 'boolk'.*'boolq'.*arc-c, arc-e, boolq, clutrr, obqa"):
        dataset.load_task("boolk")
    with pytest.raises(InputError, match="unknown task 'CLUTRR'. Did you mean 'clutrr'?"):
        dataset.load_task("CLUTRR")


@pytest.mark.parametrize(("name", "change", "complaint"), [
    ("clutrr", {"target_text": "cousin"}, "label 'cousin' is none of its choices"),
    ("clutrr", {"target": 3}, "target 3 is not the number of target_text 'nephew'"),
    ("clutrr", {"story": ""}, "field 'story' must be a text"),
    ("clutrr", {"query": "Ada, Ben"}, "query must be a pair of names"),
    ("clutrr", {"query": "('Ada',)"}, "query must be a pair of names"),
    ("boolq", {"answer": "maybe"}, "field 'answer' must be true or false"),
    ("boolq", {"passage": None}, "field 'passage' must be a text"),
    ("boolq", {"instruction": "question: x Answer format: y", "answer": "maybe"}, "label 'maybe' is none of its"),
    ("boolq", {"instruction": "what is this", "answer": "true"}, "the instruction holds no"),
    ("arc-e", {"answerKey": "4"}, "answerKey '4' is none of its choices"),
    ("arc-c", {"choices": None}, "field 'choices' must be"),
    ("arc-c", {"choices": {"text": ["x", "y"], "label": ["A", "A"]}}, "different labels"),
    ("obqa", {"choices": {"text": ["x"], "label": ["A"]}}, "2 to 26 texts"),
    ("obqa", {"choices": {"text": ["x", "y"], "label": ["A", "B", "C"]}}, "different labels"),
    ("obqa", {"instruction": "question: q Answer1: x Answer2: y Answer format:", "answer": "answer3"}, "none of its"),
    ("obqa", {"instruction": "question: q Answer1: x Answer3: y Answer format:", "answer": "answer3"}, "Answer1 … "),
    ("obqa", {"instruction": "what is this", "answer": "answer1"}, "the instruction holds no"),
])
def test_a_bad_row_is_named(name: str, change: dict[str, object], complaint: str, tmp_path: Path) -> None:
    bad = ROWS[name] | change
    for suffix, place in (("json", "row 2"), ("jsonl", "line 3")):
        rows = [ROWS[name], bad] if suffix == "json" else f"{json.dumps(ROWS[name])}\n\n{json.dumps(bad)}\n"
        folder = write(tmp_path / suffix, **{"train": [ROWS[name]] * 3, f"test__{suffix}": rows})
        with pytest.raises(InputError, match=complaint) as caught:
            dataset.load_task(name, folder)
        assert str(caught.value).startswith(f"{place} of {folder}/test.{suffix}: ")


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, train=[{"text": "x"}], test=[STORY])
    with pytest.raises(InputError, match=r"row 1 of .*train\.json: field 'query' is missing, the row has: text"):
        dataset.load_task("clutrr", folder)


@pytest.mark.parametrize(("files", "complaint"), [
    ({}, "has no train.json or train.jsonl"),
    ({"train": []}, "train.json holds no rows"),
    ({"train__jsonl": "\n"}, "train.jsonl holds no rows"),
    ({"train": "[1, 2"}, "train.json is not valid JSON"),
    ({"train__jsonl": '{"a": 1}\n{"a"'}, "train.jsonl is not valid JSONL"),
    ({"train": {"rows": []}}, "must be a JSON list of objects, got dict"),
    ({"train": [1]}, "row 1 of .*train.json must be a JSON object, got int"),
    ({"train": [STORY]}, "needs a train and a test split, found: train"),
    ({"train": [STORY], "test": [STORY]}, "its one training example cannot be split"),
    ({"train_1": [STORY], "train_2": [STORY], "test": [STORY]}, "more than one train file"),
    ({"train": [STORY], "val": [STORY], "dev": [STORY], "test": [STORY]}, "more than one validation file"),
    ({"train": [STORY], "test": [STORY], "test__jsonl": json.dumps(STORY)}, "more than one test file"),
])
def test_bad_folders(files: dict[str, object], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=complaint):
        dataset.load_task("clutrr", write(tmp_path, **files))


def test_data_dir_must_be_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", write(tmp_path, train=[STORY]) / "train.json"):
        with pytest.raises(InputError, match="does not exist: give a folder"):
            dataset.load_task("clutrr", path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid JSON"):
        dataset.load_task("clutrr", tmp_path)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(InputError, match="the train split of task 'boolq' is empty"):
        dataset.complete_splits({"train": [], "test": [EXPECTED["boolq"]]}, "boolq")
