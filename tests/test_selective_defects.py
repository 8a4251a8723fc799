"""What the public package gets wrong, by the number of the defect: each stays right here."""
from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from masked import batches, build, loss_of, train, weights
from test_selective_optimizer import chosen, selective
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, SGD, Adafactor, AdamW, Muon, Optimizer, SparseAdam

from stt.errors import InputError
from stt.selective_optimizers.optimizer import SelectiveOptimizer
from stt.selective_optimizers.schedules import Schedule, Static
from stt.selective_optimizers.select import select_weights
from stt.selective_optimizers.wrap import get_selective_optimizer


def changed(model: nn.Module) -> int:
    """How many weights are not those the model was built with."""
    return int((weights(model) != weights(build())).sum())


@pytest.mark.parametrize("steps", [1, 3, 10, 64])
@pytest.mark.parametrize("budget", [1, 9, 105, 511])
def test_d01_the_budget_is_met_exactly_whatever_the_steps(budget: int, steps: int) -> None:
    """Also where it does not divide, and where some steps add none."""
    model = build()
    optimizer = selective(model, budget=budget, max_steps=steps, lr=1e-2)
    used = []
    for batch in batches(steps):
        train(model, optimizer, [batch])
        used.append(optimizer.get_budget_used())
    added = [count - before for count, before in zip(used, [0, *used], strict=False)]
    assert added == [budget // steps + (t < budget % steps) for t in range(steps)]
    assert used[-1] == budget
    assert changed(model) <= budget


@pytest.mark.parametrize("method", ["id3", "pafi"])
def test_d02_nothing_is_chosen_after_the_last_step(method: str) -> None:
    model = build()
    optimizer = selective(model, method, budget=100, lr=1e-2)
    train(model, optimizer, batches(25))
    assert optimizer.get_budget_used() == changed(model) == 100


@pytest.mark.parametrize("method", ["id3", "pafi"])
@pytest.mark.parametrize("decay", ["group", "keyword", "place"])
def test_d03_weight_decay_acts_on_chosen_weights_alone(method: str, decay: str) -> None:
    model = build()
    own = {"budget": 100} | ({"max_steps": 10} if method == "id3" else {})
    params = [{"params": model.parameters(), "weight_decay": 0.5}] if decay == "group" else model.parameters()
    place = (1e-2, (0.9, 0.999), 1e-8, 0.5) if decay == "place" else ()
    keywords = {} if decay == "place" else {"lr": 1e-2} | ({"weight_decay": 0.5} if decay == "keyword" else {})
    optimizer = get_selective_optimizer(AdamW, method)(params, *place, **own | keywords)
    train(model, optimizer, batches(10))
    assert changed(model) == 100
    plain = build()
    train(plain, selective(plain, method, budget=100, lr=1e-2, weight_decay=0.0), batches(10))
    assert not torch.equal(weights(plain), weights(model))  # and on these it acts


def test_d04_a_closure_is_masked_like_any_step() -> None:
    model = build()
    optimizer = selective(model, budget=100, lr=1e-2)  # no backward pass before the first call

    for batch in batches(10):
        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss
        assert optimizer.step(closure) > 0
    assert changed(model) == 100


@pytest.mark.parametrize("base", [Muon, LBFGS, Adafactor, SparseAdam], ids=lambda base: base.__name__)
def test_d05_optimizers_that_mix_weights_are_refused(base: type[Optimizer]) -> None:
    with pytest.raises(InputError, match=f"{base.__name__} does not train single weights"):
        selective(build(), base=base)


class Normed(SGD):
    """Moves every tensor by a share of its norm, as LARS and LAMB do."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for tensor in group["params"]:
                tensor.sub_(tensor.grad / tensor.grad.norm() * tensor.norm(), alpha=group["lr"])


class Blockwise(SGD):
    """Keeps one number for every two weights, as 8-bit optimizers do."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        super().step()
        for group in self.param_groups:
            for tensor in group["params"]:
                self.state[tensor]["scale"] = torch.ones(tensor.numel() // 2)


def test_d05_optimizers_of_others_are_tried_out() -> None:
    """Also where the first rate is 0, as at the start of a warm-up."""
    for lr in (0.0, 1e-9, 0.1):
        with pytest.raises(InputError, match="Normed does not train single weights.*what its neighbours are"):
            selective(build(), base=Normed, lr=lr)
    with pytest.raises(InputError, match="Blockwise does not.*not one number per weight"):
        selective(build(), base=Blockwise, lr=0.1)


def test_d05_an_optimizer_that_moves_weights_without_a_gradient() -> None:
    model = build()
    train(model, selective(model, base=ASGD, budget=100, lr=1e-2), batches(12))
    assert changed(model) == 100


class Marked(nn.Module):
    """Weights whose gradients are given numbers."""

    def __init__(self, *gradients: list[float], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.given = [torch.tensor(gradient, dtype=dtype) for gradient in gradients]
        self.weights = nn.ParameterList(torch.ones(len(gradient), dtype=dtype) for gradient in gradients)

    def backward(self) -> None:
        for weight, gradient in zip(self.weights, self.given, strict=True):
            weight.grad = gradient.clone()


def ids_of(model: nn.Module, optimizer: SelectiveOptimizer) -> dict[str, list[int]]:
    return {name: ids.tolist() for name, ids in optimizer.selection(model).items()}


def test_d06_ties_go_to_the_earlier_weight_and_higher_scores_come_first() -> None:
    model = Marked([0.0] * 50, [2.0, *[1.0] * 99], [0.0, 3.0, 1.0])
    optimizer = selective(model, budget=10, max_steps=1, lr=1e-2, exp=0.0)
    model.backward()
    optimizer.step()
    assert ids_of(model, optimizer) == {"weights.1": list(range(9)), "weights.2": [1]}


def test_d06_the_highest_of_coarse_scores_are_chosen() -> None:
    """In bfloat16 many scores are equal; every one above the lowest that was chosen must be chosen."""
    torch.manual_seed(0)
    model = Marked(*((torch.randn(size) * 9).round().tolist() for size in (700, 90, 400)), dtype=torch.bfloat16)
    optimizer = selective(model, budget=300, max_steps=1, lr=1e-2, exp=0.0)
    model.backward()
    optimizer.step()
    score, is_chosen = torch.cat(model.given).abs(), chosen(model, optimizer)
    least = score[is_chosen].min()
    assert is_chosen[score > least].all()
    assert int(is_chosen.sum()) == 300
    ties = is_chosen[score == least]
    assert ties.tolist() == sorted(ties.tolist(), reverse=True)  # the first of them
    assert len(ties) > int(ties.sum()) > 0


class Late(Schedule):
    """One weight, and a second one after `wait` steps."""

    grows = True

    def __init__(self, wait: int):
        super().__init__()
        self.wait = wait

    def total(self, k: int) -> int:
        return 1 if self.done < self.wait else 2


@pytest.mark.parametrize("correction", ["global", "entry"])
def test_d07_the_first_update_of_a_late_weight(correction: str) -> None:
    """A constant gradient, chosen after t steps: the step count of all makes it (1-b1)/(1-b1^t) * sqrt((1-b2^t)/(1-b2))
    times the rate, its own step count once the rate."""
    model, wait, lr = Marked([2.0, 1.0]), 600, 1e-3
    optimizer = SelectiveOptimizer(model.parameters(), AdamW, Late(wait), budget=2, lr=lr, weight_decay=0.0,
                                   bias_correction=correction)
    for _ in range(wait + 1):
        model.backward()
        optimizer.step()
    boost = 0.1 / (1 - 0.9 ** (wait + 1)) * ((1 - 0.999 ** (wait + 1)) / 0.001) ** 0.5
    assert boost > 2
    moved = 1 - model.weights[0][1].item()
    assert moved == pytest.approx(lr * (boost if correction == "global" else 1), rel=1e-3)


def test_d08_clipping_looks_at_the_chosen_gradients() -> None:
    """The gradient of the rest is a hundred times larger, and does not count."""
    model = Marked([300.0, 400.0], [3.0, 4.0])
    optimizer = SelectiveOptimizer(model.named_parameters(), SGD, Static(
        select_weights(model, score="smallest", budget=2, exclude=["weights.0"])), budget=2, lr=1.0, max_grad_norm=1.0)
    model.backward()
    optimizer.step()
    torch.testing.assert_close(model.weights[1].detach(), 1 - torch.tensor([0.6, 0.8]))
    assert torch.equal(model.weights[0].detach(), torch.ones(2))


@pytest.mark.parametrize("method", ["id3", "pafi", "bitfit"])
def test_d09_tensors_without_gradient_and_frozen_ones(method: str) -> None:
    """An unused layer and a frozen one, also in a group that trains whole."""
    model = nn.ModuleDict({"net": build(), "unused": nn.Linear(4, 4), "frozen": nn.Linear(4, 4),
                           "head": nn.Linear(3, 3)})
    model["frozen"].requires_grad_(False)
    model["head"].bias.requires_grad_(False)
    body = [p for name in ("net", "unused", "frozen") for p in model[name].parameters()]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    own = {"max_steps": 10} if method == "id3" else {"model": model} if method == "bitfit" else {}
    budget = 9 + (20 if method == "bitfit" else 100)
    optimizer = get_selective_optimizer(AdamW, method)(
        [{"params": body}, {"params": model["head"].parameters(), "choose_all": True}], lr=1e-2, budget=budget, **own)
    for inputs, labels in batches(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model["head"](model["net"](inputs)), labels).backward()
        optimizer.step()
    assert optimizer.get_budget_used() == budget
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert not moved & {"unused.weight", "unused.bias", "frozen.weight", "frozen.bias", "head.bias"}
    assert {"head.weight", "net.0.bias"} <= moved
    if method == "id3":
        assert not {"unused.weight", "unused.bias"} & optimizer.selection(model).keys()


def test_d10_summaries_are_read_and_written_by_the_published_calls(tmp_path: Path) -> None:
    from stt.selective_optimizers.load_store import (
        load_summary_from_disk,
        load_weights_from_summary,
        write_summary_to_disk,
    )
    model, base = build(), build()
    optimizer = selective(model, lr=1e-2)
    train(model, optimizer, batches(12))
    write_summary_to_disk(tmp_path / "summary.pt", optimizer.get_summary(model))
    load_weights_from_summary(base, load_summary_from_disk(tmp_path / "summary.pt"))
    assert torch.equal(weights(base), weights(model))


@pytest.mark.parametrize("method", ["id3", "pafi"])
@pytest.mark.parametrize("fused", [True, False])
def test_d12_an_overflow_skips_the_whole_step(method: str, fused: bool) -> None:
    """Nothing is chosen by infinite gradients, nothing moves, and the schedule does not count the step."""
    model = build()
    optimizer = selective(model, method, budget=100, lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)
    for i, batch in enumerate(batches(13)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch) * (torch.inf if i in (0, 4, 7) else 1)).backward()
        before, used = weights(model), optimizer.get_budget_used()
        scaler.step(optimizer)
        scaler.update()
        if i in (0, 4, 7):
            assert torch.equal(weights(model), before)
            assert optimizer.get_budget_used() == used
    clean = build()
    expected = selective(clean, method, budget=100, lr=1e-2, fused=fused)
    train(clean, expected, [batch for i, batch in enumerate(batches(13)) if i not in (0, 4, 7)])
    assert torch.equal(chosen(model, optimizer), chosen(clean, expected))
    torch.testing.assert_close(weights(model), weights(clean), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", ["id3", "pafi"])
def test_d12_a_bad_gradient_without_a_scaler_skips_the_step(method: str, bad: float,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    optimizer = selective(model, method, lr=1e-2)
    used = optimizer.get_budget_used()
    loss_of(model, batches(1)[0]).backward()
    for parameter in model.parameters():
        parameter.grad.fill_(bad)
    optimizer.step()
    assert changed(model) == 0
    assert optimizer.get_budget_used() == used
    assert "this step is skipped" in caplog.text
    train(model, optimizer, batches(10))
    assert changed(model) == 105


def test_d13_nothing_is_copied_or_written_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    model = build()
    optimizer = selective(model, "pafi", budget=20, lr=1e-2)
    train(model, optimizer, batches(2))
    assert not list(tmp_path.iterdir())
    held = sum(value.numel() for value in tensors_in(optimizer.state_dict()))
    assert held < 20 * 6  # ids, values, start values and two moments
    optimizer.post_train_work()


def tensors_in(state: object) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    members = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [value for member in members for value in tensors_in(member)]


def test_d14_a_group_may_come_later() -> None:
    model = build()
    optimizer = get_selective_optimizer(AdamW, "id3")(model[:-1].parameters(), lr=1e-2, budget=144, max_steps=10)
    train(model, optimizer, batches(5))
    optimizer.add_param_group({"params": model[-1].parameters(), "choose_all": True, "lr": 1e-3})
    assert optimizer.get_budget_used() == 5 * 14 + 4 + 39
    train(model, optimizer, batches(5, seed=2))
    assert optimizer.get_budget_used() == changed(model) == 144
    with pytest.raises(InputError, match="the budget 0 left"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "choose_all": True})
    static = selective(build(), "pafi", budget=50, lr=1e-2)
    with pytest.raises(InputError, match="has chosen already"):
        static.add_param_group({"params": [("late", nn.Parameter(torch.ones(3)))]})
    assert len(static.param_groups) == 1


def test_d14_step_hooks_run_once() -> None:
    model = build()
    AdamW(build().parameters()).step()  # a base optimizer was there before
    optimizer, calls = selective(model, lr=1e-2), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, batches(3))
    assert calls == ["before", "after"] * 3


@pytest.mark.parametrize("method", ["id3", "pafi"])
def test_d14_copies_are_whole(method: str) -> None:
    model = build()
    optimizer = selective(model, method, lr=1e-2)
    train(model, optimizer, batches(3))
    other, copied = copy.deepcopy((model, optimizer))
    assert copied.get_budget_used() == optimizer.get_budget_used()
    assert copied.selection(other) == optimizer.selection(model)


def without_biases() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12, bias=False), nn.RMSNorm(12), nn.Linear(12, 3, bias=False))


def test_d15_bitfit_trains_biases_and_changes_no_flag() -> None:
    model = build()
    optimizer = selective(model, "bitfit", budget=40, lr=1e-2)
    assert ids_of(model, optimizer) == {"0.bias": list(range(20)), "1.bias": list(range(20))}
    train(model, optimizer, batches(3))
    assert changed(model) == 40
    assert all(parameter.requires_grad for parameter in model.parameters())
    truncated = selective(build(), "bitfit", budget=27, lr=1e-2)
    assert truncated.get_budget_used() == 27
    with pytest.raises(InputError, match="no bias for BitFit.*include_norm=True"):
        selective(without_biases(), "bitfit", budget=10)
    norms = without_biases()
    assert ids_of(norms, selective(norms, "bitfit", budget=10, include_norm=True)) == {"1.weight": list(range(10))}


def test_d15_bitfit_without_names_says_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    optimizer = get_selective_optimizer(AdamW, "bitfit")(model.parameters(), lr=1e-2, budget=75)
    assert "tensors without names" in caplog.text
    assert ids_of(model, optimizer).keys() == {"0.bias", "1.weight", "1.bias", "3.bias", "5.bias"}
    caplog.clear()
    named = get_selective_optimizer(AdamW, "bitfit")(model.parameters(), lr=1e-2, budget=55, model=model)
    assert ids_of(model, named).keys() == {"0.bias", "1.bias", "3.bias", "5.bias"}
    assert not caplog.text


def test_d17_tensors_that_hardly_learn_can_be_left_out() -> None:
    """Most rows of an embedding get no gradient from a batch: the budget need not go there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 6), nn.Flatten(), nn.Linear(18, 4))
    loss: Callable[[], Tensor] = lambda: model(torch.tensor([[1, 2, 3], [4, 5, 6]])).square().sum()  # noqa: E731

    def idle(**arguments: object) -> int:
        selection = select_weights(model, score="smallest", budget=40, **arguments)
        optimizer = SelectiveOptimizer(model.named_parameters(), SGD, Static(selection), budget=40, lr=0.1)
        optimizer.zero_grad()
        loss().backward()
        return sum(int((tensor.grad.flatten()[selection[name]] == 0).sum())
                   for name, tensor in model.named_parameters() if name in selection)

    assert idle() > 10
    assert idle(exclude=["0.*"]) == 0
