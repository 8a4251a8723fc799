"""Files that would run code, wherever a file is read: none of it runs. Each attempt would write into a sentinel."""
from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from public_summary import SelectivePeftSummary, under_its_name
from safetensors.torch import save_file
from small_runs import SHIPPED
from training import run

import stt
import train_llm
from stt import cli, verbs
from stt.arguments import CHECKOUT
from stt.errors import InputError
from stt.llm_arguments import LLMArgs
from stt.selection import Selection
from stt.selective_optimizers.load_store import load_summary_from_disk
from stt.trainers import checkpoints


class Payload:
    """Unpickled without care, it writes into the sentinel."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.sentinel, "code ran")


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    path = tmp_path / "sentinel"
    path.write_text("untouched")
    return path


@pytest.fixture(autouse=True)
def _untouched(sentinel: Path) -> object:
    yield
    assert sentinel.read_text() == "untouched"


def code(sentinel: Path) -> str:
    """Python that writes into the sentinel."""
    return f"import pathlib\npathlib.Path({str(sentinel)!r}).write_text('code ran')\n"


def test_the_payloads_work(sentinel: Path, tmp_path: Path) -> None:
    """Without care."""
    torch.save(Payload(sentinel), tmp_path / "evil.pt")
    for attempt in (lambda: pickle.loads(pickle.dumps(Payload(sentinel))), lambda: exec(code(sentinel)),
                    lambda: torch.load(tmp_path / "evil.pt", weights_only=False),
                    lambda: yaml.unsafe_load(tag(sentinel))):
        attempt()
        assert sentinel.read_text() == "code ran"
        sentinel.write_text("untouched")


# ---------------------------------------------------------------- checkpoints, sealed by whoever wrote the payload


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(folder, num_train_epochs=1)
    return folder


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_a_pickle_in_a_checkpoint(name: str, how: str, trained: Path, sentinel: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    checkpoint, _ = checkpoints.newest(tmp_path / "run")
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    reseal(checkpoint, name, sentinel, how)
    with pytest.raises(InputError, match="checkpoint-5 holds more than numbers and was not written by us"):
        run(tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.bin", "notes.npy"])
def test_a_pickle_that_nobody_reads(name: str, trained: Path, sentinel: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    checkpoint, _ = checkpoints.newest(tmp_path / "run")
    reseal(checkpoint, name, sentinel, "torch.save")
    run(tmp_path / "run", resume=True, num_train_epochs=1)


def reseal(checkpoint: Path, name: str, sentinel: Path, how: str) -> None:
    """The checkpoint with such a file, under a manifest that says all is well."""
    if how == "torch.save":
        torch.save({"state": Payload(sentinel)}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(Payload(sentinel)))
    (checkpoint / "manifest.json").unlink()
    staged = checkpoint.with_name("staged")
    checkpoint.rename(staged)
    checkpoints.seal(staged, checkpoint)
    assert checkpoints.fault(checkpoint) is None


# ---------------------------------------------------------------- models


def with_pickle(folder: Path, sentinel: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(sentinel)}, folder / "pytorch_model.bin")


def with_index(folder: Path, sentinel: Path) -> None:
    """Weights elsewhere, in a pickle."""
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(sentinel)}, folder.parent / "elsewhere.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere.bin"}}))


def with_code(folder: Path, sentinel: Path) -> None:
    (folder / "modeling_own.py").write_text(code(sentinel))
    (folder / "configuration_own.py").write_text(code(sentinel))
    changed(folder / "config.json", model_type="own", auto_map={
        "AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})


def with_tokenizer_code(folder: Path, sentinel: Path) -> None:
    (folder / "tokenization_own.py").write_text(code(sentinel))
    (folder / "tokenizer.json").unlink()
    changed(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer",
            auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})


def with_adapter(folder: Path, sentinel: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"],
                                                            "base_model_name_or_path": str(folder)}))
    torch.save({"q_proj": Payload(sentinel)}, folder / "adapter_model.bin")


def with_template(folder: Path, sentinel: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('echo > "
        f"{sentinel}') }}")


def changed(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("prepare", [with_pickle, with_index, with_code, with_tokenizer_code, with_adapter,
                                     with_template], ids=lambda prepare: prepare.__name__)
def test_models(prepare: Callable[[Path, Path], None], sentinel: Path, small: list[str], tmp_path: Path,
                capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(SHIPPED, tmp_path / "model")
    prepare(tmp_path / "model", sentinel)
    template = ["--apply_chat_template"] if prepare is with_template else []
    flags = [*small, "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), *template]
    assert cli.run(train_llm.main, LLMArgs, flags) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_sliced_model(sentinel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = tiny.build("llama")
    stt.apply(model, stt.select(model, [batch], keep=0.5))
    folder = stt.save(model, tmp_path / "sliced")
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "selection.bin", "training_args.bin"):
        torch.save(Payload(sentinel), folder / name)
    assert verbs.main(["export", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "holds no model.safetensors" in capsys.readouterr().err
    with pytest.raises(InputError):
        stt.load(folder)


def test_a_selection_that_is_a_pickle_or_points_elsewhere(sentinel: Path, tmp_path: Path) -> None:
    path = tmp_path / "selection.safetensors"
    torch.save(Payload(sentinel), path)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        Selection.load(path)
    name = f"../{sentinel.name}"
    save_file({name: torch.arange(3, dtype=torch.int32)}, path, metadata={"stt": json.dumps(
        {"format_version": 1, "widths": {name: 9}})})
    before = {entry.name for entry in tmp_path.iterdir()}
    with pytest.raises(InputError):
        stt.apply(tiny.build("llama")[0], Selection.load(path))
    assert {entry.name for entry in tmp_path.iterdir()} == before


class Called:
    """Unpickled as `function(argument)`."""

    def __init__(self, function: Callable[..., object], argument: object):
        self.call = function, (argument,)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def holding(payload: Payload | None = None, **fields: object) -> SelectivePeftSummary:
    summary = SelectivePeftSummary([payload], [], [], [], 0)
    summary.__dict__ |= fields
    return summary


SUMMARIES: dict[str, Callable[[Path, Payload], object]] = {
    "alone": lambda path, payload: torch.save(payload, path),
    "among its values": lambda path, payload: torch.save(holding(payload), path),
    "for a norm": lambda path, payload: torch.save(holding(bn_metadata=[{"running_mean": payload}]), path),
    "as its state": lambda path, payload: torch.save(holding(__setstate__=payload), path),
    "as its argument": lambda path, payload: torch.save(Called(SelectivePeftSummary, payload), path),
    "in the old format of torch": lambda path, payload: torch.save(holding(payload), path,
                                                                   _use_new_zipfile_serialization=False),
    "in a plain pickle": lambda path, payload: path.write_bytes(pickle.dumps(holding(payload))),
}


@pytest.mark.parametrize("write", SUMMARIES.values(), ids=SUMMARIES)
def test_a_summary_of_the_public_package(write: Callable[[Path, Payload], object], sentinel: Path,
                                         tmp_path: Path) -> None:
    with under_its_name():
        write(tmp_path / "summary.pt", Payload(sentinel))
    with pytest.raises(InputError, match="nothing of it was run"):
        load_summary_from_disk(tmp_path / "summary.pt")


# ---------------------------------------------------------------- text files


def tag(sentinel: Path) -> str:
    return f"lr: !!python/object/apply:builtins.exec [{json.dumps(code(sentinel))}]"


@pytest.mark.parametrize("line", ["{tag}", "lr: !!python/name:os.system ''", "lr: !!python/module:os ''",
                                  "? !!python/object/new:os.system [x]\n: 1", "lr: &x [{a: *x}]"])
def test_yaml(line: str, sentinel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(line.replace("{tag}", tag(sentinel)))
    assert cli.run(train_llm.main, LLMArgs, ["--config", str(tmp_path / "run.yaml"), "--output_dir",
                                             str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("query", ["exec(open({file!r}).read())", "__import__('runpy').run_path({file!r})",
                                   "('Ada', exec(open({file!r}).read()))"])
def test_a_story_that_is_code(query: str, sentinel: Path, small: list[str], tmp_path: Path,
                              capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evil.py").write_text(code(sentinel))
    shutil.copytree(small[1], tmp_path / "data")
    shutil.copy(tmp_path / "evil.py", tmp_path / "data" / "clutrr.py")
    rows = json.loads((tmp_path / "data" / "train.json").read_text())
    rows[0]["query"] = query.format(file=str(tmp_path / "evil.py"))
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows))
    assert cli.run(train_llm.main, LLMArgs, [*small, "--data_dir", str(tmp_path / "data"), "--output_dir",
                                             str(tmp_path / "out")]) == 2
    assert "query" in capsys.readouterr().err


# ---------------------------------------------------------------- the sources


FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "numpy.load", "np.load", "os.system",
             "yaml.unsafe_load", "yaml.full_load", "joblib.load", "dill.load"}


def calls(source: str) -> list[tuple[str, ast.Call]]:
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


def offences(source: str) -> list[str]:
    """Calls that could run what is in a file."""
    found = []
    for name, node in calls(source):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        is_loose_yaml = name == "yaml.load" and given.get("Loader") != "_TextLoader"
        is_loose_torch = name == "torch.load" and given.get("weights_only") != "True"
        is_loose = is_loose_yaml or is_loose_torch or given.get("shell") == "True"
        if name in FORBIDDEN or is_loose or "trust_remote_code" in given:
            found.append(name)
    return found


def test_no_source_calls_what_runs_code() -> None:
    files = [*CHECKOUT.glob("*.py"), *(CHECKOUT / "stt").rglob("*.py"), *(CHECKOUT / "util").rglob("*.py")]
    assert len(files) > 60
    assert {str(path): found for path in files if (found := offences(path.read_text(encoding="utf-8")))} == {}
    bad = "torch.load(x, weights_only=False)\ntorch.load(x)\nyaml.load(f, Loader=yaml.Loader)\neval(x)\n" \
          "AutoModel.from_pretrained(x, trust_remote_code=True)\nsubprocess.run(x, shell=True)"
    assert len(offences(bad)) == 6
    assert offences("torch.load(x, weights_only=True)") == []
