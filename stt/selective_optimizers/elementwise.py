"""Whether an optimizer treats every number by itself, so that some of a tensor may be trained without the others."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stt.errors import InputError

STEPS = 3
SHAPE = (6, 5)
PARTS = (7, 23)  # how many numbers of it stand alone


def check_elementwise(base: type[Optimizer], arguments: dict[str, object], device: torch.device) -> None:
    """Raises InputError unless `base` changes the numbers of a small problem alike, whole and in parts.

    A mistake in the arguments is the base optimizer's own error.
    """
    if "lr" in arguments:
        arguments = {**arguments, "lr": 1e-2}  # a first rate of 0 would show nothing
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(device)
                         for _ in range(STEPS + 1))
    whole = nn.Parameter(start.clone())
    parts = [nn.Parameter(part.clone()) for part in start.flatten().split(PARTS)]
    one = base([whole], **arguments)
    try:
        other = base(parts, **arguments)
        _step(one, [whole], [[gradient] for gradient in gradients])
        _step(other, parts, [list(gradient.flatten().split(PARTS)) for gradient in gradients])
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refused(base, str(error)) from error
    change, by_parts = whole.detach() - start, torch.cat([part.detach() for part in parts]) - start.flatten()
    if not torch.allclose(change.flatten(), by_parts, rtol=1e-5, atol=1e-6 * change.abs().max().item()):
        raise _refused(base, "it changes a number by what its neighbours are")
    if any(isinstance(value, Tensor) and value.numel() > 1 and value.shape != whole.shape
           for value in one.state[whole].values()):
        raise _refused(base, "its state is not one number per weight")


def _step(optimizer: Optimizer, parameters: list[nn.Parameter], gradients: list[list[Tensor]]) -> None:
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def _refused(base: type[Optimizer], reason: str) -> InputError:
    return InputError(f"{base.__name__} does not train single weights ({reason.splitlines()[0]}): take an optimizer "
                      "that works number by number, such as AdamW or SGD")
