"""The job scripts on a real SLURM, started here from Debian's packages: `pytest -m slurm`, as root, some minutes."""
from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
import sweep_recipe
import yaml
from safetensors import safe_open
from slurm_cluster import Cluster, states, wait_until
from small_runs import small_flags

import train_llm
from stt import cli
from stt.llm_arguments import LLMArgs
from util.grid import Grid, read_grid
from util.sweep import Record

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(__file__).with_name("sweep_recipe.py")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="stt-slurm-"))  # short: a socket's path has at most 107 characters
    started = Cluster(folder)
    try:
        slurm_cluster.install()
        started.start()
        yield started
    except slurm_cluster.Unavailable as reason:
        pytest.skip(str(reason))
    finally:
        started.stop()
        shutil.rmtree(folder)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """This checkout with a cluster.env of its own, which says what Python to take."""
    for name in ("stt", "util", "models", "datasets", "train_llm.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("cluster.env"))
    (tmp_path / "scripts" / "cluster.env").write_text(f"export STT_PYTHON={sys.executable}\n")
    return tmp_path


def grid_of(checkout: Path, recipe: Path = RECIPE, **content: object) -> Grid:
    """A grid file in the checkout, its runs in the folder `out`."""
    path = checkout / "grid.yaml"
    path.write_text(yaml.safe_dump({"question": "?", "command": str(recipe), "minutes": 1,
                                    "output_dir": str(checkout / "out")} | content, sort_keys=False))
    return read_grid(str(path))


def submit(cluster: Cluster, checkout: Path, *flags: str, job: str = "test_llm", **variables: str) -> str:
    """`sbatch scripts/JOB grid.yaml`, one CPU and no GPU a task unless the flags say so."""
    return cluster.submit("--cpus-per-task=1", "--gres=none", *flags, f"scripts/{job}", "grid.yaml", at=checkout,
                          **variables)


def results(grid: Grid, index: int) -> dict[str, object]:
    return json.loads((grid.runs[index].folder / "results.json").read_text())


def uninterrupted(grid: Grid, folder: Path) -> list[object]:
    """The digest of every run's weights, made without pause or end."""
    digests = []
    for run in grid.runs:
        flags = [*run.command()[1:], "--step_seconds", "0", "--output_dir", str(folder)]
        assert cli.run(sweep_recipe.main, sweep_recipe.SmallArgs, flags) == 0
        digests.append(json.loads((folder / run.folder.name / "results.json").read_text())["sha"])
    return digests


def restarts(cluster: Cluster, job: str) -> dict[str, int]:
    return {task: int(fields["Restarts"]) for task, fields in cluster.tasks(job).items()}


def test_the_exit_status_is_the_runs(cluster: Cluster, checkout: Path) -> None:
    """Done, failed, outside the grid; a finished run started again ends at once."""
    grid = grid_of(checkout, axes={"fails": ["never", "training", "input", "killed"]})
    job = submit(cluster, checkout, "--array=0-4")
    cluster.wait(job)
    assert states(cluster.tasks(job)) == {"0": "COMPLETED 0:0", "1": "FAILED 3:0", "2": "FAILED 2:0",
                                          "3": "FAILED 137:0", "4": "FAILED 2:0"}
    assert (checkout / f"test_llm-{job}_4.log").read_text() == (
        f"error: run 4, but {checkout}/grid.yaml has 4 runs: 0 to 3\n")
    assert [Record(run).state() for run in grid.runs] == ["done", "failed", "failed", "partial"]
    assert Record(grid.runs[1]).last()["job"] is not None
    again = submit(cluster, checkout, "--array=0")
    cluster.wait(again)
    assert states(cluster.tasks(again)) == {"0": "COMPLETED 0:0"}
    assert (checkout / f"test_llm-{again}_0.log").read_text() == f"done: {grid.runs[0].folder}\n"


def test_from_the_folder_of_the_scripts(cluster: Cluster, checkout: Path) -> None:
    """`cd scripts; sbatch text_exp`, as published; a grid is given from where we are."""
    grid = grid_of(checkout, axes={"seed": [0]})
    job = cluster.submit("--gres=none", "--array=0", "text_exp", "../grid.yaml", at=checkout / "scripts")
    cluster.wait(job)
    assert states(cluster.tasks(job)) == {"0": "COMPLETED 0:0"}
    assert results(grid, 0)["threads"] == "4"  # the script's --cpus-per-task


@pytest.mark.parametrize("job", ["test_llm", "analyze_llm", "image_exp", "text_exp"])
def test_every_script_runs_its_own_grid_as_it_is(cluster: Cluster, checkout: Path, job: str) -> None:
    """All the tasks that its header asks for are taken; the first one starts with a GPU, and is cancelled then."""
    content = yaml.safe_load((checkout / "scripts" / "grids" / f"{job}.yaml").read_text())
    content |= {"command": str(RECIPE), "fixed": {"steps": 1000, "step_seconds": 0.1},
                "axes": {"seed": list(range(len(read_array(checkout / "scripts" / job))))}}
    (checkout / "scripts" / "grids" / f"{job}.yaml").write_text(yaml.safe_dump(content))
    number = cluster.submit(f"scripts/{job}", at=checkout)
    folders = checkout / "outputs" / job
    assert wait_until(lambda: any(folders.glob("seed0-*/checkpoint-1")), 60)
    tasks = cluster.tasks(number)
    cluster.cancel(number)
    cluster.wait(number)
    assert tasks["0"]["JobState"] == "RUNNING"
    assert "gpu" in tasks["0"]["TresPerNode"]


def read_array(script: Path) -> range:
    first, last = next(line for line in script.read_text().splitlines() if "--array=" in line).split("=")[1].split("-")
    return range(int(first), int(last) + 1)


def test_gpus(cluster: Cluster, checkout: Path) -> None:
    """Two tasks with a GPU each see one another's not; a task with two sees both. The settings of cluster.env count."""
    grid = grid_of(checkout, fixed={"steps": 40, "step_seconds": 0.1}, axes={"seed": [0, 1, 2]})
    job = submit(cluster, checkout, "--array=0-1", "--gres=gpu:1")
    cluster.wait(job)
    with (checkout / "scripts" / "cluster.env").open("a") as file:
        file.write("export SBATCH_GRES=gpu:h100:2\n")
    source = f"source scripts/cluster.env && sbatch --parsable --array=2 --cpus-per-task=1 {checkout}/scripts/test_llm"
    both = subprocess.run(["bash", "-c", f"{source} grid.yaml"], cwd=checkout, env=cluster.environment,
                          capture_output=True, text=True, check=True).stdout.strip()
    cluster.wait(both)
    assert {results(grid, 0)["devices"], results(grid, 1)["devices"]} == {"0", "1"}
    assert results(grid, 2)["devices"] == "0,1"


def test_dependencies(cluster: Cluster, checkout: Path) -> None:
    """A table after the array: when all went well, or in any case."""
    grid_of(checkout, axes={"fails": ["never", "training"]})
    good, bad = submit(cluster, checkout, "--array=0"), submit(cluster, checkout, "--array=1")

    def after(kind: str, job: str) -> str:
        return cluster.submit("--kill-on-invalid-dep=yes", f"--dependency={kind}:{job}", "--output=after.log",
                              "--wrap", "echo after", at=checkout)

    jobs = [after("afterok", good), after("afterok", bad), after("afterany", bad), after("afternotok", bad)]
    cluster.wait(*jobs)
    assert [states(cluster.tasks(job))[""] for job in jobs] == [
        "COMPLETED 0:0", "CANCELLED 0:0", "COMPLETED 0:0", "COMPLETED 0:0"]


def test_a_storm_of_signals_changes_nothing(cluster: Cluster, checkout: Path) -> None:
    """Six tasks, told to stop at random moments, four times each: 24 requeues, and bit for bit the same weights."""
    grid = grid_of(checkout, fixed={"steps": 600, "step_seconds": 0.02}, axes={"seed": list(range(6))})
    job = submit(cluster, checkout, "--array=0-5")
    storm(cluster, job, 4, (0.0, 3.0))
    cluster.wait(job, seconds=240)
    assert states(cluster.tasks(job)) == {str(task): "COMPLETED 0:0" for task in range(6)}
    assert sum(restarts(cluster, job).values()) >= 20
    assert [results(grid, index)["sha"] for index in range(6)] == uninterrupted(grid, checkout / "whole")
    assert any("going on with" in log.read_text() for log in checkout.glob("test_llm-*.log"))
    ids = {Record(run).read()["wandb_id"] for run in grid.runs}
    assert len(ids) == 6


def storm(cluster: Cluster, job: str, times: int, pause: tuple[float, float], seconds: float = 240) -> None:
    """USR1 to the script of every task, at a random time after each of its first `times` starts, unless it ends before.
    """
    generator, due, until = random.Random(0), {}, time.monotonic() + seconds
    while not all(int(fields["Restarts"]) >= times or fields["JobState"] not in slurm_cluster.RUNNING
                  for fields in cluster.tasks(job).values()):
        assert time.monotonic() < until, states(cluster.tasks(job))
        for task, fields in cluster.tasks(job).items():
            life = task, int(fields["Restarts"])
            if fields["JobState"] == "RUNNING" and life[1] < times:
                due.setdefault(life, time.monotonic() + generator.uniform(*pause))
                if due[life] <= time.monotonic():
                    cluster.signal_task(f"{job}_{task}")
                    due[life] = time.monotonic() + 5  # once more if it went unheard
        time.sleep(0.1)


def test_requeues_have_an_end(cluster: Cluster, checkout: Path) -> None:
    """After STT_MAX_REQUEUES the task ends with 75 and says so; submitted again it goes on."""
    grid = grid_of(checkout, fixed={"steps": 250, "step_seconds": 0.02}, axes={"seed": [0]})
    job = submit(cluster, checkout, "--array=0", STT_MAX_REQUEUES="1")
    for life in (0, 1):
        assert wait_until(lambda life=life: cluster.tasks(job)["0"]["JobState"] == "RUNNING"
                          and restarts(cluster, job)["0"] == life, 60)
        attempts = life + 1
        assert wait_until(lambda attempts=attempts: len(Record(grid.runs[0]).read()["attempts"]) == attempts
                          and (grid.runs[0].folder / "checkpoint-1").exists(), 60)
        cluster.signal_task(f"{job}_0")
    cluster.wait(job)
    assert states(cluster.tasks(job)) == {"0": "FAILED 75:0"}
    assert "error: stopped after 1 requeues" in (checkout / f"test_llm-{job}_0.log").read_text()
    again = submit(cluster, checkout, "--array=0")
    cluster.wait(again)
    assert states(cluster.tasks(again)) == {"0": "COMPLETED 0:0"}
    assert [results(grid, 0)["sha"]] == uninterrupted(grid, checkout / "whole")


def test_a_cancelled_task_does_not_come_back(cluster: Cluster, checkout: Path) -> None:
    """It saves, and stays away."""
    grid = grid_of(checkout, fixed={"steps": 1000, "step_seconds": 0.05}, axes={"seed": [0]})
    job = submit(cluster, checkout, "--array=0")
    assert wait_until(lambda: (grid.runs[0].folder / "checkpoint-1").exists(), 60)
    cluster.cancel(job)
    cluster.wait(job)
    time.sleep(8)  # a requeued task would start after 5 seconds
    assert {fields["JobState"] for fields in cluster.tasks(job).values()} == {"CANCELLED"}
    assert [attempt["exit_code"] for attempt in Record(grid.runs[0]).read()["attempts"]] == [75]


def test_a_preempted_task_goes_on(cluster: Cluster, checkout: Path) -> None:
    """A job of the urgent partition takes all CPUs: SLURM ends the task and puts it back into the queue itself."""
    grid = grid_of(checkout, fixed={"steps": 250, "step_seconds": 0.02}, axes={"seed": [0]})
    job = submit(cluster, checkout, "--array=0")
    assert wait_until(lambda: (grid.runs[0].folder / "checkpoint-1").exists(), 60)
    urgent = cluster.submit("--partition=urgent", f"--cpus-per-task={slurm_cluster.CPUS}", "--output=urgent.log",
                            "--wrap", "sleep 1", at=checkout)
    cluster.wait(job, urgent)
    assert states(cluster.tasks(job)) == {"0": "COMPLETED 0:0"}
    assert restarts(cluster, job) == {"0": 1}
    assert [attempt["exit_code"] for attempt in Record(grid.runs[0]).read()["attempts"]] == [75, 0]
    assert [results(grid, 0)["sha"]] == uninterrupted(grid, checkout / "whole")


def test_time_limits(cluster: Cluster, checkout: Path) -> None:
    """A minute each, give or take half a minute: with a warning before, and with none but SIGTERM at the limit. Both
    go on to the same weights."""
    ways = [{"seed": 0, "steps": 350}, {"seed": 1, "steps": 1050}]  # 105 seconds: the second life stays within a minute
    grid = grid_of(checkout, fixed={"step_seconds": 0.1}, axes={"way": ways})
    warned = submit(cluster, checkout, "--array=0", "--time=1", "--signal=B:USR1@20")
    unwarned = submit(cluster, checkout, "--array=1", "--time=1", "--signal=B:CONT@1")
    cluster.wait(warned, unwarned, seconds=280)
    for job, task in ((warned, "0"), (unwarned, "1")):
        assert states(cluster.tasks(job)) == {task: "COMPLETED 0:0"}
        assert restarts(cluster, job)[task] >= 1
    assert [results(grid, index)["sha"] for index in (0, 1)] == uninterrupted(grid, checkout / "whole")


@pytest.mark.timeout(900)
def test_the_recipe_itself_in_a_storm(cluster: Cluster, checkout: Path) -> None:
    """train_llm.py, told to stop while it imports, selects or trains: the weights of an uninterrupted run."""
    flags = small_flags(checkout)
    fixed = dict(zip([name.removeprefix("--") for name in flags[::2]], flags[1::2], strict=True)) | {
        "num_epoch": "60", "eval_epochs": False}  # longer than three times the longest pause, also on an idle machine
    grid = grid_of(checkout, ROOT / "train_llm.py", fixed=fixed, axes={"mode": ["stt", "stt_lora"]})
    job = submit(cluster, checkout, "--array=0-1")
    storm(cluster, job, 3, (2.0, 12.0), seconds=300)
    cluster.wait(job, seconds=300)
    assert states(cluster.tasks(job)) == {"0": "COMPLETED 0:0", "1": "COMPLETED 0:0"}
    assert sum(restarts(cluster, job).values()) >= 4
    for run in grid.runs:
        whole = checkout / "whole" / run.folder.name
        assert cli.run(train_llm.main, LLMArgs, [*run.command()[1:], "--output_dir", str(whole.parent)]) == 0
        assert weights(run.folder) == weights(whole)


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor of the trained model, bit for bit."""
    with safe_open(folder / "checkpoint" / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


def test_nothing_is_left_running(cluster: Cluster) -> None:
    """The last test: no job, and no process of one."""
    assert subprocess.run(["squeue", "-h"], env=cluster.environment, capture_output=True, text=True,
                          check=True).stdout == ""
    lines = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(cluster.folder).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                lines.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # ended meanwhile
            continue
    assert not [line for line in lines if "sweep" in line]
