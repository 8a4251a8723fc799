"""Whether all of a feed-forward block was cut: seen in the shapes of the model before and after, by nothing that finds
sites. The configuration says which sizes are feed-forward widths; no other size of a tiny model is one."""
from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .build import Built

FACTORS: dict[str, tuple[float, ...]] = {  # times the width in the configuration: 1, and 2 for fused projections
    "dbrx": (4,),  # experts along one axis
    **dict.fromkeys(("kyutai_speech_to_text", "moshi", "recurrent_gemma"), (0.5, 1)),  # which says the double
}


@dataclass(frozen=True)
class Coverage:
    """Axes of parameters that are a feed-forward width: all, those that became narrower, and the names of the
    parameters of the others that something states as left out, or that nothing does."""

    axes: int
    narrower: int
    stated: tuple[str, ...]
    unstated: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.narrower}/{self.axes}"


def coverage(built: Built, sliced: nn.Module, left_out: Iterable[str], idle: Iterable[str]) -> Coverage:
    """Of the dense model and its sliced copy, in which every block has lost a neuron; `left_out` are parameters that
    were named as left out, `idle` beginnings of the names of those that the batch does not run."""
    left_out = set(left_out)
    left_out |= {re.sub(r"weight$", "bias", name) for name in left_out}
    sizes = {round(width * factor) for width in built.widths.values() for factor in
             FACTORS.get(built.model.config.model_type, (1, 2))}
    after = {name: tuple(parameter.shape) for name, parameter in sliced.named_parameters()}
    axes, narrower, stated, unstated = 0, 0, [], []
    for name, parameter in built.model.named_parameters():
        wide = [size for size in parameter.shape if size in sizes]
        kept = sum(min(wide.count(size), after.get(name, wide).count(size)) for size in set(wide))
        axes, narrower = axes + len(wide), narrower + len(wide) - kept
        if kept:
            (stated if name in left_out or name.startswith(tuple(idle)) else unstated).append(name)
    return Coverage(axes, narrower, tuple(stated), tuple(unstated))
