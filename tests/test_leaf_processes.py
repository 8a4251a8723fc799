"""Selected weights that train in two processes, as copies (DDP) and in parts (FSDP2): as in one."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_fsdp import batches, shard, steps
from tiny_text import build_decoder
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import in_two

import stt
from stt.errors import InputError
from stt.selection import Selection
from stt.selective_optimizers.leaf import Leaf, trained_values
from stt.selective_optimizers.weights import named_tensors, selection_of

Found = tuple[list[float], dict[str, Tensor]]


def selection_for(model: nn.Module) -> Selection:
    """Single weights, rows, columns and a whole tensor; counts that two do not divide."""
    tensors = named_tensors(model)
    first, last = "model.layers.0.mlp", "model.layers.1.self_attn.o_proj.weight"
    units = {"model.embed_tokens.weight": torch.arange(0, 400, 3), f"{first}.gate_proj.weight": torch.tensor([1, 3, 5]),
             f"{first}.down_proj.weight": torch.arange(0, 9, 2), "model.norm.weight": torch.arange(5),
             last: torch.arange(len(tensors[last]))}
    along = {f"{first}.gate_proj.weight": 0, f"{first}.down_proj.weight": 1, last: 0}
    return selection_of(units, along, tensors, {})


def attached() -> nn.Module:
    torch.manual_seed(0)
    model = build_decoder(vocabulary=60).train()
    return stt.attach(model, selection_for(model))


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The selected values, and that the model's own tensors hold them."""
    found = {name: value.clone() for name, value in trained_values(model).items()}
    stt.detach(model)
    return found | {f"all of {name}": tensor.detach().clone() for name, tensor in named_tensors(model).items()}


def in_copies(rank: int) -> Found:
    model = attached()
    losses = steps(DistributedDataParallel(model), [ids[rank::2] for ids in batches()])
    return losses, trained(model)


def in_parts(rank: int) -> Found:
    model = shard(attached())
    with pytest.raises(InputError, match="attach first"):
        stt.attach(shard(build_decoder(vocabulary=60)), selection_for(build_decoder(vocabulary=60)))
    losses = steps(model, [ids[rank::2] for ids in batches()])
    values = {name: value.clone() for name, value in trained_values(model).items()}
    tensors = {name: tensor.full_tensor().detach().clone() for name, tensor in model.named_parameters()
               if "_selected" not in name}
    return losses, values | {f"all of {name}": tensor for name, tensor in tensors.items()}


def with_ids_of_its_own(rank: int) -> list[Tensor]:
    """The positions of every leaf after a step, of which each process marks its own."""
    model = attached()
    leaves = [module for module in model.modules() if isinstance(module, Leaf)]
    for leaf in leaves:
        leaf.ids = torch.full_like(leaf.ids, rank)
    parallel = DistributedDataParallel(model)
    parallel(input_ids=batches()[0][rank::2])
    return [leaf.ids.clone() for leaf in leaves]


def test_positions_are_not_exchanged(tmp_path: Path) -> None:
    """DDP sends every buffer before every step; those of the leaves never change, and are as many as the weights."""
    for rank, found in enumerate(in_two(with_ids_of_its_own, tmp_path)):
        assert len(found) == 4
        assert all((ids == rank).all() for ids in found)


@pytest.mark.parametrize("way", [in_copies, in_parts])
def test_two_processes_train_as_one(way: Callable[[int], Found], tmp_path: Path) -> None:
    alone = attached()
    losses, expected = steps(alone, batches()), trained(alone)
    (first, one), (second, two) = in_two(way, tmp_path)
    torch.testing.assert_close([(a + b) / 2 for a, b in zip(first, second, strict=True)], losses, rtol=0, atol=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=1e-6, msg=name)
        assert torch.equal(one[name], two[name])
    torch.manual_seed(0)
    start = named_tensors(build_decoder(vocabulary=60))
    moved = [name for name in start if not torch.equal(one[f"all of {name}"], start[name])]
    assert set(moved) == set(selection_for(build_decoder(vocabulary=60)))
