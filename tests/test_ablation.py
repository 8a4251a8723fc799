"""The machinery of the ablations without a model: flags, arms, cells, tables, new stories."""
from __future__ import annotations

import ast
import csv
import dataclasses
import inspect
import json
import statistics
from pathlib import Path

import numpy
import pytest

import train_classifier
import train_llm
from stt import arguments, cli, llm_arguments, recipe
from stt.ablation import arms, flags, report, stories, study, tables
from stt.ablation.cells import Cell, Cells, best, fill, packed, unpacked
from stt.ablation.classifier_flags import ClassifierAblationArgs
from stt.ablation.llm_flags import LLMAblationArgs, resolve
from stt.arguments import CHECKOUT
from stt.errors import InputError, TrainingFailed
from stt.modes import MODES
from stt.selection import Selection
from stt.selective_optimizers import recipe as in_place
from stt.statistics import Difference
from stt.trainers import loop

LRS = (1e-4, 1e-3, 1e-2)
STT, RANDOM = arms.ARMS["stt"], arms.ARMS["random"]


# ---------------------------------------------------------------- flags

PUBLISHED = {
    LLMAblationArgs: "--model models/stt-tiny --dataset clutrr --mode ns_sigma --apply_chat_template"
    " --learning_rate 1e-4 --recovery_learning_rate 1e-5 --wd 0.01 --batch_size 8 --eval_batch 32 --num_epochs 10"
    " --train_size 5 --gradient_accumulation_steps 1 --active_threshold 0.01 --active_thresholds 0.1,0.2"
    " --active_sample_ratio 0.1"
    " --topk_ratio 0.3 --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --output_dir ./outputs --seed 42 --use_wandb"
    " --wandb_project p --wandb_entity e --wandb_run_name n --log_interval 10 --schedule --tune_attn --dev_mode",
    ClassifierAblationArgs: "--model_name models/vit-digits --dataset digits --modality image --num_classes 10"
    " --max_length 512 --image_size 8 --mode mag_tp,transfer --threshold 0.01 --sample_ratio 0.005 --disable_dropout"
    " --topk_ratio 0.3 --lora_r 32 --lora_alpha 64 --lora_dropout 0.1 --learning_rate 5e-5 --weight_decay 0.01"
    " --num_epochs 5 --batch_size 16 --gradient_accumulation_steps 1 --warmup_steps 0 --eval_steps 1000 --max_grad_norm"
    " 0.01 --output_dir outputs --seed 42 --use_wandb --wandb_project p --wandb_entity e --wandb_run_name n"
    " --log_interval 10 --recovery_lr 1e-5 --schedule --tune_attn --dev_mode --dev_ratio 0.1 --mag_norm l1"
    " --mag_use_tracker_budget --source_dataset digits --source_ratio 0.1"}


@pytest.mark.parametrize("cls", PUBLISHED)
def test_published_flags(cls: type) -> None:
    args = cli.read_args(cls, PUBLISHED[cls].split())
    assert cli.read_args(cls, ["--active_thresholds=-0.1,2"]).active_thresholds == "-0.1,2"
    assert cli.read_args(cls, ["--active_thresholds", "-0.1,2"]).active_thresholds == "-0.1,2"
    assert (args.topk_ratio, args.recovery_lr, args.tune_attn, args.dev_mode) == (0.3, 1e-5, True, True)


@pytest.mark.parametrize(("given", "complaint"), [
    ({"lrs": "1e-3,x"}, "lrs takes numbers separated by commas, got '1e-3,x'"),
    ({"lrs": "1e-3,-1"}, "lrs must be numbers above 0"),
    ({"lrs": "1e-3,0.001"}, "lrs names a number twice"),
    ({"keep_ratios": "0.1,2"}, r"keep_ratios must be in \(0, 1\]"),
    ({"active_thresholds": "nan"}, "active_thresholds must be finite"),
    ({"keep_ratio": 0.3, "keep_ratios": "0.1,0.3"}, "give one of them"),
    ({"seeds": 0}, "seeds must be 1 or more"),
    ({"select_best": True}, "select_best has no meaning in an ablation"),
    ({"score": "wanda"}, "--mode names the scores"),
    ({"eval_epochs": False}, "a trial is validated once"),
    ({"mode": "transfer"}, "say which with --source_task"),
    ({"source_task": "boolq"}, "source_task is about the data that mode transfer selects on"),
    ({"mode": "calibration,stt"}, "stands alone"),
])
def test_flags_that_make_no_ablation(given: dict[str, object], complaint: str) -> None:
    for cls in (LLMAblationArgs, ClassifierAblationArgs):
        with pytest.raises(InputError, match=complaint):
            cls(**given)


@pytest.mark.parametrize(("given", "complaint"), [
    ({"lr": 1e-3, "lrs": "1e-3,1e-2"}, "lr is one step size"),
    ({"task": "boolq", "test_size": 10}, "test_size makes new stories"),
    ({"dev_mode": True, "test_size": 10}, "test_size makes new stories"),
    ({"mode": "sttt"}, "Did you mean 'stt'"),
    ({"reference": "wanda_adapt"}, "reference 'wanda_adapt' is none of the modes compared"),
    ({"seed": 999_999, "seeds": 2}, "must stay below 1000000"),
])
def test_flags_that_are_refused_together(given: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        study.plan(resolve(LLMAblationArgs(**given)))


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without torchrun"):
        study.plan(resolve(LLMAblationArgs()))


def test_what_stands_for_nothing() -> None:
    """The shipped model in minutes, any other as published; new stories only for the shipped clutrr."""
    quick, real = resolve(LLMAblationArgs()), resolve(LLMAblationArgs(model="qwen"))
    assert (quick.seeds, quick.test_size, quick.num_epoch, quick.recovery_lr) == (1, 2000, 1, 1e-3)
    assert (real.mode, real.seeds, real.test_size, real.num_epoch, real.recovery_lr) == ("baseline", 5, 5000, 10, 1e-5)
    assert len(study.plan(quick).lrs) == len(study.plan(real).lrs) == 4
    assert resolve(LLMAblationArgs(task="boolq")).test_size == 0
    assert study.plan(resolve(LLMAblationArgs(lr=0.5))).lrs == (0.5,)


@pytest.mark.parametrize(("cls", "script"), [(LLMAblationArgs, train_llm), (ClassifierAblationArgs, train_classifier)])
def test_no_dead_flag(cls: type, script: object) -> None:
    """Every flag is refused, or read by what the ablation runs."""
    shared = [recipe.wandb, loop.training_arguments, arguments.filled, arguments.run_name, script.load_data,
              in_place.choose, in_place.Growing]
    shared += [llm_arguments.resolved] if script is train_llm else [script.load_reader, script.loop_arguments,
                                                                    script.source]
    name = "llm_ablation.py" if script is train_llm else "classifier_ablation.py"
    files = [CHECKOUT / name, *(CHECKOUT / "stt" / "ablation").glob("*.py")]
    texts = [inspect.getsource(each) for each in shared] + [path.read_text(encoding="utf-8") for path in files]
    read = {node.attr for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)
            and ast.unparse(node.value) in ("args", "self.args", "bench.args")}
    published_only = {"mag_norm", "mag_use_tracker_budget"}  # what they ask for is so in any case, and checked
    assert {field.name for field in dataclasses.fields(cls)} - read - set(flags.REFUSED) - published_only == set()


# ---------------------------------------------------------------- arms


def test_arms() -> None:
    """Every published mode is there, groups are taken apart, ratios multiply only what cuts."""
    assert set(MODES) | {"finetune", "mag_tp", "wanda_tp", "gateprod", "activation_mean_value",
                         "activation_rate"} <= set(arms.ARMS)
    found = arms.find(["stt", "baseline"], (), (), (0.1, 0.5), tune_attn=True)
    assert [arm.label for arm in found] == ["stt 10 %", "stt 50 %", "baseline"]
    assert [arm.tune_attn for arm in found] == [True, True, False]
    assert [arm.threshold for arm in arms.find(["ns_sigma"], (-0.1, 0.01), (), (), False)] == [-0.1, 0.01]
    assert [arm.sample_ratio for arm in arms.find(["ns_activeset"], (), (0.02, 0.1), (), False)] == [0.02, 0.1]
    scores = arms.find(["scores", "contribution", "random"], (), (), (), False)
    assert [arm.mode.score for arm in scores] == ["stt", "activation_mean", "activation_rate", "magnitude", "wanda",
                                                  "gate_product", "taylor", "random", "contribution"]


def test_the_page_explains_every_mode() -> None:
    page = (CHECKOUT / "docs" / "ablations.md").read_text(encoding="utf-8")
    assert not [name for name in (*arms.ARMS, *arms.GROUPS, arms.CALIBRATION) if f"`{name}`" not in page]


def test_reference_keeps_as_much() -> None:
    found = arms.find(["stt", "random", "lora"], (), (), (0.1, 0.5), False)
    assert [arms.reference_of(arm, found, "stt").label for arm in found] == ["stt 10 %", "stt 50 %", "stt 10 %",
                                                                             "stt 50 %", "stt 10 %"]


# ---------------------------------------------------------------- cells


def answer(cell: Cell) -> dict[str, object]:
    """Random neurons fail with the largest step size; the middle one is the best of all."""
    if cell.is_trial:
        if (cell.arm, cell.lr) == (RANDOM, LRS[2]):
            raise TrainingFailed("the loss became NaN")
        return {"accuracy": {LRS[0]: 0.1, LRS[1]: 0.5, LRS[2]: 0.5}[cell.lr]}
    correct = [(cell.seed + item) % (2 if cell.arm == STT else 3) == 0 for item in range(12)]
    return {"accuracy": sum(correct) / 12, "n": 12, "correct": packed(correct), "kept": 0.3, "trained": 1000,
            "trained_without_head": 900, "seconds": 1.0}


def test_trials_choose_and_seeds_follow(tmp_path: Path) -> None:
    """Three trials a mode, then seed by seed all modes with the best (of equals the smallest) step size."""
    cells, order = Cells(tmp_path / "cells.jsonl"), []

    def run(cell: Cell) -> dict[str, object]:
        order.append(cell.key)
        return answer(cell)

    fill(cells, [STT, RANDOM], LRS, (5, 6), run)
    assert order == [(mode, lr, flags.TRIAL_SEED) for mode in ("stt", "random") for lr in LRS] + [
        (mode, LRS[1], seed) for seed in (5, 6) for mode in ("stt", "random")]
    assert cells.trials(RANDOM) == {LRS[0]: 0.1, LRS[1]: 0.5, LRS[2]: None}
    assert [row["seed"] for row in cells.of(STT)] == [5, 6]
    assert numpy.array_equal(cells.correct(STT), [[(5 + i) % 2 == 0 for i in range(12)],
                                                  [(6 + i) % 2 == 0 for i in range(12)]])


def test_one_step_size_is_not_tried(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "cells.jsonl")
    fill(cells, [STT], LRS[:1], (5,), answer)
    assert list(cells.rows) == [("stt", LRS[0], 5)]


@pytest.mark.parametrize("done", [0, 2, 7, 9])
def test_an_interrupted_ablation_goes_on(tmp_path: Path, done: int) -> None:
    """Killed after some cells, in the middle of writing one: nothing is run twice, and the rows are those of an
    ablation that was never interrupted."""
    whole = Cells(tmp_path / "whole.jsonl")
    fill(whole, [STT, RANDOM], LRS, (5, 6), answer)
    lines = whole.path.read_text().splitlines(keepends=True)
    path = tmp_path / "cells.jsonl"
    path.write_text("".join(lines[:done]) + lines[done][:20])
    ran = []
    fill(Cells(path), [STT, RANDOM], LRS, (5, 6), lambda cell: ran.append(cell) or answer(cell))
    assert len(ran) == len(lines) - done
    assert path.read_text() == "".join(lines)


def test_no_step_size_works() -> None:
    with pytest.raises(TrainingFailed, match="mode 'stt' could not be trained with any of --lrs"):
        best({1e-3: None}, STT)


@pytest.mark.parametrize("line", ["{", "[]", '{"mode": "stt"}'])
def test_foreign_rows(tmp_path: Path, line: str) -> None:
    (tmp_path / "cells.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match="--overwrite"):
        Cells(tmp_path / "cells.jsonl")


def test_packed_bits_come_back() -> None:
    for n in (1, 8, 13):
        correct = numpy.random.default_rng(n).random(n) < 0.5
        assert numpy.array_equal(unpacked(packed(correct), n), correct)


def test_the_folder_goes_on_with_the_same_flags_alone(tmp_path: Path) -> None:
    args = resolve(LLMAblationArgs(output_dir=str(tmp_path), run_name="a", test_size=10))
    with pytest.raises(InputError, match="nothing to resume"):
        study.open_folder(dataclasses.replace(args, resume=True))
    folder = study.open_folder(args)
    assert study.open_folder(dataclasses.replace(args, seeds=3, mode="stt,lora", resume=True)) == folder
    with pytest.raises(InputError, match=r"was started with num_epoch 1, now it is 2: .*--overwrite"):
        study.open_folder(dataclasses.replace(args, num_epoch=2))
    assert str(CHECKOUT) not in json.dumps(json.loads((folder / "args.json").read_text())["arguments"])
    older = json.loads((folder / "args.json").read_text())
    del older["arguments"]["units"]
    (folder / "args.json").write_text(json.dumps(older))
    study.open_folder(args)
    (folder / "cells.jsonl").write_text("old")
    study.open_folder(dataclasses.replace(args, num_epoch=2, overwrite=True))
    assert not (folder / "cells.jsonl").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="holds files that no run of ours wrote"):
        study.open_folder(dataclasses.replace(args, run_name="b", overwrite=True))


# ---------------------------------------------------------------- tables


@pytest.fixture
def lines(tmp_path: Path) -> list[tables.Line]:
    cells = Cells(tmp_path / "cells.jsonl")
    fill(cells, [STT, RANDOM], LRS, (5, 6), answer)
    return tables.lines_of(cells, [STT, RANDOM], {"stt": STT, "random": STT})


def test_lines(lines: list[tables.Line]) -> None:
    """STT is right on every second item (6 of 12), random on every third (4 of 12)."""
    assert [line.accuracy for line in lines] == [(0.5, 0.5), (4 / 12, 4 / 12)]
    assert (lines[0].difference, lines[0].against, lines[1].against) == (None, None, "stt")
    assert lines[1].difference.mean == pytest.approx(-2 / 12)


def test_the_table_in_every_form(lines: list[tables.Line]) -> None:
    shown = tables.table(lines)
    assert shown[2][:5] == ["random", "0.001", "2", "33.3 ± 0.0 %", "−16.7"]
    assert {len(row) for row in shown} == {len(shown[0])}
    rows = list(csv.DictReader(tables.comma_separated(lines).splitlines()))
    assert float(rows[1]["accuracy"]) == statistics.mean(lines[1].accuracy)
    assert float(rows[1]["low"]) == lines[1].difference.low
    assert rows[0]["difference"] == ""
    latex = tables.latex(lines).splitlines()
    assert latex[0] == rf"\begin{{tabular}}{{l{'r' * (len(shown[0]) - 1)}}}"
    assert all(line.count("&") == len(shown[0]) - 1 for line in latex if line.endswith("\\\\"))
    assert "33.3 $\\pm$ 0.0 \\%" in latex[5]


def test_every_table_says_what_it_can_detect(lines: list[tables.Line]) -> None:
    size = 100 * lines[1].difference.detectable
    assert f"Minimum detectable difference: {size:.1f} points" in "".join(tables.notes(lines))
    assert "nothing to compare" in "".join(tables.notes(lines[:1]))
    same = dataclasses.replace(lines[1], difference=Difference(0.0, 0.0, 0.0, 0.0))
    assert "Every mode gave the same answers" in "".join(tables.notes([lines[0], same]))
    assert tables.at_edge(lines, LRS) == []
    assert "edge of those tried for: stt, random" in tables.at_edge(lines, LRS[1:])[0]


def test_transfer_in_words() -> None:
    """6 units against 4, 3 of them common: 3 of 7, 3/6 and 3/4."""
    own, moved = Selection({"mlp": range(6)}), Selection({"mlp": [3, 4, 5, 9]})
    found = arms.find(["transfer"], (), (), (), False)
    words = report.transfer_words({"stt": own, "stt of source": moved}, found, "boolq")[0]
    assert "Jaccard 0.43" in words
    assert "covers 50.0 % of the task's, the task's 75.0 % of the source's" in words
    assert report.transfer_words({"stt": own}, [STT], "boolq") == []


def test_overlap_by_chance() -> None:
    """Two random halves share a third of what either holds."""
    assert "about 0.33" in report.chance(Selection({"mlp": range(50)}, {"widths": {"mlp": 100}}))


# ---------------------------------------------------------------- new stories


def test_new_stories_are_new_and_always_the_same(tmp_path: Path) -> None:
    """By the text of the story and by the people with their relations, read from the files alone."""
    made = stories.folder_of_new(300, tmp_path)
    new = json.loads((made / "test.json").read_text())
    shipped = [row for split in ("train", "val", "test")
               for row in json.loads((CHECKOUT / "datasets" / "clutrr" / f"{split}.json").read_text())]
    assert len(new) == 300
    assert not {row["story"] for row in new} & {row["story"] for row in shipped}
    assert not {(row["genders"], row["f_comb"]) for row in new} & {(row["genders"], row["f_comb"]) for row in shipped}
    again = stories.folder_of_new(300, tmp_path / "again")
    assert (again / "test.json").read_bytes() == (made / "test.json").read_bytes()
    (made / "test.json").write_text(json.dumps(new[:5]))
    with pytest.raises(InputError, match="holds 5 test stories instead of 300: delete it"):
        stories.folder_of_new(300, tmp_path)


def test_stories_of_the_training_data_are_refused() -> None:
    stories.check_apart("ab", "cd")
    with pytest.raises(InputError, match="1 test items are in the training or validation data"):
        stories.check_apart("ab", "bc")
