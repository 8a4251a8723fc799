"""The state every measurement runs in."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stt.trace import evaluating


@contextmanager
def inference(model: nn.Module, autocast_dtype: torch.dtype | None = None) -> Iterator[torch.device]:
    """Evaluation mode without gradients, under autocast if a dtype is given; yields the model's device.

    Afterwards every module is back in the mode, train or eval, it was in by itself.
    """
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode(), \
            torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
        yield device
