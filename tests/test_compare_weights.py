"""The comparison of what trains: the search for a step size, every arm's number of weights, resumption, the table."""
from __future__ import annotations

import copy
import json
import math
import statistics

import pytest
import torch
from scripts_loader import load_script
from tiny_text import build_decoder

from benchmarks import studies, weight_arms
from benchmarks.weight_cells import TRIAL_SEED, UNTRAINED, Cell, Comparison, next_trial, step_size, table_of
from stt.errors import InputError, TrainingFailed
from stt.words import T

script = load_script("compare_weights")
ROWS = [{"input_ids": ids, "labels": ids} for ids in
        torch.randint(3, 60, (80, 9), generator=torch.Generator().manual_seed(0)).tolist()]


def study() -> studies.Study:
    def perplexity(model):
        ids = torch.tensor([row["input_ids"] for row in ROWS])
        with torch.no_grad():
            return math.exp(float(model.eval()(input_ids=ids, labels=ids).loss))
    return weight_arms.adapted(studies.Study(
        build_decoder(60), ROWS, lambda seed: ROWS[seed % 40:][:40], perplexity, lambda model: 2 * perplexity(model), 4,
        "constant", 0, validate=lambda model: 3 * perplexity(model)))


# ---------------------------------------------------------------- the step size


def test_step_sizes():
    assert [step_size(place) for place in range(-9, 3)] == [
        0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]


@pytest.mark.parametrize("optimum", range(-12, 0))
def test_the_search_ends_between_two_worse_ones(optimum):
    losses = {}
    while (place := next_trial(losses)) is not None:
        assert place not in losses
        losses[place] = math.inf if place > optimum + 1 else abs(place - optimum - 0.1)
    assert min(losses, key=losses.get) == optimum
    assert {optimum - 1, optimum, optimum + 1} <= {*losses}
    assert len(losses) >= 4
    assert sorted(losses) == list(range(min(losses), max(losses) + 1))


def test_a_search_without_end():
    losses = {place: -place for place in range(-8, 7)}
    assert next_trial(losses) == 7
    with pytest.raises(TrainingFailed, match="no step size from 0.002 to 200 is better than its neighbours"):
        next_trial(losses | {7: -7})


# ---------------------------------------------------------------- the arms


def changed(model, base) -> int:
    """Entries of the tensors of `base` that differ in `model`."""
    tensors = dict(model.named_parameters())
    return sum(int((tensors[name] != tensor).sum()) for name, tensor in base.named_parameters())


def order_of(monkeypatch, tried, ready, cell):
    """Train, and the batches in the order in which they are put together."""
    seen, collate = [], studies.collate
    with monkeypatch.context() as patched:
        patched.setattr(studies, "collate", lambda pad: lambda rows: seen.append(rows) or collate(pad)(rows))
        studies.train(tried, ready.model, 5, cell.lr, cell.seed, make_optimizer=ready.make_optimizer)
    return seen[:5]


@pytest.fixture(scope="module")
def order():
    tried, patch = study(), pytest.MonkeyPatch()
    return order_of(patch, tried, weight_arms.Ready(copy.deepcopy(tried.model)), Cell("full", 0, 0.02, 3))


@pytest.mark.parametrize(("arm", "budget"), weight_arms.plan(study(), list(weight_arms.ARMS), (2900,)))
def test_arms(arm, budget, order, monkeypatch):
    """As many weights train as are said to, near the budget, and all arms see the data in the same order."""
    tried = study()
    cell = Cell(arm, budget, 0.01, 3)
    ready = weight_arms.ARMS[arm](tried, copy.deepcopy(tried.model), cell)
    assert order_of(monkeypatch, tried, ready, cell) == order
    row = weight_arms.run(tried, cell, 5)
    assert row == {"trained": ready.trained, "test": math.log(tried.task(ready.model)),
                   "general": pytest.approx(row["test"] + math.log(2))}
    assert row["test"] < math.log(tried.task(tried.model))
    if arm == "LoRA":
        return  # see test_the_rank
    nearest = 0 if arm != "neurons by stt" else 2 * 3 * 32 // 2  # of both layers half a neuron
    assert abs(row["trained"] - budget) <= nearest
    assert 0.5 * row["trained"] < changed(ready.model, tried.model) <= row["trained"]  # few words occur in five steps


def test_the_rank():
    """Of LoRA: what it trains comes as near to the budget as that of any rank."""
    tried = study()
    per_rank = sum(sum(module.weight.shape) for name, module in tried.model.named_modules()
                   if isinstance(module, torch.nn.Linear) and name != "lm_head")
    for budget in (10, 1.4 * per_rank, 1.6 * per_rank, 3 * per_rank):
        ready = weight_arms.lora(tried, copy.deepcopy(tried.model), Cell("LoRA", int(budget), 0.1, 0))
        assert abs(ready.trained - budget) == min(abs(per_rank * rank - budget) for rank in range(1, 9))


@pytest.mark.parametrize("arm", ["LoRA", "random", "gradient", "neurons by stt"])
def test_the_seed_decides_where_training_starts(arm):
    """By the adapters' first values, or by which weights are chosen."""
    tried = study()

    def start(seed):
        model = weight_arms.ARMS[arm](tried, copy.deepcopy(tried.model), Cell(arm, 2900, 0.1, seed)).model
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


def test_the_plan():
    total = sum(tensor.numel() for tensor in study().model.parameters())
    vectors = sum(tensor.numel() for tensor in study().model.parameters() if tensor.dim() == 1)
    names = ["full", "random", "norms (BitFit)", "LoRA"]
    assert weight_arms.plan(study(), names, (10, 20)) == [
        ("full", total), ("norms (BitFit)", vectors), ("random", vectors),
        ("random", 10), ("LoRA", 10), ("random", 20), ("LoRA", 20)]
    assert weight_arms.plan(study(), ["random", "full"], (10,)) == [("full", total), ("random", 10)]
    with pytest.raises(InputError, match="'randon'.*random"):
        weight_arms.plan(study(), ["randon"], (10,))
    for budget in (0, total):
        with pytest.raises(InputError, match=f"from 1 to {total - 1:,} weights, got {budget:,}"):
            weight_arms.plan(study(), ["random"], (budget,))


def test_a_training_without_a_loss():
    """As a trial it is a result."""
    broken = weight_arms.replace(study(), validate=lambda _: math.inf, task=lambda _: math.nan)
    row = weight_arms.run(broken, Cell("random", 10, 0.1, TRIAL_SEED), 1)
    assert row["validation"] is None
    with pytest.raises(TrainingFailed, match="random with 10 weights and step size 0.1: the loss of seed 2 is no num"):
        weight_arms.run(broken, Cell("random", 10, 0.1, 2), 1)
    found = Comparison([{"arm": "random", "budget": 10, "lr": 0.1, "seed": TRIAL_SEED, **row}])
    assert found.losses("random", 10) == {-3: math.inf}


# ---------------------------------------------------------------- the whole, with trainings that are made up


def made_up(study, cell, steps):
    """The best step size is 0.05 for random and 0.005 for the others; a seed adds a hundredth."""
    if cell == UNTRAINED:
        return {"trained": 0, "test": 5.0, "general": 2.0}
    place = next(place for place in range(-20, 9) if step_size(place) == cell.lr)
    loss = (1 if cell.arm == "random" else 0.9) + (place - (-4 if cell.arm == "random" else -7)) ** 2
    if cell.is_trial:
        return {"trained": cell.budget, "validation": loss}
    extra = 0.01 * cell.seed if cell.arm == "random" else 0.03 * cell.seed
    return {"trained": cell.budget, "test": loss + extra, "general": 3.0 + cell.seed}


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "shakespeare", study)
    monkeypatch.setattr(weight_arms, "run", made_up)
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- weights-7 -->\nold\n<!-- end of weights-7 -->\nb\n")
    return ["--arms", "random", "largest (Super-Tuning)", "full", "--budgets", "50", "--seeds", "3", "--steps", "7",
            "--out", str(tmp_path), "--page", str(page)]


def test_table_and_resumption(comparison, tmp_path, monkeypatch, capsys):
    assert script.main(comparison) == 0
    rows = [json.loads(line) for line in (tmp_path / "weights-7.jsonl").read_text().splitlines()]
    assert len({(row["arm"], row["budget"], row["lr"], row["seed"]) for row in rows}) == len(rows) == 1 + 4 + 6 + 4 + 9
    assert not [row for row in rows if row["seed"] == TRIAL_SEED and "test" in row]
    table = capsys.readouterr().out.strip()
    assert (tmp_path / "page.md").read_text() == "\n".join(
        ["a", "<!-- weights-7 -->", table, "<!-- end of weights-7 -->", "b", ""])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    total = f"{sum(tensor.numel() for tensor in study().model.parameters()):,}"
    gaps = [-0.1 + 0.02 * seed for seed in range(3)]
    half = T[1] * statistics.stdev(gaps) / 3**0.5
    assert cells[2:] == [
        ["–", "nothing", "0", "–", "–", "5.000", "–", "2.000", "–"],
        ["50", "random", "50", "0.05", "1.000", "1.010 ± 0.010", "–", "4.000 ± 1.000", "+2.000"],
        ["50", "largest (Super-Tuning)", "50", "0.005", "0.900", "0.930 ± 0.030",
         f"-0.080 [{-0.08 - half:+.3f}, {-0.08 + half:+.3f}]", "4.000 ± 1.000", "+2.000"],
        [total, "full", total, "0.005", "0.900", "0.930 ± 0.030", "–", "4.000 ± 1.000", "+2.000"]]
    monkeypatch.setattr(weight_arms, "run", lambda *_: pytest.fail("a training was run again"))
    assert script.main(comparison) == 0
    assert capsys.readouterr().out.strip() == table


def test_interrupted_in_the_middle_of_a_row(comparison, tmp_path):
    path = tmp_path / "weights-7.jsonl"
    assert script.main(comparison) == 0
    whole = path.read_text()
    path.write_text(whole[:len(whole) // 2])
    assert len(studies.read_rows(path)) < len(whole.splitlines())
    assert script.main(comparison) == 0
    assert path.read_text() == whole


def test_what_was_not_run_is_not_in_the_table():
    found = Comparison([{"arm": "none", "budget": 0, "lr": 0.0, "seed": 0, "trained": 0, "test": 1.0, "general": 1.0}])
    assert len(table_of(found, [("random", 5)])) == 3


@pytest.mark.parametrize(("change", "words"), [
    (["--arms", "randon"], "unknown arm 'randon'"),
    (["--budgets", "9999999"], "a budget must be from 1 to"),
    (["--page", "nowhere.md"], "there is no page nowhere.md: give a file that has the lines <!-- weights-7 -->"),
])
def test_wrong_input(comparison, tmp_path, capsys, change, words):
    assert script.main([*comparison, *change]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert not (tmp_path / "weights-7.jsonl").exists()


def test_numbers_below_one(capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--steps", "0"])
    assert stop.value.code == 2
    assert "--seeds and --steps must be at least 1, got 3 and 0" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "words"), [(None, "STT_TEST_DATA is not set: set it to the folder of real data"),
                                              ("/nowhere", "STT_TEST_DATA=/nowhere has no stories260k/hf: set it to")])
@pytest.mark.parametrize(("program", "flags"), [("compare_weights", []), ("compare_scores", ["shakespeare"])])
def test_without_data(program, flags, value, words, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("STT_TEST_DATA", raising=False)
    if value:
        monkeypatch.setenv("STT_TEST_DATA", value)
    assert load_script(program).main([*flags, "--out", str(tmp_path / "rows")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


def test_real_data(data_dir):
    """What is trained on, validated on and tested on are apart, and the model knows stories better than plays."""
    real = studies.shakespeare()
    general, task, other = real.general(real.model), real.task(real.model), real.validate(real.model)
    assert general < 10 < task
    assert task != other
    text = (data_dir / "lm_text" / "tinyshakespeare.txt").read_text()
    assert len(text) - int(0.9 * len(text)) > 2 * studies.PART
