"""The two ablations from flags to report, on little data."""
from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import classifying
import pytest
from small_runs import results as results_of
from small_runs import run as train
from small_runs import small_flags

import classifier_ablation
import llm_ablation
from stt import cli, verbs
from stt.ablation import bench as benches
from stt.ablation.cells import Cells, packed
from stt.ablation.classifier_flags import ClassifierAblationArgs
from stt.ablation.flags import TRIAL_SEED
from stt.ablation.llm_flags import LLMAblationArgs
from stt.dataset.classification import form_of

FILES = ("ablation.json", "args.json", "report.md", "table.csv", "table.tex", "plots/accuracy.png",
         "plots/accuracy_by_kept.png", "plots/composition.png")
SHORT = ("--num_epoch", "1", "--train_size", "12")
WHOLE = ("--mode", "stt_lora,mag_tp", "--lrs", "1e-3,3e-3", "--seeds", "2")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return small_flags(tmp_path_factory.mktemp("small"))


def ablate(small: list[str], folder: Path, *given: str) -> int:
    """The exit code of an ablation in folder/run."""
    flags = [*small, *SHORT, "--output_dir", str(folder), "--run_name", "run", *given]
    return cli.run(llm_ablation.main, LLMAblationArgs, flags)


def rows_of(folder: Path) -> list[dict[str, object]]:
    """Its rows without the times."""
    rows = [json.loads(line) for line in (folder / "run" / "cells.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """An ablation of two modes, two step sizes and two seeds; and what each cell was measured on."""
    folder, looked_at = tmp_path_factory.mktemp("whole"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benches, "run", watched(benches.run, looked_at))
        assert ablate(small, folder, *WHOLE) == 0
    return folder, looked_at


def watched(run: Callable[..., object], looked_at: list[tuple[int, str]]) -> Callable[..., object]:
    """`run` with a bench that notes which data a cell's answers are about."""
    class Watched:
        def __init__(self, bench: object, seed: int):
            self._bench, self._seed = bench, seed

        def __getattr__(self, name: str) -> object:
            return getattr(self._bench, name)

        def correct(self, model: object, split: str) -> list[bool]:
            looked_at.append((self._seed, split))
            return self._bench.correct(model, split)

    return lambda bench, cell, *rest: run(Watched(bench, cell.seed), cell, *rest)


def test_rows_and_files(whole: tuple[Path, list[tuple[int, str]]]) -> None:
    """4 trials, 4 seeds; a trial is measured on the validation data only, a seed on the test data only."""
    folder, looked_at = whole
    rows = rows_of(folder)
    assert [(row["mode"], row["seed"]) for row in rows] == [
        *[("stt_lora", TRIAL_SEED)] * 2, *[("mag_tp", TRIAL_SEED)] * 2, ("stt_lora", 42), ("mag_tp", 42),
        ("stt_lora", 43), ("mag_tp", 43)]
    assert set(looked_at) == {(TRIAL_SEED, "validation"), (42, "test"), (43, "test")}
    assert all((folder / "run" / name).stat().st_size for name in FILES)
    report = (folder / "run" / "report.md").read_text()
    for words in ("Head (tied to the input embedding): trained in every mode, 126,592",
                  "no test example was read in a trial", "| mag_tp |"):
        assert words in report, words
    assert "accuracy_cut" in rows[-1]
    assert "accuracy_cut" not in rows[-2]
    assert rows[-1]["trained"] > rows[-2]["trained"]  # everything, before the cut
    assert rows[-1]["kept"] < 0.6


def test_a_cell_is_a_run_of_the_training_recipe(small: list[str], tmp_path: Path,
                                                whole: tuple[Path, list[tuple[int, str]]]) -> None:
    """The same mode, step size and seed with train_llm.py: the same answers, the same perplexity, to the last digit."""
    row = next(row for row in rows_of(whole[0]) if (row["mode"], row["seed"]) == ("stt_lora", 42))
    assert train(small, tmp_path, *SHORT, "--mode", "stt_lora", "--lr", str(row["lr"]), "--seed", "42") == 0
    found = results_of(tmp_path)
    correct = [each["correct"] for each in json.loads((tmp_path / "run" / "outputs.json").read_text())]
    assert (row["accuracy"], row["correct"]) == (found["accuracy"]["test"], packed(correct))
    assert row["perplexity"] == found["perplexity"]["trained"]
    assert row["kept"] == found["parameters"]["kept_fraction_of_units"]
    assert row["trained"] == found["parameters"]["trained"]


def test_an_interrupted_ablation_ends_with_the_same_rows(small: list[str], tmp_path: Path,
                                                         whole: tuple[Path, list[tuple[int, str]]],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the sixth row was written, and started again: five rows are kept, and the rest is as if it never
    stopped."""
    folder, run, ran = tmp_path / "run", benches.run, []
    shutil.copytree(whole[0] / "run", folder)
    (folder / "ablation.json").unlink()
    lines = (folder / "cells.jsonl").read_text().splitlines(keepends=True)
    (folder / "cells.jsonl").write_text("".join(lines[:5]) + lines[5][:30])
    monkeypatch.setattr(benches, "run", lambda *given: ran.append(given) or run(*given))
    before = json.loads((folder / "args.json").read_text())["arguments"]
    assert ablate(small, tmp_path, *WHOLE) == 0
    assert len(ran) == 3
    assert rows_of(tmp_path) == rows_of(whole[0])
    assert (folder / "ablation.json").is_file()
    assert json.loads((folder / "args.json").read_text())["arguments"] == before | {"output_dir": str(tmp_path)}


def test_transfer_and_thresholds(small: list[str], tmp_path: Path) -> None:
    """Every way to select keeps as many as STT on the run's own data; the report compares source and task."""
    data = small[small.index("--data_dir") + 1]
    assert ablate(small, tmp_path, "--mode", "transfer,ns_sigma", "--source_task", "clutrr", "--source_dir", data,
                  "--source_ratio", "0.1", "--lr", "1e-3", "--seeds", "1") == 0
    rows = rows_of(tmp_path)
    assert [row["mode"] for row in rows] == ["stt", "stt of source", "stt threshold -0.1", "stt threshold 0.01"]
    assert len({row["kept"] for row in rows}) == 1
    assert rows[3]["perplexity"] == rows[0]["perplexity"] != rows[2]["perplexity"]  # 0.01 is the run's own
    assert "Selected on clutrr against selected on the task: Jaccard" in (tmp_path / "run" / "report.md").read_text()


def test_calibration_trains_nothing(small: list[str], tmp_path: Path) -> None:
    assert ablate(small, tmp_path, "--mode", "calibration", "--active_sample_ratios", "0.1,0.5,1") == 0
    found = list(csv.DictReader((tmp_path / "run" / "overlap.csv").read_text().splitlines()))
    assert len(found) == 9
    assert all((float(row["jaccard"]) == 1) == (row["a"] == row["b"]) for row in found)
    assert (tmp_path / "run" / "plots" / "overlap.png").is_file()
    assert not (tmp_path / "run" / "cells.jsonl").exists()


def test_bad_input_writes_nothing(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate(small, tmp_path, "--mode", "stt,sttx") == 2
    assert "unknown mode 'sttx'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_classifier(tmp_path: Path) -> None:
    """Several shares kept, on the shipped model and real digits."""
    given = ["--output_dir", str(tmp_path), "--run_name", "run", "--train_size", "48", "--num_epoch", "1", "--mode",
             "stt,wanda_tp,baseline", "--keep_ratios", "0.2,0.6", "--lr", "3e-3", "--seeds", "1"]
    assert cli.run(classifier_ablation.main, ClassifierAblationArgs, given) == 0
    rows = rows_of(tmp_path)
    assert [row["mode"] for row in rows] == ["stt 20 %", "stt 60 %", "wanda_tp 20 %", "wanda_tp 60 %", "baseline"]
    assert [round(row["kept"], 1) for row in rows] == [0.2, 0.6, 0.2, 0.6, 1.0]
    for row in rows:
        assert bin(int(row["correct"], 16)).count("1") == round(row["accuracy"] * row["n"])
    assert len(Cells(tmp_path / "run" / "cells.jsonl").rows) == 5
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| stt 60 % | 0.003 | 1 |" in report
    assert "Minimum detectable difference" in report


def test_a_quantity_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of stsb and of data of one's own: there is no right and wrong to compare."""
    def table(name: str, *columns: str) -> str:
        rows = [dict.fromkeys(columns, "salt " * (n % 5) + "sea") | {"label": n % 5 + 0.5} for n in range(20)]
        return str(classifying.write_table(tmp_path / "data" / f"{name}.csv", rows))

    for split in ("train", "dev"):
        table(split, *form_of("stsb").fields)
    model = ["--model", str(classifying.build("bert", tmp_path)), "--output_dir", str(tmp_path / "out")]
    for data, name in ((["--task", "stsb", "--data_dir", str(tmp_path / "data")], "stsb"),
                       (["--train_file", table("own", "text"), "--num_classes", "1"], "own")):
        assert cli.run(classifier_ablation.main, ClassifierAblationArgs, [*model, *data]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == (f"error: {name} predicts a quantity, and answers are compared that are right or wrong: give a "
                        "task with classes.")
    assert not (tmp_path / "out").exists()


def test_a_report_of_its_own(small: list[str], whole: tuple[Path, list[tuple[int, str]]], tmp_path: Path,
                             capsys: pytest.CaptureFixture[str]) -> None:
    """`stt report` refuses an ablation; the command again, with all rows there, writes the same report anew."""
    again = tmp_path / "run"
    shutil.copytree(whole[0] / "run", again)
    assert verbs.main(["report", str(again)]) == 2
    assert capsys.readouterr().err == (f"error: {again} is an ablation, which has a report of its own "
                                       f"({again / 'report.md'}); the same command again goes on with it and writes "
                                       "that anew.\n")
    text = (again / "report.md").read_text()
    (again / "report.md").unlink()
    assert ablate(small, tmp_path, *WHOLE) == 0
    assert (again / "report.md").read_text() == text


@pytest.mark.parametrize("program", ["llm_ablation", "classifier_ablation"])
def test_help_is_quick(program: str) -> None:
    """Nothing heavy is imported before there is something to do."""
    code = f"import sys, {program}; assert not {{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_trials_are_compared_on_a_part_of_the_validation_data(small: list[str], tmp_path: Path) -> None:
    assert ablate(small, tmp_path, "--mode", "random", "--lrs", "1e-3,3e-3", "--seeds", "1", "--val_size", "2") == 0
    assert [row["n"] for row in rows_of(tmp_path)][:2] == [2, 2]


def test_modes_that_remove_nothing(small: list[str], tmp_path: Path) -> None:
    """As many weights in each, beside the head; neurons in place are as many as STT keeps."""
    assert ablate(small, tmp_path, "--mode", "pafi,id3,id3_global,train_in_place", "--lr", "1e-3", "--budget", "1000",
                  "--keep_ratio", "0.3") == 0
    rows = {row["mode"]: row for row in rows_of(tmp_path)}
    assert {name: rows[name]["trained_without_head"] for name in ("pafi", "id3", "id3_global")} == \
        {"pafi": 1000, "id3": 1000, "id3_global": 1000}
    assert {row["kept"] for row in rows.values()} == {1.0}
    assert rows["id3"]["perplexity"] != rows["id3_global"]["perplexity"]
    assert rows["train_in_place"]["trained_without_head"] > 1000
