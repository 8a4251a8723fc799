"""Patches: trained weights and their way back bit for bit, scales and sums against dense arithmetic."""
from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import patches
import pytest
import tiny
import torch
from patches import dense, drawn, made, mixed, moved, state_bits
from torch import nn

from stt.errors import InputError
from stt.selection import Selection
from stt.selective_optimizers.leaf import ATTACHED, attach, detach, selected_parameters, trained_values
from stt.selective_optimizers.patch import Patch
from stt.selective_optimizers.weights import named_tensors, selection_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------- apply and revert


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [*patches.FORMS, None])
def test_apply_and_revert_bit_for_bit(dtype: torch.dtype, form: str | None, tmp_path: Path) -> None:
    base, tuned, patch = made(dtype, form=form)
    before = state_bits(base)
    assert before != state_bits(tuned)
    patch.save(tmp_path / "patch")
    for one in (patch, Patch.load(tmp_path / "patch")):
        applied = one.apply(base)
        assert state_bits(base) == state_bits(tuned)
        applied.revert()
        assert state_bits(base) == before


def test_the_sum_alone_is_not_exact() -> None:
    """So `exact` is needed, and the weights in `moved` call for it."""
    base, tuned, patch = made()
    assert sum(len(exact.at) for exact in patch.exact.values()) > 10
    object.__setattr__(patch, "exact", {})
    patch.apply(base)
    assert state_bits(base) != state_bits(tuned)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2-tied", "mixtral", "vit"])
def test_on_transformers(kind: str) -> None:
    base, _ = (tiny.ARCHITECTURES | tiny.MIXTURES)[kind]()
    selection = drawn(base, seed=1, share=0.1)
    tuned = moved(base, selection)
    patch = Patch.between(base.state_dict(), tuned, selection)
    assert patch.budget_used == sum(int(mask.sum()) for mask in patches.masks(base, selection).values())
    patch.apply(base)
    assert state_bits(base) == state_bits(tuned)


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0, 2.0])
def test_scale(scale: float) -> None:
    base, tuned, patch = made(torch.float64)
    before, after = dense(base), dense(tuned)
    patch.apply(base, scale)
    for name, tensor in named_tensors(base).items():
        torch.testing.assert_close(tensor.detach(), before[name] + scale * (after[name] - before[name]), rtol=0,
                                   atol=1e-12)


def test_values_are_those_between() -> None:
    base, tuned, patch = made()
    selection = drawn(base)
    chosen = patches.masks(base, selection)
    parts = [{name: patch.deltas[name].clone() for name in selection} for _ in range(2)]
    for part, model in zip(parts, (base, tuned), strict=True):
        for name, tensor in named_tensors(model).items():  # row-major within the mask, as a box of rows or columns is
            part[name] = tensor.detach()[chosen[name]].view(patch.deltas[name].shape)
    again = Patch.from_values(tuned, selection, *parts)
    assert again.selection == patch.selection
    assert all(torch.equal(delta, again.deltas[name]) for name, delta in patch.deltas.items())
    assert again.starts == patch.starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_leaf_back_end_trained(dtype: torch.dtype) -> None:
    base, batch = tiny.build("llama")
    base.to(dtype)
    model, selection = copy.deepcopy(base), drawn(base, share=0.05, form="flat")
    attach(model, selection)
    optimizer = torch.optim.AdamW(selected_parameters(model), lr=1e-2)
    for _ in range(3):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    patch = Patch.from_values(model, selection, getattr(model, ATTACHED).start, trained_values(model))
    detach(model)
    patch.apply(base)
    assert state_bits(base) == state_bits(model)


def test_a_base_in_more_bits() -> None:
    """Trained in bfloat16, put on the same weights in float32: the very values of the tuned model."""
    base, tuned, patch = made(torch.bfloat16)
    base.float()
    patch.apply(base)
    assert state_bits(base) == state_bits(tuned.float())


# ---------------------------------------------------------------- what is refused


def other_weight(model: nn.Module) -> nn.Module:
    name, ids = next(iter(drawn(model).items()))
    named_tensors(model)[name].data.view(-1)[ids[-1]] += 1
    return model


REFUSED: dict[str, tuple[Callable[[nn.Module, Patch], object], str]] = {
    "one selected weight differs": (lambda model, patch: other_weight(model), "does not hold what it held"),
    "applied already": (lambda model, patch: patch.apply(model), "does not hold what it held"),
    "fewer bits": (lambda model, patch: model.bfloat16(), "loaded in fewer bits"),
    "one tensor more": (lambda model, patch: model.register_parameter("more", nn.Parameter(torch.ones(1))),
                        "a model with other tensors"),
    "another shape": (lambda model, patch: setattr(model, "middle", nn.Linear(4, 5)), "made for another one"),
    "no such tensor": (lambda model, patch: delattr(model, "scale"), "unknown tensor 'scale'"),
    "no such buffer": (lambda model, patch: setattr(model.norm, "running_mean", None), "a buffer 'norm.running_mean'"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_another_model_is_refused_and_left_alone(change: Callable[[nn.Module, Patch], object], said: str) -> None:
    base, tuned, _ = made()
    tuned.norm.running_mean += 1
    patch = Patch.between(base, tuned, drawn(base))
    change(base, patch)
    before = state_bits(base)
    with pytest.raises(InputError, match=said):
        patch.apply(base)
    assert state_bits(base) == before


def test_other_misuse() -> None:
    base, tuned, patch = made()
    with pytest.raises(InputError, match="finite number, got nan"):
        patch.apply(base, float("nan"))
    with pytest.raises(InputError, match="unknown tensor of the base model 'scale'"):
        Patch.between({name: tensor for name, tensor in dense(base).items() if name != "scale"}, tuned, drawn(base))
    with pytest.raises(InputError, match="middle.weight is \\(4, 4\\) in the base model and \\(4, 5\\)"):
        Patch.between(base, with_wider(mixed()), Selection({"middle.weight": [0]}, {"along": {}}))
    start = {name: delta[:-1] for name, delta in patch.deltas.items() if delta.dim()}
    with pytest.raises(InputError, match="read both with weights.read"):
        Patch.from_values(base, patch.selection, start, patch.deltas)
    with pytest.raises(InputError, match="neurons or heads"):
        Patch.between(base, tuned, Selection({"middle": [0]}))


def with_wider(model: nn.Module) -> nn.Module:
    model.middle = nn.Linear(5, 4)
    return model


def test_revert_in_the_reverse_order() -> None:
    base, _, first = made(form="flat")
    before = state_bits(base)
    applied = first.apply(base)
    second = Patch.between(base, moved(base, drawn(base, 5), 5), drawn(base, 5))
    later = second.apply(base)
    with pytest.raises(InputError, match="take off later patches first"):
        applied.revert()
    later.revert()
    applied.revert()
    assert state_bits(base) == before
    with pytest.raises(InputError, match="has changed since"):
        applied.revert()


# ---------------------------------------------------------------- new tensors and statistics


def test_a_new_head_needs_no_start(tmp_path: Path) -> None:
    base, other = mixed(), mixed()
    selection = selection_of({"middle.weight": torch.arange(4), "middle.bias": torch.arange(4),
                              "words.weight": torch.tensor([3, 9])}, {"middle.weight": 0}, named_tensors(base), {})
    tuned = moved(base, selection)
    patch = Patch.between(base, tuned, selection, new=("middle.weight", "middle.bias"))
    nn.init.normal_(other.middle.weight)
    nn.init.normal_(other.middle.bias)
    before = state_bits(other)
    patch.save(tmp_path / "patch")
    for scale in (1.0, 0.5):
        applied = Patch.load(tmp_path / "patch").apply(other, scale)
        assert torch.equal(other.middle.weight, tuned.middle.weight)
        assert torch.equal(other.middle.bias, tuned.middle.bias)
        assert (state_bits(other) == state_bits(tuned)) is (scale == 1.0)
        applied.revert()
        assert state_bits(other) == before
    without = Patch.between(base, tuned, selection)
    with pytest.raises(InputError, match="middle.weight does not hold"):
        without.apply(other)


def test_statistics_travel(tmp_path: Path) -> None:
    base = mixed()
    tuned = moved(base, drawn(base))
    tuned.train()(torch.randn(5, 3, 4), torch.arange(5))
    tuned.eval()
    patch = Patch.between(base, tuned, drawn(base))
    assert set(patch.extras) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    patch.save(tmp_path / "patch")
    before, mean = state_bits(base), base.norm.running_mean.clone()
    applied = Patch.load(tmp_path / "patch").apply(base)
    assert state_bits(base) == state_bits(tuned)
    applied.revert()
    assert state_bits(base) == before
    patch.apply(base, 0.25)
    torch.testing.assert_close(base.norm.running_mean, 0.75 * mean + 0.25 * tuned.norm.running_mean)
    named = Patch.from_values(tuned, patch.selection, *({name: tensor for name, tensor in patch.deltas.items()},) * 2)
    assert set(named.extras) == set(patch.extras)


# ---------------------------------------------------------------- sums


def test_patches_apart_compose_exactly(tmp_path: Path) -> None:
    base = mixed()
    halves = [selection_of({name: torch.arange(first, tensor.numel(), 2) for name, tensor in named_tensors(base).items()
                            if tensor.numel() > first}, {}, named_tensors(base), {}) for first in (0, 1)]
    first, second = (Patch.between(base, moved(base, half, seed), half) for seed, half in enumerate(halves))
    expected = copy.deepcopy(base)
    first.apply(expected)
    second.apply(expected)
    both = Patch.compose([first, second])
    both.save(tmp_path / "patch")
    assert both.exact
    before = state_bits(base)
    for one in (both, Patch.load(tmp_path / "patch"), Patch.compose([both])):
        applied = one.apply(base)
        assert state_bits(base) == state_bits(expected)
        applied.revert()
        assert state_bits(base) == before


@pytest.mark.parametrize("scales", [None, [0.5, -2.0, 1.0]])
@pytest.mark.parametrize("forms", [("flat", "flat", "flat"), ("rows", "rows", "whole"), ("rows", "columns", "flat"),
                                   (None, None, None)])
def test_sum_of_overlapping_patches(forms: tuple[str | None, ...], scales: list[float] | None, tmp_path: Path) -> None:
    base = mixed(torch.float64)
    before = dense(base)
    selections = [drawn(base, seed, form) for seed, form in enumerate(forms)]
    tuned = [moved(base, selection, seed) for seed, selection in enumerate(selections)]
    sum_ = Patch.compose([Patch.between(base, model, selection) for model, selection in
                          zip(tuned, selections, strict=True)], scales)
    sum_.save(tmp_path / "patch")
    applied = Patch.load(tmp_path / "patch").apply(base)
    for name, tensor in named_tensors(base).items():
        expected = before[name] + sum(scale * (dense(model)[name] - before[name])
                                      for model, scale in zip(tuned, scales or (1, 1, 1), strict=True))
        torch.testing.assert_close(tensor.detach(), expected, rtol=0, atol=1e-12)
    chosen = [patches.masks(base, selection) for selection in (*selections, sum_.selection)]
    assert all(torch.equal(a[name] | b[name] | c[name], union[name]) for a, b, c, union in [chosen] for name in union)
    applied.revert()
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(base).items())


@pytest.mark.parametrize("forms", [("flat", "rows"), ("rows", "rows"), ("rows", "rows", "columns")])
def test_a_sum_knows_its_base(forms: tuple[str, ...]) -> None:
    """Every weight that any of them lies on is checked, also of a sum of sums."""
    base = mixed()
    selections = [drawn(base, seed, form, share=0.2) for seed, form in enumerate(forms)]
    parts = [Patch.between(base, moved(base, selection), selection) for selection in selections]
    sum_ = functools.reduce(lambda left, right: Patch.compose([left, right]), parts)
    union = patches.masks(base, sum_.selection)
    for name, mask in union.items():
        for i, is_selected in enumerate(mask.flatten().tolist()):
            other = copy.deepcopy(base)
            named_tensors(other)[name].data.view(-1)[i] += 1
            if is_selected:
                with pytest.raises(InputError, match=f"{name} does not hold"):
                    sum_.apply(other)
            else:
                sum_.apply(other)


def test_what_cannot_be_added() -> None:
    base, tuned, patch = made()
    with pytest.raises(InputError, match="one patch or more and a finite scale for each, got 0 patches"):
        Patch.compose([])
    with pytest.raises(InputError, match="got 1 patches and the scales \\[1.0, 2.0\\]"):
        Patch.compose([patch], [1.0, 2.0])
    smaller, other = tiny.build("gpt2")[0], mixed(seed=1)
    with pytest.raises(InputError, match="models with other tensors"):
        Patch.compose([patch, Patch.between(smaller, smaller, drawn(smaller))])
    with pytest.raises(InputError, match="start from different values of"):
        Patch.compose([patch, Patch.between(other, other, drawn(base))])
    as_new = Patch.between(base, tuned, drawn(base), new=("middle.weight",))
    assert torch.equal(Patch.compose([as_new, as_new], [0.5, 0.5]).deltas["middle.weight"],
                       as_new.deltas["middle.weight"])
    with pytest.raises(InputError, match="middle.weight is new in one patch"):
        Patch.compose([as_new, patch])
    tuned.norm.running_mean += 1
    first = Patch.between(base, tuned, drawn(base))
    tuned.norm.running_mean += 1
    with pytest.raises(InputError, match="different values of the buffer 'norm.running_mean'"):
        Patch.compose([first, Patch.between(base, tuned, drawn(base))])
