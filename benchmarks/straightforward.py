"""The straightforward way to do what the library does: the obvious code, sharing nothing with it.

Training: the kept neurons are computed, scattered into the dense width in front of the activation function, and
gathered again in front of the down projection. Selection: forward hooks on the dense model, statistics on the host.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Shapes: B batch, T tokens, D model width, F neurons, K kept neurons.


class ScatterLinear(nn.Module):
    """Rows `ids` of a linear layer; its output has the dense width, with zeros elsewhere."""

    def __init__(self, linear: nn.Linear, ids: Tensor):
        super().__init__()
        self.width = linear.out_features
        self.weight = nn.Parameter(linear.weight.detach()[ids].clone())  # (K, D)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach()[ids].clone())
        self.register_buffer("ids", ids)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # (B, T, K)
        wide = y.new_zeros(*y.shape[:-1], self.width)
        return wide.index_copy(-1, self.ids, y)  # (B, T, F)


class GatherLinear(nn.Module):
    """Columns `ids` of a linear layer; reads the dense width."""

    def __init__(self, linear: nn.Linear, ids: Tensor):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach()[:, ids].clone())  # (D, K)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.register_buffer("ids", ids)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.index_select(-1, self.ids), self.weight, self.bias)  # (B, T, D)


def scatter(model: nn.Module, kept: Mapping[str, Tensor], feeding: Iterable[str], down: str) -> nn.Module:
    """`model` itself, computing only the `kept` neurons of each layer."""
    for layer, ids in kept.items():
        for names, kind in ((feeding, ScatterLinear), ((down,), GatherLinear)):
            for name in names:
                owner, _, attribute = f"{layer}.{name}".rpartition(".")
                block = model.get_submodule(owner)
                linear = getattr(block, attribute)
                setattr(block, attribute, kind(linear, ids.to(linear.weight.device)))
    return model


@torch.no_grad()
def measure(model: nn.Module, modules: Iterable[str], batches: Iterable[Mapping[str, Tensor]],
            threshold: float = 0.01) -> dict[str, dict[str, Tensor]]:
    """Mean output of each neuron of `modules`, and how often it is at least `threshold`: {module: {mean, rate}}, (F,).

    Assumes that no position is padding.
    """
    outputs: dict[str, list[Tensor]] = {}
    statistics: dict[str, dict[str, Tensor]] = {}
    hooks = [model.get_submodule(name).register_forward_hook(
        lambda module, args, output, name=name: outputs.setdefault(name, []).append(output.detach().float().cpu()))
        for name in modules]
    was_training = model.training
    model.eval()
    positions = 0
    for batch in batches:
        model(**batch)
        for name, collected in outputs.items():
            rows = torch.cat(collected).flatten(0, -2)  # (B T, F)
            sums = statistics.setdefault(name, {"mean": torch.zeros(rows.shape[1]), "rate": torch.zeros(rows.shape[1])})
            sums["mean"] += rows.sum(0)
            sums["rate"] += (rows >= threshold).sum(0)
        positions += len(rows)
        outputs.clear()
    for hook in hooks:
        hook.remove()
    model.train(was_training)
    return {name: {key: value / positions for key, value in sums.items()} for name, sums in statistics.items()}
