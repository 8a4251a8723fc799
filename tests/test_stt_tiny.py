"""The shipped base model: its files, its tokenizer, what it has learned, and what it must never have seen."""
from __future__ import annotations

import ast
import itertools
import json
import math
import os
import random
import re
from pathlib import Path

import pytest
import torch
from scripts_loader import load_script
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from stt.dataset import kinship, kinship_text

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "stt-tiny"
DATA = ROOT / "datasets" / "clutrr"


@pytest.fixture(scope="module")
def script():
    return load_script("pretrain_tiny")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


@pytest.fixture(scope="module")
def held_out_items():
    return [item for name in ("val", "test") for item in json.loads((DATA / f"{name}.json").read_text())]


# ----------------------------------------------------------------------------------------------------------- the files


def test_size_and_files():
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "heldout.txt",
            "pretraining.json"} <= set(sizes)
    assert sum(sizes.values()) <= 6_000_000
    assert 40_000 <= sizes["heldout.txt"] <= 60_000
    assert all(os.access(path, os.R_OK) for path in MODEL.iterdir())


def test_model_is_qwen2_of_about_a_million(model):
    assert type(model) is Qwen2ForCausalLM
    assert 0.8e6 <= sum(weight.numel() for weight in model.parameters()) <= 2e6
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == 256
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_record_matches_the_weights(model, tokenizer):
    record = json.loads((MODEL / "pretraining.json").read_text())
    assert record["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert record["vocabulary"] == len(tokenizer) == model.config.vocab_size
    assert record["loss_curve"][-1]["step"] == record["arguments"]["steps"]
    assert record["loss_curve"][-1]["loss"] < 0.5 * record["loss_curve"][0]["loss"]
    assert record["document_shares"] == kinship_text.SHARES


# -------------------------------------------------------------------------------------------------------- the tokenizer


def test_vocabulary_and_special_tokens(tokenizer):
    assert len(tokenizer) <= 1024
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert None not in (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.padding_side == "left"


def test_auto_tokenizer_splits_as_the_file_says(tokenizer):
    """transformers swaps the splitting rules of an unknown tokenizer class for its own; ours is a class it keeps."""
    plain = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    for text in ((MODEL / "heldout.txt").read_text(), "Eva's mother-in-law\n\nCan't 12 say  so."):
        assert tokenizer.encode(text, verbose=False) == plain.encode(text).ids


def test_any_text_survives_a_round_trip(tokenizer):
    for text in ("Anna's brother is Ben.", " two  spaces\tand\nlines", "żółw 漢字 🙂 ~#", ""):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_name_is_one_token(tokenizer):
    names = [name for pool in kinship_text.NAMES.values() for name in pool]
    assert len(set(names)) == 80
    for name in names:
        assert len(tokenizer.encode(" " + name, add_special_tokens=False)) == 1, name
        assert len(tokenizer.encode(name, add_special_tokens=False)) == 1, name


def test_stories_are_at_most_80_tokens(tokenizer):
    for split in ("train", "val", "test"):
        for item in json.loads((DATA / f"{split}.json").read_text()):
            story = item["story"].replace("[", "").replace("]", "")
            assert len(tokenizer.encode(story, add_special_tokens=False)) <= 80
            assert len(tokenizer.encode(" " + item["target_text"], add_special_tokens=False)) <= 5


def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello."}], tokenize=False,
                                         add_generation_prompt=True)
    assert text == "user:\nHello.\nassistant:\n"


# ------------------------------------------------------------------------------------------------ what it has learned


def slow_perplexity(model, ids, piece=128):
    """exp(mean of -log p(next token)) over separate pieces, one token at a time in the sum."""
    total = count = 0
    for start in range(0, len(ids) - piece + 1, piece):
        part = torch.tensor([ids[start : start + piece]])
        with torch.no_grad():
            log_p = model(input_ids=part).logits[0].double().log_softmax(-1)
        for position in range(piece - 1):
            total -= log_p[position, part[0, position + 1]].item()
            count += 1
    return math.exp(total / count)


def test_perplexity_is_far_below_an_untrained_copy(script, model, tokenizer):
    text = (MODEL / "heldout.txt").read_text()
    torch.manual_seed(0)
    untrained = Qwen2ForCausalLM(model.config).eval()
    ids = tokenizer.encode(text[:8000], add_special_tokens=False, verbose=False)
    trained, chance = slow_perplexity(model, ids), slow_perplexity(untrained, ids)
    assert trained < 6 < 500 < chance
    record = json.loads((MODEL / "pretraining.json").read_text())
    assert script.perplexity(model, tokenizer, text) == pytest.approx(record["heldout_perplexity"], rel=1e-3)
    some = "".join(text.splitlines(keepends=True)[:60])
    ids = tokenizer.encode(some, add_special_tokens=False, verbose=False)
    assert script.perplexity(model, tokenizer, some) == pytest.approx(slow_perplexity(model, ids), rel=1e-4)


def test_it_knows_who_is_a_man(model, tokenizer):
    """A first sign of life: after "<name> is a", the right one of man and woman for nearly every name."""
    right = 0
    for gender, names in kinship_text.NAMES.items():
        man, woman = (tokenizer.encode(f" {noun}", add_special_tokens=False)[0] for noun in ("man", "woman"))
        for name in names:
            ids = torch.tensor([tokenizer.encode(f"{name} is a", add_special_tokens=False)])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, -1]
            right += (logits[man] > logits[woman]).item() == (gender == "male")
    assert right >= 72  # of 80


# ------------------------------------------------------------------------------------------- what it must not have seen


def names_and_facts(item):
    names = [pair.split(":")[0] for pair in item["genders"].split(",")]
    return tuple(names), tuple(ast.literal_eval(item["edge_types"]))


def test_kept_out_is_every_val_and_test_item(script, held_out_items):
    assert script.kept_out(DATA) == {names_and_facts(item) for item in held_out_items}


def test_no_val_or_test_item_in_the_text(script, held_out_items):
    """A sample of the regenerated training text, and heldout.txt, against the items by three ways to look."""
    forbidden = {names_and_facts(item) for item in held_out_items}
    stories = [item[field].replace("[", "").replace("]", "")
               for item in held_out_items for field in ("story", "clean_story")]
    sentences = [frozenset(story.removesuffix(".").split(". ")) for story in stories]
    held_out = script.held_out_documents(0, script.kept_out(DATA))
    sample = list(itertools.islice(script.training_documents(0, script.kept_out(DATA), held_out), 4000))
    assert "\n".join(held_out) + "\n" == (MODEL / "heldout.txt").read_text()
    assert not {document.text for document in sample} & set(held_out)
    assert not {(document.people, document.chain) for document in sample} & forbidden
    for text in [document.text for document in sample] + held_out:
        said = set(text.removesuffix(".").split(". "))
        assert not any(story <= said for story in sentences), text
    joined = "\n".join(document.text for document in sample)
    assert not any(story in joined for story in stories)


def test_what_is_held_out_is_skipped():
    """The same stream with everything it told held out tells none of it again."""
    first = [document for document in itertools.islice(kinship_text.documents(random.Random(3)), 400)]
    held_out = {(document.people, document.chain) for document in first if document.chain}
    assert len(held_out) > 20
    again = list(itertools.islice(kinship_text.documents(random.Random(3), held_out), 400))
    assert not {(document.people, document.chain) for document in again} & held_out


def test_told_relations_are_true():
    """Whatever a chain document adds to its story follows from the chain by the composition table."""
    shapes = [re.escape(aside).replace(r"\{X\}", r"(?P<x>\w+)").replace(r"\{Y\}", r"(?P<y>\w+)")
              .replace(r"\{r\}", r"(?P<r>[a-z-]+)") for aside in kinship_text.ASIDES]
    told = 0
    for document in itertools.islice(kinship_text.documents(random.Random(1)), 3000):
        if document.kind != "chains":
            continue
        spans = itertools.combinations(range(len(document.people)), 2)
        true = {(document.people[i], kinship.fold(document.chain[i:j]), document.people[j]) for i, j in spans}
        for sentence in document.text.removesuffix(".").split(". ")[len(document.chain):]:
            match = next(filter(None, (re.fullmatch(shape, sentence + ".") for shape in shapes)))
            assert (match["x"], match["r"], match["y"]) in true, document
            told += 1
    assert told > 300


def test_task_prompt_is_not_in_the_text():
    text = " ".join(document.text for document in itertools.islice(kinship_text.documents(random.Random(2)), 4000))
    assert "related" not in text


# ----------------------------------------------------------------------------------------------------- the script

TINY = ["--hidden", "16", "--layers", "1", "--intermediate", "16", "--batch", "2", "--length", "32", "--threads", "1"]


def test_two_steps_run_and_repeat(script, tmp_path, capsys):
    for name in ("a", "b"):
        assert script.main(["--out", str(tmp_path / name), "--steps", "2", *TINY]) == 0
    assert "held-out perplexity" in capsys.readouterr().out
    for name in ("model.safetensors", "tokenizer.json", "heldout.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "heldout.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (MODEL / name).read_bytes(), f"{name} is not what ships"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a").config.hidden_size == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.slow
def test_the_first_steps_are_those_of_the_shipped_run(script, tmp_path):
    """The warm-up hides the number of steps, so 20 of them must give the first loss that the shipped run recorded."""
    assert script.main(["--out", str(tmp_path), "--steps", "20"]) == 0
    repeated, shipped = (json.loads((folder / "pretraining.json").read_text()) for folder in (tmp_path, MODEL))
    assert repeated["loss_curve"][0]["loss"] == pytest.approx(shipped["loss_curve"][0]["loss"], abs=2e-3)


@pytest.mark.parametrize(("flags", "message"), [
    (["--steps", "0"], "--steps must be from 1"),
    (["--hidden", "20"], "multiple of 8"),
    (["--learning_rate", "nan"], "--learning_rate must be above 0"),
    (["--length", "300"], "from 16 to 256"),
    (["--data", "no_such_folder"], "is missing"),
    (["--size", "big"], "unknown flag '--size'"),
])
def test_bad_input_writes_nothing(script, tmp_path, capsys, flags, message):
    assert script.main(["--out", str(tmp_path / "new"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("content", "message"), [("[{", "is not JSON"), ('[{"story": ""}]', "genders and edge_types")])
def test_data_that_is_not_ours(script, tmp_path, capsys, content, message):
    for name in ("val.json", "test.json"):
        (tmp_path / name).write_text(content)
    assert script.main(["--out", str(tmp_path / "new"), "--data", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_nan_loss_stops_with_exit_code_3(script, tmp_path, capsys, monkeypatch):
    build = script.build_model

    def broken(args, tokenizer):
        model = build(args, tokenizer)
        with torch.no_grad():
            model.model.norm.weight.fill_(math.nan)
        return model

    monkeypatch.setattr(script, "build_model", broken)
    assert script.main(["--out", str(tmp_path / "new"), "--steps", "2", *TINY]) == 3
    assert "at step 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
