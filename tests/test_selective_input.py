"""What the wrapper back end is given and cannot do: one sentence that says so."""
from __future__ import annotations

import pytest
import torch
from masked import build
from test_selective_optimizer import selective
from torch import nn
from torch.optim import AdamW

from stt.errors import InputError
from stt.selective_optimizers.wrap import get_selective_optimizer

WRONG = {
    "no budget": ({"budget": None}, "budget= is missing"),
    "no max_steps": ({"max_steps": None}, "max_steps= must be"),
    "zero steps": ({"max_steps": 0}, "max_steps= must be"),
    "too large": ({"budget": 600}, "at most the 511 weights"),
    "not whole": ({"budget": "many"}, "budget must be a number"),
    "correction": ({"bias_correction": "none"}, "unknown bias_correction 'none'"),
    "gather": ({"gather": "never"}, "unknown gather 'never'"),
    "schedule": ({"schedule": "cosine"}, "unknown schedule 'cosine'"),
    "differentiable": ({"differentiable": True}, "differentiable=True"),
    "eps": ({"eps": 0.0, "exp": 1.0}, "raise eps"),
    "passes": ({"accumulation_steps": 0}, "accumulation_steps must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_told(case: str) -> None:
    arguments, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        selective(build(), **{"lr": 1e-2} | arguments)


def test_wrong_methods_and_groups_are_told() -> None:
    model = build()
    with pytest.raises(InputError, match="unknown method 'id4'.*Did you mean 'id3'"):
        get_selective_optimizer(AdamW, "id4")
    with pytest.raises(InputError, match="must be a class of optimizers.*got 'adamw'"):
        get_selective_optimizer("adamw", "id3")
    whole = [{"params": model.parameters(), "choose_all": True}]
    with pytest.raises(InputError, match="leaves nothing to choose beside the 511"):
        get_selective_optimizer(AdamW, "id3")(whole, budget=511, max_steps=3)
    with pytest.raises(InputError, match="less than the 511 weights of the choose_all"):
        get_selective_optimizer(AdamW, "pafi")(whole, budget=510)
    assert get_selective_optimizer(AdamW, "pafi")(whole, budget=511).get_budget_used() == 511
    with pytest.raises(InputError, match="unknown direction"):
        get_selective_optimizer(AdamW, "pafi")(model.parameters(), budget=5, direction="up")


def test_gradients_that_a_scaler_would_have_to_unscale_are_refused() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    head = nn.Parameter(torch.ones(3))
    optimizer = get_selective_optimizer(torch.optim.SGD, "pafi")(
        [{"params": [weight]}, {"params": [head], "choose_all": True}], lr=0.1, budget=5, gather="backward")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum() + head.sum()).backward()
    with pytest.raises(InputError, match="GradScaler"):
        scaler.step(optimizer)
    assert torch.equal(weight, torch.ones(4, 4))
