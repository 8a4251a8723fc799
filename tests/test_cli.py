"""Command lines: what is accepted, what it becomes, and the one sentence for everything else."""
from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import fake_run
import pytest
from flags_read import fields_read
from scripts_loader import load_script
from tyro.conf import arg

from stt import arguments, comparison, modes, plots, surgery, verbs
from stt.arguments import resolve_model
from stt.cli import read_args, run
from stt.errors import InputError, TrainingFailed
from stt.llm_arguments import LLMArgs, resolved

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Kitchen:
    """Bakes bread."""

    flour: Annotated[str, arg(aliases=("--grain",))] = "rye"
    """kind of flour"""
    heat: float | None = None
    """degrees"""
    loaves: int = 2
    """how many"""
    crust: Literal["thin", "thick"] = "thin"
    """how much crust"""
    salt: bool = False
    """with salt"""
    steam: bool | None = None
    """with steam; None = as the flour needs"""

    def __post_init__(self) -> None:
        if self.loaves < 1:
            raise InputError(f"loaves must be 1 or more, got {self.loaves}")


@pytest.mark.parametrize(("line", "expected"), [
    ("", {}),
    ("--flour wheat --heat 1e-3", {"flour": "wheat", "heat": 1e-3}),
    ("--grain=wheat --heat -2.5", {"flour": "wheat", "heat": -2.5}),
    ("--salt --steam", {"salt": True, "steam": True}),
    ("--no_salt --no-steam", {"salt": False, "steam": False}),
    ("--loaves 3 --loaves 4", {"loaves": 4}),
    ("--heat None", {"heat": None}),
])
def test_flags(line, expected):
    assert read_args(Kitchen, line.split()) == Kitchen(**expected)


@pytest.mark.parametrize(("line", "sentence"), [
    ("--flower wheat", r"unknown flag '--flower'; did you mean --flour\?"),
    ("--no_flour", "unknown flag '--no_flour'"),
    ("-heat 3", r"unknown flag '-heat'; did you mean --heat\?"),
    ("--heat warm", "--heat must be a number, got 'warm'"),
    ("--loaves 1.5", "--loaves must be a whole number, got '1.5'"),
    ("--loaves", "--loaves needs a value: a whole number"),
    ("--heat --salt", "--heat needs a value: a number"),
    ("--crust thn", "unknown --crust 'thn'. Did you mean 'thin'?"),
    ("--crust THICK", "unknown --crust 'THICK'. Did you mean 'thick'?"),
    ("--salt yes", "--salt is a switch and takes no value"),
    ("--steam=true", "--steam is a switch and takes no value"),
    ("wheat", "unexpected argument 'wheat'"),
    ("--loaves 0", "^loaves must be 1 or more, got 0$"),
    ("--config", "--config needs a value"),
    ("--config a.yaml --config=b.yaml", "--config is given twice"),
    ("--config nowhere.yaml", "no config file 'nowhere.yaml'"),
])
def test_mistakes_get_one_sentence(line, sentence, capsys):
    with pytest.raises(InputError, match=sentence):
        read_args(Kitchen, line.split())
    assert run(lambda args: None, Kitchen, line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("text", "expected"), [
    ("", {}),
    ("heat: 1e-5\nloaves: 007", {"heat": 1e-5, "loaves": 7}),       # plain YAML reads 1e-5 as text, 007 as octal
    ("flour: on\nsalt: on", {"flour": "on", "salt": True}),          # plain YAML reads both as True
    ("grain: '1'\nheat: null\nsteam: no", {"flour": "1", "heat": None, "steam": False}),
    ("no-such: 1", "unknown flag in .*: 'no-such'"),
    ("flours: rye", r"Did you mean 'flour'\?"),
    ("heat: 1\nheat: 2", "'heat' is given twice"),
    ("flour: rye\ngrain: rye", "gives flour twice"),
    ("loaves: 1.5", "loaves must be a whole number, got '1.5'"),
    ("salt: maybe", "salt must be true or false, got 'maybe'"),
    ("crust: thn", r"Did you mean 'thin'\?"),
    ("loaves: 0", "loaves must be 1 or more, got 0"),
    ("flour: [rye, wheat]", "flour must be one value, got a list"),
    ("flour: {kind: rye}", "flour must be one value, got a dict"),
    ("- flour", "must hold one `flag: value` per line"),
    ("a: b: c", "is not a YAML file"),
    ("flour: !!python/object/apply:os.system ['touch evil']", "line 1: the tag .*os.system means nothing here"),
])
def test_config_file(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bread.yaml").write_text(text)
    if isinstance(expected, dict):
        assert read_args(Kitchen, ["--config", "bread.yaml"]) == Kitchen(**expected)
    else:
        with pytest.raises(InputError, match=expected):
            read_args(Kitchen, ["--config=bread.yaml"])
    assert not (tmp_path / "evil").exists()


def test_config_file_that_is_not_text(tmp_path):
    (tmp_path / "bread.yaml").write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(InputError, match="is not a YAML file"):
        read_args(Kitchen, ["--config", str(tmp_path / "bread.yaml")])


def test_command_line_overrides_config(tmp_path):
    (tmp_path / "bread.yaml").write_text("flour: wheat\nloaves: 5\nsalt: true\nsteam: true")
    given = read_args(Kitchen, ["--loaves", "6", "--no_salt", "--config", str(tmp_path / "bread.yaml"), "--no_steam"])
    assert given == Kitchen(flour="wheat", loaves=6, salt=False, steam=False)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        read_args(LLMArgs, ["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    for field in dataclasses.fields(LLMArgs):
        assert f"--{field.name}" in text
    assert "--config FILE" in text


@pytest.mark.parametrize(("outcome", "code"), [
    (None, 0), (75, 75), (InputError("no"), 2), (TrainingFailed("loss is nan"), 3), (KeyboardInterrupt(), 130)])
def test_exit_codes(outcome, code, capsys):
    def main(args: Kitchen) -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    assert run(main, Kitchen, []) == code
    assert bool(capsys.readouterr().err) == isinstance(outcome, BaseException)


def test_other_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run(lambda args: 1 // 0, Kitchen, [])


# ---------------------------------------------------------------- train_llm.py's flags


PUBLISHED = [  # the published command lines: flag and value, what it sets
    ("--model qwen7", "model", "qwen7"), ("--task boolq", "task", "boolq"), ("--dataset arc-e", "task", "arc-e"),
    ("--mode stt_lora", "mode", "stt_lora"), ("--apply_chat_template", "apply_chat_template", True),
    ("--lr 1e-5", "lr", 1e-5), ("--learning_rate 1e-5", "lr", 1e-5), ("--wd 0.1", "wd", 0.1),
    ("--train_batch 4", "train_batch", 4), ("--batch_size 4", "train_batch", 4), ("--eval_batch 8", "eval_batch", 8),
    ("--num_epoch 3", "num_epoch", 3), ("--num_epochs 3", "num_epoch", 3), ("--train_size 100", "train_size", 100),
    ("--gradient_accumulation_steps 2", "gradient_accumulation_steps", 2),
    ("--active_threshold -0.1", "active_threshold", -0.1), ("--threshold -0.1", "active_threshold", -0.1),
    ("--active_sample_ratio 0.01", "active_sample_ratio", 0.01), ("--sample_ratio 0.01", "active_sample_ratio", 0.01),
    ("--topk_ratio 0.1", "topk_ratio", 0.1), ("--lora_r 8", "lora_r", 8), ("--lora_alpha 16", "lora_alpha", 16),
    ("--lora_dropout 0", "lora_dropout", 0.0), ("--output_dir ./out", "output_dir", "./out"), ("--seed 1", "seed", 1),
    ("--use_wandb", "use_wandb", True), ("--wandb_project p", "wandb_project", "p"),
    ("--wandb_entity e", "wandb_entity", "e"), ("--wandb_run_name n", "wandb_run_name", "n"),
    ("--log_interval 5", "log_interval", 5), ("--schedule", "schedule", True), ("--tune_attn", "tune_attn", True),
    ("--dev_mode", "dev_mode", True)]


@pytest.mark.parametrize(("line", "name", "value"), PUBLISHED)
def test_published_flags(line, name, value):
    flag, *given = line.split()
    for spelling in (flag, flag.replace("_", "-")):
        assert getattr(read_args(LLMArgs, [spelling, *given]), name) == value


@pytest.mark.parametrize(("name", "value"), [
    ("topk_ratio", 0), ("topk_ratio", -1), ("topk_ratio", 1.5), ("topk_ratio", float("nan")), ("keep_ratio", 0),
    ("active_sample_ratio", 2), ("lr", 0), ("lr", float("inf")), ("lr", float("nan")), ("wd", -0.1),
    ("num_epoch", 0), ("train_batch", 0), ("eval_batch", 0), ("gradient_accumulation_steps", 0), ("lora_r", 0),
    ("lora_alpha", 0), ("lora_dropout", 1), ("lora_dropout", -0.1), ("warmup_ratio", 1), ("max_grad_norm", -1),
    ("max_length", 1), ("train_size", -1), ("seed", -1), ("log_interval", 0), ("active_threshold", float("nan")),
    ("multiple_of", 0)])
def test_numbers_out_of_range(name, value, capsys):
    with pytest.raises(InputError, match=f"^{name} must be .*, got {value}$"):
        LLMArgs(**{name: value})
    assert run(lambda args: None, LLMArgs, [f"--{name}", str(value)]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(("given", "sentence"), [
    ({"mode": "sst"}, "unknown mode 'sst'. Did you mean 'stt'"), ({"head": "thaw"}, "unknown head 'thaw'"),
    ({"precision": "fp8"}, "unknown precision 'fp8'"), ({"partial": "yes"}, "unknown partial 'yes'"),
    ({"resume": True, "overwrite": True}, "give one of them"), ({"run_name": "a/b"}, "one folder name"),
    ({"run_name": ""}, "run_name must not be empty"), ({"output_dir": ""}, "output_dir must not be empty"),
    ({"run_name": ".."}, "one folder name"), ({"select_best": True, "eval_epochs": False}, "needs eval_epochs"),
    ({"eval_restored": True, "mode": "lora"}, "mode 'lora' removes none"), ({"width": "wide"}, "width must be free"),
    ({"width": "uniform", "mode": "lora"}, "keeps all"), ({"multiple_of": 8, "mode": "baseline"}, "keeps all")])
def test_conflicts(given, sentence):
    with pytest.raises(InputError, match=sentence):
        LLMArgs(**given)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A checkout with a model in it, seen from a working directory elsewhere."""
    model = tmp_path / "checkout" / "models" / "stt-tiny"
    model.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(arguments, "CHECKOUT", tmp_path / "checkout")
    monkeypatch.setattr(arguments, "SHIPPED_MODELS", model.parent)
    return model


def test_resolved_fills_in_what_the_model_needs(shipped, caplog):
    caplog.set_level("INFO")
    args = resolved(LLMArgs())
    assert (args.model, args.lr, args.num_epoch, args.train_batch, args.schedule) == (str(shipped), 1e-3, 3, 32, True)
    assert args.ppl_text == str(shipped / "heldout.txt")
    assert args.run_name == "stt-tiny-clutrr-stt-top0.3-seed42"
    assert "lr 0.001" in caplog.text
    real = resolved(LLMArgs(model="qwen3"))
    found = (real.model, real.lr, real.num_epoch, real.train_batch, real.schedule)
    assert found == ("Qwen/Qwen2.5-3B", 1e-5, 10, 8, False)


def test_resolved_keeps_what_was_given(shipped):
    given = LLMArgs(task="clutrr", lr=0.5, num_epoch=1, train_batch=2, schedule=False, run_name="mine", score="wanda",
                    compensate="mean")
    assert resolved(given) == dataclasses.replace(given, model=str(shipped), ppl_text=str(shipped / "heldout.txt"))


def test_presets_fill_in_what_is_left_open(shipped):
    def chosen(**given):
        args = resolved(LLMArgs(**given))
        return args.score, args.compensate

    assert chosen() == (None, None)  # as published, and as every run that selects otherwise
    assert chosen(preset="best") == tuple(arguments.PRESETS["best"].values())
    assert chosen(preset="best", compensate="mean") == (arguments.PRESETS["best"]["score"], "mean")
    assert chosen(mode="stt_lora", score="wanda") == ("wanda", None)
    assert chosen(mode="random") == (None, None)


def test_run_names_differ(shipped):
    variants = [{}, {"preset": "best"}, {"score": "taylor"}, {"score": "mine:Taylor"}, {"compensate": "mean"},
                {"select_on": "answer"}, {"mode": "lora"}, {"topk_ratio": 0.1}, {"keep_ratio": 0.1},
                {"width": "uniform"}, {"width": "buckets:2"}, {"width": "buckets:3"}, {"multiple_of": 8},
                {"head": "freeze"}, {"seed": 1}, {"task": "boolq"}, {"model": "Qwen/Qwen2.5-3B"}]
    assert len({resolved(LLMArgs(**variant)).run_name for variant in variants}) == len(variants)


@pytest.mark.parametrize("name", ["models/none", "./none", "/none/at/all", "a/b/c"])
def test_missing_model_folder(name):
    with pytest.raises(InputError, match="no model folder"):
        resolve_model(name)


def test_model_that_is_a_file(tmp_path):
    (tmp_path / "weights").write_text("")
    with pytest.raises(InputError, match="no model folder"):
        resolve_model(str(tmp_path / "weights"))


def test_missing_perplexity_text(shipped):
    with pytest.raises(InputError, match="no text file 'none.txt'"):
        resolved(LLMArgs(ppl_text="none.txt"))


# ---------------------------------------------------------------- every flag is read, nothing heavy is imported


def test_no_dead_flag_in_train_llm():
    flags = ("arguments.py", "llm_arguments.py", "verbs.py")
    library = [source for source in (ROOT / "stt").rglob("*.py") if source.name not in flags]
    texts = [source.read_text(encoding="utf-8") for source in (ROOT / "train_llm.py", *library)]
    declared = {field.name for field in dataclasses.fields(LLMArgs)}
    assert declared - fields_read(texts) == set()


def test_what_counts_as_reading_a_flag():
    text = """
def main(args: LLMArgs): return lambda: args.lr + parser.args.wd
def other(args: TrainingArguments): return args.fp16
def third(args): return args.seed
def fourth(run: Run):
    args = run.args
    return args.wd
"""
    assert fields_read([text]) == {"lr", "wd"}


# ---------------------------------------------------------------- one list of names, wherever it is written


def test_modes_agree():
    assert set(get_args(arguments.Mode)) == set(modes.MODES) == set(load_script("compare_modes").MODES)
    assert set(get_args(arguments.AnyMode)) == modes.MODES.keys() | modes.IN_PLACE.keys() == plots.MODE_COLOURS.keys()


def test_head_policies_agree():
    assert set(get_args(arguments.Head)) == set(surgery.HEADS) == set(comparison.HEADS)


@pytest.mark.parametrize("verb", verbs.VERBS)
def test_no_dead_flag_in_verbs(verb):
    """Read by a function that is given the flags, or by a property of theirs."""
    cls, read = verbs.VERBS[verb][1], set()
    for source in (ROOT / "stt").glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
                read |= {name for each in node.body if isinstance(each, ast.FunctionDef) and each.decorator_list
                         for name in attributes_of("self", each)}
            elif isinstance(node, ast.FunctionDef) and f"args: {cls.__name__}" in map(ast.unparse, node.args.args):
                read |= attributes_of("args", node)
    assert {field.name for field in dataclasses.fields(cls)} - read == set()


def attributes_of(name: str, function: ast.FunctionDef) -> set[str]:
    return {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == name}


def test_help_imports_nothing_heavy():
    code = ("import sys, stt.verbs\nfrom stt.cli import read_args\nfrom stt.llm_arguments import LLMArgs\n"
            "stt.verbs.main(['--help'])\n"
            "try: read_args(LLMArgs, ['--help'])\n"
            "except SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'peft', 'datasets', 'wandb'} & set(sys.modules)\n"
            "sys.exit(f'imported {heavy}' if heavy else 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_closed_pipe_is_quiet(tmp_path):
    run_folder = fake_run.write(tmp_path / "run")
    for verb in (f"report {run_folder}", "report --help"):
        command = f"{sys.executable} -m stt {verb} | (exec <&-; sleep 0.1)"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert done.stderr == ""


# ---------------------------------------------------------------- the command `stt`


@pytest.mark.parametrize(("argv", "code", "expected"), [
    ([], 0, "stt report"), (["--help"], 0, "stt export"), (["repport"], 2, "Did you mean 'report'?"),
    (["report"], 2, "give the run folders to compare"), (["report", "none"], 2, "none is not a run folder"),
    (["report", "/no/such/run"], 2, "/no/such/run is not a run folder"),
    (["report", "none", "--out", "nowhere"], 2, "none is not a run folder"),
    (["sites"], 2, "MODEL"), (["sites", "./none"], 2, "no model folder './none'"),
    (["export", "d", "--to", "onnx", "--out", "o"], 2, "unknown --to 'onnx'"),
    (["export", "d", "--to", "hf"], 2, "--out"),
    (["export", "d", "--out", "o", "--for", "vlm"], 2, "unknown --for 'vlm'. Did you mean 'vllm'"),
    (["export", "d", "--out", "o", "--for", "awq", "--to", "dense"], 2, "leave one of them out"),
    (["export", "d", "--out", "o", "--for", "gguf", "--tp", "2"], 2, "goes with --for vllm and awq only"),
    (["export", "d", "--out", "o", "--for", "awq"], 2, "no sliced checkpoint at d")])
def test_stt_command(argv, code, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert verbs.main(argv) == code
    out, err = capsys.readouterr()
    assert expected in (err if code else out)
    assert not any(tmp_path.iterdir())


def test_stt_report_writes_table_and_figure(tmp_path, capsys):
    runs = [fake_run.write(tmp_path / f"run{seed}", seed=seed) for seed in (0, 1)]
    assert verbs.main(["report", *map(str, runs)]) == 0
    assert "| stt | 2 | 70.0 ± 0.0 % |" in capsys.readouterr().out
    assert (tmp_path / "comparison.md").read_text().startswith("### train_llm")
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_stt_report_that_cannot_be_written(tmp_path, capsys):
    run_folder = str(fake_run.write(tmp_path / "run"))
    (tmp_path / "out" / "comparison.png").mkdir(parents=True)  # nothing can be written in its place
    for out, sentence in (("nowhere", "no folder "), ("out", "cannot write to ")):
        assert verbs.main(["report", run_folder, "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {sentence}")
        assert str(tmp_path / out) in error
        assert error.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["comparison.png"]
