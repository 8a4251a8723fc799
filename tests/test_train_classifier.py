"""train_classifier.py end to end on texts and pictures: every mode, every flag, interruption and resume."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from classifying import build, results, run, small_pictures, small_texts, write_table
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

from stt import modes
from stt.checkpoint import load
from stt.report import compare
from stt.selection import Selection

SELECTING = [name for name, mode in modes.MODES.items() if mode.score]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    return [*small_texts(folder), "--model", str(build("bert", folder))]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    return [*small_pictures(folder), "--model", str(build("vit", folder))]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder) if "loss" in row]


@pytest.mark.parametrize("mode", [name if name == "stt" else pytest.param(name, marks=pytest.mark.slow)
                                  for name in modes.MODES])
def test_every_mode_runs_and_leaves_a_whole_folder(mode, texts, tmp_path, capsys):
    assert run(texts, tmp_path, "--mode", mode) == 0
    assert "test accuracy" in capsys.readouterr().out
    folder, found = tmp_path / "run", results(tmp_path)
    for name in ("args.json", "metrics.jsonl", "outputs.json", "report.md", "report.html", "checkpoint/config.json",
                 "checkpoint/tokenizer.json", "plots/confusion.png"):
        assert (folder / name).is_file(), name
    assert [row["step"] for row in rows_of(tmp_path) if "loss" in row] == list(range(1, 15))  # 49 examples, 8 a step
    assert [row["step"] for row in rows_of(tmp_path) if "validation_accuracy" in row] == [7, 14]
    answers = json.loads((folder / "outputs.json").read_text())
    assert found["accuracy"]["correct"] == sum(row["prediction"] == row["label"] for row in answers)
    assert found["accuracy"]["n"] == len(answers) == 6
    assert found["metrics"]["accuracy"] == found["accuracy"]["test"]
    assert sum(map(sum, found["confusion"])) == sum(row["examples"] for row in found["classes"]) == 6
    assert (folder / "selection.safetensors").is_file() == (mode in SELECTING) == ("sliced" in found["throughput"])
    assert (found["parameters"]["kept"] < found["parameters"]["dense"]) == (mode in SELECTING)
    assert found["throughput"]["dense"]["seconds_per_batch_p99"] > 0
    assert found["flops"]["training"] > 14 * found["flops"]["inference"]
    report = (folder / "report.md").read_text()
    for words in ("## Classes", "| same |", "confusion.png", "examples per second"):
        assert words in report


@pytest.mark.slow
def test_modes_train_comparable_parts(texts, tmp_path):
    """Every baseline that cuts keeps STT's sizes and trains as many parameters; the others train all or LoRA."""
    kept, trained = {}, {}
    for mode in modes.MODES:
        assert run(texts, tmp_path / mode, "--mode", mode, "--num_epoch", "1", "--no_eval_epochs") == 0
        found = results(tmp_path / mode)
        kept[mode] = [site["kept"] for site in found["sites"]]
        trained[mode] = found["parameters"]
    assert kept["stt"] == kept["random"] == kept["wanda_adapt"] == kept["magnitude_pruning"] == kept["stt_lora"]
    cutting = [trained[mode] for mode in ("stt", "random", "wanda_adapt", "magnitude_pruning")]
    assert cutting.count(cutting[0]) == 4
    head = {name: found["trained"] - found["trained_without_head"] for name, found in trained.items()}
    assert set(head.values()) == {32 * 32 + 32 + 2 * 32 + 2}  # the pooler and the output layer of BERT, in every mode
    assert trained["stt"]["trained_without_head"] == sum((2 * 32 + 1) * units for units in kept["stt"]) + 2 * 32
    assert trained["baseline"]["trained"] == trained["baseline"]["dense"]


@pytest.mark.slow
def test_only_the_selected_neurons_and_the_head_moved(texts, tmp_path):
    assert run(texts, tmp_path, "--mode", "magnitude_pruning") == 0
    trained = load(tmp_path / "run" / "checkpoint").state_dict()
    dense = load_file(Path(texts[-1]) / "model.safetensors")
    moved = [name for name, value in trained.items() if name in dense and value.shape == dense[name].shape
             and not torch.equal(value, dense[name]) and not name.startswith(("classifier", "bert.pooler"))]
    assert moved == [f"bert.encoder.layer.{layer}.output.dense.bias" for layer in range(2)]


@pytest.fixture(scope="module")
def plain(texts, tmp_path_factory) -> Path:
    """A run of one epoch that the flags below are compared with."""
    folder = tmp_path_factory.mktemp("plain")
    assert run(texts, folder, "--num_epoch", "1") == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--head", "freeze"], ["--max_grad_norm", "0.01"], ["--schedule"], ["--wd", "0.9"],
                                   ["--tune_attn"], ["--keep_ratio", "0.9"], ["--threshold", "5"], ["--seed", "1"],
                                   ["--preset", "best"], ["--max_length", "5"], ["--disable_dropout"],
                                   ["--count_padding"],
                                   ["--source_task", "clutrr", "--max_length", "60"], ["--sample_ratio", "0.1"],
                                   ["--schedule", "--warmup_steps", "5"]], ids=" ".join)
def test_every_flag_changes_the_training(flags, texts, plain, tmp_path):
    assert run(texts, tmp_path, "--num_epoch", "1", "--no_eval_epochs", *flags) == 0
    assert losses(tmp_path) != losses(plain)
    assert len(losses(tmp_path)) == len(losses(plain)) == 7
    assert load(tmp_path / "run" / "checkpoint").stt_selection == Selection.load(
        tmp_path / "run" / "selection.safetensors").without_new_values()


@pytest.mark.slow
def test_warm_up_steps(texts, tmp_path):
    """The step size rises for as many steps, then falls to 0."""
    assert run(texts, tmp_path, "--num_epoch", "1", "--schedule", "--warmup_steps", "4") == 0
    rates = [row["learning_rate"] for row in rows_of(tmp_path) if "loss" in row]
    assert rates == pytest.approx([1e-3 * share for share in (0, 1 / 4, 2 / 4, 3 / 4, 1, 2 / 3, 1 / 3)])


@pytest.mark.slow
def test_validation_every_few_steps(texts, tmp_path):
    assert run(texts, tmp_path, "--num_epoch", "1", "--eval_steps", "3", "--select_best") == 0
    assert [row["step"] for row in rows_of(tmp_path) if "validation_accuracy" in row] == [3, 6, 7]  # and at the end
    kept = {int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*")}
    assert 7 in kept <= {3, 6, 7}


@pytest.mark.slow
def test_sizes(texts, tmp_path):
    flags = ["--num_epoch", "1", "--no_eval_epochs"]
    assert run(texts, tmp_path / "few", *flags, "--train_size", "8") == 0
    assert run(texts, tmp_path / "accumulated", *flags, "--gradient_accumulation_steps", "2") == 0
    assert run(texts, tmp_path / "dev", *flags, "--dev_mode", "--dev_ratio", "0.2") == 0
    assert [len(losses(tmp_path / name)) for name in ("few", "accumulated", "dev")] == [1, 4, 5]
    assert results(tmp_path / "dev")["accuracy"]["n"] == 10  # a fifth of 49
    assert "held-out accuracy" in (tmp_path / "dev" / "run" / "report.md").read_text()


@pytest.mark.slow
def test_accumulation_is_the_larger_batch(texts, tmp_path):
    """Two micro-batches of 4 train as one of 8: the same losses to rounding."""
    flags = ["--num_epoch", "1", "--no_eval_epochs", "--disable_dropout", "--train_size", "40"]
    assert run(texts, tmp_path / "whole", *flags) == 0
    assert run(texts, tmp_path / "parts", *flags, "--train_batch", "4", "--gradient_accumulation_steps", "2") == 0
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_flops_add_up_over_the_examples(texts, plain):
    """Every example on its own, as it is trained and classified."""
    from stt.dataset.classification import read_own
    from stt.dataset.classification.encode import encoder_of
    from stt.trainers.classify import with_loss
    from util.torch_flops import forward_flops, training_flops

    task, model = read_own(texts[1], None), load(plain / "run" / "checkpoint")
    encoder = encoder_of(AutoTokenizer.from_pretrained(plain / "run" / "checkpoint"), model, 512)
    batches: Callable = lambda items: [encoder.batch([row]) for row in encoder.rows(items)]  # noqa: E731
    read = [forward_flops(model, {name: value for name, value in batch.items() if name != "labels"})
            for batch in batches(task.test)]
    assert results(plain)["flops"]["inference"] == round(sum(read) / len(read))
    from stt.surgery import train_only

    train_only(model)
    with_loss(model.train())
    assert results(plain)["flops"]["training"] == sum(training_flops(model, batch) for batch in batches(task.train))


def test_the_checkpoint_answers_as_the_report_says(texts, plain, tmp_path):
    """Plain from_pretrained and the saved tokenizer give the predictions of outputs.json."""
    import stt  # noqa: F401  (teaches from_pretrained the widths)

    folder = plain / "run" / "checkpoint"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in json.loads((plain / "run" / "outputs.json").read_text()):
        with torch.no_grad():
            scores = model(**tokenizer(*row["input"], return_tensors="pt")).logits.softmax(-1)[0]
        assert model.config.id2label[int(scores.argmax())] == row["prediction"]
        assert float(scores.max()) == pytest.approx(row["probability"], abs=1e-5)


def test_pictures(pictures, tmp_path):
    """Three shades are told apart; the checkpoint holds the processor; removed neurons are put back."""
    assert run(pictures, tmp_path, "--num_epoch", "10", "--lr", "5e-3", "--eval_restored", "--train_batch", "4",
               "--no_eval_epochs") == 0
    found, folder = results(tmp_path), tmp_path / "run" / "checkpoint"
    assert (found["accuracy"]["n"], found["accuracy"]["majority"]) == (12, 4 / 12)
    assert found["accuracy"]["test"] > 0.8
    assert "restored" in found["accuracy"]
    assert AutoModelForImageClassification.from_pretrained(folder).config.id2label == {0: "dark", 1: "grey", 2: "light"}
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"height": 8, "width": 8}


@pytest.mark.slow
def test_plain_checkpoints_of_pictures(pictures, tmp_path):
    assert run(pictures, tmp_path, "--mode", "lora", "--num_epoch", "1", "--no_eval_epochs") == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "checkpoint")
    assert not hasattr(model.config, "stt")


def test_quantities(texts, tmp_path):
    """A number to predict: rank correlation, no accuracy, no classes."""
    rows = [{"text": f"{'salt ' * (n % 5)}sea", "label": n % 5 + 0.5} for n in range(40)]
    table = write_table(tmp_path / "salt.csv", rows)
    assert run([*texts, "--train_file", str(table)], tmp_path, "--num_classes", "1", "--num_epoch", "8",
               "--select_best") == 0
    found = results(tmp_path)
    assert found["accuracy"] == {"n": 4}
    assert found["main"] == "spearman"
    assert set(found["metrics"]) == {"spearman", "pearson"}
    assert found["metrics"]["spearman"] > 0.5
    assert "classes" not in found
    assert len([row for row in rows_of(tmp_path) if "validation_spearman" in row]) == 8
    report = (tmp_path / "run" / "report.md").read_text()
    assert "test spearman" in report
    assert "accuracy" not in report
    assert "spearman" in compare([tmp_path / "run"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "distilbert"])
def test_other_text_models(kind, texts, tmp_path):
    """Decoders get a padding token; a model without token types gets none."""
    model = build(kind, tmp_path)
    assert run([*texts, "--model", str(model)], tmp_path, "--num_epoch", "1") == 0
    assert load(tmp_path / "run" / "checkpoint").config.pad_token_id is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip-vision"])
def test_other_image_models(kind, pictures, tmp_path):
    model = build(kind, tmp_path)
    assert run([*pictures, "--model", str(model)], tmp_path, "--num_epoch", "1") == 0
    assert results(tmp_path)["parameters"]["trained"] > results(tmp_path)["parameters"]["trained_without_head"] > 0


@pytest.mark.parametrize("mode", [name if name == "stt" else pytest.param(name, marks=pytest.mark.slow)
                                  for name in ("stt", "stt_lora", "baseline", "lora")])
def test_interrupted_and_resumed_equals_uninterrupted(mode, pictures, tmp_path, monkeypatch):
    """Bitwise: weights, answers and the record of losses."""
    flags = ("--mode", mode, "--lora_dropout", "0.1")
    assert run(pictures, tmp_path / "whole", *flags) == 0

    def stop(self, args, state, control, **_):
        if state.epoch >= 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.trainer_callback.PrinterCallback.on_epoch_begin", stop)
        patch.setattr("transformers.trainer_callback.DefaultFlowCallback.on_epoch_begin", stop)
        assert run(pictures, tmp_path / "cut", *flags) == 130
    assert not (tmp_path / "cut" / "run" / "results.json").exists()
    assert run(pictures, tmp_path / "cut", *flags) == 2  # unfinished: --resume or --overwrite must be said
    assert run(pictures, tmp_path / "cut", *flags, "--resume") == 0
    whole, cut = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    one, other = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (whole, cut))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "outputs.json").read_text() == (cut / "outputs.json").read_text()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_select_best_validates_on_the_validation_set(pictures, tmp_path, monkeypatch):
    """The test examples are read once, after the training; with validations 0.9, 0.1 the first epoch is shipped."""
    from stt.evaluate.classifier import ClassifierJudge

    seen, answers = [], iter([0.9, 0.1])
    real = ClassifierJudge.outputs

    def outputs(self, model, rows):
        seen.append("test" if rows is self.test_rows else "validation" if rows is self.validation_rows else "other")
        return real(self, model, rows)

    def validate(self, model):
        self.outputs(model, self.validation_rows)
        return next(answers)

    monkeypatch.setattr(ClassifierJudge, "outputs", outputs)
    monkeypatch.setattr(ClassifierJudge, "validate", validate)
    assert run(pictures, tmp_path, "--mode", "baseline", "--select_best") == 0
    assert seen == ["validation", "validation", "test"]
    best, last, shipped = (AutoModelForImageClassification.from_pretrained(tmp_path / "run" / name).state_dict()
                           for name in ("checkpoint-3", "checkpoint-6", "checkpoint"))
    assert all(torch.equal(best[name], shipped[name]) for name in shipped)
    assert not all(torch.equal(last[name], shipped[name]) for name in shipped)


@pytest.mark.slow
def test_selection_on_another_task(texts, plain, tmp_path):
    """The same selection as a run on that task makes, on as many of its examples."""
    flags = ["--num_epoch", "1", "--no_eval_epochs", "--max_length", "60"]
    source = ["--source_task", "clutrr", "--source_ratio", "0.02"]
    assert run(texts, tmp_path / "moved", *flags, *source) == 0
    of_task = [flag for flag in texts if flag not in ("--train_file", texts[1])]
    assert run(of_task, tmp_path / "own", *flags, "--task", "clutrr", "--train_size", "0", "--sample_ratio", "0.02",
               "--num_epoch", "1", "--train_batch", "512") == 0
    moved, own, other = (Selection.load(folder / "run" / "selection.safetensors")
                         for folder in (tmp_path / "moved", tmp_path / "own", plain))
    assert moved == own
    assert moved != other
    assert "on clutrr" in results(tmp_path / "moved")["selected_by"]
