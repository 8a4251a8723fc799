"""The wrapper back end against a dense masked optimizer, and as part of a run: resume, Trainer, closures, scaling."""
from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from masked import Masked, batches, build, growing, loss_of, smallest, train, weights
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from stt.errors import InputError, TrainingFailed
from stt.selection import Selection
from stt.selective_optimizers import scores
from stt.selective_optimizers.optimizer import SelectiveOptimizer
from stt.selective_optimizers.schedules import Regrow, Static
from stt.selective_optimizers.select import select_weights
from stt.selective_optimizers.wrap import get_selective_optimizer

STEPS = 12
ELEMENTWISE = {
    "sgd": (SGD, {"lr": 0.1}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (Adam, {"lr": 1e-2}),
    "amsgrad": (Adam, {"lr": 1e-2, "amsgrad": True}),
    "maximize": (AdamW, {"lr": 1e-2, "maximize": True, "weight_decay": 0.1}),
    "adamw": (AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "fused": (AdamW, {"lr": 1e-2, "weight_decay": 0.1, "fused": True}),
    "foreach": (AdamW, {"lr": 1e-2, "weight_decay": 0.1, "foreach": True}),
    "nadam": (torch.optim.NAdam, {"lr": 1e-2}),
    "radam": (torch.optim.RAdam, {"lr": 1e-2}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.5, "centered": True}),
    "adagrad": (Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.1}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "adamax": (torch.optim.Adamax, {"lr": 1e-2}),
    "rprop": (torch.optim.Rprop, {"lr": 1e-3}),
    "asgd": (torch.optim.ASGD, {"lr": 1e-2}),
}


def selective(model: nn.Module, method: str = "id3", base: type[Optimizer] = AdamW, budget: int = 105,
              **arguments: object) -> SelectiveOptimizer:
    own = {"max_steps": 10} if method == "id3" else {}
    return get_selective_optimizer(base, method)(model.named_parameters(), budget=budget, **own | arguments)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_static_is_the_masked_dense_optimizer_bit_for_bit(name: str) -> None:
    base, arguments = ELEMENTWISE[name]
    ours, theirs = build(), build()
    train(ours, selective(ours, "pafi", base, **arguments), batches(STEPS))
    train(theirs, Masked(theirs, base, smallest(theirs, 105), **arguments), batches(STEPS))
    assert_equal(name, ours, theirs)
    assert (weights(ours) != weights(build())).sum() == 105


@pytest.mark.parametrize("exp", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_growing_is_the_masked_dense_optimizer(name: str, exp: float) -> None:
    base, arguments = ELEMENTWISE[name]
    ours, theirs = build(), build()
    optimizer = selective(ours, base=base, exp=exp, **arguments)
    reference = Masked(theirs, base, growing(theirs, 105, 10, exp), **arguments)
    train(ours, optimizer, batches(STEPS))
    train(theirs, reference, batches(STEPS))
    assert torch.equal(chosen(ours, optimizer), reference.chosen)
    assert_equal(name, ours, theirs)
    assert optimizer.get_budget_used() == 105


def assert_equal(name: str, ours: nn.Module, theirs: nn.Module) -> None:
    """Bit for bit; the fused kernels compute the last numbers, those that do not fill a vector of the processor, in
    another way."""
    if name == "fused":
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-7)
    else:
        assert torch.equal(weights(ours), weights(theirs))


def chosen(model: nn.Module, optimizer: SelectiveOptimizer) -> Tensor:
    """Whether each weight of the model has been chosen."""
    selection, found = optimizer.selection(model), []
    for name, tensor in model.named_parameters():
        mask = torch.zeros(tensor.shape, dtype=torch.bool)
        if name in selection.meta["along"]:
            mask.index_fill_(0, selection[name], True)
        elif name in selection:
            mask.view(-1)[selection[name]] = True
        found.append(mask.flatten())
    return torch.cat(found)


def test_entry_correction_counts_the_steps_of_every_weight() -> None:
    lr, betas, eps, decay = 1e-2, (0.9, 0.999), 1e-8, 0.1
    ours, theirs = build(), build()
    optimizer = selective(ours, lr=lr, weight_decay=decay, bias_correction="entry")
    choose, masks = growing(theirs, 105, 10), [torch.zeros_like(p, dtype=torch.bool) for p in theirs.parameters()]
    state = [[torch.zeros_like(p) for _ in range(3)] for p in theirs.parameters()]
    train(ours, optimizer, batches(STEPS))
    for step, batch in enumerate(batches(STEPS)):
        theirs.zero_grad()
        loss_of(theirs, batch).backward()
        choose(step, masks)
        for tensor, mask, (m, v, t) in zip(theirs.parameters(), masks, state, strict=True):
            with torch.no_grad():
                t += mask
                m.lerp_(tensor.grad * mask, 1 - betas[0])
                v.lerp_((tensor.grad * mask) ** 2, 1 - betas[1])
                corrected = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
                tensor.copy_(torch.where(mask, tensor * (1 - lr * decay) - lr * corrected, tensor))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-6)
    assert optimizer.get_budget_used() == 105


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "eps": 1e-3}, {"maximize": True, "betas": (0.8, 0.95)}])
@pytest.mark.parametrize(("base", "schedule"), [(AdamW, "grow"), (Adam, "grow"), (AdamW, "regrow")])
def test_one_parameter_trains_as_one_for_every_step_does(base: type[Optimizer], schedule: str,
                                                         options: dict[str, object],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that torch counts the steps of: bitwise, with fewer parameters. The rate changes on the way."""
    def trained() -> tuple[Tensor, int]:
        model = build()
        arguments = {"lr": 1e-2, "weight_decay": 0.1, "bias_correction": "entry", **options}
        optimizer = selective(model, base=base, **arguments) if schedule == "grow" else SelectiveOptimizer(
            model.named_parameters(), base, Regrow(scores.make("largest"), 3, 10), budget=105, **arguments)
        for i, batch in enumerate(batches(STEPS)):
            optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
            train(model, optimizer, [batch])
        return weights(model), len(optimizer.state_dict()["selective"]["base"]["state"])

    found, parameters = trained()
    monkeypatch.setattr("stt.selective_optimizers.optimizer.COUNTS", ())
    expected, many = trained()
    assert torch.equal(found, expected)
    assert parameters == 1
    assert many > 3


def test_weight_decay_of_a_group_and_a_rate_that_changes() -> None:
    """Every group keeps its own numbers, and what a scheduler writes into them holds."""
    ours, theirs = build(), build()

    def groups(model: nn.Module) -> list[dict[str, object]]:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        return [{"params": matrices, "weight_decay": 0.3}, {"params": [p for p in model.parameters() if p.dim() == 1]}]

    optimizer = get_selective_optimizer(AdamW, "pafi")(groups(ours), lr=1e-2, weight_decay=0.0, budget=80)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)
    reference = Masked(theirs, AdamW, smallest(theirs, 80), lr=1e-2)
    reference.base = AdamW(groups(theirs), lr=1e-2, weight_decay=0.0)
    theirs_schedule = torch.optim.lr_scheduler.LinearLR(reference.base, 1.0, 0.1, total_iters=6)
    for batch in batches(8):
        train(ours, optimizer, [batch])
        train(theirs, reference, [batch])
        schedule.step()
        theirs_schedule.step()
    assert torch.equal(chosen(ours, optimizer).nonzero(), reference.chosen.nonzero())
    assert torch.equal(weights(ours), weights(theirs))


def test_choose_all_is_charged_first_and_trains_whole() -> None:
    model = build()
    before = weights(model)
    optimizer = get_selective_optimizer(AdamW, "id3")(
        [{"params": model[:-1].parameters()}, {"params": model[-1].parameters(), "choose_all": True}],
        lr=1e-2, budget=139, max_steps=10, verify=True)
    assert optimizer.get_budget_used() == 39
    train(model, optimizer, batches(STEPS))
    changed = weights(model) != before
    assert changed[-39:].all()
    assert changed.sum() == optimizer.get_budget_used() == 139
    optimizer.post_train_work()
    selection = optimizer.selection(model)
    assert selection.meta["along"] == {"5.weight": 0, "5.bias": 0}


def test_bfloat16_has_wide_copies_of_what_is_chosen() -> None:
    """Updates far below the steps of bfloat16 add up in float32, and what is not chosen keeps its bits."""
    ours, theirs = (build(dtype=torch.bfloat16) for _ in range(2))
    optimizer = selective(ours, "pafi", SGD, lr=1e-3, verify=True)
    train(ours, optimizer, batches(100, dtype=torch.bfloat16))
    optimizer.post_train_work()
    copies = [tensor.detach().float() for tensor in theirs.parameters()]
    masks = chosen(ours, optimizer).split([len(tensor.flatten()) for tensor in copies])
    for batch in batches(100, dtype=torch.bfloat16):
        theirs.zero_grad()
        loss_of(theirs, batch).backward()
        for tensor, wide, mask in zip(theirs.parameters(), copies, masks, strict=True):
            wide.sub_(tensor.grad.float() * mask.view(tensor.shape), alpha=1e-3)
            tensor.data.copy_(wide)
    assert torch.equal(weights(ours), weights(theirs))
    assert (weights(ours) != weights(build(dtype=torch.bfloat16))).sum() > 50


def test_weights_that_someone_else_writes_are_taken_up() -> None:
    """The model is the truth: what is loaded into it between two steps is not written over."""
    ours, theirs = build(), build()
    optimizer, reference = selective(ours, "pafi", lr=1e-2), Masked(theirs, AdamW, smallest(theirs, 105), lr=1e-2)
    for part in (batches(4), batches(4, seed=2)):
        train(ours, optimizer, part)
        train(theirs, reference, part)
        for model in (ours, theirs):
            model.load_state_dict(build(seed=5).state_dict())
    for model, steps in ((ours, optimizer), (theirs, reference)):
        train(model, steps, batches(1, seed=3))
    assert torch.equal(weights(ours), weights(theirs))


@pytest.mark.parametrize("correction", ["global", "entry"])
@pytest.mark.parametrize("method", ["id3", "pafi", "bitfit"])
@pytest.mark.parametrize("at", [0, 1, 7, 10, 11])
def test_resumes_bit_for_bit(method: str, correction: str, at: int) -> None:
    """105 is no multiple of 10: the first steps choose one more."""
    budget = 38 if method == "bitfit" else 105
    arguments = {"lr": 1e-2, "weight_decay": 0.1, "bias_correction": correction, "budget": budget, "verify": True}
    whole, model = build(), build()
    expected = selective(whole, method, **arguments)
    train(whole, expected, batches(STEPS))
    optimizer = selective(model, method, **arguments)
    train(model, optimizer, batches(STEPS)[:at])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = build(seed=9)
    again.load_state_dict(saved["model"])
    resumed = selective(again, method, **arguments)
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, batches(STEPS)[at:])
    assert torch.equal(weights(again), weights(whole))
    assert resumed.get_budget_used() == expected.get_budget_used() == budget
    assert resumed.selection(again) == expected.selection(whole)
    assert all(torch.equal(value, expected.start_values(whole)[name])
               for name, value in resumed.start_values(again).items())
    resumed.post_train_work()


def test_resume_of_half_precision_keeps_the_wide_copies() -> None:
    def steps(model: nn.Module, optimizer: SelectiveOptimizer, part: slice) -> None:
        train(model, optimizer, batches(STEPS, dtype=torch.bfloat16)[part])

    whole, model = build(dtype=torch.bfloat16), build(dtype=torch.bfloat16)
    steps(whole, selective(whole, lr=1e-3), slice(None))
    first = selective(model, lr=1e-3)
    steps(model, first, slice(5))
    second = selective(model, lr=1e-3)
    second.load_state_dict(first.state_dict())
    steps(model, second, slice(5, None))
    assert torch.equal(weights(model), weights(whole))


def test_state_of_another_optimizer_is_refused() -> None:
    model = build()
    optimizer = selective(model, lr=1e-2)
    with pytest.raises(InputError, match="not the state of a selective optimizer"):
        optimizer.load_state_dict(AdamW(model.parameters()).state_dict())
    other = nn.Linear(3, 3)
    with pytest.raises(InputError, match="other tensors"):
        optimizer.load_state_dict(selective(other, budget=5, lr=1e-2).state_dict())


def test_a_closure_runs_once_with_gradients_and_its_loss_is_returned() -> None:
    ours, theirs = build(), build()
    optimizer = selective(ours, lr=1e-2)
    calls = []

    for batch in batches(5):
        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(ours, batch)
            loss.backward()
            calls.append(loss.item())
            return loss
        assert optimizer.step(closure).item() == calls[-1]
    assert train(theirs, selective(theirs, lr=1e-2), batches(5)) == calls
    assert torch.equal(weights(ours), weights(theirs))


def test_accumulated_gradients_are_one_batch() -> None:
    """Four backward passes and one step are one pass over the four parts together."""
    ours, theirs = build(), build()
    optimizer, reference = (selective(model, lr=1e-2, max_grad_norm=0.1) for model in (ours, theirs))
    for batch in batches(STEPS):
        optimizer.zero_grad()
        for inputs, labels in zip(*(part.split(4) for part in batch), strict=True):
            (loss_of(ours, (inputs, labels)) / 4).backward()
        optimizer.step()
        train(theirs, reference, [batch])
    assert torch.equal(chosen(ours, optimizer), chosen(theirs, reference))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=2e-6)


def test_a_selection_made_before_trains() -> None:
    model = build()
    before = weights(model)
    selection = select_weights(model, score="random", budget=60, always=["5.bias"])
    optimizer = SelectiveOptimizer(model.named_parameters(), AdamW, Static(selection), budget=60, lr=1e-2)
    train(model, optimizer, batches(3))
    assert torch.equal(chosen(model, optimizer), weights(model) != before)
    found = optimizer.selection(model)
    assert sum(len(ids) for ids in found.values()) == 60
    assert all(torch.equal(found[name], ids) for name, ids in selection.items() if name != "5.bias")


def test_a_patch_of_what_trained_turns_the_base_into_the_model(tmp_path: Path) -> None:
    model = build()
    optimizer = selective(model, lr=1e-2)
    train(model, optimizer, batches(STEPS))
    base = build()
    optimizer.patch(model).apply(base)
    assert torch.equal(weights(base), weights(model))
    with pytest.raises(InputError, match="does not have"):
        optimizer.patch(nn.Linear(8, 20))


def test_a_copy_goes_on_alike_and_apart() -> None:
    model = build()
    optimizer = selective(model, lr=1e-2)
    train(model, optimizer, batches(4))
    other, copied = copy.deepcopy((model, optimizer))
    train(other, copied, batches(4, seed=2))
    at_four = weights(model)
    train(model, optimizer, batches(4, seed=2))
    assert torch.equal(weights(model), weights(other))
    assert not torch.equal(weights(model), at_four)


def test_verify_names_the_tensor_that_something_else_changed() -> None:
    model = build()
    optimizer = selective(model, "pafi", lr=1e-2, verify=True)
    train(model, optimizer, batches(2))
    optimizer.post_train_work()
    free = next(i for i in range(160) if i not in optimizer.selection(model)["0.weight"])
    with torch.no_grad():
        model[0].weight.view(-1)[free] *= 1 + 2e-7  # the last bit
    with pytest.raises(TrainingFailed, match="changed in 0.weight"):
        optimizer.post_train_work()


@pytest.mark.parametrize("gather", ["step", "backward"])
def test_a_model_that_changes_its_dtype_after_the_optimizer_is_built(gather: str) -> None:
    """As with a device: what was chosen stays, and the vectors follow."""
    ours, theirs = build(), build(dtype=torch.float64)
    before, after = (selective(model, "pafi", lr=1e-2, gather=gather) for model in (ours, theirs))
    ours.double()
    train(ours, before, batches(4, dtype=torch.float64))
    train(theirs, after, batches(4, dtype=torch.float64))
    assert torch.equal(weights(ours), weights(theirs))
    spread = build()
    optimizer = selective(spread, "pafi", lr=1e-2)
    spread[0].double()
    for parameter in spread.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(InputError, match="spread over devices or dtypes"):
        optimizer.step()


def test_the_selection_says_what_chose_it(tmp_path: Path) -> None:
    for method, score, options in (("id3", "d3", {"exp": 1.0, "eps": 1e-8}), ("pafi", "smallest", {}),
                                   ("bitfit", "bias", {"include_norm": False})):
        model = build()
        optimizer = selective(model, method, budget=30, lr=1e-2)
        train(model, optimizer, batches(1))
        selection = optimizer.selection(model)
        assert (selection.meta["score"], selection.meta["options"], selection.meta["budget"]) == (score, options, 30)
        selection.save(tmp_path / "selection.safetensors")
        assert Selection.load(tmp_path / "selection.safetensors") == selection


def test_one_class_for_the_same_arguments() -> None:
    assert get_selective_optimizer(AdamW, "id3") is get_selective_optimizer(AdamW, "id3")
    assert issubclass(get_selective_optimizer(AdamW, "id3"), Optimizer)
