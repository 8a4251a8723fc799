"""Bad input to the recipe: one sentence, exit code 2, nothing written, nothing lost."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import SHIPPED, run
from transformers import AutoModelForCausalLM, AutoTokenizer

BAD = {
    "missing model folder": (["--model", "./no/such/model"], "no model folder"),
    "missing data folder": (["--data_dir", "/no/such/data"], "does not exist"),
    "unknown task": (["--task", "clutr"], "Did you mean 'clutrr'"),
    "unknown mode": (["--mode", "sst"], "Did you mean 'stt'"),
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
    "unknown score": (["--score", "contributions"], "Did you mean 'contribution'"),
    "a score from nowhere": (["--score", "nowhere:Score"], "cannot load the score 'nowhere:Score'"),
    "a score for magnitude": (["--score", "wanda", "--mode", "magnitude_pruning"], "has its own way"),
    "best magnitude": (["--preset", "best", "--mode", "magnitude_pruning"], "has its own way"),
    "unknown compensation": (["--compensate", "lsq"], "compensate"),
    "nothing to compensate": (["--compensate", "mean", "--mode", "baseline"], "removes none"),
    "restored and compensated": (["--preset", "best", "--eval_restored"], "--compensate none"),
    "a part for nothing": (["--select_on", "answer", "--mode", "baseline"], "selects nothing"),
    "padding of the answer": (["--select_on", "answer", "--count_padding"], "give one of them"),
    "width without a selection": (["--width", "uniform", "--mode", "baseline"], "keeps all"),
    "no width": (["--width", "buckets:0"], "width must be free, uniform or buckets:N"),
    "no multiple": (["--multiple_of", "0"], "multiple_of must be 1 or more"),
    "unknown units": (["--units", "head"], "Did you mean 'heads'"),
    "heads 0": (["--units", "both", "--heads_ratio", "0"], "heads_ratio must be in (0, 1], got 0"),
    "a share of no heads": (["--heads_ratio", "0.5"], "only neurons are chosen; give --units heads or both"),
    "heads of the dense model": (["--units", "heads", "--mode", "lora"], "mode 'lora' keeps everything"),
    "compensated heads": (["--units", "heads", "--compensate", "mean"], "only heads are chosen"),
    "heads by a preset": (["--units", "heads", "--preset", "best"], "only heads are chosen"),
    "heads of a width": (["--units", "heads", "--width", "uniform"], "only heads are chosen"),
    "attention twice": (["--units", "both", "--tune_attn"], "trains what it keeps of it anyway"),
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


def damaged(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


DAMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:10_000]), "cannot load the model"),
    "no tensor file": (lambda path: path.write_bytes(b"not a tensor file at all"), "cannot load the model"),
    "foreign": (lambda path: save_file({"other": torch.ones(3)}, path, {"format": "pt"}), "lack"),
    "one tensor short": (lambda path: damaged(path, lambda t: t.pop("model.layers.2.mlp.down_proj.weight")),
                         "lack 1 tensors of a Qwen2ForCausalLM, the first 'model.layers.2.mlp.down_proj.weight'"),
    "another shape": (lambda path: damaged(path, lambda t: t.update({"model.norm.weight": torch.ones(7)})),
                      "cannot load the model"),
    "NaN": (lambda path: damaged(path, lambda t: t["model.norm.weight"].fill_(float("nan"))), "NaN"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_model(damage, said, small, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(SHIPPED, model)
    damage(model / "model.safetensors")
    assert run(small, tmp_path / "out", "--model", str(model)) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def with_config(folder: Path, **changes) -> Path:
    """stt-tiny with another config."""
    shutil.copytree(SHIPPED, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_too_few_positions_are_seen_before_training(small, tmp_path, capsys):
    model = with_config(tmp_path / "model", max_position_embeddings=40)
    assert run(small, tmp_path / "out", "--model", str(model)) == 2
    assert "positions of the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_no_decoder(small, tmp_path, capsys):
    from transformers import BertConfig, BertLMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    BertLMHeadModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
                               vocab_size=len(tokenizer))).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    assert run(small, tmp_path / "out", "--model", str(tmp_path / "bert")) == 2
    assert "is no decoder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_smaller_vocabulary_than_the_tokenizer(small, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(tmp_path / "small")
    assert run(small, tmp_path / "out", "--model", str(tmp_path / "small")) == 2
    assert "the model 100" in capsys.readouterr().err


def test_bad_input_with_overwrite_keeps_the_earlier_run(small, tmp_path, capsys):
    assert run(small, tmp_path, "--mode", "baseline", "--num_epoch", "1", "--no_eval_epochs") == 0
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    for flags in (["--ppl_text", str(tmp_path / "latin.txt")], ["--model", "./nowhere"], ["--max_length", "3"]):
        assert run(small, tmp_path, "--overwrite", *flags) == 2
        assert (tmp_path / "run" / "results.json").is_file()


def test_a_model_without_feed_forward_sites(small, tmp_path, capsys):
    from transformers import MambaConfig, MambaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=len(tokenizer), state_size=4,
                                 eos_token_id=0, pad_token_id=1, bos_token_id=0)).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    assert run(small, tmp_path / "out", "--model", str(tmp_path / "mamba")) == 2
    assert "no feed-forward site in MambaForCausalLM" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
