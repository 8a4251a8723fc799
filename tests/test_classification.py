"""Classification tasks: every task from every layout, own data, what is selected on, and one sentence for bad data."""
from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from classifying import write_picture, write_pictures, write_table

import META
from stt.dataset import classification
from stt.dataset.classification import balanced_subset, form_of, load_task, read_own, task_names
from stt.dataset.classification.base import Item
from stt.errors import InputError

TEXT = [name for name in task_names() if form_of(name).modality == "text"]
IMAGE = [name for name in task_names() if form_of(name).modality == "image"]
ISSUE = {"mrpc", "qnli", "sst2", "cola", "rte", "stsb", "qqp", "agnews", "imdb", "clutrr", "clevr_count", "eurosat",
         "gtsrb", "cifar10", "cifar100", "mnist", "digits"}
STORY = {"story": "[Ada] met her brother [Ben].", "query": "('Ada', 'Ben')", "target_text": "brother"}


def text_rows(name: str) -> list[dict[str, object]]:
    """Six rows of the task, its labels by number; the columns as on the hub."""
    form = form_of(name)
    if name == "clutrr":
        return [STORY | {"target_text": form.labels[number % 3]} for number in range(6)]
    labels = range(len(form.labels)) if form.labels else (0.5, 4.25)
    return [{column: f'{column} "{number}", or not' for column in form.fields} |
            {form.label: labels[number % len(labels)]} for number in range(6)]


def test_the_tasks():
    assert set(task_names()) >= ISSUE
    assert set(META.CLASSIFICATION_DATA_SETS) <= set(task_names()) == {*TEXT, *IMAGE}
    assert len(form_of("clutrr").labels) == 18
    with pytest.raises(InputError, match="Did you mean 'sst2'"):
        load_task("sst")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
@pytest.mark.parametrize("name", TEXT)
def test_text_tasks_from_tables(name, suffix, tmp_path):
    rows, form = text_rows(name), form_of(name)
    for split in ("train", "dev", "test"):
        write_table(tmp_path / f"{split}{suffix}", rows)
    task = load_task(name, tmp_path)
    assert (len(task.train), len(task.validation), len(task.test)) == (6, 6, 6)
    if name == "clutrr":
        assert task.train[0].content == ("Ada met her brother Ben.", "How is Ben related to Ada? Ben is Ada's")
    else:
        assert [item.content for item in task.test] == [tuple(row[field] for field in form.fields) for row in rows]
        assert [item.label for item in task.test] == [row["label"] for row in rows]
    assert task.is_regression == (name == "stsb")


@pytest.mark.parametrize("name", IMAGE)
def test_image_tasks_from_folders_and_tables(name, tmp_path):
    labels = form_of(name).labels
    write_pictures(tmp_path / "whole", {"train": 2, "val": 1, "test": 1}, labels[:3])
    task = load_task(name, tmp_path / "whole")
    assert [item.label for item in task.train] == sorted([0, 0, 1, 1, 2, 2], key=lambda n: labels[n])
    assert (len(task.validation), len(task.test)) == (3, 3)
    assert task.test[0].content.open().size == (8, 8)
    rows = [{"image": str(Path("pictures", f"{number}.png")), "label": number % 3} for number in range(5)]
    for row in rows:
        write_picture(tmp_path / "tables" / row["image"], 10)
    for split in ("train", "test"):
        write_table(tmp_path / "tables" / f"{split}.csv", rows)
    task = load_task(name, tmp_path / "tables")
    assert (len(task.train), len(task.validation), len(task.test)) == (4, 1, 5)
    assert [item.label for item in task.test] == [0, 1, 2, 0, 1]


def test_one_piece_is_split_the_same_way_each_time(tmp_path):
    """EuroSAT's official archive: a folder for every class and nothing else."""
    for name in ("River", "Forest"):
        for number in range(10):
            write_picture(tmp_path / name / f"{name}_{number}.jpg", 50, number)
    one, other = (load_task("eurosat", tmp_path) for _ in range(2))
    places = [[[item.where for item in getattr(task, split)] for split in ("train", "validation", "test")]
              for task in (one, other)]
    assert places[0] == places[1]
    assert list(map(len, places[0])) == [16, 2, 2]
    assert len({place for split in places[0] for place in split}) == 20


def test_digits():
    """The images of scikit-learn, every one in one split; the turned ones are the same ones, turned left."""
    from sklearn.datasets import load_digits

    data, task, turned = load_digits(), load_task("digits"), load_task("digits_turned")
    places = {split: [int(item.where.split()[1]) for item in getattr(task, split)]
              for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in places.items()} == {"train": 1257, "validation": 180, "test": 360}
    assert sorted(place for found in places.values() for place in found) == list(range(1797))
    for item, other in list(zip(task.test, turned.test, strict=True))[:20]:
        place = int(item.where.split()[1])
        assert item.label == other.label == data.target[place]
        pixels, seen = (numpy.asarray(each.content.open())[:, :, 0] for each in (item, other))
        assert numpy.array_equal(pixels, numpy.round(data.images[place] * 255 / 16))
        assert numpy.array_equal(numpy.rot90(pixels), seen)
    assert {item.where for item in task.test} == {item.where for item in turned.test}


def test_labels_by_name_or_number():
    number = classification.base.number_of
    assert [number(label, ("no", "yes"), "") for label in ("yes", "1", 1, " no ")] == [1, 1, 1, 0]
    assert number("00007", tuple(map(str, range(43))), "") == 7
    assert number("4.5", (), "") == 4.5
    for label, labels, said in (("maybe", ("no", "yes"), "'maybe' is not known; the classes are no, yes"),
                                ("2", ("no", "yes"), "from 0 to 1"), ("-1", ("no", "yes"), "not known"),
                                ("high", (), "finite number"), ("nan", (), "finite number")):
        with pytest.raises(InputError, match=said):
            number(label, labels, "line 2")


def test_hub_rows(monkeypatch):
    """As `datasets` gives them: GLUE's hidden test labels are left out, pictures are decoded when they are needed."""
    import datasets

    def glue(*_: object) -> datasets.DatasetDict:
        return datasets.DatasetDict({split: datasets.Dataset.from_list(
            [{"sentence": f"{split} {n}", "label": -1 if split == "test" else n % 2} for n in range(20)])
            for split in ("train", "validation", "test")})

    monkeypatch.setattr(datasets, "load_dataset", glue)
    task = load_task("sst2")
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 2, 20)
    assert task.test[0].content == ("validation 0",)

    shades = [numpy.full((4, 4, 3), shade, numpy.uint8) for shade in range(0, 200, 20)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})

    def cifar(*_: object) -> datasets.DatasetDict:
        return datasets.DatasetDict({split: datasets.Dataset.from_dict(
            {"img": shades, "label": list(range(10))}, features=features) for split in ("train", "test")})

    monkeypatch.setattr(datasets, "load_dataset", cifar)
    task = load_task("cifar10")
    assert [numpy.asarray(item.content.open())[0, 0, 0] for item in task.test] == [shade[0, 0, 0] for shade in shades]


def test_no_hub(monkeypatch):
    import datasets

    def fail(*_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match="nyu-mll/glue cannot be loaded from the hub .* give --data_dir"):
        load_task("qnli")


# ---------------------------------------------------------------- real data


def test_real_texts(data_dir):
    sst2, mrpc = (load_task(name, data_dir / name) for name in ("sst2", "mrpc"))
    assert (len(sst2.train), len(sst2.validation), len(sst2.test)) == (60614, 6735, 872)
    assert (len(mrpc.train), len(mrpc.validation), len(mrpc.test)) == (3300, 367, 408)
    assert sum(item.label for item in mrpc.test) == 279
    assert sum(item.label for item in sst2.test) == 444


def test_real_traffic_signs(data_dir):
    task = load_task("gtsrb", data_dir / "gtsrb")
    assert len(task.train) + len(task.validation) == 1677
    assert len(task.test) == 1000
    assert {item.label for item in task.train} == {item.label for item in task.validation} == set(range(43))
    assert task.test[0].label == 16  # the first row of GT-final_test.csv
    tracks = [{(item.label, Path(item.where).name.split("_")[0]) for item in split}
              for split in (task.train, task.validation)]
    assert not tracks[0] & tracks[1]


# ---------------------------------------------------------------- what is selected on


def test_balanced_subset():
    """int(N * ratio / C) of every class, at least one, the same for one seed; the order of the data stays."""
    items = [Item((str(n),), 0 if n < 70 else 1 if n < 98 else 2, str(n)) for n in range(100)]

    def counts(ratio: float, seed: int = 0) -> list[int]:
        found = balanced_subset(items, ratio, 3, seed)
        assert [int(item.where) for item in found] == sorted(int(item.where) for item in found)
        return [sum(item.label == label for item in found) for label in range(3)]

    assert counts(0.005) == [1, 1, 1]
    assert counts(0.1) == [3, 3, 2]  # int(100 * 0.1 / 3), and there are only two of class 2
    assert counts(1.0) == [33, 28, 2]
    assert balanced_subset(items, 0.1, 3, 0) == balanced_subset(items, 0.1, 3, 0) != balanced_subset(items, 0.1, 3, 1)
    quantities = [Item((str(n),), n / 7, str(n)) for n in range(100)]
    assert len(balanced_subset(quantities, 0.1, 0, 0)) == 10
    with pytest.raises(InputError, match="sample_ratio"):
        balanced_subset(items, 0, 3, 0)


# ---------------------------------------------------------------- own data


def test_own_tables(tmp_path):
    rows = [{"text": f"text {n}", "label": ("b", "a", "10")[n % 3], "source": "web"} for n in range(30)]
    task = read_own(str(write_table(tmp_path / "mine.tsv", rows)), None)
    assert (task.name, task.labels, task.modality) == ("mine", ("10", "a", "b"), "text")
    assert (len(task.train), len(task.validation), len(task.test)) == (24, 3, 3)
    assert task.metrics == ("accuracy", "macro_f1")
    pairs = [{"text_a": "x", "text_b": f"{n}", "label": n % 2 + 9} for n in range(10)]
    task = read_own(str(write_table(tmp_path / "pairs.jsonl", pairs)), str(tmp_path / "pairs.jsonl"))
    assert (task.labels, len(task.test), task.train[0].content[0]) == (("9", "10"), 10, "x")
    assert task.metrics == ("accuracy", "f1")
    task = read_own(str(tmp_path / "pairs.jsonl"), None, is_quantity=True)
    assert (task.labels, task.is_regression, task.test[0].label) == ((), True, float(task.test[0].label))


def test_own_pictures(tmp_path):
    write_pictures(tmp_path, {"train": 4, "test": 2})
    task = read_own(str(tmp_path / "train"), str(tmp_path / "test"))
    assert (task.modality, task.labels) == ("image", ("dark", "grey", "light"))
    assert (len(task.train), len(task.validation), len(task.test)) == (11, 1, 6)
    rows = [{"image": f"train/dark/{n}.png", "label": n % 2} for n in range(4)]
    table = write_table(tmp_path / "table.csv", rows)
    assert read_own(str(table), str(table)).test[0].content.open().size == (8, 8)


BAD = {
    "no file": (lambda path: path / "none.csv", "no data file"),
    "another suffix": (lambda path: put(path / "data.txt", "text,label\na,b\n"), "must be called .csv or .tsv"),
    "empty": (lambda path: put(path / "data.csv", ""), "holds no rows"),
    "only a head": (lambda path: put(path / "data.csv", "text,label\n"), "holds no rows"),
    "too few": (lambda path: put(path / "data.csv", "text,label\na,b\nc,d\n"), "give at least 3"),
    "no label": (lambda path: put(path / "data.csv", "text\n" + "a\n" * 5), "has no 'label'"),
    "an empty label": (lambda path: put(path / "data.csv", "text,label\n" + "a,x\n" * 5 + "b,\n"), "has no 'label'"),
    "no text": (lambda path: put(path / "data.csv", "words,label\n" + "a,b\n" * 5), "give label and either text"),
    "an empty text": (lambda path: put(path / "data.csv", "text,label\n" + "a,b\n" * 5 + " ,c\n"), "are empty"),
    "a cell too many": (lambda path: put(path / "data.csv", "text,label\n" + "a,b\n" * 5 + "a,b,c\n"),
                        "line 7 of .* as many cells"),
    "a cell too few": (lambda path: put(path / "data.csv", "text,label\n" + "a,b\n" * 5 + "a\n"), "as many cells"),
    "an open quote": (lambda path: put(path / "data.csv", 'text,label\n"a,b\n'), "is not valid CSV"),
    "latin-1": (lambda path: put(path / "data.csv", "text,label\ncaf\xe9,b\n".encode("latin-1")), "is not valid CSV"),
    "no JSON": (lambda path: put(path / "data.jsonl", "{"), "is not valid JSONL"),
    "one class": (lambda path: put(path / "data.csv", "text,label\n" + "a,b\n" * 9), "have the same label \\('b'\\)"),
    "a number as text": (lambda path: put(path / "data.jsonl", '{"text": 3, "label": "x"}\n' * 5), "must be a text"),
    "no class folder": (lambda path: put(path / "data" / "x.png", b"").parent, "no folder of a class"),
    "an empty class": (lambda path: put(path / "data" / "cat" / "notes.txt", "").parents[1], "holds no picture"),
    "a missing picture": (lambda path: put(path / "data.csv", "image,label\n" + "a.png,b\n" * 5), "no picture"),
}


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
def test_bad_own_data(make, said, tmp_path):
    with pytest.raises(InputError, match=said) as raised:
        read_own(str(make(tmp_path)), None)
    assert str(raised.value).count("\n") == 0


def test_a_label_that_training_does_not_have(tmp_path):
    write_table(tmp_path / "train.csv", [{"text": f"{n}", "label": "ab"[n % 2]} for n in range(10)])
    write_table(tmp_path / "test.csv", [{"text": "x", "label": "c"}])
    with pytest.raises(InputError, match="line 2 of .*test.csv: label 'c' is not known; the classes are a, b"):
        read_own(str(tmp_path / "train.csv"), str(tmp_path / "test.csv"))


def test_bad_folders(tmp_path):
    for folder, said in ((tmp_path / "none", "does not exist"), (tmp_path, "has no train table")):
        with pytest.raises(InputError, match=said):
            load_task("sst2", folder)
    write_table(tmp_path / "train.csv", [{"sentence": "a", "label": 0}, {"sentence": "b", "label": 1}])
    with pytest.raises(InputError, match="needs a train and a test split"):
        load_task("sst2", tmp_path)
    write_table(tmp_path / "train.jsonl", [{"sentence": "a", "label": 0}])
    with pytest.raises(InputError, match="more than one train set"):
        load_task("sst2", tmp_path)


def test_unreadable_pictures(tmp_path):
    whole = write_picture(tmp_path / "a.png", 10).read_bytes()
    for name, content in (("cut.png", whole[:60]), ("text.png", b"no picture"), ("empty.png", b"")):
        picture = classification.base.picture_of(str(put(tmp_path / name, content)), name)
        with pytest.raises(InputError, match=f"{name} is no picture that can be read"):
            classification.check_readable([picture])


def test_official_traffic_signs_without_their_table(tmp_path):
    write_picture(tmp_path / "GTSRB" / "Training" / "00000" / "00000_00010.ppm", 10)
    with pytest.raises(InputError, match="has no GT-final_test.csv"):
        load_task("gtsrb", tmp_path)
    put(tmp_path / "GT-final_test.csv", "Filename;Class\nx.ppm;1\n")
    with pytest.raises(InputError, match="columns Filename and ClassId are needed"):
        load_task("gtsrb", tmp_path)


def test_clutrr_ships():
    task = load_task("clutrr")
    raw = json.loads((META.DATA_SETS["clutrr"].folder / "test.json").read_text())
    assert [task.labels[item.label] for item in task.test] == [row["target_text"] for row in raw]
