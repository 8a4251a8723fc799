"""The recipe end to end on the shipped model and a little of the shipped data; bad input; interruption and resume."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_llm
from stt import cli, modes, verbs
from stt.arguments import CHECKOUT, LLMArgs
from stt.checkpoint import load
from stt.selection import Selection

SELECTING = [name for name, mode in modes.MODES.items() if mode.score]


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> list[str]:
    """Flags for a run of seconds: 24 training stories, 8 to validate and to test, a short text."""
    folder = tmp_path_factory.mktemp("small")
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        rows = json.loads((CHECKOUT / "datasets" / "clutrr" / f"{split}.json").read_text())
        (folder / f"{split}.json").write_text(json.dumps(rows[:count]))
    (folder / "text.md").write_text((CHECKOUT / "models" / "stt-tiny" / "heldout.txt").read_text()[:2000])
    return ["--data_dir", str(folder), "--ppl_text", str(folder / "text.md"), "--train_batch", "4", "--num_epoch", "2",
            "--active_sample_ratio", "0.5", "--log_interval", "1"]


def run(small: list[str], folder: Path, *flags: str) -> int:
    return cli.run(train_llm.main, LLMArgs, [*small, "--output_dir", str(folder), "--run_name", "run", *flags])


def results(folder: Path) -> dict:
    return json.loads((folder / "run" / "results.json").read_text())


@pytest.mark.parametrize("mode", modes.MODES)
def test_every_mode_runs_and_leaves_a_whole_folder(mode, small, tmp_path, capsys):
    assert run(small, tmp_path, "--mode", mode) == 0
    assert "test accuracy" in capsys.readouterr().out
    folder, found = tmp_path / "run", results(tmp_path)
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


@pytest.mark.parametrize("flags", [
    ["--dev_mode"], ["--apply_chat_template"], ["--head", "untie"], ["--count_padding"], ["--train_size", "8"],
    ["--gradient_accumulation_steps", "2", "--no_schedule"], ["--max_grad_norm", "0"]], ids=" ".join)
def test_flags_that_change_a_run(flags, small, tmp_path):
    assert run(small, tmp_path, "--num_epoch", "1", *flags) == 0
    assert results(tmp_path)["accuracy"]["n"] == (2 if flags == ["--dev_mode"] else 8)
    assert load(tmp_path / "run" / "checkpoint").stt_selection == Selection.load(
        tmp_path / "run" / "selection.safetensors")


def test_half_precision_model(small, tmp_path):
    """A bf16 checkpoint under autocast: what trains is and stays float32, the rest keeps its bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shipped = CHECKOUT / "models" / "stt-tiny"
    half = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(shipped).save_pretrained(tmp_path / "half")
    assert run(small, tmp_path, "--model", str(tmp_path / "half"), "--precision", "bf16", "--lr", "1e-3",
               "--head", "freeze") == 0
    trained, before = load(tmp_path / "run" / "checkpoint").state_dict(), half.state_dict()
    for name, value in trained.items():
        if ".mlp." in name:
            assert value.dtype == torch.float32, name
        else:
            assert torch.equal(value, before[name]), name


def test_budgets_match_site_by_site(small, tmp_path):
    """Every baseline keeps exactly as many neurons in every site as STT."""
    kept = {}
    for mode in ("stt", "random", "wanda_adapt", "magnitude_pruning"):
        assert run(small, tmp_path / mode, "--mode", mode, "--num_epoch", "1", "--no_eval_epochs") == 0
        kept[mode] = {site["name"]: site["kept"] for site in results(tmp_path / mode)["sites"]}
        trained = results(tmp_path / mode)["parameters"]["trained"]
        kept[mode]["trained"] = trained
    assert kept["stt"] == kept["random"] == kept["wanda_adapt"] == kept["magnitude_pruning"]


def test_only_the_selected_neurons_and_the_head_moved(small, tmp_path):
    assert run(small, tmp_path, "--mode", "stt", "--keep_ratio", "0.25") == 0
    trained = load(tmp_path / "run" / "checkpoint").state_dict()
    dense = load_file(CHECKOUT / "models" / "stt-tiny" / "model.safetensors")
    selection = Selection.load(tmp_path / "run" / "selection.safetensors")
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
    dense = load_file(CHECKOUT / "models" / "stt-tiny" / "model.safetensors")
    assert torch.equal(trained["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    assert not torch.equal(trained["model.norm.weight"], dense["model.norm.weight"])
    assert results(tmp_path)["parameters"]["trained"] == results(tmp_path)["parameters"]["trained_without_head"]


def test_the_checkpoint_exports(small, tmp_path):
    """`stt export` of a run: to hf it answers as the run's model does, to dense it is the dense model's size again."""
    from transformers import AutoModelForCausalLM

    assert run(small, tmp_path, "--mode", "stt", "--num_epoch", "1", "--no_eval_epochs") == 0
    checkpoint = str(tmp_path / "run" / "checkpoint")
    for kind in ("hf", "dense"):
        assert verbs.main(["export", checkpoint, "--to", kind, "--out", str(tmp_path / kind)]) == 0
    ids = torch.arange(3, 13).unsqueeze(0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(plain(ids).logits, load(checkpoint)(ids).logits, rtol=0, atol=1e-4)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert sum(p.numel() for p in dense.parameters()) == results(tmp_path)["parameters"]["dense"]


def test_restored_neurons(small, tmp_path):
    assert run(small, tmp_path, "--mode", "stt", "--eval_restored") == 0
    assert 0 <= results(tmp_path)["accuracy"]["restored"] <= 1


def test_tune_attn_trains_the_attention_too(small, tmp_path):
    assert run(small, tmp_path, "--mode", "stt", "--num_epoch", "1", "--tune_attn") == 0
    trained = load(tmp_path / "run" / "checkpoint").state_dict()
    dense = load_file(CHECKOUT / "models" / "stt-tiny" / "model.safetensors")
    assert not torch.equal(trained["model.layers.0.self_attn.q_proj.weight"],
                           dense["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize("mode", ["stt", "stt_lora", "baseline", "lora"])
def test_interrupted_and_resumed_equals_uninterrupted(mode, small, tmp_path, monkeypatch):
    """Bitwise: weights, answers and the record of losses."""
    flags = ("--mode", mode, "--lora_dropout", "0.1")
    assert run(small, tmp_path / "whole", *flags) == 0

    def stop(self, args, state, control, **_):
        if state.epoch >= 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stt.trainers.sft.Record.on_epoch_begin", stop)
        assert run(small, tmp_path / "cut", *flags) == 130
    assert not (tmp_path / "cut" / "run" / "results.json").exists()
    assert run(small, tmp_path / "cut", *flags) == 2  # unfinished: --resume or --overwrite must be said
    assert run(small, tmp_path / "cut", *flags, "--lr", "1e-4", "--resume") == 2  # started with another lr
    assert run(small, tmp_path / "cut", *flags, "--resume") == 0
    whole, cut = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
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
    from stt.trainers import sft

    calls, real = [], sft.answer_loss
    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(0)
        return real(outputs, labels, num_items_in_batch) * (float("nan") if len(calls) > 8 else 1.0)

    monkeypatch.setattr("stt.trainers.sft.answer_loss", loss)
    assert run(small, tmp_path, "--mode", "stt") == 3
    assert "step 9" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint-6" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "results.json").exists()


BAD = {
    "missing model folder": (["--model", "./no/such/model"], "no model folder"),
    "missing data folder": (["--data_dir", "/no/such/data"], "does not exist"),
    "unknown task": (["--task", "clutr"], "Did you mean 'clutrr'"),
    "unknown mode": (["--mode", "sst"], "stt"),
    "unknown flag": (["--topk_ration", "0.3"], "did you mean --topk_ratio"),
    "topk 0": (["--topk_ratio", "0"], "must be in (0, 1], got 0"),
    "topk -1": (["--topk_ratio", "-1"], "must be in (0, 1], got -1"),
    "topk 1.5": (["--topk_ratio", "1.5"], "must be in (0, 1], got 1.5"),
    "topk NaN": (["--topk_ratio", "nan"], "must be in (0, 1], got nan"),
    "keep 0": (["--keep_ratio", "0"], "must be in (0, 1], got 0"),
    "fp16 on a CPU": (["--precision", "fp16"], "needs a GPU"),
    "no text": (["--ppl_text", "/no/such/text"], "no text file"),
    "nothing to resume": (["--resume"], "nothing to resume"),
    "tune_attn without a selection": (["--mode", "lora", "--tune_attn"], "tune_attn"),
    "too short": (["--max_length", "3"], "max_length"),
}


@pytest.mark.parametrize(("flags", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(flags, said, small, tmp_path, capsys):
    assert run(small, tmp_path, *flags) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert list(tmp_path.iterdir()) == []


def test_output_below_a_file(small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(small, tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten(small, tmp_path, capsys):
    assert run(small, tmp_path, "--mode", "baseline", "--num_epoch", "1", "--no_eval_epochs") == 0
    before = (tmp_path / "run" / "results.json").read_text()
    assert run(small, tmp_path, "--mode", "baseline") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "run" / "results.json").read_text() == before
    assert run(small, tmp_path, "--mode", "baseline", "--num_epoch", "1", "--no_eval_epochs", "--overwrite") == 0


@pytest.mark.parametrize(("damage", "said"), [("truncate", "cannot load the model"), ("foreign", "cannot load")])
def test_damaged_model(damage, said, small, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for file in (CHECKOUT / "models" / "stt-tiny").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000] if damage == "truncate" else b"not a tensor file at all")
    assert run(small, tmp_path / "out", "--model", str(model)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_without_feed_forward_sites(small, tmp_path, capsys):
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(CHECKOUT / "models" / "stt-tiny")
    MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=len(tokenizer), state_size=4,
                                 eos_token_id=0, pad_token_id=1, bos_token_id=0)).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    assert run(small, tmp_path / "out", "--model", str(tmp_path / "mamba")) == 2
    assert "no feed-forward site in MambaForCausalLM" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
