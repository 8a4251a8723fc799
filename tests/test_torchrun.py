"""A recipe started by torchrun is the run of one process with the same updates; and what the processes agree on."""
from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import classifying
import pytest
import torch
from safetensors.torch import load_file
from small_runs import results, run
from tiny_text import build_decoder
from two_processes import in_two

import stt
from stt import cli, recipe
from stt.arguments import CHECKOUT
from stt.errors import InputError, TrainingFailed
from stt.llm_arguments import LLMArgs
from stt.selection import Selection
from stt.sites import find_sites
from stt.trainers.callbacks import any_rank
from stt.trainers.checkpoints import fault, in_order, step_of
from stt.trainers.loop import check_same_selection
from util import ranks

FLAGS = ["--eval_batch", "3"]  # batches for both processes
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def torchrun(small: list[str], folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """train_llm.py in two processes of two examples each, in folder/run."""
    return subprocess.run(command("train_llm.py", small, folder, "2", *flags), capture_output=True, text=True,
                          env=ENVIRONMENT, timeout=280)


def command(script: str, data: list[str], folder: Path, batch: str, *flags: str) -> list[str | Path]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", CHECKOUT / script,
            *data, "--train_batch", batch, *FLAGS, "--output_dir", folder, "--run_name", "run", *flags]


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def check_same_run(found: Path, expected: Path) -> None:
    """All numbers of two runs but their times."""
    check_same_rows(found, expected)
    mine, theirs = results(found), results(expected)
    for name in ("accuracy", "parameters", "flops", "truncation"):
        assert mine[name] == theirs[name]
    assert mine["answer_loss"] == pytest.approx(theirs["answer_loss"], rel=1e-5)
    assert mine["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-5)
    chosen, other = (Selection.load(folder / "run" / recipe.SELECTION) for folder in (found, expected))
    assert chosen == other
    assert chosen.meta["calibration"] == other.meta["calibration"]  # digest and number of the examples, tokens
    assert (found / "run/outputs.json").read_text() == (expected / "run/outputs.json").read_text()
    check_weights(found / "run/checkpoint", expected / "run/checkpoint")


def check_same_rows(found: Path, expected: Path) -> None:
    for row, other in zip(rows(found), rows(expected), strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"seconds"}:
            assert row[name] == pytest.approx(other[name], rel=1e-5), (row, other)


def check_weights(found: Path, expected: Path) -> None:
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def one(small, tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    assert run(small, folder, *FLAGS) == 0
    return folder


def of_two_examples(rank: int, small: list[str], folder: Path, flags: Sequence[str] = ()) -> int:
    """The exit code of one of two processes, as torchrun's."""
    return run(small, folder, *FLAGS, "--train_batch", "2", *flags)


@pytest.fixture(scope="module")
def two(small, tmp_path_factory) -> Path:
    """That of two processes."""
    folder = tmp_path_factory.mktemp("two")
    assert in_two(of_two_examples, tmp_path_factory.mktemp("said"), small, folder) == (0, 0)
    return folder


def test_two_processes_are_as_one(one, two):
    check_same_run(two, one)
    assert (results(two)["processes"], results(one)["processes"]) == (2, 1)


@pytest.mark.slow
def test_torchrun_itself(two, small, tmp_path):
    """The processes it starts are those of the other tests, and one of them speaks."""
    done = torchrun(small, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    assert done.stderr.count("step 12  ") == 2  # a row of training and one of validation
    assert (tmp_path / "run/checkpoint/model.safetensors").read_bytes() == \
        (two / "run/checkpoint/model.safetensors").read_bytes()


def unfinished(folder: Path, after: Path) -> Path:
    """A copy of a run as it was after six of its twelve steps."""
    shutil.copytree(folder, after)
    shutil.rmtree(after / "run" / "checkpoint-12")
    (after / "run" / "results.json").unlink()
    return after


def test_one_process_goes_on_where_two_were(one, two, small, tmp_path, caplog):
    assert run(small, unfinished(two, tmp_path / "as_large"), *FLAGS, "--resume") == 0  # updates of 4, as before
    check_same_run(tmp_path / "as_large", one)
    assert "an update was made of" not in caplog.text
    half = unfinished(two, tmp_path / "half")
    assert run(small, half, *FLAGS, "--train_batch", "2", "--resume") == 0
    assert "an update was made of 4 examples, and is of 2 with 1 processes now" in caplog.text


def test_a_flag_that_changes_the_update_is_refused(two, small, tmp_path, capsys):
    assert run(small, unfinished(two, tmp_path / "copy"), *FLAGS, "--train_batch", "8", "--resume") == 2
    assert "was started with train_batch 2, now it is 8" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_go_on_where_two_or_one_were(one, two, small, tmp_path):
    again = unfinished(two, tmp_path / "again")
    assert torchrun(small, again, "--resume").returncode == 0
    assert (again / "run/checkpoint/model.safetensors").read_bytes() == \
        (two / "run/checkpoint/model.safetensors").read_bytes()
    assert torchrun(small, unfinished(one, tmp_path / "more"), "--resume").returncode == 0
    check_same_run(tmp_path / "more", one)


WAYS = [["--pack"], ["--distill", "kl"], ["--group_by_length"], ["--activation_checkpointing"]]


@pytest.mark.parametrize("flags", [sum(WAYS, []), *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS)],
                         ids=" ".join)
def test_ways_to_train(flags, small, tmp_path):
    """The same updates by packed rows of two examples, by a teacher in each process, in batches of one length, and from
    activations that are computed twice."""
    flags = ["--num_epoch", "1", "--no_eval_epochs", *flags]
    assert run(small, tmp_path / "one", *FLAGS, *flags) == 0
    assert in_two(of_two_examples, tmp_path, small, tmp_path / "two", flags) == (0, 0)
    check_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--lr", "-1"], ["--data_dir", "/none"]], ids=" ".join)
def test_bad_input_ends_every_process_with_one_sentence(flags, small, tmp_path):
    done = torchrun(small, tmp_path, *flags)
    assert done.stderr.count("error: ") == 1
    assert done.stderr.count("exitcode  : 2") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(small, tmp_path):
    with subprocess.Popen(command("train_llm.py", small, tmp_path, "2", "--num_epoch", "400", "--no_eval_epochs"),
                          env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as started:
        while not ((tmp_path / "run" / "metrics.jsonl").exists() and len(rows(tmp_path)) > 3):
            time.sleep(0.05)
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if "train_llm" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGUSR1)
        stderr = started.communicate(timeout=120)[1]
    assert stderr.count("exitcode  : 75") == 2, stderr
    assert stderr.count("stopped by another process: the same command with --resume goes on") == 1
    assert (tmp_path / "run" / "STOPPED").is_file()
    newest = in_order(tmp_path / "run")[-1]
    assert fault(newest) is None
    assert step_of(newest) == rows(tmp_path)[-1]["step"]


@pytest.mark.slow
@pytest.mark.parametrize("build", ["vit", "bert"])
def test_classifiers_too(build, tmp_path):
    small = classifying.small_pictures if build == "vit" else classifying.small_texts
    data = [*small(tmp_path), "--model", str(classifying.build(build, tmp_path)), "--disable_dropout", "--train_size",
            "16"]  # whole updates of eight
    assert classifying.run(data, tmp_path / "one", *FLAGS) == 0
    subprocess.run(command("train_classifier.py", data, tmp_path / "two", "4"), check=True, env=ENVIRONMENT)
    check_same_rows(tmp_path / "two", tmp_path / "one")
    one, two = (Selection.load(tmp_path / name / "run" / recipe.SELECTION) for name in ("one", "two"))
    assert one == two
    check_weights(tmp_path / "two/run/checkpoint", tmp_path / "one/run/checkpoint")
    assert classifying.results(tmp_path / "two")["metrics"] == classifying.results(tmp_path / "one")["metrics"]


# ---------------------------------------------------------------- what the processes agree on


def raised(work: Callable[[], object]) -> str:
    """What it raises, in words."""
    try:
        return f"nothing, but {work()!r}"
    except (InputError, TrainingFailed, OSError) as error:
        return f"{type(error).__name__}: {error}"


def fail_if(claim: bool, error: Exception) -> str:
    if claim:
        raise error
    return "done"


def together_if(claim: bool) -> None:
    with ranks.together():
        fail_if(claim, InputError("a file is missing"))


def sliced_by(start: int) -> torch.nn.Module:
    model = build_decoder(vocabulary=60)
    stt.apply(model, Selection({name: torch.arange(start, start + 4) for name in find_sites(model)}))
    return model


@dataclass(frozen=True)
class NoArgs:
    """Nothing to say."""


def said(main: Callable[[NoArgs], int]) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        return cli.run(main, NoArgs, []), stderr.getvalue()


def agreed(rank: int) -> dict[str, object]:
    ranks.LAST_WORDS = timedelta(seconds=2)
    args = replace(LLMArgs(), use_wandb=True)
    return {
        "who": (ranks.rank(), ranks.world(), ranks.is_first()),
        "gathered": ranks.gather(f"of {rank}"),
        "broadcast": ranks.broadcast(f"of {rank}"),
        "shared out": ranks.shared_out([1, 2, 3], lambda n: (n, rank), "work"),
        "batches": [recipe.batches_of(list(range(n)), 4, list) for n in (20, 5, 2)],
        "on first": ranks.on_first(lambda: f"of {rank}"),
        "first fails": raised(lambda: ranks.on_first(lambda: fail_if(rank == 0, TrainingFailed("disk full")))),
        "second fails": raised(lambda: together_if(rank == 1)),
        "nobody fails": raised(lambda: together_if(False)),
        "same": raised(lambda: check_same_selection(sliced_by(0))),
        "different": raised(lambda: check_same_selection(sliced_by(rank))),
        "any": [any_rank(rank == 1, torch.device("cpu")), any_rank(False, torch.device("cpu"))],
        "sink": type(recipe.wandb(args)).__name__ if rank else "not asked",
        "all end": said(lambda _: fail_if(True, InputError("no such task"))),
        "one ends": said(lambda _: fail_if(rank == 1, InputError("no such node")) and 0),
    }


def test_what_processes_agree_on(tmp_path):
    first, second = in_two(agreed, tmp_path)
    assert (first["who"], second["who"]) == ((0, 2, True), (1, 2, False))
    assert (first["batches"], second["batches"]) == (
        [[[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]], [[0, 1], [4]], [[0]]],
        [[[4, 5, 6, 7], [12, 13, 14, 15]], [[2, 3]], [[1]]])
    assert second["sink"] == "NoSink"
    for found in (first, second):
        assert found["any"] == [True, False]
        assert found["gathered"] == ["of 0", "of 1"]
        assert found["broadcast"] == found["on first"] == "of 0"
        assert found["shared out"] == [(1, 0), (2, 1), (3, 0)]
        assert found["first fails"] == "TrainingFailed: disk full"
        assert found["second fails"] == "InputError: a file is missing"
        assert found["nobody fails"] == found["same"] == "nothing, but None"
        assert found["different"].startswith("InputError: the processes have models with different selections")
    assert (first["all end"], second["all end"]) == ((2, "error: no such task\n"), (2, ""))
    assert (first["one ends"], second["one ends"]) == ((0, ""), (2, "error: no such node\n"))


def test_alone_nothing_is_asked():
    assert (ranks.rank(), ranks.world(), ranks.is_first(), ranks.speaks()) == (0, 1, True, True)
    assert ranks.gather(3) == [3]
    assert ranks.broadcast(3) == ranks.on_first(lambda: 3) == 3
    assert ranks.shared_out([1, 2], lambda n: 2 * n, "work") == [2, 4]
    assert raised(lambda: ranks.on_first(lambda: fail_if(True, OSError("full")))) == "OSError: full"
    assert raised(lambda: together_if(True)) == "InputError: a file is missing"
