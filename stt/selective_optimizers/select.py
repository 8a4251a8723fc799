"""Scores -> one exact budget -> a selection of weights."""
from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from stt.batches import Batch
from stt.errors import InputError, unknown_name
from stt.selection import Selection
from stt.selective_optimizers import scores, units
from stt.selective_optimizers.amount import Amount, apportioned, weights_in
from stt.selective_optimizers.choose import best, check_numbers, top_entries
from stt.selective_optimizers.leaf import Leaf
from stt.selective_optimizers.scores.base import Seen, WeightScore
from stt.selective_optimizers.seeing import see
from stt.selective_optimizers.weights import all_of, named_tensors, selection_of

# Shapes: P weights of a tensor, R rows.

SCOPES = ("global", "per_tensor", "per_row")
Scored = Iterator[tuple[str, Tensor]]


def select_weights(model: nn.Module, data: Iterable[Batch] = (), tokenizer: PreTrainedTokenizerBase | None = None, *,
                   score: str = "d3", budget: Amount | None = None, unit: str = "weight", scope: str = "global",
                   exclude: Sequence[str] = (), always: Sequence[str] = (), seed: int = 42,
                   **options: object) -> Selection:
    """The weights of `model` worth training: exactly `budget` of them, those with the highest score.

    `score` is smallest, largest, gradient, d3 (`exp`, `eps`), fisher, wanda, bias (`include_norm`) or random; those of
    gradients and inputs look at `data`, batches with `labels`. `budget` is a number of weights or a share of the model
    ("0.2%"); None, for score bias, is every bias. `scope` shares it out: one ranking of the whole model ("global"), or
    to every tensor ("per_tensor") or row ("per_row") in proportion to its size. `unit` "row", "head", "block" or
    "layer" chooses parts whole, by the mean score of their weights, as many as fit into the budget. Tensors named in
    `always` (names or patterns such as "classifier.*") are chosen whole and charged to the budget first; those in
    `exclude` never are.

    Ties go to the earlier tensor, then to the lower position. A tied tensor counts once, a frozen one is never chosen.
    Raises InputError for an
    unknown name, a pattern that matches nothing, a budget that is no number of weights, is larger than what can be
    chosen or is used up by `always`, and for data that the score cannot be made from.

    >>> selection = stt.select_weights(model, score="smallest", budget="0.2%", exclude=["*embed*"])
    """
    _check(unit, scope)
    method = scores.make(score, **({"seed": seed} if score == "random" else {}) | options)
    check_plain(model)
    tensors = {name: tensor for name, tensor in named_tensors(model).items()
               if tensor.is_floating_point() and tensor.requires_grad and tensor.numel()}
    whole = matching(tensors, always, "always")
    left_out = {*matching(tensors, exclude, "exclude"), *whole}
    candidates = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    charged = sum(tensors[name].numel() for name in whole)
    if budget is None:
        count = charged + _all_of(method, candidates, score)
    else:
        count = weights_in(budget, sum(tensor.numel() for tensor in named_tensors(model).values()))
    rest = count - charged
    _check_rest(rest, count, whole, candidates)
    seen = see(model, candidates, method.needs, data, tokenizer)

    def scored() -> Scored:
        return ((name, method.result(name, tensor.detach(), seen[name])) for name, tensor in candidates.items())

    chosen, along = _chosen(model, candidates, scored, rest, unit, scope) if rest else ({}, {})
    _check_found(chosen, rest, candidates, unit, score)
    for name in whole:
        axis, chosen[name] = all_of(tensors[name])
        along |= {} if axis is None else {name: axis}
    meta = {"score": score, "unit": unit, "scope": scope, "budget": count, "seed": seed, "options": options}
    return selection_of({name: chosen[name] for name in tensors if name in chosen}, along, named_tensors(model), meta)


def check_plain(model: nn.Module) -> None:
    """Raises InputError for a model of which weights are attached."""
    if any(isinstance(module, Leaf) for module in model.modules()):
        raise InputError("weights of this model are attached already: stt.detach(model) first")


def matching(tensors: Mapping[str, Tensor], patterns: Sequence[str], what: str) -> list[str]:
    """Names of the tensors that a pattern names, in the order of the model. Raises InputError for a pattern that names
    none."""
    if isinstance(patterns, str):
        raise InputError(f"{what} takes a list of names or patterns, got the text {patterns!r}: put it into a list")
    for pattern in patterns:
        if not fnmatch.filter(tensors, pattern):
            raise unknown_name(f"tensor in {what}", pattern, tensors)
    return [name for name in tensors if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def _chosen(model: nn.Module, candidates: Mapping[str, Tensor], scored: Callable[[], Scored], budget: int, unit: str,
            scope: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Ids by tensor, and the axes of those that are rows or columns."""
    if unit == "row":
        return _rows(candidates, scored(), budget), {name: 0 for name in candidates}
    if unit != "weight":
        parts = {"head": units.heads, "block": units.blocks, "layer": units.layers}[unit](model, candidates)
        units.add_scores(parts, scored())
        return units.merged(units.fill(parts, budget), candidates)
    if scope == "global":
        return best(((name, score.flatten()) for name, score in scored()), budget), {}
    sizes = [int((score > -torch.inf).sum()) for _, score in scored()]
    shares = apportioned(min(budget, sum(sizes)), sizes)
    found = {}
    for (name, score), share in zip(scored(), shares, strict=True):
        found[name] = top_entries(score.flatten(), share) if scope == "per_tensor" else top_of_rows(score, share)
    return found, {}


def _rows(candidates: Mapping[str, Tensor], scored: Scored, budget: int) -> dict[str, Tensor]:
    """Rows of matrices (and of larger tensors: slices along the first axis) that fit into the budget, best first."""
    names = [name for name, tensor in candidates.items() if tensor.dim() > 1]
    means = {}  # (R,)
    for name, score in scored:
        check_numbers(score)
        means |= {name: score.flatten(1).mean(1, dtype=torch.float64).cpu()} if name in names else {}
    if not means:
        raise InputError("nothing to choose rows of: every tensor is excluded, or has one dimension")
    sizes = torch.cat([torch.full((len(mean),), candidates[name][0].numel()) for name, mean in means.items()])
    joined = torch.cat(list(means.values()))
    order = joined.sort(descending=True, stable=True).indices
    order = order[joined[order] > -torch.inf]
    taken = _that_fit(sizes[order], budget)
    chosen = torch.zeros(len(joined), dtype=torch.bool)
    chosen[order[taken]] = True
    parts = chosen.split([len(mean) for mean in means.values()])
    return {name: part.nonzero().flatten() for name, part in zip(means, parts, strict=True)}


def _that_fit(sizes: Tensor, budget: int) -> list[int]:
    """Places of the sizes that fit, one after the other, into what is left of the budget."""
    taken, left = [], budget
    for place, size in enumerate(sizes.tolist()):
        if size <= left:
            taken.append(place)
            left -= size
    return taken


def top_of_rows(score: Tensor, budget: int) -> Tensor:
    """Flat positions of the best of every row, the budget shared out evenly, to the first rows one more where it does
    not divide. A tensor of one dimension is one row."""
    rows = score.flatten(1) if score.dim() > 1 else score.reshape(1, -1)  # (R, P / R)
    check_numbers(rows)
    sizes = (rows > -torch.inf).sum(1).tolist()
    counts = torch.tensor(apportioned(budget, sizes), device=rows.device)
    sorted_rows = rows.sort(dim=1, descending=True, stable=True)
    is_taken = torch.arange(rows.shape[1], device=rows.device) < counts.unsqueeze(1)
    is_taken &= sorted_rows.values > -torch.inf
    places = sorted_rows.indices + torch.arange(len(rows), device=rows.device).unsqueeze(1) * rows.shape[1]
    return places[is_taken].sort().values.cpu()


def _all_of(method: WeightScore, candidates: Mapping[str, Tensor], score: str) -> int:
    """How many weights the score can choose. Raises InputError for one that can choose any."""
    if score != "bias":
        raise InputError(f"score {score!r} can choose any weight: give a budget, such as 320000 or \"0.2%\"")
    return sum(int((method.result(name, tensor, Seen()) > -torch.inf).sum()) for name, tensor in candidates.items())


def _check(unit: str, scope: str) -> None:
    if unit not in units.UNITS:
        raise unknown_name("unit", unit, units.UNITS)
    if scope not in SCOPES:
        raise unknown_name("scope", scope, SCOPES)
    if unit != "weight" and scope != "global":
        raise InputError(f"scope {scope!r} is about single weights, and whole parts ({unit}) are chosen: leave it out")


def _check_rest(rest: int, count: int, whole: Sequence[str], candidates: Mapping[str, Tensor]) -> None:
    if rest < 0 or (rest > 0 and not candidates):
        raise InputError(f"budget {count:,} does not go with the tensors that are always chosen, {count - rest:,} "
                         f"weights of {len(whole)}: raise it, or choose fewer" if rest < 0 else
                         "every tensor is excluded: exclude fewer")


def _check_found(chosen: Mapping[str, Tensor], rest: int, candidates: Mapping[str, Tensor], unit: str,
                 score: str) -> None:
    """Raises InputError if fewer weights can be chosen than the budget has."""
    found = sum(len(ids) for ids in chosen.values())
    if unit != "weight" or found == rest:
        return
    if score == "bias":
        hint = "give a lower one" if found else "the model has none: take include_norm=True, or another score"
        raise InputError(f"budget {rest:,} is more than the {found:,} biases: {hint}")
    raise InputError(f"budget {rest:,} is more than the {found:,} weights that {score!r} can choose among the "
                     f"{len(candidates)} tensors: lower it")

