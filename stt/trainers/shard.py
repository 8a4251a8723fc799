"""Training with FSDP2: weights, gradients and optimizer of a model shared out over the GPUs of several processes."""
from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import TrainingArguments

CONFIG = {"version": 2, "state_dict_type": "FULL_STATE_DICT"}  # whole weights in checkpoints, whoever reads them


@contextmanager
def trainable(model: nn.Module, arguments: TrainingArguments) -> Iterator[nn.Module]:
    """What Trainer is to train: the model, or, where it is to be sharded, a copy that is taken apart. The model then
    waits on the CPU, and has all values of the copy afterwards, whole, on every process."""
    if not arguments.fsdp:
        yield model
        return
    device = next(model.parameters()).device
    copied = copy.deepcopy(model)
    model.to("cpu")
    yield copied
    state = get_model_state_dict(copied, options=StateDictOptions(full_state_dict=True))
    missing, unknown = model.load_state_dict(state, strict=False)
    amiss = [*unknown, *(set(missing) - set(model.all_tied_weights_keys))]
    assert not amiss, f"the copy has other parameters than the model: {amiss[:3]}"
    model.to(device)
