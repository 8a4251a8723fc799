"""Scores of heads against slow loops over what the output projections read, position by position."""
from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stt
from stt.batches import Batch
from stt.errors import InputError
from stt.head_scores import SCORES, matching
from stt.heads import find_heads
from stt.selecting import HEADS, measure
from stt.sites import find_sites
from tests.architectures.build import build
from tests.architectures.matrix import difference, run
from tests.architectures.matrix import masked as with_masked_neurons
from tests.attention import masked

IDS = torch.tensor([[5, 9, 33, 7, 8], [4, 20, 0, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
REAL = [(0, t) for t in range(5)] + [(1, 0), (1, 1)]  # (example, position) of the words
TYPES = ["llama", "gpt2", "falcon"]


def score_heads(model: nn.Module, data: Iterable[Batch] = (), score: str = "activation_norm",
                seed: int = 42) -> dict[str, Tensor]:
    """The scores (U,) of every attention site, alone."""
    return measure(model, data, None, [], head_score=score, seed=seed, progress=False).scores[HEADS]


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
    selection = stt.select(model, [BATCH], units="heads", keep=0.5)
    assert {name: sorted(ids.tolist()) for name, ids in selection.items()} == {
        name: sorted(of_site.argsort()[2:].tolist()) for name, of_site in scores.items()}
    sliced = stt.apply(copy.deepcopy(model), selection)
    assert sliced.transformer.h[0].attn.c_proj.weight.shape == (16, 32)


def test_wrong_input() -> None:
    model = build("gpt2").model
    with pytest.raises(InputError, match="unknown score 'wandb'.*Did you mean 'wanda'"):
        stt.select(model, [BATCH], score="wandb", units="heads")
    with pytest.raises(InputError, match="unknown units 'head'.*Did you mean 'heads'"):
        stt.select(model, [BATCH], units="head")
    with pytest.raises(InputError, match="heads_keep must be in"):
        stt.select(model, [BATCH], units="both", heads_keep=0.0)
    with pytest.raises(InputError, match="heads_keep is a share of attention heads.*give units=\"heads\""):
        stt.select(model, [BATCH], heads_keep=0.5)
    for wrong in ({"compensate": "mean"}, {"width": "uniform"}, {"multiple_of": 2},
                  {"across_sites": True, "keep": 0.5}):
        with pytest.raises(InputError, match="are about neurons, and only heads are selected"):
            stt.select(model, [BATCH], units="heads", **wrong)
    with pytest.raises(InputError, match="calibration data is empty"):
        stt.select(model, units="heads")
    with pytest.raises(InputError, match="no attention site in Deepseek.*a latent"):
        stt.select(build("deepseek_v3").model, [BATCH], units="both")


# ---------------------------------------------------------------- neurons and heads in one pass


@pytest.mark.parametrize(("method", "head_score"), [
    ("stt", "activation_norm"), ("contribution", "activation_norm"), ("magnitude", "magnitude"), ("wanda", "wanda"),
    ("taylor", "taylor"), ("random", "random"), ("outside_score:MeanSize", "activation_norm")])
def test_the_matching_score_of_heads(method: str, head_score: str) -> None:
    assert matching(method) == head_score


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("method", ["stt", "wanda", "taylor", "magnitude", "gate_product"])
def test_one_pass_finds_what_two_find(model_type: str, method: str) -> None:
    """The selection of both kinds of units is that of neurons and that of heads, with the same agreement of halves."""
    model = build(model_type).model
    both, neurons, heads = (stt.select(model, [BATCH], score=method, keep=0.5, heads_keep=share, units=units)
                            for units, share in (("both", 0.25), ("neurons", None), ("heads", 0.25)))
    assert both == stt.Selection({**neurons, **heads})
    assert both.meta["reliability"] == neurons.meta["reliability"] | heads.meta["reliability"]
    assert {len(ids) for ids in heads.values()} == {1}
    assert [both.meta[key] for key in ("units", "head_score", "heads_keep")] == ["both", matching(method), 0.25]
    assert both.heads == heads.heads == {name: site.heads for name, site in find_heads(model).items()}
    alone = score_heads(model, [BATCH], matching(method))
    together = measure(model, [BATCH], None, [method], head_score=matching(method), progress=False).scores[HEADS]
    assert all(torch.equal(together[name], alone[name]) for name in alone)


@pytest.mark.parametrize("model_type", TYPES)
def test_both_sliced_is_both_masked(model_type: str) -> None:
    built = build(model_type)
    selection = stt.select(built.model, [BATCH], score="wanda", keep=0.5, units="both")
    neurons, heads = find_sites(built.model), find_heads(built.model)
    of_neurons, of_heads = ({name: selection[name] for name in sites} for sites in (neurons, heads))
    expected = with_masked_neurons(masked(built.model, heads, of_heads), neurons, of_neurons)
    assert difference(run(built, built.model), run(built, expected)) > 1e-3
    assert difference(run(built, stt.apply(copy.deepcopy(built.model), selection)), run(built, expected)) <= 1e-5


def test_how_many_heads_are_kept() -> None:
    model = build("gpt2").model  # 4 heads a layer
    for given, kept in (({"keep": 0.5}, 2), ({"topk_ratio": 0.25}, 1), ({"keep": 0.25, "heads_keep": 0.75}, 3),
                        ({"keep": 0.01}, 1), ({"heads_keep": 1.0}, 4)):
        selection = stt.select(model, [BATCH], units="both", **given)
        assert {len(selection[name]) for name in find_heads(model)} == {kept}
    names = [*find_sites(model), *find_heads(model)]
    as_many = stt.select(model, [BATCH], units="both", keep=dict(zip(names, (5, 6, 1, 3), strict=True)))
    assert [len(as_many[name]) for name in names] == [5, 6, 1, 3]
    share_of_heads = stt.select(model, [BATCH], units="both", keep=dict.fromkeys(find_sites(model), 7), topk_ratio=0.5)
    assert [len(share_of_heads[name]) for name in names] == [7, 7, 2, 2]


def test_compensation_is_of_neurons_alone() -> None:
    model = build("gpt2").model
    both, neurons = (stt.select(model, [BATCH], keep=0.5, compensate="mean", units=units)
                     for units in ("both", "neurons"))
    assert both.new_values.keys() == neurons.new_values.keys()
    assert all(torch.equal(value, neurons.new_values[name]) for name, value in both.new_values.items())

