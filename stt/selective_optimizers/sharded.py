"""Tensors that FSDP2 has shared out over processes: every process writes what lies in its own part."""
from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from stt.errors import InputError
from stt.selective_optimizers.weights import write


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; of a plain one itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_part(tensor: Tensor, axis: int | None, ids: Tensor, values: Tensor) -> None:
    """`weights.write` of all `values` into a tensor, or into this process's part of it: some of its rows. Raises
    InputError for a tensor that is shared out along another axis."""
    if not isinstance(tensor, DTensor):
        write(tensor, axis, ids, values)
        return
    local = tensor.to_local()
    first = _first_row(tensor)
    if axis == 1:
        write(local, 1, ids, values[first:first + len(local)])
        return
    size = 1 if axis == 0 else tensor.numel() // len(tensor)  # units of a row
    is_here = (ids >= first * size) & (ids < (first + len(local)) * size)
    write(local, axis, ids[is_here] - first * size, values[is_here])


def _first_row(tensor: DTensor) -> int:
    """The first row that this process has: every process has ceil(rows / processes) of them, the last ones fewer."""
    shared = [place for place, placement in enumerate(tensor.placements) if placement.is_shard()]
    if not shared:
        return 0
    if len(shared) > 1 or not tensor.placements[shared[0]].is_shard(0):
        raise InputError("selected weights can train in tensors that are shared out by rows, as fully_shard does, and "
                         f"this one is shared out as {tensor.placements}: leave the sharding out")
    mesh = tensor.device_mesh
    return min(mesh.get_local_rank(shared[0]) * -(-len(tensor) // mesh.size(shared[0])), len(tensor))
