"""The flags of train_classifier.py, and bad input to it: one sentence, exit code 2, nothing written."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from classifying import results, run, write_picture, write_pictures, write_table
from flags_read import fields_read

from stt import arguments
from stt.arguments import CHECKOUT, alias_of, resolve_model
from stt.classifier_arguments import SHIPPED_TASK, ClassifierArgs, resolved
from stt.cli import read_args
from stt.dataset.classification import task_names
from stt.errors import InputError

# the published command line: flag and value, what it sets
PUBLISHED = [
    ("--model_name m", "model", "m"), ("--dataset mrpc", "task", "mrpc"), ("--task mrpc", "task", "mrpc"),
    ("--modality text", "modality", "text"), ("--num_classes 43", "num_classes", 43),
    ("--max_length 128", "max_length", 128), ("--image_size 224", "image_size", 224), ("--mode stt_lora", "mode",
                                                                                      "stt_lora"),
    ("--threshold 0.02", "active_threshold", 0.02), ("--sample_ratio 0.005", "active_sample_ratio", 0.005),
    ("--disable_dropout", "disable_dropout", True), ("--topk_ratio 0.1", "topk_ratio", 0.1),
    ("--lora_r 8", "lora_r", 8),
    ("--lora_alpha 16", "lora_alpha", 16), ("--lora_dropout 0", "lora_dropout", 0.0),
    ("--learning_rate 1e-5", "lr", 1e-5), ("--lr 1e-5", "lr", 1e-5), ("--weight_decay 0.1", "wd", 0.1),
    ("--wd 0.1", "wd", 0.1), ("--num_epochs 3", "num_epoch", 3), ("--batch_size 4", "train_batch", 4),
    ("--eval_batch_size 8", "eval_batch", 8), ("--gradient_accumulation_steps 2", "gradient_accumulation_steps", 2),
    ("--warmup_steps 10", "warmup_steps", 10), ("--eval_steps 1000", "eval_steps", 1000),
    ("--max_grad_norm 0.01", "max_grad_norm", 0.01), ("--output_dir ./out", "output_dir", "./out"),
    ("--seed 1", "seed", 1), ("--use_wandb", "use_wandb", True), ("--wandb_project p", "wandb_project", "p"),
    ("--wandb_entity e", "wandb_entity", "e"), ("--wandb_run_name n", "wandb_run_name", "n"),
    ("--log_interval 5", "log_interval", 5), ("--schedule", "schedule", True), ("--tune_attn", "tune_attn", True),
    ("--dev_mode", "dev_mode", True), ("--dev_ratio 0.2", "dev_ratio", 0.2),
    ("--mode magnitude_pruning --mag_norm l1", "mag_norm", "l1"),
    ("--mode magnitude_pruning --mag_use_tracker_budget", "mag_use_tracker_budget", True),
    ("--source_task qqp", "source_task", "qqp"), ("--source_dataset qqp", "source_task", "qqp"),
    ("--source_task qqp --source_ratio 0.1", "source_ratio", 0.1)]


@pytest.mark.parametrize(("line", "name", "value"), PUBLISHED)
def test_published_flags(line, name, value):
    assert getattr(read_args(ClassifierArgs, line.split()), name) == value


def test_published_defaults_hold_for_real_models():
    args = resolved(ClassifierArgs(model="google/vit-base-patch16-224", task="eurosat"))
    given = {name: getattr(args, name) for name in ("lr", "wd", "num_epoch", "train_batch", "schedule", "topk_ratio",
                                                    "active_sample_ratio", "active_threshold", "max_grad_norm",
                                                    "lora_r", "lora_alpha", "lora_dropout", "max_length", "dev_ratio")}
    assert given == {"lr": 5e-5, "wd": 0.01, "num_epoch": 5, "train_batch": 16, "schedule": False, "topk_ratio": 0.3,
                     "active_sample_ratio": 0.005, "active_threshold": 0.01, "max_grad_norm": 0.01, "lora_r": 32,
                     "lora_alpha": 64, "lora_dropout": 0.1, "max_length": 512, "dev_ratio": 0.1}


def test_no_arguments():
    args = resolved(ClassifierArgs())
    assert args.task == "digits_turned"
    assert args.run_name == "vit-digits-digits_turned-stt-top0.3-seed42"
    assert set(SHIPPED_TASK) == {path.name for path in (CHECKOUT / "models").iterdir() if path.is_dir()}
    assert set(SHIPPED_TASK.values()) <= set(task_names())
    with pytest.raises(InputError, match="no task is given for the model 'bert-base-uncased'"):
        resolved(ClassifierArgs(model="bert-base-uncased"))


def test_every_task_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        read_args(ClassifierArgs, ["--help"])
    text = capsys.readouterr().out.replace("│", " ")
    assert set(task_names()) <= set(text.replace("|", " ").replace(";", " ").split())
    assert all(f"--{field.name}" in text for field in dataclasses.fields(ClassifierArgs))


def test_no_dead_flag():
    """Every flag is read outside its declaration, or says in its own check why it is refused."""
    library = [path for path in (CHECKOUT / "stt").rglob("*.py") if path.name not in (
        "arguments.py", "classifier_arguments.py", "verbs.py")]
    texts = [path.read_text().replace("args: ClassifierArgs", "args: RunArgs")
             for path in (CHECKOUT / "train_classifier.py", *library)]
    dead = {field.name for field in dataclasses.fields(ClassifierArgs)} - fields_read(texts)
    assert dead == {"recovery_lr", "mag_norm", "mag_use_tracker_budget"}  # tested below


@pytest.mark.parametrize(("given", "said"), [
    ({"recovery_lr": 1e-5}, "classifier_ablation.py"), ({"mag_use_tracker_budget": False}, "as many neurons as STT"),
    ({"mag_norm": "l1"}, "the mode is 'stt'"), ({"mag_use_tracker_budget": True}, "the mode is 'stt'"),
    ({"mag_norm": "l2"}, "unknown mag_norm"), ({"modality": "images"}, "Did you mean 'image'"),
    ({"head": "untie"}, "give train or freeze"), ({"warmup_steps": 5, "schedule": False}, "part of the schedule"),
    ({"eval_steps": 5, "eval_epochs": False}, "give one of them"), ({"source_ratio": 0.1}, "source_task"),
    ({"source_dir": "x"}, "source_task"), ({"source_task": "qqp", "mode": "lora"}, "selects nothing"),
    ({"dev_ratio": 1.0}, "dev_ratio must be between 0 and 1"), ({"num_classes": 0}, "num_classes must be 1 or more"),
    ({"max_length": 1}, "max_length must be 2 or more"), ({"active_sample_ratio": 0}, r"must be in \(0, 1\]"),
    ({"source_ratio": 2, "source_task": "qqp"}, r"source_ratio must be in \(0, 1\]")])
def test_conflicts(given, said):
    with pytest.raises(InputError, match=said):
        ClassifierArgs(**given)


def test_minilm(monkeypatch, tmp_path):
    (tmp_path / "a_package" / "model").mkdir(parents=True)
    (tmp_path / "a_package" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(arguments, "PACKAGED_MODELS", {"minilm": ("a-package", "a_package", "model")})
    assert resolve_model("minilm") == str(tmp_path / "a_package" / "model")
    assert alias_of(resolve_model("minilm")) == "minilm"
    assert alias_of("a/model") == "a/model"
    assert resolved(ClassifierArgs(model="minilm", task="sst2")).run_name == "minilm-sst2-stt-top0.3-seed42"
    monkeypatch.setattr(arguments, "PACKAGED_MODELS", {"minilm": ("b-package", "b_package", "model")})
    with pytest.raises(InputError, match="package b-package, which is not installed: pip install b-package"):
        resolve_model("minilm")


# ---------------------------------------------------------------- bad input to a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures and tables, good and bad."""
    found = tmp_path_factory.mktemp("data")
    write_pictures(found / "good", {"train": 4, "test": 2})
    write_pictures(found / "unknown", {"train": 4, "test": 2}, ("dark", "grey"))
    write_picture(found / "unknown" / "test" / "pink" / "0.png", 9)
    write_pictures(found / "one", {"train": 4, "test": 2}, ("dark",))
    write_pictures(found / "broken", {"train": 4, "test": 2})
    (found / "broken" / "test" / "grey" / "0.png").write_bytes(b"no picture")
    write_table(found / "texts.csv", [{"text": f"{n}", "label": n % 2} for n in range(9)])
    (found / "empty.csv").write_text("")
    return found


BAD = {
    "missing model": (["--model", "./no/such", "--task", "digits"], "no model folder"),
    "missing data folder": (["--data_dir", "/no/such"], "does not exist"),
    "unknown task": (["--task", "digit"], "Did you mean 'digits'"),
    "unknown source": (["--source_task", "digit"], "Did you mean 'digits'"),
    "unknown mode": (["--mode", "sst"], "Did you mean 'stt'"),
    "unknown flag": (["--sample_ration", "0.3"], "did you mean --sample_ratio"),
    "ratio": (["--topk_ratio", "1.5"], "must be in (0, 1], got 1.5"),
    "modality": (["--modality", "text"], "digits_turned holds images"),
    "classes": (["--num_classes", "3"], "has 10"),
    "padding of pictures": (["--count_padding"], "pictures have no padding"),
    "a text task": (["--task", "clutrr"], "cannot load the tokenizer of"),
    "source of the other modality": (["--source_task", "clutrr"], "source_task clutrr holds texts"),
    "size": (["--image_size", "32"], "--image_size"),
    "nothing to resume": (["--resume"], "nothing to resume"),
    "no file": (["--train_file", "/no/such.csv"], "no data file"),
    "an empty file": (["--train_file", "{}/empty.csv"], "holds no rows"),
    "a label not known": (["--train_file", "{}/unknown/train", "--eval_file", "{}/unknown/test"], "'pink' is not"),
    "one class": (["--train_file", "{}/one/train"], "the same label ('dark')"),
    "a broken picture": (["--train_file", "{}/broken/train", "--eval_file", "{}/broken/test"], "no picture that"),
    "texts for a vision model": (["--train_file", "{}/texts.csv"], "cannot load the tokenizer of"),
    "fp16 on a CPU": (["--precision", "fp16"], "needs a GPU"),
    "unknown score": (["--score", "contributions"], "Did you mean 'contribution'"),
}


@pytest.mark.parametrize(("flags", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(flags, said, folder, tmp_path, capsys):
    assert run([flag.replace("{}", str(folder)) for flag in flags], tmp_path) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_not_overwritten(folder, tmp_path, capsys):
    flags = ["--train_file", str(folder / "good" / "train"), "--num_epoch", "1", "--mode", "baseline",
             "--no_eval_epochs"]
    assert run(flags, tmp_path) == 0
    before = results(tmp_path)
    assert run(flags, tmp_path) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert results(tmp_path) == before
