"""Sliced models under FSDP2 (fully_shard) in two processes: they train as one process, also where the kept width does
not divide evenly, and their checkpoint is read on another number of processes."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_text import build_decoder
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from two_processes import in_two

import stt
from stt.selection import Selection
from stt.sites import find_sites

STEPS = 3


def sliced(widths: tuple[int, ...]) -> nn.Module:
    """A decoder with so many kept neurons in its blocks, of which those and the head train."""
    torch.manual_seed(0)
    model = build_decoder(vocabulary=60)
    sites = find_sites(model)
    assert len(sites) == len(widths)
    stt.apply(model, Selection({name: torch.arange(width) * 2 for name, width in zip(sites, widths, strict=True)}))
    stt.train_only(model)
    return model.train()


def batches() -> list[Tensor]:
    return list(torch.randint(3, 60, (STEPS, 4, 9), generator=torch.Generator().manual_seed(1)))


def steps(model: nn.Module, chosen: list[Tensor]) -> list[float]:
    """The losses of AdamW steps on these batches."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for ids in chosen:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def shard(model: nn.Module) -> nn.Module:
    """Every layer, then the rest, over the processes there are."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained_on_half(rank: int, widths: tuple[int, ...], folder: str) -> dict[str, object]:
    model = shard(sliced(widths))
    losses = steps(model, [ids[rank::2] for ids in batches()])
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {"losses": losses, "state": whole}


@pytest.mark.parametrize("widths", [(6, 6), (7, 3), (1, 5)], ids=str)
def test_sharded_training_is_that_of_one_process(widths: tuple[int, ...], tmp_path: Path) -> None:
    model = sliced(widths)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = steps(model, batches())
    folder = tmp_path / "checkpoint"
    first, second = in_two(trained_on_half, tmp_path, widths, str(folder))
    torch.testing.assert_close((torch.tensor(first["losses"]) + torch.tensor(second["losses"])) / 2,
                               torch.tensor(losses), rtol=0, atol=1e-6)
    check(first["state"], model.state_dict())  # the full state is gathered on the first process
    assert max((model.state_dict()[name] - value).abs().max() for name, value in before.items()) > 1e-3
    check(read_by_one_process(widths, folder), model.state_dict())


def read_by_one_process(widths: tuple[int, ...], folder: Path) -> Mapping[str, Tensor]:
    """What two processes saved, in a model that is not sharded."""
    model = sliced(widths)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(model, state["model"])
    return model.state_dict()


def check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() <= expected.keys()
    assert {name for name in expected if "mlp" in name} <= found.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
