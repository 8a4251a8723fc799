"""When which weights train: growth, regrowth, blocks in turn; gradients taken during the backward pass; ties."""
from __future__ import annotations

import gc
import io
from collections.abc import Callable

import pytest
import torch
from masked import batches, build, loss_of, train, weights
from test_selective_optimizer import chosen, selective
from torch import nn
from torch.optim import AdamW, NAdam, Optimizer

from stt.errors import InputError
from stt.selective_optimizers import scores
from stt.selective_optimizers.choose import best, top_entries
from stt.selective_optimizers.optimizer import SelectiveOptimizer
from stt.selective_optimizers.patch import Patch
from stt.selective_optimizers.schedules import SHAPES, Grow, Regrow, Rotate, Schedule
from stt.selective_optimizers.wrap import get_selective_optimizer


def with_schedule(model: nn.Module, schedule: Schedule, budget: int, **arguments: object) -> SelectiveOptimizer:
    return SelectiveOptimizer(model.named_parameters(), AdamW, schedule, budget=budget, **{"lr": 1e-2} | arguments)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_every_shape_of_growth_ends_at_the_budget(shape: str, steps: int) -> None:
    model = build()
    optimizer = selective(model, max_steps=steps, schedule=shape, lr=1e-2)
    used = [0]
    for batch in batches(steps + 2):
        train(model, optimizer, [batch])
        used.append(optimizer.get_budget_used())
    assert used == sorted(used)
    assert used[steps] == used[-1] == 105
    assert used[steps - 1] < 105 or shape != "uniform"


def test_front_loaded_growth_is_ahead_of_the_linear_and_that_of_the_uniform_one() -> None:
    at_a_quarter = {shape: total(1000, 24, 100) for shape, total in SHAPES.items()}
    assert at_a_quarter == {"uniform": 250, "linear": 438, "front": 578}  # 1-(3/4)^2 = 0.4375, 1-(3/4)^3 = 0.578


def test_wrong_numbers_of_steps_are_told() -> None:
    with pytest.raises(InputError, match="max_steps= must be a number of optimizer steps.*got None"):
        Grow(None, scores.make("d3"))
    with pytest.raises(InputError, match="every= must be"):
        Regrow(scores.make("random"), 0, 10)
    with pytest.raises(InputError, match="every= must be"):
        Rotate([[nn.Parameter(torch.ones(1))]], 0)
    with pytest.raises(InputError, match="rate= must be a share.*got 2"):
        Regrow(scores.make("random"), 3, 10, 2)


def test_a_score_that_needs_more_than_a_gradient_cannot_grow() -> None:
    with pytest.raises(InputError, match="Fisher needs more than the gradient of a step"):
        Grow(10, scores.make("fisher"))
    with pytest.raises(InputError, match="Gradient looks at data.*select_weights"):
        with_schedule(build(), Regrow(scores.make("gradient"), 3, 10), 50)


@pytest.mark.parametrize("correction", ["global", "entry"])
def test_regrowth_keeps_the_budget_and_puts_the_dropped_back(correction: str) -> None:
    """Against the rule itself: of 50 weights, round(0.4 * (1 - t/12) * 50) that moved least go back to their start
    values at t = 4 and 8, and those with the largest gradients among the others take their places."""
    model = build()
    start = weights(model)
    optimizer = with_schedule(model, Regrow(scores.make("random"), 4, 12, 0.4), 50, bias_correction=correction)
    for step, batch in enumerate(batches(14)):
        before, was = weights(model), chosen(model, optimizer)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        optimizer.step()
        is_now = chosen(model, optimizer)
        count = {4: 13, 8: 7}.get(step, 0)  # round(0.4 * 2/3 * 50), round(0.4 * 1/3 * 50)
        dropped, new = was & ~is_now, is_now & ~was
        assert int(is_now.sum()) == optimizer.get_budget_used() == 50
        assert int(dropped.sum()) == int(new.sum()) == count
        if count:
            moved = (before - start).abs()
            assert moved[dropped].max() <= moved[was & ~dropped].min()
            assert gradient.abs()[new].min() >= gradient.abs()[~was & ~new].max()
        assert torch.equal(weights(model)[~is_now], start[~is_now])
        assert (weights(model)[is_now] != start[is_now]).all()


@pytest.mark.parametrize("correction", ["global", "entry"])
@pytest.mark.parametrize("at", [3, 4, 5, 9])
def test_regrowth_resumes_bit_for_bit(correction: str, at: int) -> None:
    def optimizer_of(model: nn.Module) -> SelectiveOptimizer:
        return with_schedule(model, Regrow(scores.make("random"), 4, 12, 0.4), 50, bias_correction=correction)

    resumes(optimizer_of, at)


def resumes(optimizer_of: Callable[[nn.Module], SelectiveOptimizer], at: int) -> None:
    """Whether a run that is saved after `at` steps ends as one that is not."""
    whole, model, again = build(), build(), build(seed=4)
    train(whole, optimizer_of(whole), batches(14))
    first = optimizer_of(model)
    train(model, first, batches(14)[:at])
    file = io.BytesIO()
    torch.save([model.state_dict(), first.state_dict()], file)
    file.seek(0)
    state, saved = torch.load(file, weights_only=True)
    again.load_state_dict(state)
    second = optimizer_of(again)
    second.load_state_dict(saved)
    train(again, second, batches(14)[at:])
    assert torch.equal(weights(again), weights(whole))


def in_blocks(model: nn.Module, order: str = "ascending", **arguments: object) -> SelectiveOptimizer:
    blocks = [list(model[i].parameters()) for i in (0, 3, 5)]
    return with_schedule(model, Rotate(blocks, 2, order), 300, **arguments)


@pytest.mark.parametrize(("order", "expected"), [("ascending", [0, 3, 5, 0]), ("descending", [5, 3, 0, 5])])
def test_blocks_train_in_turn_and_leave_no_state(order: str, expected: list[int]) -> None:
    model = build()
    optimizer = in_blocks(model, order)
    for turn, layer in enumerate(expected):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert optimizer.get_budget_used() == sum(p.numel() for p in model[layer].parameters())
        train(model, optimizer, batches(1, seed=turn))
        state = optimizer.state_dict()["selective"]["base"]["state"]
        assert sum(value["exp_avg"].numel() for value in state.values()) == optimizer.get_budget_used()
        train(model, optimizer, batches(1, seed=turn + 9))
        assert not optimizer.state_dict()["selective"]["base"]["state"]
        assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == \
            {f"{layer}.weight", f"{layer}.bias"}


def test_a_block_trains_as_with_an_optimizer_of_its_own() -> None:
    ours, theirs = build(), build()
    train(ours, in_blocks(ours), batches(6))
    for turn, layer in enumerate((0, 3, 5)):
        train(theirs, AdamW(theirs[layer].parameters(), lr=1e-2), batches(6)[2 * turn:2 * turn + 2])
        theirs.zero_grad()
    assert torch.equal(weights(ours), weights(theirs))


def test_random_blocks_come_once_in_a_round_and_resume() -> None:
    model = build()
    schedule = Rotate([list(model[i].parameters()) for i in (0, 3, 5)], 1, "random", seed=3)
    with_schedule(model, schedule, 300)
    names, turns = dict(model.named_parameters()), []
    for schedule.done in range(30):
        turns.append(schedule.whole(names)[0])
    rounds = [tuple(turns[i:i + 3]) for i in range(0, 30, 3)]
    assert all(set(one) == {"0.weight", "3.weight", "5.weight"} for one in rounds)
    assert len(set(rounds)) > 1
    for at in (1, 2, 5):
        resumes(lambda model: in_blocks(model, "random"), at)


def test_what_blocks_changed_is_told() -> None:
    model = build()
    optimizer = in_blocks(model, verify=True)
    train(model, optimizer, batches(3))
    assert optimizer.selection(model).keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}
    optimizer.post_train_work()
    with pytest.raises(InputError, match="second copy of the model: take Patch.between"):
        optimizer.patch(model)
    patch, fresh = Patch.between(build(), model, optimizer.selection(model)), build()
    patch.apply(fresh)
    assert torch.equal(weights(fresh), weights(model))


def test_wrong_blocks_are_told() -> None:
    model = build()
    with pytest.raises(InputError, match="largest block has 252 weights and the budget leaves 200"):
        with_schedule(model, Rotate([list(model[3].parameters())], 2), 200)
    with pytest.raises(InputError, match="a tensor that the optimizer does not choose from"):
        with_schedule(model, Rotate([[nn.Parameter(torch.ones(2))]], 2), 200)
    with pytest.raises(InputError, match="none empty"):
        Rotate([[]], 2)
    with pytest.raises(InputError, match="unknown order"):
        Rotate([list(model.parameters())], 2, "sideways")


# ------------------------------------------------------------ gradients taken during the backward pass


def in_groups(model: nn.Module, method: str, **arguments: object) -> SelectiveOptimizer:
    """With the last layer trained whole."""
    own = {"max_steps": 10} if method == "id3" else {"model": model} if method == "bitfit" else {}
    groups = [{"params": model[:-1].parameters()}, {"params": model[-1].parameters(), "choose_all": True}]
    return get_selective_optimizer(AdamW, method)(groups, lr=1e-2, budget=91, **own | arguments)


@pytest.mark.parametrize("method", ["id3", "pafi", "bitfit"])
def test_gradients_taken_early_train_the_same(method: str) -> None:
    """Bit for bit; and after the backward pass only what trains whole has a gradient. model.zero_grad() will do."""
    ours, theirs = build(), build()
    early, late = in_groups(ours, method, gather="backward", max_grad_norm=0.5), \
        in_groups(theirs, method, max_grad_norm=0.5)
    for batch in batches(12):
        ours.zero_grad()
        loss_of(ours, batch).backward()
        assert [name for name, p in ours.named_parameters() if p.grad is not None] == ["5.weight", "5.bias"]
        early.step()
        train(theirs, late, [batch])
    assert torch.equal(chosen(ours, early), chosen(theirs, late))
    assert torch.equal(weights(ours), weights(theirs))
    assert early.get_budget_used() == 91


@pytest.mark.parametrize("method", ["id3", "pafi"])
def test_gradients_taken_early_add_up(method: str) -> None:
    ours, theirs = build(), build()
    early, late = in_groups(ours, method, gather="backward", accumulation_steps=4), in_groups(theirs, method)
    for step, batch in enumerate(batches(12)):
        parts = [part.split(4)[:2 if step == 5 else None] for part in batch]  # one step of fewer passes
        for model, optimizer in ((ours, early), (theirs, late)):
            optimizer.zero_grad()
            for inputs, labels in zip(*parts, strict=True):
                (loss_of(model, (inputs, labels)) / 4).backward()
            optimizer.step()
    assert torch.equal(chosen(ours, early), chosen(theirs, late))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-6)


def test_regrowth_with_gradients_taken_early() -> None:
    found = []
    for gather in ("step", "backward"):
        model = build()
        optimizer = with_schedule(model, Regrow(scores.make("random"), 4, 12, 0.4), 50, gather=gather)
        train(model, optimizer, batches(14))
        found.append(weights(model))
    assert torch.equal(*found)


def test_blocks_with_gradients_taken_early() -> None:
    """Those of the resting blocks are freed."""
    ours, theirs = build(), build()
    early = in_blocks(ours, gather="backward")
    for batch in batches(6):
        layer = early.schedule.whole(dict(ours.named_parameters()))[0][0]
        loss_of(ours, batch).backward()
        assert [name for name, p in ours.named_parameters() if p.grad is not None] == \
            [f"{layer}.weight", f"{layer}.bias"]
        early.step()
        early.zero_grad()
    train(theirs, in_blocks(theirs), batches(6))
    assert torch.equal(weights(ours), weights(theirs))


def test_two_passes_of_a_growing_schedule_must_be_announced() -> None:
    model = build()
    optimizer = in_groups(model, "id3", gather="backward")
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(InputError, match="accumulation_steps="):
        loss_of(model, batches(1)[0]).backward()
    optimizer.zero_grad()
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    assert optimizer.get_budget_used() == 39 + 6
    model = build()
    of_two = in_groups(model, "id3", gather="backward", accumulation_steps=2)
    for _ in range(3):
        loss_of(model, batches(1)[0]).backward()
    with pytest.raises(InputError, match="accumulation_steps="):
        of_two.step()


@pytest.mark.parametrize("method", ["id3", "pafi"])
def test_a_bad_gradient_taken_early_skips_the_step(method: str) -> None:
    model = build()
    optimizer = in_groups(model, method, gather="backward")
    used = optimizer.get_budget_used()
    (loss_of(model, batches(1)[0]) * torch.nan).backward()
    optimizer.step()
    assert optimizer.get_budget_used() == used
    assert torch.equal(weights(model), weights(build()))
    optimizer.zero_grad()
    train(model, optimizer, batches(10))
    assert int((weights(model) != weights(build())).sum()) == 91


def test_a_state_that_counts_otherwise_is_refused() -> None:
    """NAdam has a parameter for every step's choice, AdamW one."""
    model = build()

    def of(base: type[Optimizer]) -> SelectiveOptimizer:
        return get_selective_optimizer(base, "id3")(model.parameters(), lr=1e-2, budget=91, max_steps=10,
                                                    bias_correction="entry")
    apart = of(NAdam)
    train(model, apart, batches(3))
    with pytest.raises(InputError, match="of every weight: start the training again"):
        of(AdamW).load_state_dict(apart.state_dict())
    of(NAdam).load_state_dict(apart.state_dict())


def test_a_discarded_optimizer_leaves_gradients_alone() -> None:
    model = build()
    in_groups(model, "pafi", gather="backward")
    gc.collect()
    loss_of(model, batches(1)[0]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ------------------------------------------------------------ the best of many


@pytest.mark.parametrize("values", [2, 30, 10 ** 6])
def test_the_best_of_many_are_those_of_a_stable_sort(values: int) -> None:
    """Sizes on both sides of where blocks are looked at, many ties, scores that are never chosen."""
    generator = torch.Generator().manual_seed(values)
    for sizes, k in (([3000, 0, 1, 700], 11), ([90_000, 5000, 40_000], 20), ([20_000, 64, 25_600], 3), ([40, 50], 99)):
        of_tensor = [torch.randint(0, values, (size,), generator=generator).float() for size in sizes]
        for score in of_tensor:
            score[torch.rand(len(score), generator=generator) < 0.3] = -torch.inf
        joined = torch.cat(of_tensor)
        order = joined.sort(descending=True, stable=True).indices[:k]
        expected = order[joined[order] > -torch.inf].sort().values
        found = best(((str(i), score) for i, score in enumerate(of_tensor)), k)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        assert torch.equal(torch.cat([found[str(i)] + start for i, start in enumerate(starts)]), expected)


@pytest.mark.parametrize("at", [0, 63, 50_000, 99_999])
def test_undefined_scores_are_refused_wherever_they_are(at: int) -> None:
    score = torch.zeros(100_000)
    score[at] = torch.nan
    with pytest.raises(InputError, match="holds NaN"):
        top_entries(score, 5)
    with pytest.raises(InputError, match="holds NaN"):
        best([("a", torch.ones(100)), ("b", score)], 5)
