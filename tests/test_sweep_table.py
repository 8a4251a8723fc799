"""Where a sweep stands, its table, its CSV file and its figure; on made-up accuracies that follow a formula."""
from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_grids import written

from stt import plots, verbs
from stt.errors import InputError
from util import sweep, sweep_table
from util.grid import read_grid


@pytest.fixture
def finished(tmp_path: Path) -> str:
    """Seven of the eight runs done, with the made-up accuracy 0.5 + lr, 0.1 less for random, 0.01 more with each seed;
    mode random, lr 0.2, seed 1 failed."""
    path = written(tmp_path)
    *done, failed = read_grid(path).runs
    for run in done:
        made_up = 0.5 + run.flags["lr"] - 0.1 * (run.flags["mode"] == "random") + 0.01 * run.flags["seed"]
        run.folder.mkdir(parents=True)
        (run.folder / "args.json").write_text("{}")
        (run.folder / "results.json").write_text(json.dumps(
            {"format_version": 1, "mode": run.flags["mode"], "accuracy": {"test": made_up, "n": 100}, "sites": [1, 2]}))
    record = sweep.Record(failed)
    record.path.parent.mkdir(parents=True)
    record.path.write_text(json.dumps(
        record.read() | {"attempts": [{"exit_code": 3, "job": "17", "own_log": False}]}))
    return path


def test_status(finished, tmp_path, capsys):
    assert verbs.main(["sweep", "status", finished]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Does it work?",
                         f"8 runs in {tmp_path}/out: 7 done, 1 failed; at most 2 min 0 s of computing left"]
    assert lines[2:] == [f"failed 7: exit code 3 in job 17, {read_grid(finished).runs[7].folder}"]


def test_table_csv_and_figure(finished, tmp_path, capsys):
    """Against the formula of the made-up accuracies."""
    assert verbs.main(["sweep", "table", finished, "--metric", "accuracy.test", "accuracy.n"]) == 0
    text = capsys.readouterr().out
    sd = f"{statistics.stdev([0.6, 0.61]):.2g}"
    for row in ("| mode | lr | done | accuracy.test | accuracy.n |", f"| stt | 0.1 | 2 of 2 | 0.605 ± {sd} | 100 ± 0 |",
                f"| stt | 0.2 | 2 of 2 | 0.705 ± {sd} | 100 ± 0 |",
                f"| random | 0.1 | 2 of 2 | 0.505 ± {sd} | 100 ± 0 |",
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
    def axis(*names: str, **flags: object) -> str | None:
        return sweep_table.default_axis(SimpleNamespace(axes=names, runs=[SimpleNamespace(flags=flags)]))

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


