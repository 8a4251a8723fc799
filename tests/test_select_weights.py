"""Selections of weights against slow loops over single weights."""
from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stt
from stt.errors import InputError
from stt.heads import find_heads
from stt.selection import Selection
from stt.selective_optimizers import scores
from stt.selective_optimizers.amount import apportioned, weights_in
from stt.selective_optimizers.choose import best
from stt.selective_optimizers.in_place import in_place
from stt.selective_optimizers.weights import axis_of, named_tensors, read, sizes
from stt.sites import find_sites

IDS = torch.tensor([[5, 9, 33, 7, 8], [4, 20, 0, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def slow_gradients(model: nn.Module) -> list[dict[str, Tensor]]:
    """The gradient of the summed loss of every example, alone and unpadded."""
    found = []
    for length, ids in zip((5, 2), IDS, strict=True):
        logits = model(input_ids=ids[None, :length]).logits[0, :-1]
        loss = F.cross_entropy(logits, ids[1:length], reduction="sum")
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append({name: gradient for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True)})
    return found


def slow_inputs(model: nn.Module, name: str) -> Tensor:
    """Squares of what a linear layer reads, summed over the words."""
    total = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: total.append(args[0][0]))
    for length, ids in zip((5, 2), IDS, strict=True):
        model(input_ids=ids[None, :length])
    hook.remove()
    return torch.cat(total).square().sum(0)


def slow_scores(model: nn.Module, score: str) -> dict[str, Tensor]:
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    if score in ("smallest", "largest"):
        return {name: tensor.abs() * (1 if score == "largest" else -1) for name, tensor in tensors.items()}
    if score == "wanda":
        linears = {f"{name}.weight": name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        return {name: tensor.abs() * slow_inputs(model, linears[name]).sqrt() if name in linears
                else torch.full_like(tensor, -math.inf) for name, tensor in tensors.items()}
    first, second = slow_gradients(model)
    if score == "fisher":
        return {name: first[name] ** 2 + second[name] ** 2 for name in tensors}
    slope = {name: (first[name] + second[name]).abs() for name in tensors}
    return slope if score == "gradient" else {name: slope[name] / (tensors[name].abs() + 1e-3) ** 0.5 for name in slope}


def slow_best(by_name: Mapping[str, Tensor], budget: int) -> dict[str, list[int]]:
    """Sorted by score, then by tensor, then by place."""
    rows = [(-float(value), order, place) for order, score in enumerate(by_name.values())
            for place, value in enumerate(score.detach().flatten())]
    chosen = sorted(rows)[:budget]
    return {name: sorted(place for _, order, place in chosen if order == i) for i, name in enumerate(by_name)}


@pytest.mark.parametrize("score", ["smallest", "largest", "gradient", "d3", "fisher", "wanda"])
@pytest.mark.parametrize("budget", [1, 777])
def test_scores(score: str, budget: int) -> None:
    model, _ = tiny.build("llama", torch.float64)
    options = {"exp": 0.5, "eps": 1e-3} if score == "d3" else {}
    found = stt.select_weights(model, [BATCH], score=score, budget=budget, **options)
    expected = slow_best(slow_scores(model, score), budget)
    assert {name: ids.tolist() for name, ids in found.items()} == {name: ids for name, ids in expected.items() if ids}


def test_every_score_is_known_and_exact() -> None:
    model, _ = tiny.build("llama-bias")
    for score in scores.names():
        budget = 40 if score == "bias" else 333
        found = stt.select_weights(model, [BATCH], score=score, budget=budget)
        assert sum(sizes(found, named_tensors(model)).values()) == budget
        again = stt.select_weights(copy.deepcopy(model), [BATCH], score=score, budget=budget)
        assert found == again


@pytest.mark.parametrize("score", ["gradient", "fisher", "wanda"])
def test_data_may_be_batched_in_any_way(score: str) -> None:
    model, _ = tiny.build("llama", torch.float64)
    parts = [{name: value[i:i + 1] for name, value in BATCH.items()} for i in (1, 0)]
    whole, split = (stt.select_weights(model, data, score=score, budget=500) for data in ([BATCH], parts))
    assert whole == split


def test_nothing_of_the_model_changes() -> None:
    model, _ = tiny.build("llama")
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    stt.select_weights(model, [BATCH], score="fisher", budget=10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_best_over_many_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(100):
        by_name = {f"t{i}": torch.randint(0, 6, (int(torch.randint(1, 30, (), generator=generator)),),
                                          generator=generator).float() for i in range(4)}
        budget = trial % 40
        found = {name: ids.tolist() for name, ids in best(by_name.items(), budget).items()}
        assert found == slow_best(by_name, budget)
    with pytest.raises(InputError, match="NaN"):
        best([("a", torch.tensor([1.0, math.nan]))], 1)


@pytest.mark.parametrize("scope", ["per_tensor", "per_row"])
@pytest.mark.parametrize("budget", [100, 1234])
def test_scopes_share_the_budget_out(scope: str, budget: int) -> None:
    model, _ = tiny.build("llama")
    found = stt.select_weights(model, score="largest", budget=budget, scope=scope)
    tensors = named_tensors(model)
    assert sum(len(ids) for ids in found.values()) == budget
    total = sum(tensor.numel() for tensor in tensors.values())
    for name, tensor in tensors.items():
        chosen = torch.zeros(tensor.numel(), dtype=torch.bool)
        chosen[found.get(name, [])] = True
        assert abs(int(chosen.sum()) - budget * tensor.numel() / total) < 1
        rows = chosen.view(tensor.shape).flatten(1) if tensor.dim() > 1 else chosen[None]
        if scope == "per_row":
            assert int(rows.sum(1).max()) - int(rows.sum(1).min()) <= 1
        for row, values in zip(rows if scope == "per_row" else [chosen],
                               tensor.detach().flatten().abs().view(rows.shape) if scope == "per_row"
                               else [tensor.detach().flatten().abs()], strict=True):
            assert not row.any() or row.all() or float(values[row].min()) >= float(values[~row].max())


def test_rows_are_chosen_by_their_mean() -> None:
    model, _ = tiny.build("llama")
    found = stt.select_weights(model, score="largest", unit="row", budget=900)
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items() if tensor.dim() > 1}
    rows = sorted(((-float(row.abs().double().mean()), order, place) for order, (name, tensor) in
                   enumerate(tensors.items()) for place, row in enumerate(tensor)))
    left, expected = 900, {name: [] for name in tensors}
    for _, order, place in rows:
        name = list(tensors)[order]
        if tensors[name][place].numel() <= left:
            left -= tensors[name][place].numel()
            expected[name].append(place)
    assert {name: ids.tolist() for name, ids in found.items()} == {n: sorted(ids) for n, ids in expected.items() if ids}
    assert all(axis_of(found, name) == 0 for name in found)


@pytest.mark.parametrize("unit", ["head", "block", "layer"])
def test_whole_parts(unit: str) -> None:
    """The best part by the mean score of its weights."""
    model, _ = tiny.build("llama")
    tensors = named_tensors(model)
    if unit == "head":
        sites = find_heads(model)
        alone = [in_place(model, Selection({site: [u]})) for site in sites for u in range(sites[site].width)]
        parts = [{name: (axis_of(part, name), ids) for name, ids in part.items()} for part in alone]
    else:
        prefixes = [f"model.layers.{i}" for i in (0, 1)]
        if unit == "block":
            children = [child for child, _ in model.model.layers[0].named_children()]
            prefixes = [f"{prefix}.{child}" for prefix in prefixes for child in children]
        parts = [{name: (0, torch.arange(len(tensor))) for name, tensor in tensors.items() if name.startswith(p + ".")}
                 for p in prefixes]
    means = [torch.cat([read(tensors[name].detach(), *where).abs().flatten().double() for name, where in part.items()])
             for part in parts]
    winner = max(range(len(parts)), key=lambda i: float(means[i].mean()))
    budget = len(means[winner])
    found = stt.select_weights(model, score="largest", unit=unit, budget=budget)
    assert sum(sizes(found, tensors).values()) == budget
    assert {name: ids.tolist() for name, ids in found.items()} == \
        {name: ids.tolist() for name, (_, ids) in parts[winner].items()}


@pytest.mark.parametrize("unit", ["row", "head", "block", "layer"])
def test_undefined_scores_are_an_error(unit: str) -> None:
    model, _ = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = math.nan
    with pytest.raises(InputError, match="holds NaN"):
        stt.select_weights(model, score="largest", unit=unit, budget=5000)


def test_tensors_of_several_dtypes_are_compared_unrounded() -> None:
    found = best([("a", torch.tensor([0.999, 0.9985])), ("b", torch.tensor([1.0, 0.5], dtype=torch.bfloat16))], 2)
    assert {name: ids.tolist() for name, ids in found.items()} == {"a": [0], "b": [0]}
    wide = best([("a", torch.tensor([1.0])), ("b", torch.tensor([1 + 1e-12], dtype=torch.float64))], 1)
    assert {name: ids.tolist() for name, ids in wide.items()} == {"a": [], "b": [0]}


def test_half_precision_has_scores_of_weights_at_zero() -> None:
    model, _ = tiny.build("llama", torch.float16)
    with torch.no_grad():
        model.model.embed_tokens.weight[40] = 0.0  # no token of the batch
    assert sum(len(ids) for ids in stt.select_weights(model, [BATCH], score="d3", budget=100).values()) == 100


def test_frozen_and_empty_tensors_are_never_chosen() -> None:
    model, _ = tiny.build("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    model.empty = nn.Parameter(torch.empty(0, 3))
    for options in ({}, {"unit": "row"}, {"scope": "per_row"}):
        found = stt.select_weights(model, score="largest", budget=500, **options)
        assert not {"model.embed_tokens.weight", "empty"} & found.keys()


@pytest.mark.parametrize("scope", ["per_tensor", "per_row"])
def test_tensors_that_cannot_be_scored_get_no_share(scope: str) -> None:
    model, _ = tiny.build("bert")
    assert sum(map(len, stt.select_weights(model, score="bias", scope=scope, budget=50).values())) == 50
    assert sum(map(len, stt.select_weights(model, [BATCH], score="wanda", scope=scope, budget=500).values())) == 500


def test_always_and_exclude() -> None:
    model, _ = tiny.build("bert")
    head = model.classifier.weight.numel() + model.classifier.bias.numel()
    found = stt.select_weights(model, score="smallest", budget=head + 50, always=["classifier.*"],
                               exclude=["bert.embeddings.*"])
    counts = sizes(found, named_tensors(model))
    assert counts["classifier.weight"] + counts["classifier.bias"] == head
    assert sum(counts.values()) == head + 50
    assert not [name for name in found if name.startswith("bert.embeddings")]
    only = stt.select_weights(model, score="smallest", budget=head, always=["classifier.*"])
    assert list(only) == ["classifier.weight", "classifier.bias"]


def test_bias_is_every_bias_and_nothing_else() -> None:
    model, _ = tiny.build("bert")
    found = stt.select_weights(model, score="bias")
    assert set(found) == {name for name in named_tensors(model) if name.endswith("bias")}
    norms = stt.select_weights(model, score="bias", include_norm=True)
    assert set(norms) == {name for name, tensor in named_tensors(model).items() if tensor.dim() == 1}
    few = stt.select_weights(model, score="bias", budget=50)
    first = next(iter(found))
    assert few[first].tolist() == list(range(min(50, len(found[first]))))
    with pytest.raises(InputError, match="include_norm=True"):
        stt.select_weights(tiny.build("llama")[0], score="bias", budget=1)


def test_neurons_as_weights() -> None:
    """Rows of gate and up, columns of down, the biases, and all of the down projection's."""
    model, _ = tiny.build("llama-bias")
    neurons = stt.select(model, score="magnitude", keep=0.25)
    found = in_place(model, neurons)
    for site in find_sites(model):
        ids = neurons[site].tolist()
        for part, axis in (("gate_proj.weight", 0), ("up_proj.weight", 0), ("down_proj.weight", 1)):
            assert axis_of(found, f"{site}.{part}") == axis
            assert found[f"{site}.{part}"].tolist() == ids
        assert found[f"{site}.gate_proj.bias"].tolist() == ids
        assert len(found[f"{site}.down_proj.bias"]) == model.get_parameter(f"{site}.down_proj.bias").numel()
    assert len(found) == 12


def test_neurons_of_stacked_experts_are_flat_places() -> None:
    model, _ = tiny.build("mixtral")
    neurons = stt.select(model, score="magnitude", keep=0.5)
    found = in_place(model, neurons)
    masks = {name: torch.zeros_like(model.get_parameter(name), dtype=torch.bool) for name in found}
    for site in find_sites(model).values():
        for member in site.members:
            channels = site.pick(member, neurons[site.name])
            masks[member.tensor][member.expert].index_fill_(member.axis - 1, channels, True)
    assert all(torch.equal(found[name], mask.flatten().nonzero().flatten()) for name, mask in masks.items())


def test_file(tmp_path: Path) -> None:
    model, _ = tiny.build("llama")
    found = stt.select_weights(model, score="largest", unit="row", budget=900)
    found.save(tmp_path / "s.safetensors")
    loaded = Selection.load(tmp_path / "s.safetensors")
    assert loaded == found
    assert loaded.meta == found.meta


@pytest.mark.parametrize(("amount", "count"), [(5, 5), ("5", 5), ("0.5%", 5), (0.005, 5), ("0.005", 5), (1000, 1000),
                                               ("100%", 1000), (1e-9, 1), ("5e-3", 5), (1.0, 1000), ("1.0", 1000)])
def test_amounts(amount: float | str, count: int) -> None:
    assert weights_in(amount, 1000) == count


@pytest.mark.parametrize("amount", [0, -3, "0%", "101%", 1.5, "many", "x%", 1001, float("nan"), True, None,
                                    "1.2.3", 2.0, "2.0", "-1", "1e3"])
def test_wrong_amounts(amount: object) -> None:
    with pytest.raises(InputError, match="budget must be"):
        weights_in(amount, 1000)


def test_apportioned_is_exact() -> None:
    for total in range(0, 61):
        shares = apportioned(total, [10, 1, 30, 7, 12])
        assert sum(shares) == total
        assert all(0 <= share <= size for share, size in zip(shares, [10, 1, 30, 7, 12], strict=True))


@pytest.mark.parametrize(("wrong", "match"), [
    ({"score": "smalest"}, "Did you mean 'smallest'"), ({"unit": "rows"}, "unknown unit"),
    ({"scope": "local"}, "unknown scope"), ({"exclude": ["nothing.*"]}, "tensor in exclude"),
    ({"always": "lm_head.weight"}, "takes a list"), ({"exclude": ["*"]}, "every tensor is excluded"),
    ({"always": ["lm_head.weight"], "budget": 3}, "does not go with"), ({"exp": 2.0}, "no option 'exp'"),
    ({"unit": "row", "scope": "per_row"}, "single weights"), ({"budget": 10 ** 9}, "at most"),
    ({"unit": "layer", "budget": 3}, "less than the smallest part"), ({"budget": None}, "give a budget"),
    ({"score": "d3"}, "looks at data")])
def test_errors(wrong: dict[str, object], match: str) -> None:
    model, _ = tiny.build("llama")
    with pytest.raises(InputError, match=match):
        stt.select_weights(model, **{"score": "smallest", "budget": 300, **wrong})
