"""For tests of `stt plan`: its answer, and the loss of a training step to compare it with."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import small_runs
import torch
from torch import Tensor, nn

from stt import verbs
from stt.loss import chunked_loss

B, T, L = 4, 64, 9  # examples, tokens, labelled ones
SHIPPED = str(small_runs.SHIPPED)


def answer(capsys: pytest.CaptureFixture, *flags: str) -> dict:
    assert verbs.main(["plan", *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def as_config(model: nn.Module, folder: Path) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def loss_of(model: nn.Module, precision: str) -> Callable[..., Tensor]:
    """A function that computes the loss on a padded batch or one row."""
    chunked_loss(model.train())

    def loss(examples: int = B) -> Tensor:
        ids = torch.randint(3, 90, (examples, T))
        labels = ids.clone()
        labels[:, :-L] = -100
        mask = torch.ones_like(ids)
        mask[1:, :3] = 0  # not of a single row
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss
