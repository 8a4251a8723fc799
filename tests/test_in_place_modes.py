"""The modes that remove nothing, through the recipes: what trains, what is left behind, interruption and resume."""
from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from small_runs import SHIPPED, results, run
from torch import nn
from transformers import AutoModelForCausalLM

import train_classifier
from stt import cli, modes
from stt.arguments import CHECKOUT
from stt.classifier_arguments import ClassifierArgs
from stt.llm_arguments import LLMArgs, resolved
from stt.loading import Classes, load_classifier
from stt.selection import Selection
from stt.selective_optimizers.patch import Patch
from stt.selective_optimizers.recipe import choose, prepare
from stt.selective_optimizers.verify import verify
from stt.selective_optimizers.weights import named_tensors, sizes
from stt.surgery import count_parameters, head_parameters
from stt.trainers.callbacks import Record

BUDGET = 2001
FLAGS = {"train_in_place": ["--keep_ratio", "0.3"], "pafi": ["--budget", str(BUDGET)],
         "bitfit": ["--include_norm"], "random_weights": ["--budget", str(BUDGET)], "id3": ["--budget", str(BUDGET)]}


def base() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)


@pytest.mark.parametrize("mode", modes.IN_PLACE)
def test_the_patch_is_what_changed(mode: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Base and patch make the trained model to the last bit, and nothing else of it moved."""
    assert run(small, tmp_path, "--mode", mode, *FLAGS[mode], "--eval_restored", "--num_epoch", "1") == 2
    assert "eval_restored" in capsys.readouterr().err
    assert run(small, tmp_path, "--mode", mode, *FLAGS[mode], "--num_epoch", "1") == 0
    folder, found = tmp_path / "run", results(tmp_path)
    patch = Patch.load(folder / "patch.safetensors")
    trained = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    model = base()
    assert verify(model, trained, patch.selection).is_exact
    start = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
    patch.apply(model)
    tensors = named_tensors(trained)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in named_tensors(model).items())
    heads = head_parameters(model)
    counts = sizes(patch.selection, start)
    outside = sum(count for name, count in counts.items() if name not in heads)
    assert {name: counts[name] for name in heads} == {name: start[name].numel() for name in heads}
    assert found["parameters"]["trained_without_head"] == outside
    assert found["parameters"]["trained"] == sum(counts.values())
    assert found["parameters"]["kept"] == found["parameters"]["dense"]
    assert "sliced" not in found["perplexity"]
    if "--budget" in FLAGS[mode]:
        assert outside == BUDGET
    words = (folder / "report.md").read_text()
    assert ("Trained neurons" if mode == "train_in_place" else "Trained weights") in words


@pytest.mark.parametrize("head", ["train", "freeze"])
def test_a_tied_head_in_half_precision_is_counted_as_the_head(head: str) -> None:
    """It trains as values beside the embedding, whose name they bear."""
    model = tiny.build("qwen2-tied")[0].to(torch.bfloat16)
    tied, total = model.get_input_embeddings().weight.numel(), sum(p.numel() for p in model.parameters())
    args = resolved(LLMArgs(mode="pafi", budget=str(BUDGET), head=head))
    prepare(model, choose(model, "smallest", args), head)
    trained = {"train": BUDGET + tied, "freeze": BUDGET}[head]
    assert count_parameters(model) == {"total": total, "trained": trained, "trained_without_head": BUDGET}


@pytest.mark.parametrize("mode", ["pafi", "id3", "train_in_place"])
def test_interrupted_and_resumed_equals_uninterrupted(mode: str, small: list[str], tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--mode", mode, *FLAGS[mode], "--save_steps", "5"]
    assert run(small, tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Record, "on_step_begin", ending_at(8))
        assert run(small, tmp_path / "cut", *flags) == 130
    assert run(small, tmp_path / "cut", *flags, "--resume") == 0
    one, other = (load_file(tmp_path / name / "run" / "checkpoint" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    chosen = [Selection.load(tmp_path / name / "run" / "selection.safetensors") for name in ("whole", "cut")]
    assert chosen[0] == chosen[1]


def ending_at(step: int) -> object:
    """The process ends before the step after `step`."""
    def before(self: Record, args: object, state: object, control: object, **_: object) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt
    return before


@pytest.mark.parametrize(("mode", "head"), [("pafi", "train"), ("id3", "train"), ("pafi", "freeze")])
def test_classifier(mode: str, head: str, tmp_path: Path) -> None:
    """A head that is drawn anew is in the patch as a whole, also if it did not train."""
    flags = ["--mode", mode, "--budget", "500", "--train_size", "64", "--num_epochs", "1", "--run_name", "run",
             "--output_dir", str(tmp_path), "--head", head]
    assert cli.run(train_classifier.main, ClassifierArgs, flags) == 0
    patch = Patch.load(tmp_path / "run" / "patch.safetensors")
    classes = Classes("image", tuple(map(str, range(10))), 7, False)
    model = load_classifier(str(CHECKOUT / "models" / "vit-digits"), classes, None, "cpu", None)
    assert set(patch.new) == set(head_parameters(model))
    patch.apply(model)
    trained = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items() if name in trained)
    assert results(tmp_path)["parameters"]["trained_without_head"] == 500


def test_a_share_is_the_same_in_every_mode(small: list[str], tmp_path: Path) -> None:
    """Of the whole model."""
    counts = set()
    for mode in ("pafi", "id3"):
        assert run(small, tmp_path / mode, "--mode", mode, "--budget", "0.5%", "--train_size", "4", "--num_epoch", "1",
                   "--no_eval_epochs") == 0
        counts.add(results(tmp_path / mode)["parameters"]["trained_without_head"])
    assert counts == {round(0.005 * sum(parameter.numel() for parameter in base().parameters()))}


@pytest.mark.parametrize(("flags", "words"), [
    (["--mode", "stt", "--budget", "5"], "budget is about single weights"),
    (["--mode", "pafi", "--budget", "0"], "budget must be a number of weights"),
    (["--mode", "pafi", "--budget", "many"], "budget must be a number of weights"),
    (["--mode", "pafi", "--budget", "99999999"], "at most"),
    (["--mode", "pafi", "--d3_exp", "0"], "d3_exp is about single weights"),
    (["--mode", "id3", "--d3_eps", "0"], "d3_eps must be a number above 0"),
    (["--mode", "pafi", "--units", "heads"], "units says what is chosen"),
    (["--mode", "train_in_place", "--compensate", "mean"], "removes none"),
    (["--mode", "pafi", "--score", "taylor"], "has its own way"),
    (["--mode", "paffi"], "Did you mean 'pafi'")])
def test_bad_flags(flags: list[str], words: str, small: list[str], tmp_path: Path,
                   capsys: pytest.CaptureFixture) -> None:
    assert run(small, tmp_path, *flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_classifier_goes_on_from_a_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--mode", "pafi", "--budget", "500", "--train_size", "40", "--num_epochs", "1", "--run_name", "run",
             "--train_batch", "8", "--save_steps", "2", "--no_eval_epochs"]

    def start(name: str, *more: str) -> int:
        return cli.run(train_classifier.main, ClassifierArgs, [*flags, "--output_dir", str(tmp_path / name), *more])

    assert start("whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(Record, "on_step_begin", ending_at(3))
        assert start("cut") == 130
    assert len(Patch.load(tmp_path / "cut" / "run" / "checkpoint-2" / "patch.safetensors").new) == 2  # of the head
    assert start("cut", "--resume") == 0
    one, other = (load_file(tmp_path / name / "run" / "checkpoint" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
