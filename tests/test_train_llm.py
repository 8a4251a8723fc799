"""The recipe end to end on the shipped model and a little of the shipped data; interruption and resume."""
from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SHIPPED, results, run
from tiny_text import build_decoder, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from stt import modes, verbs
from stt.checkpoint import load
from stt.selection import Selection

SELECTING = [name for name, mode in modes.MODES.items() if mode.score]


@pytest.fixture(scope="module")
def ran(small, tmp_path_factory) -> Callable[[str], Path]:
    """Where a mode was run, once; said.txt is what it printed."""
    @functools.cache
    def of_mode(mode: str) -> Path:
        folder = tmp_path_factory.mktemp(mode)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert run(small, folder, "--mode", mode) == 0
        (folder / "said.txt").write_text(said.getvalue())
        return folder
    return of_mode


@pytest.mark.parametrize("mode", modes.MODES)
def test_every_mode_runs_and_leaves_a_whole_folder(mode, ran):
    folder, found = ran(mode) / "run", results(ran(mode))
    assert "test accuracy" in (folder.parent / "said.txt").read_text()
    for name in ("args.json", "metrics.jsonl", "outputs.json", "report.md", "report.html", "checkpoint/config.json"):
        assert (folder / name).is_file(), name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert len([row for row in rows if "validation_accuracy" in row]) == 2
    answers = json.loads((folder / "outputs.json").read_text())
    assert found["accuracy"]["correct"] == sum(row["prediction"] == row["label"] for row in answers)
    assert found["accuracy"]["n"] == 8
    assert found["parameters"]["trained"] > found["parameters"]["trained_without_head"] > 0
    is_selecting = mode in SELECTING
    assert (folder / "selection.safetensors").is_file() == is_selecting
    assert ("sliced" in found["perplexity"]) == is_selecting == ("sliced" in found["throughput"])
    assert (found["parameters"]["kept"] < found["parameters"]["dense"]) == is_selecting


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="session")
def plain(small, tmp_path_factory) -> Path:
    """A run of one epoch that the flags below are compared with."""
    folder = tmp_path_factory.mktemp("plain")
    assert run(small, folder, "--num_epoch", "1") == 0
    return folder


@pytest.mark.parametrize("flags", [["--apply_chat_template"], ["--head", "untie"], ["--head", "freeze"],
                                   ["--max_grad_norm", "0"], ["--no_schedule"], ["--wd", "0.9"], ["--tune_attn"],
                                   ["--keep_ratio", "0.9"], ["--active_threshold", "5"], ["--seed", "1"],
                                   ["--preset", "best"], ["--score", "outside_score:MeanSize"],
                                   ["--compensate", "mean"], ["--select_on", "answer"],
                                   ["--width", "uniform"], ["--group_by_length"]], ids=" ".join)
def test_every_flag_changes_the_training(flags, small, plain, tmp_path):
    assert run(small, tmp_path, "--num_epoch", "1", *flags) == 0
    assert losses(tmp_path) != losses(plain)
    assert len(losses(tmp_path)) == len(losses(plain)) == 6
    selection = Selection.load(tmp_path / "run" / "selection.safetensors")
    assert load(tmp_path / "run" / "checkpoint").stt_selection == selection.without_new_values()
    assert bool(selection.new_values) == ("best" in flags or "mean" in flags)


def test_steps_follow_from_sizes(small, tmp_path):
    flags = ["--num_epoch", "1", "--no_eval_epochs"]
    assert run(small, tmp_path / "few", *flags, "--train_size", "8") == 0
    assert run(small, tmp_path / "accumulated", *flags, "--gradient_accumulation_steps", "2") == 0
    assert run(small, tmp_path / "dev", *flags, "--dev_mode") == 0
    assert [len(losses(tmp_path / name)) for name in ("few", "accumulated", "dev")] == [2, 3, 6]
    assert results(tmp_path / "dev")["accuracy"]["n"] == 2  # a tenth of 24
    assert "held-out accuracy" in (tmp_path / "dev" / "run" / "report.md").read_text()


def test_flops_add_up_over_the_examples(small, plain):
    """Every example on its own, as it is trained, answered and measured."""
    import stt
    from stt.dataset import encode_all, load_task, prompt_ids, selection_subset
    from stt.loading import load_tokenizer
    from util.torch_flops import flops_of, forward_flops, training_flops

    found, task = results(plain), load_task("clutrr", small[1])
    model, tokenizer = load(plain / "run" / "checkpoint"), load_tokenizer(found["model"])
    stt.train_only(model)
    stt.chunked_loss(model.train())

    def row(example: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([values]) for name, values in example.items()}

    trained = encode_all(task.train, tokenizer, 256)[0]
    assert found["flops"]["training"] == sum(training_flops(model, row(example)) for example in trained)
    prompts = [prompt_ids(example, tokenizer, 256, False) for example in task.test]
    read = [forward_flops(model.eval(), {"input_ids": torch.tensor([ids])}) for ids in prompts]
    assert found["flops"]["inference"] == round(sum(read) / len(read))

    dense = AutoModelForCausalLM.from_pretrained(SHIPPED)
    last = dense.model.layers[-1].mlp.down_proj
    shown = encode_all(selection_subset(task.train, 0.5, 42), tokenizer, 256)[0]
    with torch.no_grad():
        read = sum(flops_of(lambda example=example: dense.model(input_ids=torch.tensor([example["input_ids"]])))
                   - 2 * last.weight.numel() * len(example["input_ids"]) for example in shown)
    assert found["flops"]["selection"] == read  # the pass ends in front of the last down projection


@pytest.fixture(scope="session")
def half(tmp_path_factory) -> Path:
    """stt-tiny in bf16."""
    folder = tmp_path_factory.mktemp("half")
    AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder)
    return folder


HALF = ["--precision", "bf16", "--lr", "1e-3", "--num_epoch", "1", "--no_eval_epochs"]


@pytest.mark.parametrize("mode", ["baseline", "lora"])
@pytest.mark.parametrize("head", ["train", "freeze", "untie"])
def test_plain_checkpoints_are_not_rounded(mode, head, small, half, tmp_path, monkeypatch):
    """A bf16 model trained under autocast reloads with plain from_pretrained as the very weights that were tested."""
    tested = {}
    from stt.evaluate.llm import Judge

    real = Judge.test
    def test(self, model, folder):
        tested.update({name: value.clone() for name, value in model.state_dict().items()})
        return real(self, model, folder)

    monkeypatch.setattr(Judge, "test", test)
    assert run(small, tmp_path, "--model", str(half), "--mode", mode, "--head", head, *HALF) == 0
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint").state_dict()
    assert reloaded.keys() == tested.keys()
    assert all(torch.equal(reloaded[name], value.float()) for name, value in tested.items())


def test_half_precision_model(small, half, tmp_path):
    """A bf16 checkpoint under autocast: what trains is and stays float32, the rest keeps its bits."""
    assert run(small, tmp_path, "--model", str(half), "--head", "freeze", "--eval_restored", *HALF) == 0
    trained = load(tmp_path / "run" / "checkpoint").state_dict()
    before = AutoModelForCausalLM.from_pretrained(half).state_dict()
    for name, value in trained.items():
        if ".mlp." in name:
            assert value.dtype == torch.float32, name
        else:
            assert torch.equal(value, before[name]), name


def test_budgets_match_site_by_site(ran):
    """Every baseline keeps exactly as many neurons in every site as STT."""
    kept = {}
    for mode in ("stt", "random", "wanda_adapt", "magnitude_pruning"):
        found = results(ran(mode))
        kept[mode] = {site["name"]: site["kept"] for site in found["sites"]}
        kept[mode]["trained"] = found["parameters"]["trained"]
    assert kept["stt"] == kept["random"] == kept["wanda_adapt"] == kept["magnitude_pruning"]


def test_only_the_selected_neurons_and_the_head_moved(ran):
    trained = load(ran("stt") / "run" / "checkpoint").state_dict()
    dense = load_file(SHIPPED / "model.safetensors")
    selection = Selection.load(ran("stt") / "run" / "selection.safetensors")
    moved = 0
    for name, before in dense.items():
        site = next((site for site in selection if name.startswith(site + ".")), None)
        if site is not None:
            before = before[:, selection[site]] if "down_proj" in name else before[selection[site]]
            moved += not torch.equal(trained[name], before)
        elif name == "model.embed_tokens.weight":  # the head is tied to it
            moved += not torch.equal(trained[name], before)
        else:
            assert torch.equal(trained[name], before), name
    assert moved == 3 * len(selection) + 1


def test_frozen_head_stays(small, tmp_path):
    assert run(small, tmp_path, "--mode", "baseline", "--head", "freeze") == 0
    trained = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    dense = load_file(SHIPPED / "model.safetensors")
    assert torch.equal(trained["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    assert not torch.equal(trained["model.norm.weight"], dense["model.norm.weight"])
    assert results(tmp_path)["parameters"]["trained"] == results(tmp_path)["parameters"]["trained_without_head"]


def test_the_checkpoint_exports(ran, tmp_path):
    """`stt export` of a run: to hf it answers as the run's model does, to dense it is the dense model's size again."""
    checkpoint = str(ran("stt") / "run" / "checkpoint")
    for kind in ("hf", "dense"):
        assert verbs.main(["export", checkpoint, "--to", kind, "--out", str(tmp_path / kind)]) == 0
    ids = torch.arange(3, 13).unsqueeze(0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(plain(ids).logits, load(checkpoint)(ids).logits, rtol=0, atol=1e-4)  # logits of about 20
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert sum(p.numel() for p in dense.parameters()) == results(ran("stt"))["parameters"]["dense"]


def test_restored_neurons(small, tmp_path):
    """Measured as `stt export --to dense` answers."""
    from stt.dataset import load_task
    from stt.evaluate.generation import accuracy, generate_answers

    assert run(small, tmp_path, "--mode", "stt", "--eval_restored") == 0
    assert verbs.main(["export", str(tmp_path / "run" / "checkpoint"), "--to", "dense", "--out",
                       str(tmp_path / "dense")]) == 0
    dense, task = AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), load_task("clutrr", small[1])
    rows = generate_answers(dense, AutoTokenizer.from_pretrained(SHIPPED), task, task.test, 8, max_length=256)
    assert results(tmp_path)["accuracy"]["restored"] == accuracy(rows)


def test_tune_attn_trains_the_attention_too(small, tmp_path):
    assert run(small, tmp_path, "--mode", "stt", "--num_epoch", "1", "--tune_attn") == 0
    trained = load(tmp_path / "run" / "checkpoint").state_dict()
    dense = load_file(SHIPPED / "model.safetensors")
    assert not torch.equal(trained["model.layers.0.self_attn.q_proj.weight"],
                           dense["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize("mode", ["stt", "stt_lora", "baseline", "lora"])
def test_interrupted_and_resumed_equals_uninterrupted(mode, small, ran, tmp_path, monkeypatch):
    """Bitwise: weights, answers and the record of losses; LoRA has its dropout."""
    flags = ("--mode", mode)

    def stop(self, args, state, control, **_):
        if state.epoch >= 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stt.trainers.loop.Record.on_epoch_begin", stop)
        assert run(small, tmp_path / "cut", *flags) == 130
    assert not (tmp_path / "cut" / "run" / "results.json").exists()
    assert run(small, tmp_path / "cut", *flags) == 2  # unfinished: --resume or --overwrite must be said
    assert run(small, tmp_path / "cut", *flags, "--lr", "1e-4", "--resume") == 2  # started with another lr
    assert run(small, tmp_path / "cut", *flags, "--resume") == 0
    whole, cut = ran(mode) / "run", tmp_path / "cut" / "run"
    one, other = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (whole, cut))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "outputs.json").read_text() == (cut / "outputs.json").read_text()
    losses = [[row["loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
               if "loss" in row] for folder in (whole, cut)]
    assert losses[0] == losses[1]


def test_select_best_ships_the_best_epoch(small, tmp_path, monkeypatch):
    """With validation accuracies 0.9, 0.1 the first epoch's weights are shipped."""
    answers = iter([0.9, 0.1])
    monkeypatch.setattr("stt.evaluate.llm.Judge.accuracy", lambda *_: next(answers))
    assert run(small, tmp_path, "--mode", "baseline", "--select_best") == 0
    best = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    shipped = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert all(torch.equal(best[name], shipped[name]) for name in shipped)


def test_nan_exits_with_3_and_keeps_the_last_good_checkpoint(small, tmp_path, monkeypatch, capsys):
    from stt.trainers.loop import RecordedTrainer

    real = RecordedTrainer.compute_loss
    def loss(self, *args, **kwargs):
        return real(self, *args, **kwargs) * (float("nan") if self.state.global_step >= 8 else 1.0)

    monkeypatch.setattr(RecordedTrainer, "compute_loss", loss)
    assert run(small, tmp_path, "--mode", "stt") == 3
    assert "step 9" in capsys.readouterr().err
    assert load(tmp_path / "run" / "checkpoint-6").stt_selection  # the last good one, usable as it is
    assert not (tmp_path / "run" / "results.json").exists()


def test_the_shipped_model_knows_the_ends_of_a_template(tmp_path) -> None:
    """Plain `generate` of the saved model stops where our evaluation does."""
    import train_llm
    from stt.dataset import Example, Task
    from stt.dataset.own import extract
    from stt.evaluate.llm import Judge

    tokenizer = build_tokenizer()
    examples = [Example("the sea is", "x", "x", ())]
    for stop_ids in ((), (7, 9)):
        task = Task("own", examples, examples, examples, extract, 8, stop_ids=stop_ids)
        judge = Judge("", task, tokenizer, "", 1, 32, False, None)
        train_llm.ship(build_decoder(len(tokenizer)), judge, tmp_path / str(len(stop_ids)), is_sliced=False)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / str(len(stop_ids))).generation_config.eos_token_id
        assert saved == ([tokenizer.eos_token_id, 7, 9] if stop_ids else None)
