"""Bytes: what backward keeps, what weights and optimizer hold, what is free, and how many layers fit in it."""
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from benchmarks import models
from benchmarks.sizes import Size

MB = 1e6
FLOAT = 4  # bytes
SHARE_TO_USE = 0.8  # of the free memory; the rest is for activations


class TooLarge(ValueError):
    """Not even one layer fits."""


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages that `forward()` saves for the backward pass; each counts once, parameters do not."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in saved.values())


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, shared ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of all that trains, once there are any."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state."""
    return sum(value.nbytes for values in optimizer.state.values() for value in values.values()
               if isinstance(value, Tensor))


def peak_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> int:
    """Most bytes during `step()`: weights, optimizer state, gradients and whatever else there is at that moment."""
    return parameter_bytes(model) + optimizer_bytes(optimizer) + extra_bytes(next(model.parameters()).device, step)


def extra_bytes(device: torch.device, step: Callable[[], object]) -> int:
    """Most bytes that `step()` holds at a time beyond those it found."""
    return _extra_on_gpu(step, device) if device.type == "cuda" else _extra_on_cpu(step)


def _extra_on_cpu(step: Callable[[], object]) -> int:
    """Most bytes that `step()` has allocated and not yet freed, by PyTorch's record of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def _extra_on_gpu(step: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def free_bytes(device: torch.device) -> int:
    """Bytes a new process could use. On the CPU that is read from Linux's /proc/meminfo."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


def resident_bytes(size: Size) -> int:
    """Bytes of the weights, gradients and AdamW states of all rows at once, and of the logits of a training step.

    The small matrices of a LoRA are not counted.
    """
    full = models.dense(size, "meta")
    thin = models.dense(dataclasses.replace(size, config={**size.config, "intermediate_size": size.kept}), "meta")
    whole, rest, heads = _numel(full), _numel(thin), _numel(full, models.head_names(full, size))
    neurons = _numel(thin, models.neurons_and_head(thin, size))
    trained = {"full": whole, "lora": heads, "ours_lora": heads}
    frozen = {"full": 0, "lora": whole - heads, "ours_lora": rest - heads}
    total = 4 * sum(trained.get(row, neurons) for row in size.rows)  # weights, gradients, two moments
    total += sum({frozen.get(row, rest - neurons) for row in size.rows})  # equal ones are there once
    return FLOAT * (total + 3 * size.batch * size.length * int(size.config.get("vocab_size", 0)))


def layers_that_fit(size: Size, free: int) -> Size:
    """`size`, with fewer layers if its rows need more than a share of the `free` bytes.

    Raises TooLarge if not even one layer fits.
    """
    one, two = (resident_bytes(size.with_layers(count)) for count in (1, 2))
    layers = 1 + int((SHARE_TO_USE * free - one) // (two - one))
    if layers < 1:
        raise TooLarge(f"{size.described()} with the rows {', '.join(size.rows)} needs {one / 1e9:.1f} GB with one "
                       f"layer, and {free / 1e9:.1f} GB are free: measure fewer rows or a smaller size")
    return size.with_layers(min(layers, size.layers))


def _numel(model: nn.Module, names: Iterable[str] | None = None) -> int:
    chosen = None if names is None else set(names)
    return sum(p.numel() for name, p in model.named_parameters() if chosen is None or name in chosen)
