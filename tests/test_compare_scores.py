"""The comparison of scores: its cells, its resumption, and its table by hand."""
from __future__ import annotations

import json
import statistics

import pytest
import torch
from scripts_loader import load_script
from tiny_text import build_decoder

from stt.words import T

compare = load_script("compare_scores")
ROWS = [{"input_ids": ids, "labels": ids} for ids in
        torch.randint(3, 60, (40, 9), generator=torch.Generator().manual_seed(0)).tolist()]


def study():
    def loss(model):
        ids = torch.tensor([row["input_ids"] for row in ROWS])
        with torch.no_grad():
            return float(model.eval()(input_ids=ids, labels=ids).loss)
    return compare.Study(build_decoder(60), ROWS, lambda seed: ROWS[seed:seed + 20], loss, lambda model: -loss(model),
                         4, "constant", 0)


FLAGS = ["shakespeare", "--scores", "stt", "random", "--kept", "0.5", "--seeds", "2", "--steps", "0", "3"]


@pytest.fixture
def ran(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(compare.STUDIES, "shakespeare", (study, "loss", (0, 3)))
    assert compare.main([*FLAGS, "--out", str(tmp_path)]) == 0
    return tmp_path / "shakespeare-3.jsonl", capsys.readouterr().out


def test_every_cell_once_and_resumed(ran, monkeypatch, tmp_path):
    path, table = ran
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({(r["seed"], r["kept"], r["score"], r["compensate"]) for r in rows}) == len(rows) == 2 * 2 * 3
    for row in rows:
        assert row["task_3"] < row["task_0"] == -row["general_0"]  # it learns
        assert row["general_3"] == -row["task_3"]
    assert len({row["task_0"] for row in rows}) == len(rows)  # no two cells are the same model
    assert table.count("\n") == 2 + 6
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["seed"] == 0 or row["score"] == "stt"))
    assert compare.main([*FLAGS, "--out", str(tmp_path)]) == 0
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(again, key=compare.key_of) == sorted(rows, key=compare.key_of)
    monkeypatch.setattr(compare, "one", lambda *_: pytest.fail("a cell was run again"))
    assert compare.main([*FLAGS, "--out", str(tmp_path)]) == 0
    assert compare.read(path, (0, 3)) == again
    assert compare.read(path, (0, 2, 3)) == []  # nothing was measured after two steps


def test_the_table_by_hand(tmp_path):
    def row(seed, score, task, how="none"):
        return {"seed": seed, "kept": 0.3, "score": score, "compensate": how, "task_5": task, "general_0": 10 * task,
                "general_5": 100 + seed}

    rows = [row(0, "random", 0.1), row(1, "random", 0.2), row(0, "wanda", 0.4), row(1, "wanda", 0.6),
            row(0, "random", 0.5, "mean")]
    lines = compare.table_of(rows, (0.3,), (5,), "accuracy")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["score", "compensate", "30% kept: accuracy %, 5 steps", "30% kept: minus random",
                        "30% kept: general perplexity, cut → trained"]
    assert cells[2] == ["random", "none", "15.0 ± 7.1", "–", "1.5 → 100"]
    assert cells[3] == ["random", "mean", "50.0", "–", "5 → 100"]
    gaps = [30, 40]
    half = T[0] * statistics.stdev(gaps) / 2**0.5
    assert cells[4] == ["wanda", "none", "50.0 ± 14.1", f"+35.00 [{35 - half:+.2f}, {35 + half:+.2f}]", "5 → 100"]
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- scores: x-5 -->\nold\n<!-- end of scores: x-5 -->\nb\n")
    compare.write_between_marks(page, "scores: x-5", "\n".join(lines))
    assert page.read_text() == "\n".join(["a", "<!-- scores: x-5 -->", *lines, "<!-- end of scores: x-5 -->", "b", ""])
