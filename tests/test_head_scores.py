"""Scores of heads against slow loops over what the output projections read, position by position."""
from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stt
from stt.errors import InputError
from stt.head_scores import SCORES, score_heads, select_heads
from stt.heads import find_heads
from tests.architectures.build import build

IDS = torch.tensor([[5, 9, 33, 7, 8], [4, 20, 0, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
REAL = [(0, t) for t in range(5)] + [(1, 0), (1, 1)]  # (example, position) of the words
TYPES = ["llama", "gpt2", "falcon"]


def read_and_slopes(model: nn.Module, module: str) -> tuple[Tensor, Tensor]:
    """What an output projection reads, and the slope of the summed loss there: (B, T, F)."""
    seen = []

    def keep(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].detach().requires_grad_()
        seen.append(x)
        return (x,)

    hook = model.get_submodule(module).register_forward_pre_hook(keep)
    logits = model(**BATCH).logits
    hook.remove()
    labels = IDS.masked_fill(IDS == 0, -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return seen[0].detach(), torch.autograd.grad(loss, seen[0])[0]


def slow(score: str, x: Tensor, slopes: Tensor, weight: Tensor, channels: range) -> float:
    """The score of the unit with these channels; `weight` is (D, F)."""
    if score == "activation_norm":
        return math.sqrt(sum(sum(float(x[b, t, c]) ** 2 for c in channels) for b, t in REAL) / len(REAL))
    if score == "magnitude":
        return math.sqrt(sum(float(weight[:, c].square().sum()) for c in channels))
    if score == "wanda":
        return sum(float(weight[:, c].abs().sum()) * math.sqrt(sum(float(x[b, t, c]) ** 2 for b, t in REAL))
                   for c in channels)
    return sum(abs(sum(float(x[b, t, c] * slopes[b, t, c]) for c in channels)) for b, t in REAL)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("score", sorted(SCORES.keys() - {"random"}))
def test_scores(model_type: str, score: str) -> None:
    model = build(model_type).model
    found = score_heads(model, [BATCH], score=score)
    for name, site in find_heads(model).items():
        x, slopes = read_and_slopes(model, site.down_module)
        layer = model.get_submodule(site.down_module)
        weight = (layer.weight.T if model_type == "gpt2" else layer.weight).detach()
        size = x.shape[-1] // site.width
        expected = [slow(score, x, slopes, weight, range(u * size, (u + 1) * size)) for u in range(site.width)]
        torch.testing.assert_close(found[name], torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_random_depends_on_the_seed_and_the_site_alone() -> None:
    model = build("gpt2").model
    one, same, other = (score_heads(model, score="random", seed=seed) for seed in (1, 1, 2))
    first, second = one
    assert torch.equal(one[first], same[first])
    assert not torch.equal(one[first], other[first])
    assert not torch.equal(one[first], one[second])


def test_the_best_are_kept_and_applied() -> None:
    model = build("gpt2").model
    scores = score_heads(model, [BATCH])
    selection = select_heads(model, [BATCH], keep=0.5)
    assert {name: sorted(ids.tolist()) for name, ids in selection.items()} == {
        name: sorted(of_site.argsort()[2:].tolist()) for name, of_site in scores.items()}
    sliced = stt.apply(copy.deepcopy(model), selection)
    assert sliced.transformer.h[0].attn.c_proj.weight.shape == (16, 32)


def test_wrong_input() -> None:
    model = build("gpt2").model
    with pytest.raises(InputError, match="unknown score of heads 'wandb'.*Did you mean 'wanda'"):
        score_heads(model, [BATCH], score="wandb")
    with pytest.raises(InputError, match="keep must be in"):
        select_heads(model, [BATCH], keep=0.0)
    with pytest.raises(InputError, match="calibration data is empty"):
        score_heads(model, [])
