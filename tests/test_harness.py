"""`stt eval --harness`: the harness's likelihoods are our own."""
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from small_runs import SHIPPED
from transformers import AutoModelForCausalLM, AutoTokenizer

import stt
from stt import verbs
from stt.harness import run_harness
from stt.loss import answer_nll
from stt.selection import Selection

ROWS = [("The children went to the", " park to play.", " moon."), ("She opened the door and", " smiled.", " the the."),
        ("Once upon a time there was a", " little girl.", " of and.")]
TASK = """task: likelihood_of_endings
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one task of the three rows."""
    rows = [{"start": start, "right": right, "wrong": wrong} for start, right, wrong in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    task = TASK.format(rows=tmp_path / "rows.jsonl", cache=tmp_path / "cache")
    (tmp_path / "tasks" / "task.yaml").write_text(task)
    return tmp_path / "tasks"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a sliced checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    stt.apply(model, Selection({next(iter(stt.find_sites(model))): range(300)}))
    stt.save(model, tmp_path / "run" / "checkpoint", AutoTokenizer.from_pretrained(SHIPPED))
    return tmp_path / "run"


def own_likelihood(model: torch.nn.Module, tokenizer: object, start: str, ending: str) -> float:
    """log p(ending | start) in nats, by the function our own evaluation uses."""
    ids, context = (torch.tensor([tokenizer(text).input_ids]) for text in (start + ending, start))
    labels = ids.clone()
    labels[:, :context.shape[1]] = -100
    return -answer_nll(model, {"input_ids": ids}, labels)[0]


def test_likelihoods_are_our_own(tasks: Path, run: Path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]' -c requirements.txt")
    for folder in (run / "checkpoint", SHIPPED):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = run_harness(model, tokenizer, ["likelihood_of_endings"], str(tasks), batch_size=2, samples=True)
        samples = sorted(found["samples"]["likelihood_of_endings"], key=lambda sample: sample["doc_id"])
        expected = [[own_likelihood(model, tokenizer, start, ending) for ending in endings] for start, *endings in ROWS]
        for sample, own in zip(samples, expected, strict=True):
            assert [value for value, _ in sample["filtered_resps"]] == pytest.approx(own, abs=1e-4)
        right = sum(first > second for first, second in expected) / len(ROWS)
        assert found["results"]["likelihood_of_endings"]["acc,none"] == pytest.approx(right)


def test_the_command(tasks: Path, run: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]' -c requirements.txt")
    command = ["eval", str(run), "--include", str(tasks), "--limit", "2", "--harness", "likelihood_of_*"]
    assert verbs.main(command) == 0
    assert "likelihood_of_endings" in capsys.readouterr().out
    written = json.loads((run / "harness.json").read_text())
    assert 0 <= written["results"]["likelihood_of_endings"]["acc,none"] <= 1
    assert written["n-samples"]["likelihood_of_endings"]["effective"] == 2
    assert written["limit"] == 2


@pytest.mark.slow
def test_an_unknown_task(tasks: Path, run: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]' -c requirements.txt")
    assert verbs.main(["eval", str(run), "--include", str(tasks), "--harness", "likelihood_of_ending"]) == 2
    assert "has no task 'likelihood_of_ending': did you mean likelihood_of_endings" in capsys.readouterr().err


def test_without_the_harness_there_is_a_sentence(run: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert verbs.main(["eval", str(run), "--harness", "arc_easy"]) == 2
    assert "--harness needs lm-eval, which is not installed: pip install" in capsys.readouterr().err
    assert os.listdir(run) == ["checkpoint"]


@pytest.mark.parametrize(("flags", "message"), [
    (["--harness"], "no task given"), (["--harness", "x", "--limit", "0"], "limit must be 1 or more"),
    (["--harness", "x", "--shots", "-1"], "shots must be 0 or more"),
    (["--harness", "x", "--out", "missing/x.json"], "no folder 'missing' for x.json"),
    (["--harness", "x", "--include", "missing"], "no folder 'missing' with task files")])
def test_mistakes(flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("stt.harness.check_installed", lambda: None)
    assert verbs.main(["eval", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
