"""Grids, runs of a grid one at a time and together, their records, tables and figures; on a recipe of seconds."""
from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweep_recipe
import yaml

from stt import cli, verbs
from stt.errors import InputError
from util import grid as grids
from util import sweep, sweep_local, sweep_table
from util.grid import read_grid

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(__file__).with_name("sweep_recipe.py")
GRIDS = sorted((ROOT / "scripts" / "grids").glob("*.yaml"))
JOBS = ("test_llm", "analyze_llm", "image_exp", "text_exp")


def given(folder: Path, **changes: object) -> dict[str, object]:
    """A grid of eight runs: 2 modes x 2 step sizes x 2 seeds."""
    return {"question": "Does it work?", "command": str(RECIPE), "minutes": 2, "output_dir": str(folder / "out"),
            "fixed": {"steps": 3}, "axes": {"mode": ["stt", "random"], "lr": [0.1, 0.2], "seed": [0, 1]}} | changes


def written(folder: Path, **changes: object) -> str:
    """The path of that grid as a file; a key changed to None is left out."""
    path = folder / "grid.yaml"
    content = {key: value for key, value in given(folder, **changes).items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def task(path: str, *flags: str) -> int:
    """The exit code of `python util/sweep.py GRID FLAGS`."""
    return cli.run(sweep.main, sweep.TaskArgs, [path, *flags])


def started(*command: str, **variables: str) -> subprocess.Popen[bytes]:
    """A program of ours in the background, in a process group of its own."""
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env=os.environ | {"PYTHONPATH": str(ROOT)} | variables, process_group=0)


def eventually(is_true: object, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until, "it did not become true in time"
        time.sleep(0.02)


def results(run: grids.Run) -> dict[str, object]:
    return json.loads((run.folder / "results.json").read_text())


def states(path: str) -> list[str]:
    return [sweep.Record(run).state() for run in read_grid(path).runs]


# ---------------------------------------------------------------- grid files


def test_runs_are_the_product_of_the_axes_the_last_one_fastest(tmp_path):
    grid = read_grid(written(tmp_path))
    expected = list(itertools.product(["stt", "random"], [0.1, 0.2], [0, 1]))
    assert [(run.flags["mode"], run.flags["lr"], run.flags["seed"]) for run in grid.runs] == expected
    assert [run.index for run in grid.runs] == list(range(8))
    assert all(run.flags["steps"] == 3 for run in grid.runs)
    assert grid.array_range == "0-7"


def test_values_that_vary_together(tmp_path):
    axes = {"method": [{"mode": "stt", "schedule": "true"}, {"mode": "random"}], "seed": [0, 1]}
    grid = read_grid(written(tmp_path, axes=axes))
    assert [run.flags for run in grid.runs] == [
        {"steps": 3, "mode": "stt", "schedule": True, "seed": 0}, {"steps": 3, "mode": "stt", "schedule": True, "seed": 1},
        {"steps": 3, "mode": "random", "seed": 0}, {"steps": 3, "mode": "random", "seed": 1}]
    assert grid.axes == ("mode", "schedule", "seed")


def test_skip_rules(tmp_path):
    skip = [{"mode": "random", "lr": [0.1, "2e-1"], "seed": 1}, {"mode": "stt", "lr": 0.2}]
    grid = read_grid(written(tmp_path, skip=skip))
    assert [(run.flags["mode"], run.flags["lr"], run.flags["seed"]) for run in grid.runs] == [
        ("stt", 0.1, 0), ("stt", 0.1, 1), ("random", 0.1, 0), ("random", 0.2, 0)]
    assert [run.index for run in grid.runs] == [0, 1, 2, 3]


def test_commands_are_what_the_recipe_reads(tmp_path):
    fixed = {"learning_rate": "1e-1", "schedule": False, "note": "a b; c", "steps": 3}
    grid = read_grid(written(tmp_path, fixed=fixed, axes={"seed": [7], "mode": ["stt"]}))
    args = cli.read_args(sweep_recipe.SmallArgs, grid.runs[0].command()[1:])
    assert (args.lr, args.schedule, args.note, args.seed) == (0.1, False, "a b; c", 7)
    assert Path(args.output_dir) / args.run_name == grid.runs[0].folder
    assert "--note 'a b; c' " in grid.runs[0].shown()


MISTAKES = [
    ({"qestion": "?"}, "unknown key in .*'qestion'. Did you mean 'question'"),
    ({"question": None}, "has no question; a grid needs question, command, minutes, axes"),
    ({"axes": None}, "has no axes"),
    ({"question": ["a"]}, "question must be one value, got a list"),
    ({"minutes": "soon"}, "minutes .* must be a number above 0, got 'soon'"),
    ({"minutes": -1}, "got '-1'"),
    ({"command": "train.py"}, "no recipe 'train.py'; command is a program of this checkout .*train_llm.py"),
    ({"command": str(Path(__file__).with_name("fake_run.py"))}, "fake_run.py is no recipe"),
    ({"axes": {"seed": []}}, r"axis seed must be a list of one or more values, got \[\]"),
    ({"axes": {"seed": 1}}, "axis seed must be a list of one or more values, got '1'"),
    ({"axes": ["seed"]}, "axes must hold one `flag:"),
    ({"axes": {"sead": [1]}}, "unknown flag in .*axes: 'sead'. Did you mean 'seed'"),
    ({"axes": {"seed": ["one"]}}, "axes: seed must be a whole number, got 'one'"),
    ({"axes": {"mode": ["sst"]}}, "'sst'. Did you mean 'stt'"),
    ({"axes": {"mode": ["stt", {"mode": "random"}]}}, "mode must be one value, got a dict"),
    ({"axes": {"seed": [1, 1]}}, "runs 0 and 1 are the same"),
    ({"axes": {"seed": [1], "steps": [3, 4]}}, "steps is given by fixed and again by the axis steps"),
    ({"axes": {"lr": [1], "learning_rate": [2]}}, "lr is given by the axis lr and again by the axis learning_rate"),
    ({"fixed": {"lr": 1, "learning_rate": 2}}, "fixed gives lr twice"),
    ({"fixed": {"lr": {"a": 1}}}, "fixed: lr must be one value, got a dict"),
    ({"fixed": {"run_name": "x"}}, "fixed gives run_name, which the sweep gives every run itself"),
    ({"fixed": {"output_dir": "x"}}, "output_dir is a key of the grid"),
    ({"axes": {"resume": ["true"]}}, "gives resume"),
    ({"skip": [{"mode": "stt", "lr": 9}]}, "skip rule mode .*stt.*, lr .* matches no run"),
    ({"skip": [{"mode": ["stt", "random"]}]}, "the skip rules leave no run"),
    ({"skip": {"mode": "stt"}}, "skip must be a list of rules"),
    ({"skip": [{"sead": 1}]}, "unknown flag in .*skip: 'sead'"),
    ({"fixed": {"schedule": True}}, "run 4 .*mode random.*schedule does not go with mode 'random'"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_are_one_sentence_and_write_nothing(tmp_path, capsys, changes, message):
    path = written(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        read_grid(path)
    assert verbs.main(["sweep", "run", path]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "message"), [
    ("seed: 1\nseed: 2\n", "'seed' is given twice"), ("- a\n", "must hold the keys of a grid"), ("a: [", "not a YAML file"),
    ("", "has no question"), ("!!python/object:os.system {}", "must hold the keys|has no question|not a YAML")])
def test_files_that_are_no_grids(tmp_path, text, message):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_grid(str(path))


def test_no_grid_file():
    with pytest.raises(InputError, match="no grid file 'nowhere.yaml'"):
        read_grid("nowhere.yaml")


# ---------------------------------------------------------------- run folders


def test_folders_are_readable_and_of_the_run_alone(tmp_path):
    """Not of the order of the flags, their spelling, where they stand, what else is in the grid, or W&B."""
    grid = read_grid(written(tmp_path))
    run = next(run for run in grid.runs if (run.flags["mode"], run.flags["lr"], run.flags["seed"]) == ("stt", 0.2, 1))
    assert run.folder.name.startswith("stt-seed1-")
    other = read_grid(written(tmp_path, fixed={"learning_rate": "2e-1", "mode": "stt", "use_wandb": "true"},
                              axes={"seed": [5, 1], "steps": [9, 3]}))
    twin = next(run for run in other.runs if (run.flags["seed"], run.flags["steps"]) == (1, 3))
    assert twin.folder == run.folder
    assert len({each.folder for each in (*grid.runs, *other.runs)}) == 8 + 4 - 1


def test_folders_hold_no_odd_characters():
    flags = {"model": "/data/My Models/../q wen!", "task": "a:b", "seed": 0}
    assert grids.folder_name(Path("x.py"), flags).startswith("q_wen_-a_b-seed0-")
    assert grids.folder_name(Path("x.py"), {"model": "..", "seed": 0}).startswith("-seed0-")


def test_another_recipe_is_another_run():
    assert grids.folder_name(Path("a.py"), {"seed": 1}) != grids.folder_name(Path("b.py"), {"seed": 1})


def test_a_record_of_other_flags_is_refused(tmp_path, capsys):
    path = written(tmp_path)
    run = read_grid(path).runs[0]
    record = sweep.Record(run)
    record.path.parent.mkdir(parents=True)
    record.path.write_text(json.dumps({"flags": {"seed": 99}, "attempts": []}))
    assert task(path, "--run", "0") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "belongs to a run with other flags" in error


# ---------------------------------------------------------------- one run at a time


def test_questions_about_a_grid(tmp_path, capsys):
    path = written(tmp_path)
    for flags, code, out, error in (
            (["--count"], 0, "0-7\n", ""), (["--show", "3"], 0, read_grid(path).runs[3].shown() + "\n", ""),
            (["--run", "8"], 2, "", f"error: run 8, but {path} has 8 runs: 0 to 7\n"),
            (["--run", "-1"], 2, "", f"error: run -1, but {path} has 8 runs: 0 to 7\n"),
            (["--run", "1", "--count"], 2, "", "error: give one of --count, --show NUMBER and --run NUMBER\n")):
        assert task(path, *flags) == code
        assert capsys.readouterr() == (out, error)
    assert not (tmp_path / "out").exists()


def test_it_is_a_program(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "util" / "sweep.py"), written(tmp_path), "--count"],
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0-7\n", "")


def test_a_finished_run_ends_at_once(tmp_path):
    path = written(tmp_path)
    run = read_grid(path).runs[2]
    assert task(path, "--run", "2") == 0
    before = (run.folder / "results.json").stat().st_mtime_ns
    assert task(path, "--run", "2") == 0
    assert (run.folder / "results.json").stat().st_mtime_ns == before
    assert len(sweep.Record(run).read()["attempts"]) == 1


@pytest.mark.parametrize(("how", "code", "state"), [("input", 2, "failed"), ("training", 3, "failed"),
                                                    ("silently", 3, "failed"), ("killed", 137, "partial")])
def test_the_exit_code_is_the_runs(tmp_path, how, code, state):
    path = written(tmp_path, fixed={"fails": how})
    assert task(path, "--run", "0") == code
    assert states(path) == [state] + ["waiting"] * 7


def test_stopped_runs_go_on_to_the_same_result(tmp_path):
    """Asked to stop again and again, by each signal in turn: the same numbers as without."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole, stopped = (written(tmp_path / name, fixed={"steps": 12, "step_seconds": 0.05}) for name in ("whole", "stopped"))
    assert task(whole, "--run", "5") == 0
    run = read_grid(stopped).runs[5]
    saved = run.folder / "checkpoint-1" / "state.json"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        step = json.loads(saved.read_text())["step"] if saved.exists() else 0
        process = started(str(ROOT / "util" / "sweep.py"), stopped, "--run", "5")
        eventually(lambda step=step: saved.exists() and json.loads(saved.read_text())["step"] > step + 1)
        process.send_signal(number)
        assert process.wait(20) == 75
        assert sweep.Record(run).state() == "partial"
    assert task(stopped, "--run", "5") == 0
    assert results(run)["sha"] == results(read_grid(whole).runs[5])["sha"]
    assert [attempt["exit_code"] for attempt in sweep.Record(run).read()["attempts"]] == [75, 75, 0]


def test_a_run_that_runs_is_not_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "PATIENCE", 0.2)
    path = written(tmp_path, fixed={"steps": 1000, "step_seconds": 0.05})
    run = read_grid(path).runs[0]
    process = started(str(ROOT / "util" / "sweep.py"), path, "--run", "0")
    try:
        eventually(lambda: (run.folder / "checkpoint-1").exists())
        assert states(path)[0] == "running"
        with pytest.raises(InputError, match="is running already"):
            sweep.attempt(run, sweep.Children())
        process.kill()  # the run itself goes on, and keeps the lock
        process.wait(20)
        assert states(path)[0] == "running"
    finally:
        os.kill(int((run.folder / "pid").read_text()), signal.SIGTERM)
    eventually(lambda: states(path)[0] == "partial")


# ---------------------------------------------------------------- all of them on one machine


def local(path: str, *flags: str) -> int:
    return verbs.main(["sweep", "run", path, *flags])


def test_all_runs_some_at_a_time(tmp_path, caplog):
    path = written(tmp_path)
    assert local(path, "--jobs", "3") == 0
    runs = read_grid(path).runs
    assert states(path) == ["done"] * 8
    assert len({results(run)["sha"] for run in runs}) == 8
    written_at = [(run.folder / "results.json").stat().st_mtime_ns for run in runs]
    assert local(path) == 0
    assert [(run.folder / "results.json").stat().st_mtime_ns for run in runs] == written_at
    assert "8 done; 0 to run" in caplog.text


def test_each_job_has_a_gpu_and_its_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert sweep_local.environments(3) == [{"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpu} for gpu in "464"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert sweep_local.environments(1) == [{"OMP_NUM_THREADS": "5"}]


def test_failed_runs_are_kept_apart_and_tried_again_only_when_asked(tmp_path, caplog):
    path = written(tmp_path, axes={"fails": ["never", "training", "killed"]})
    runs = read_grid(path).runs
    assert local(path, "--jobs", "2") == 3
    assert states(path) == ["done", "failed", "partial"]
    assert f"failed 1: exit code 3, {runs[1].folder}: error: the loss became NaN." in caplog.text
    assert f"partial 2: ended by SIGKILL, {runs[2].folder}" in caplog.text
    assert local(path) == 3
    assert [len(sweep.Record(run).read()["attempts"]) for run in runs] == [1, 1, 2]
    assert states(path) == ["done", "failed", "done"]
    assert local(path, "--retry_failed") == 0
    assert states(path) == ["done"] * 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stopped_sweep_goes_on(tmp_path, number, code):
    """Ctrl-C: both running children save and end, the third is not started; the next sweep goes on with all three."""
    path = written(tmp_path, fixed={"steps": 30, "step_seconds": 0.05}, axes={"seed": [0, 1, 2]})
    runs = read_grid(path).runs
    process = started("-m", "stt", "sweep", "run", path, "--jobs", "2")
    eventually(lambda: all((run.folder / "checkpoint-1" / "state.json").exists() for run in runs[:2]))
    process.send_signal(number)
    assert process.wait(20) == code
    assert states(path) == ["partial", "partial", "waiting"]
    assert local(path, "--jobs", "2") == 0
    assert [len(sweep.Record(run).read()["attempts"]) for run in runs] == [2, 2, 1]
    assert len({results(run)["sha"] for run in runs}) == 3


# ---------------------------------------------------------------- W&B


FAKE_WANDB = """
import json, os

class Error(Exception):
    pass

class Settings(dict):
    pass

class Run:
    def log(self, row):
        pass

    def finish(self):
        pass

def init(name, mode, **_):
    if mode is None:
        raise Error("no network")
    with open(os.environ["SEEN"], "a") as file:
        file.write(json.dumps([name, mode, os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]]) + "\\n")
    return Run()
"""


def test_a_run_that_goes_on_continues_its_wandb_run(tmp_path):
    """wandb.init takes the id from WANDB_RUN_ID where none is given, as here."""
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    seen = tmp_path / "seen"
    path = written(tmp_path, fixed={"steps": 30, "step_seconds": 0.05, "use_wandb": "true"}, axes={"seed": [0, 1]})
    variables = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "SEEN": str(seen), "WANDB_RUN_ID": "the caller's own"}
    runs = read_grid(path).runs
    for index in (0, 1):
        process = started(str(ROOT / "util" / "sweep.py"), path, "--run", str(index), **variables)
        eventually(lambda index=index: (runs[index].folder / "checkpoint-1" / "state.json").exists())
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 75
        assert started(str(ROOT / "util" / "sweep.py"), path, "--run", str(index), **variables).wait(20) == 0
    rows = [json.loads(line) for line in seen.read_text().splitlines()]
    assert [row[0] for row in rows] == [runs[0].folder.name] * 2 + [runs[1].folder.name] * 2
    ids = [row[2] for row in rows]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert {(row[1], row[3]) for row in rows} == {("offline", "allow")}


# ---------------------------------------------------------------- status, table, figure


@pytest.fixture
def finished(tmp_path) -> str:
    """Seven of the eight runs done: lr 0.2, mode random, seed 1 failed in its second step, of three."""
    path = written(tmp_path)
    for run in read_grid(path).runs[:-1]:
        assert cli.run(sweep_recipe.main, sweep_recipe.SmallArgs, run.command()[1:]) == 0
    last = sweep.Record(read_grid(path).runs[-1])
    record = last.read()
    record["attempts"] = [{"exit_code": 3, "job": "17", "own_log": False}]
    last.path.parent.mkdir(parents=True)
    last.path.write_text(json.dumps(record))
    return path


def test_status(finished, tmp_path, capsys):
    assert verbs.main(["sweep", "status", finished]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Does it work?",
                         f"8 runs in {tmp_path}/out: 7 done, 1 failed; at most 2 min 0 s of computing left"]
    assert lines[2:] == [f"failed 7: exit code 3 in job 17, {read_grid(finished).runs[7].folder}"]


def test_table_csv_and_figure(finished, tmp_path, capsys):
    """Against the formula of the recipe's made-up accuracy."""
    assert verbs.main(["sweep", "table", finished, "--metric", "accuracy.test", "accuracy.n"]) == 0
    text = capsys.readouterr().out
    sd = f"{statistics.stdev([0.6, 0.61]):.2g}"
    for row in ("| mode | lr | done | accuracy.test | accuracy.n |", f"| stt | 0.1 | 2 of 2 | 0.605 ± {sd} | 100 ± 0 |",
                f"| stt | 0.2 | 2 of 2 | 0.705 ± {sd} | 100 ± 0 |", f"| random | 0.1 | 2 of 2 | 0.505 ± {sd} | 100 ± 0 |",
                "| random | 0.2 | 1 of 2 | 0.6 | 100 |"):
        assert row in text.splitlines()
    assert "7 done, 1 failed of 8 runs" in text
    assert "- failed 7: exit code 3 in job 17" in text
    assert (tmp_path / "out" / "table.md").read_text() == text.removesuffix("\n")
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [row["state"] for row in rows] == ["done"] * 7 + ["failed"]
    for row in rows[:7]:
        made_up = 0.5 + float(row["lr"]) - 0.1 * (row["mode"] == "random") + 0.01 * int(row["seed"])
        assert float(row["accuracy.test"]) == pytest.approx(made_up, abs=1e-12)
    assert rows[7]["accuracy.test"] == ""
    assert (tmp_path / "out" / "table.png").stat().st_size > 10_000


def test_the_figure_shows_the_means(finished, tmp_path, monkeypatch):
    """Lines as drawn: places, means and standard deviations per mode."""
    from stt import plots

    drawn = []

    def look(panel, *args):
        sweep_lines(panel, *args)
        drawn.append({container.get_label(): container for container in panel.containers})
        return drawn

    sweep_lines = sweep_table._lines
    monkeypatch.setattr(sweep_table, "_lines", look)
    grid = read_grid(finished)
    sweep_table.draw(grid, sweep_table.outcomes(grid), "accuracy.test", "lr", tmp_path / "figure.png")
    data, _, bars = drawn[0]["stt"].lines
    assert data.get_xdata().tolist() == [0.1, 0.2]
    assert data.get_ydata() == pytest.approx([0.605, 0.705])
    assert data.get_color() == plots.MODE_COLOURS["stt"]
    low, high = bars[0].get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(statistics.stdev([0.6, 0.61]))
    assert drawn[0]["random"].lines[0].get_ydata() == pytest.approx([0.505, 0.6])


def test_what_is_drawn_along():
    from types import SimpleNamespace as Any

    def axis(*names: str, **flags: object) -> str | None:
        return sweep_table.default_axis(Any(axes=names, runs=[Any(flags=flags)]))

    assert axis("mode", "task", "lr", "seed", task="a", lr=0.1) == "lr"
    assert axis("mode", "task", "seed", task="a") == "task"
    assert axis("mode", "seed") is None
    assert axis("schedule", schedule=True) == "schedule"


@pytest.mark.parametrize(("flags", "message"), [
    (["--metric", "acuracy.test"], "unknown metric 'acuracy.test'. Did you mean 'accuracy.test'"),
    (["--axis", "steps"], "unknown axis of .*: 'steps'"), (["--metric"], "metric needs a name"),
    (["--jobs", "2"], "jobs is about `stt sweep run`, not `stt sweep table`")])
def test_mistakes_about_a_table(finished, tmp_path, capsys, flags, message):
    assert verbs.main(["sweep", "table", finished, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert pytest.raises(InputError, match=message).matches(InputError(error))
    assert not (tmp_path / "out" / "table.md").exists()


def test_nothing_to_show_yet(tmp_path, capsys):
    path = written(tmp_path)
    assert verbs.main(["sweep", "status", path]) == 0
    assert "8 waiting; at most 16 min 0 s of computing left" in capsys.readouterr().out
    assert verbs.main(["sweep", "table", path]) == 2
    assert "no run of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- what ships


def headers(name: str) -> dict[str, str]:
    """The #SBATCH options of a job script."""
    lines = (ROOT / "scripts" / name).read_text().splitlines()
    return dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_grids_are_right(path):
    """Every run goes through the recipe's own checks."""
    recipe = ROOT / yaml.safe_load(path.read_text())["command"]
    if not recipe.exists():
        pytest.skip(f"{recipe.name} does not exist")
    grid = read_grid(str(path))
    assert grid.output_dir == Path("outputs") / path.stem


@pytest.mark.parametrize("name", JOBS)
def test_the_job_scripts_fit_their_grids(name):
    """Array range and time limit are those of the grid, counted from the bare YAML."""
    grid = yaml.safe_load((ROOT / "scripts" / "grids" / f"{name}.yaml").read_text())
    count = 1
    for values in grid["axes"].values():
        count *= len(values)
    hours, minutes, _ = map(int, headers(name)["time"].split(":"))
    assert headers(name)["array"] == f"0-{count - 1}"
    assert "skip" not in grid
    assert 60 * hours + minutes >= grid["minutes"]


def test_the_job_scripts_differ_in_names_only():
    bodies = {(ROOT / "scripts" / name).read_text().partition("\ncd ")[2].replace(name, "NAME") for name in JOBS}
    assert len(bodies) == 1
    options = [{key: value for key, value in headers(name).items() if key not in ("job-name", "array", "time")}
               for name in JOBS]
    assert options[1:] == options[:-1]
    assert options[0]["signal"] == "B:USR1@120"
