"""Malformed files and flags through the programs themselves: one line, exit code 2, nothing written or changed.

More of them, each beside what it is about: test_cli.py (flags), test_train_llm_input.py (models), test_own_data.py
(rows), test_selection.py and test_checkpoint.py (what stt.load reads), test_checkpoints_survive.py (damage).
"""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import fake_run
import pytest
import tiny
from small_runs import SHIPPED

import stt
import train_llm
from stt import cli, verbs
from stt.arguments import CHECKOUT
from stt.llm_arguments import LLMArgs, resolved
from stt.trainers.checkpoints import seal
from util.utils import RunFolder

Edit = Callable[[Path], object]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file, byte for byte, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(folder: Path, act: Callable[[], int], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`act` gives 2 and one sentence with `said` in it, and leaves `folder` as it was."""
    before = contents(folder)
    capsys.readouterr()
    assert act() == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("defaults for ")]
    assert out == ""
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert contents(folder) == before


def recipe(*flags: str) -> int:
    return cli.run(train_llm.main, LLMArgs, flags)


def edited(**changes: object) -> Edit:
    """config.json with other entries; None takes one away."""
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items()
                                                        if value is not None}))
    return edit


def holds(name: str, content: str | bytes) -> Edit:
    """A file with this content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def lacks(*names: str) -> Edit:
    def edit(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()
    return edit


# ---------------------------------------------------------------- flags and --config


FLAGS = {
    "no number": (["--lr", "fast"], "--lr must be a number"), "a fraction": (["--num_epoch", "1.5"], "whole number"),
    "minus infinity": (["--active_threshold=-inf"], "a finite number"), "huge seed": (["--seed", "4294967296"], "seed"),
    "no value": (["--mode"], "--mode needs a value"), "saves": (["--save_steps", "-1"], "save_steps must be 0"),
    "a saved fraction": (["--save_steps", "0.5"], "whole number"), "tokens": (["--min_tokens", "-1"], "min_tokens"),
    "switched": (["--resume", "yes"], "is a switch"), "word": (["resume"], "unexpected argument 'resume'"),
    "one dash": (["-mode", "stt"], "did you mean --mode"), "a name": (["--run_name", "."], "run_name"),
    "up": (["--run_name", "../../elsewhere"], "one folder name"), "absolute": (["--run_name", "/tmp/x"], "one folder"),
    "a long name": (["--run_name", "x" * 300], "longer than 255 bytes"),
    "model": (["--model", ""], "must not be empty"),
    "a number of buckets": (["--width", "buckets:x"], "width must be free"),
    "bucket": (["--width", "buckets"], "width must be free"),
    "a score without a name": (["--score", "nowhere:"], "score"), "a score in no class": (["--score", ":X"], "score"),
    "a module that is none": (["--score", "os:getcwd"], "score"), "text folder": (["--ppl_text", "/"], "no text file"),
}


@pytest.mark.parametrize(("flags", "said"), FLAGS.values(), ids=FLAGS)
def test_flags(flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(tmp_path, lambda: recipe("--output_dir", "out", *flags), said, capsys)


CONFIGS = {
    "an unknown flag": ("learnin: 1", "unknown flag in run.yaml: 'learnin'"),
    "both spellings": ("lr: 1\nlearning_rate: 2", "gives lr twice"),
    "a list": ("lr: [1, 2]", "lr must be one value, got a list"), "a mapping": ("lr: {a: 1}", "got a dict"),
    "a mode": ("mode: sst", "Did you mean 'stt'"), "a range": ("topk_ratio: 30%", "must be a number, got '30%'"),
    "out of range": ("topk_ratio: 30", "must be in (0, 1]"), "a switch": ("resume: perhaps", "true or false"),
    "a text": ("just words", "must hold one `flag: value` per line"), "tabs": ("lr:\n\t- 1", "not a YAML file"),
    "a tag": ("lr: !!python/name:os.system", "python/name:os.system"), "an alias": ("lr: *rate", "is not a YAML file"),
    "a document more": ("lr: 1\n---\nlr: 2", "is not a YAML file"), "merged": ("<<: {lr: 2}", "unknown flag"),
    "a key that is none": ("? [a, b]\n: 1", "not a YAML file"),
    "conflict": ("resume: yes\noverwrite: yes", "give one of"),
    "zero byte": ("model: a\0b", "not a YAML file"), "Latin-1": (b"model: caf\xe9", "not a YAML file"),
}


@pytest.mark.parametrize(("content", "said"), CONFIGS.values(), ids=CONFIGS)
def test_config_files(content: str | bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    holds("run.yaml", content)(tmp_path)
    assert_refused(tmp_path, lambda: recipe("--config", "run.yaml"), said, capsys)


# ---------------------------------------------------------------- a model's folder


MODELS: dict[str, tuple[Edit, str]] = {
    "config no JSON": (holds("config.json", "{"), "cannot load"),
    "config empty": (holds("config.json", ""), "cannot load"),
    "config a list": (holds("config.json", "[]"), "cannot load"), "no config": (lacks("config.json"), "cannot load"),
    "config not text": (holds("config.json", b"\xff\xfe"), "cannot load"),
    "an unknown type": (edited(model_type="qwen99"), "qwen99"), "no type": (edited(model_type=None), "cannot load"),
    "a number as type": (edited(model_type=7), "cannot load"),
    "width in words": (edited(intermediate_size="wide"), "cannot load"),
    "width below 0": (edited(hidden_size=-8), "cannot load"),
    "no heads": (edited(num_attention_heads=0), "cannot load"),
    "another width": (edited(intermediate_size=100), "cannot load"),
    "layers without weights": (edited(num_hidden_layers=9, layer_types=None), "lack"),
    "an unknown activation": (edited(hidden_act="swoosh"), "cannot load"),
    "no tokenizer": (lacks("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "tokenizer no JSON": (holds("tokenizer.json", "{"), "tokenizer"),
    "tokenizer empty": (holds("tokenizer.json", "{}"), "tokenizer"),
    "tokenizer config no JSON": (holds("tokenizer_config.json", "{"), "tokenizer"),
    "no weights": (lacks("model.safetensors"), "cannot load"),
    "weights a page": (holds("model.safetensors", "<html>please log in</html>"), "cannot load"),
    "weights empty": (holds("model.safetensors", b""), "cannot load"),
    "a huge header": (holds("model.safetensors", b"\xff" * 64), "cannot load"),
}


@pytest.mark.parametrize(("edit", "said"), MODELS.values(), ids=MODELS)
def test_models(edit: Edit, said: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(SHIPPED, tmp_path / "model")
    edit(tmp_path / "model")
    assert_refused(tmp_path, lambda: recipe(*small, "--model", str(tmp_path / "model"), "--output_dir",
                                            str(tmp_path / "out")), said, capsys)


# ---------------------------------------------------------------- a task's data


def rows(**changes: object) -> Edit:
    """The first training story with other fields; None takes one away."""
    def edit(folder: Path) -> None:
        stories = json.loads((folder / "train.json").read_text())
        stories[0] = {key: value for key, value in (stories[0] | changes).items() if value is not None}
        (folder / "train.json").write_text(json.dumps(stories))
    return edit


DATA: dict[str, tuple[Edit, str]] = {
    "no JSON": (holds("train.json", "["), "train.json"), "empty": (holds("train.json", ""), "train.json"),
    "no rows": (holds("train.json", "[]"), "train"), "an object": (holds("train.json", "{}"), "train"),
    "a list of words": (holds("train.json", '["a", "b"]'), "train"), "not text": (holds("test.json", b"\xff"), "test"),
    "no training file": (lacks("train.json"), "has no train.json"), "no story": (rows(story=None), "story"),
    "no query": (rows(query=None), "query"), "no answer": (rows(target_text=None), "target_text"),
    "a story in numbers": (rows(story=7), "story"), "a query in words": (rows(query="who?"), "query"),
    "a query of one": (rows(query="('Ada',)"), "query"), "code as a query": (rows(query="print(1)"), "query"),
    "an unknown relation": (rows(target_text="friend"), "friend"),
}


@pytest.mark.parametrize(("edit", "said"), DATA.values(), ids=DATA)
def test_task_files(edit: Edit, said: str, small: list[str], tmp_path: Path,
                    capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(small[1], tmp_path / "data")
    edit(tmp_path / "data")
    assert_refused(tmp_path, lambda: recipe(*small, "--data_dir", str(tmp_path / "data"), "--output_dir",
                                            str(tmp_path / "out")), said, capsys)


# ---------------------------------------------------------------- a run to resume


RUNS: dict[str, tuple[Edit, str]] = {
    "no arguments": (lacks("args.json"), "no run of ours"), "cut off": (holds("args.json", '{"argum'), "not JSON"),
    "arguments a list": (holds("args.json", "[]"), "must hold a JSON object"),
    "no arguments in it": (holds("args.json", "{}"), "was started with"),
    "a list in it": (holds("args.json", '{"arguments": []}'), "was started with"),
    "arguments not text": (holds("args.json", b"\xff"), "not JSON"),
    "of a newer release": (holds("args.json", '{"arguments": {"model": "x"}}'), "was started with"),
}
CHECKPOINTS: dict[str, tuple[Edit, str]] = {
    "empty": (lambda folder: None, "checkpoint-6: it has no manifest"),
    "cut off": (holds("manifest.json", '{"files"'), "its manifest is not readable"),
    "a number": (holds("manifest.json", "7"), "its manifest is not readable"),
    "not text": (holds("manifest.json", b"\xff"), "its manifest is not readable"),
    "files in a list": (holds("manifest.json", '{"format_version": 1, "files": ["a"]}'), "not readable"),
    "a file without a digest": (holds("manifest.json", '{"format_version": 1, "files": {"a": {}}}'), "not readable"),
    "of a newer release": (holds("manifest.json", '{"format_version": 2, "files": {}}'), "format 2"),
    "files elsewhere": (holds("manifest.json", json.dumps({"format_version": 1, "files": {
        "../args.json": {"bytes": 1, "sha256": ""}}})), "../args.json is missing"),
    "somebody's notes": (holds("notes.txt", "mine"), "it has no manifest"),
}


def unfinished(folder: Path, flags: list[str]) -> Path:
    """A run that these flags started, with a whole checkpoint."""
    run = RunFolder(folder).start(asdict(resolved(cli.read_args(LLMArgs, flags))))
    (run.path / "staged").mkdir()
    (run.path / "staged" / "optimizer.pt").write_text("made up")
    seal(run.path / "staged", run.path / "checkpoint-6")
    return run.path


@pytest.mark.parametrize(("edit", "said"), RUNS.values(), ids=RUNS)
def test_runs_to_resume(edit: Edit, said: str, small: list[str], tmp_path: Path,
                        capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*small, "--output_dir", str(tmp_path), "--run_name", "run", "--resume"]
    edit(unfinished(tmp_path / "run", flags))
    assert_refused(tmp_path, lambda: recipe(*flags), said, capsys)


@pytest.mark.parametrize(("edit", "said"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoints_to_resume(edit: Edit, said: str, small: list[str], tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*small, "--output_dir", str(tmp_path), "--run_name", "run", "--resume"]
    checkpoint = unfinished(tmp_path / "run", flags) / "checkpoint-6"
    (checkpoint / "manifest.json").unlink()
    edit(checkpoint)
    assert_refused(tmp_path, lambda: recipe(*flags), said, capsys)


# ---------------------------------------------------------------- what `stt` reads


EXPORT = ["export", "sliced", "--out", "out"]
VERBS: dict[str, tuple[list[str], Edit, str]] = {
    "results cut off": (["report", "run"], holds("run/results.json", '{"mode"'), "not JSON"),
    "results a list": (["report", "run"], holds("run/results.json", "[]"), "must hold a JSON object"),
    "no results": (["report", "run"], lacks("run/results.json"), "is not complete"),
    "newer results": (["report", "run"], holds("run/results.json", '{"format_version": 9}'), "update stt"),
    "results not text": (["report", "run"], holds("run/results.json", b"\xff"), "not JSON"),
    "sites of no model": (["sites", "run"], lambda folder: None, "run"),
    "sites of a broken config": (["sites", "./sliced"], holds("sliced/config.json", "{"), "sliced"),
    "export of a run folder": (["export", "run", "--out", "out"], lambda folder: None, "no sliced checkpoint"),
    "export of a broken config": (EXPORT, holds("sliced/config.json", "{"), "not readable"),
    "export of broken weights": (EXPORT, holds("sliced/model.safetensors", "x"), "damaged"),
    "export of a broken selection": (EXPORT, holds("sliced/selection.safetensors", "x"), "not a readable safetensors"),
    "export into a full folder": (["export", "sliced", "--out", "run"], lambda folder: None, "run"),
    "export without its base": ([*EXPORT, "--to", "dense", "--base", "./none"], lambda folder: None, "./none"),
    "export of parts": ([*EXPORT, "--multiple_of", "0"], lambda folder: None, "multiple_of"),
    "export for no ranks": ([*EXPORT, "--for", "vllm", "--tp", "0"], lambda folder: None, "tp"),
}


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sliced model, as stt.save writes it."""
    model, batch = tiny.build("llama")
    stt.apply(model, stt.select(model, [batch], keep=0.5))
    return stt.save(model, tmp_path_factory.mktemp("sliced") / "sliced")


@pytest.mark.parametrize(("argv", "edit", "said"), VERBS.values(), ids=VERBS)
def test_verbs(argv: list[str], edit: Edit, said: str, sliced: Path, tmp_path: Path,
               monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sliced, tmp_path / "sliced")
    fake_run.write(tmp_path / "run")
    edit(tmp_path)
    assert_refused(tmp_path, lambda: verbs.main(argv), said, capsys)


# ---------------------------------------------------------------- as processes


@pytest.mark.parametrize("command", [
    ["train_llm.py", "--topk_ratio", "2"], ["train_llm.py", "--config", "nowhere.yaml"],
    ["-m", "stt", "report", "nowhere"],
], ids=" ".join)
def test_as_a_process(command: list[str], tmp_path: Path) -> None:
    command = [str(CHECKOUT / part) if part.endswith(".py") else part for part in command]
    ended = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True,
                           env={"PYTHONPATH": str(CHECKOUT), "PATH": ""})
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
