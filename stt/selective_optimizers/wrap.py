"""The published front door: an optimizer class that trains a budget of weights chosen by ID3, PaFI or BitFit.

>>> optimizer_class = get_selective_optimizer(torch.optim.AdamW, "id3")
>>> optimizer = optimizer_class(model.parameters(), lr=1e-4, budget=100_000, max_steps=1000)
"""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from torch.optim import Optimizer

from stt.errors import InputError, unknown_name
from stt.selective_optimizers import scores
from stt.selective_optimizers.optimizer import SelectiveOptimizer
from stt.selective_optimizers.schedules import Biases, Grow, Schedule, Static

SMALLEST_DIVISOR = 1e-30  # of a score, so that it stays a float32


def id3(max_steps: int | None = None, exp: float = 1.0, eps: float = 1e-8, schedule: str = "uniform") -> Schedule:
    """Every one of `max_steps` steps adds the weights with the highest |g| / (eps + |w|)^exp.
    arxiv.org/abs/2408.14470. `eps` is that of the score; the base optimizer's is `base_eps`."""
    if exp and (eps < 0 or eps ** exp < SMALLEST_DIVISOR):
        raise InputError(f"eps={eps} with exp={exp} lets the score of a weight of 0 leave the numbers: raise eps")
    return Grow(max_steps, scores.make("d3", exp=exp, eps=eps), schedule)


def pafi(direction: str = "smallest") -> Schedule:
    """The weights of the smallest magnitude (arxiv.org/abs/2305.16742), or of the largest."""
    if direction not in (directions := ("smallest", "largest")):
        raise unknown_name("direction", str(direction), directions)
    return Static(scores.make(direction))


def bitfit(include_norm: bool = False) -> Schedule:
    """The biases. arxiv.org/abs/2106.10199"""
    return Biases(include_norm)


METHODS: dict[str, Callable[..., Schedule]] = {"id3": id3, "pafi": pafi, "bitfit": bitfit}


@functools.cache
def get_selective_optimizer(optimizer_class: type[Optimizer], peft_to_use: str) -> type[SelectiveOptimizer]:
    """An optimizer class as published: `optimizer_class` behind a SelectiveOptimizer, with the arguments of all three.

    The method's are `max_steps`, `exp`, `eps` and `schedule` (id3), `direction` (pafi), `include_norm` (bitfit); the
    others are SelectiveOptimizer's and those of `optimizer_class`. Raises InputError for an unknown method.
    """
    if peft_to_use not in METHODS:
        raise unknown_name("method", str(peft_to_use), METHODS)
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise InputError(f"optimizer_class must be a class of optimizers such as torch.optim.AdamW, got "
                         f"{optimizer_class!r}")
    method = METHODS[peft_to_use]
    names = list(inspect.signature(method).parameters)

    class Selective(SelectiveOptimizer):
        def __init__(self, params: object, *args: object, **arguments: object):
            own = {name: arguments.pop(name) for name in names if name in arguments}
            if "base_eps" in arguments:
                arguments["eps"] = arguments.pop("base_eps")
            super().__init__(params, optimizer_class, method(**own), **_by_name(optimizer_class, args), **arguments)

    Selective.__name__ = Selective.__qualname__ = f"{peft_to_use.capitalize()}{optimizer_class.__name__}"
    return Selective


def _by_name(optimizer_class: type[Optimizer], args: tuple[object, ...]) -> dict[str, object]:
    """Arguments after the tensors that were given by their place."""
    return dict(zip(list(inspect.signature(optimizer_class).parameters)[1:], args, strict=False))
