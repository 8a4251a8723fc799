"""Adam with a step count for every number: weights that were chosen at different times stand in one parameter."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

# Shapes: n numbers of a parameter.

COUNTS = (Adam, AdamW)  # whose step `step_by_entry` can do
FRESH = ("step", "exp_avg", "exp_avg_sq")  # their state before the first step, as numbers that are 0


@torch.no_grad()
def step_by_entry(optimizer: Optimizer) -> None:
    """Do the step of the parameters whose state counts the steps of every number, and take their gradients away, so
    that the optimizer's own step leaves them alone. The formulas, and their order, are those of torch's Adam."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if parameter.grad is not None and "step" in state and state["step"].dim():
                _step(parameter, state, group)
                parameter.grad = None


def follow(optimizer: Optimizer) -> None:
    """Bring the counts to their parameters: torch leaves them where they were loaded."""
    for parameter, state in optimizer.state.items():
        if "step" in state and isinstance(state["step"], Tensor) and state["step"].dim():
            state["step"] = state["step"].to(parameter.device)


def _step(parameter: nn.Parameter, state: dict[str, Tensor], group: dict[str, object]) -> None:
    beta1, beta2 = map(float, group["betas"])
    rate, decay = float(group["lr"]), float(group["weight_decay"])
    gradient = -parameter.grad if group["maximize"] else parameter.grad
    if decay and group["decoupled_weight_decay"]:
        parameter.mul_(1 - rate * decay)
    elif decay:
        gradient = gradient.add(parameter, alpha=decay)
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if group["amsgrad"]:
        largest = state.setdefault("max_exp_avg_sq", torch.zeros_like(square))
        square = torch.maximum(largest, square, out=largest)
    steps = state["step"].add_(1)
    rates, roots = -rate / _of_steps(beta1, steps), _of_steps(beta2, steps).sqrt()
    spread = square.sqrt().div_(_at(steps, roots, square)).add_(group["eps"])
    parameter.add_(_at(steps, rates, mean).mul_(mean).div_(spread))


def _of_steps(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^step in float64, for every count up to the highest: there are fewer of those than numbers."""
    return 1 - beta ** torch.arange(int(steps.max()) + 1, dtype=torch.float64)


def _at(steps: Tensor, table: Tensor, like: Tensor) -> Tensor:
    """(n,) the entries of the table, of the dtype and on the device of `like`."""
    return table.to(like).index_select(0, steps.int())
