"""Grid files: which runs they give, where those lie, and what is refused; the grids and job scripts that ship."""
from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import sweep_recipe
import yaml
from sweep_grids import ROOT, written

from stt import cli, verbs
from stt.errors import InputError
from util import grid as grids
from util.grid import read_grid

GRIDS = sorted((ROOT / "scripts" / "grids").glob("*.yaml"))
JOBS = ("test_llm", "analyze_llm", "image_exp", "text_exp")


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
        {"steps": 3, "mode": "stt", "schedule": True, "seed": 0},
        {"steps": 3, "mode": "stt", "schedule": True, "seed": 1},
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
    ("seed: 1\nseed: 2\n", "'seed' is given twice"), ("- a\n", "must hold the keys of a grid"),
    ("a: [", "not a YAML file"), ("", "has no question"),
    ("question: !!python/object/apply:os.mkdir [hostile]\n", "means nothing here")])
def test_files_that_are_no_grids(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_grid(str(path))
    assert not (tmp_path / "hostile").exists()


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
