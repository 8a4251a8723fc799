"""--activation_checkpointing: the same training, bit for bit, in less memory."""
from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import classifying
import pytest
import torch
import training
from safetensors.torch import load_file
from small_runs import SHIPPED, results, run
from torch import nn
from transformers import AutoModelForCausalLM, OpenAIGPTConfig, OpenAIGPTModel

from benchmarks.memory import saved_bytes
from stt.errors import InputError
from stt.llm_arguments import LLMArgs
from stt.loss import chunked_loss
from stt.modes import IN_PLACE
from stt.recipe import check_same_flags
from stt.trainers.memory import check_can_recompute, recompute


def losses(folder: Path) -> list[tuple[float, float]]:
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def weights(folder: Path) -> dict[str, bytes]:
    shipped = load_file(folder / "run" / "checkpoint" / "model.safetensors")
    return {name: value.numpy().tobytes() for name, value in shipped.items()}


@pytest.mark.parametrize("mode", ["stt", "baseline", "lora", "stt_lora"])
def test_the_same_training_with_dropout(mode: str, tmp_path: Path) -> None:
    """And less is saved for the backward pass."""
    plain, other = training.prepared(mode, dropout=0.2), training.prepared(mode, dropout=0.2)
    recompute(other)
    saved = []
    for model in (plain, other):
        rows = training.examples(4)
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
        chunked_loss(model.train())
        saved.append(saved_bytes(model, lambda model=model, ids=ids: model(input_ids=ids, labels=ids).loss))
    assert saved[1] < 0.7 * saved[0]
    found = [training.run(tmp_path / name, model=model, gradient_accumulation_steps=2)
             for name, model in (("a", plain), ("b", other))]
    training.assert_equal(*found)
    assert training.rows(tmp_path / "a") == training.rows(tmp_path / "b")


@pytest.mark.parametrize("mode", ["stt", *(pytest.param(mode, marks=pytest.mark.slow) for mode in IN_PLACE)])
def test_decoders(mode: str, small: list[str], tmp_path: Path) -> None:
    """The recipe: losses, norms of gradients and weights; and the FLOPs of the second forward pass count."""
    for name, flags in (("plain", []), ("less", ["--activation_checkpointing"])):
        assert run(small, tmp_path / name, "--mode", mode, "--num_epoch", "1", "--no_eval_epochs", *flags) == 0
    plain, less = tmp_path / "plain", tmp_path / "less"
    assert losses(plain) == losses(less)
    assert weights(plain) == weights(less)
    assert (plain / "run" / "outputs.json").read_text() == (less / "run" / "outputs.json").read_text()
    before, after = results(plain)["flops"], results(less)["flops"]
    assert 1.2 * before.pop("training") < after.pop("training") < 2 * results(plain)["flops"]["training"]
    assert before == after


@pytest.mark.parametrize("mode", ["stt", "baseline"])
def test_classifiers(mode: str, tmp_path: Path) -> None:
    data = [*classifying.small_pictures(tmp_path), "--model", str(classifying.build("vit", tmp_path)), "--mode", mode]
    for name, flags in (("plain", []), ("less", ["--activation_checkpointing"])):
        assert classifying.run(data, tmp_path / name, "--num_epoch", "1", "--no_eval_epochs", *flags) == 0
    assert losses(tmp_path / "plain") == losses(tmp_path / "less")
    assert weights(tmp_path / "plain") == weights(tmp_path / "less")


def test_a_run_may_go_on_with_it(tmp_path: Path) -> None:
    args = replace(LLMArgs(), run_name="run", output_dir=str(tmp_path))
    (tmp_path / "args.json").write_text(json.dumps({"arguments": asdict(args), "processes": 1}))
    check_same_flags(tmp_path, replace(args, activation_checkpointing=True))
    with pytest.raises(InputError, match="lora_r 16, now it is 8"):
        check_same_flags(tmp_path, replace(args, activation_checkpointing=True, lora_r=8))


def test_a_model_that_cannot_is_refused(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="OpenAIGPTModel knows no activation checkpointing: leave it out"):
        check_can_recompute(OpenAIGPTModel(OpenAIGPTConfig(n_layer=1, n_embd=8, n_head=2, vocab_size=9)))
    shipped = AutoModelForCausalLM.from_pretrained(SHIPPED)
    monkeypatch.setattr(type(shipped), "supports_gradient_checkpointing", False)
    assert run(small, tmp_path, "--activation_checkpointing") == 2
    assert "knows no activation checkpointing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
