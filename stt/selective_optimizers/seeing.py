"""One pass over batches for scores of weights: gradients of single weights, and norms of what linear layers read.

The loss is summed over labels and padding never counts, so that what is seen does not depend on how the data is
batched, nor on how many processes share it.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from stt.batches import Batch, as_inputs, batched, on_device, padded_right, token_masks
from stt.calibrate import summed_loss
from stt.errors import InputError
from stt.selective_optimizers.scores.base import Seen
from stt.trace import evaluating
from util import ranks

# Shapes: B examples, T tokens, D inputs of a linear layer.

Sums = defaultdict[str, dict[str, Tensor]]  # field of Seen -> tensor name -> sum


def see(model: nn.Module, tensors: Mapping[str, nn.Parameter], needs: Iterable[str], data: Iterable[Batch] = (),
        tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Seen]:
    """What `data` shows of each of these tensors; nothing is run if nothing is needed. Raises InputError for no data
    where it is needed, and whatever is wrong with a batch."""
    needs = set(needs)
    if not needs:
        return {name: Seen() for name in tensors}
    sums: Sums = defaultdict(dict)
    count = 0
    with evaluating(model), _differentiating(model, tensors, bool(needs & {"gradient", "squares"})):
        for batch in tqdm(batched(data), desc="measuring weights", unit="batch", disable=None if ranks.is_first()
                          else True):
            inputs = on_device(padded_right(model, as_inputs(batch, model, tokenizer)), model)
            for part in _examples(inputs) if "squares" in needs else [inputs]:
                count += 1
                _add(model, tensors, needs, part, sums)
    if not sum(ranks.gather(count)):
        raise InputError("this score of weights looks at data, and there is none: give batches with `labels`, or "
                         "choose smallest, largest, bias or random")
    _add_up_over_ranks(sums, tensors, needs)
    return {name: Seen(**{field: of_tensor.get(name) for field, of_tensor in sums.items()}) for name in tensors}


def _add(model: nn.Module, tensors: Mapping[str, nn.Parameter], needs: set[str], inputs: dict[str, Tensor],
         sums: Sums) -> None:
    with _noting_inputs(model, tensors, inputs, sums["inputs"]) if "inputs" in needs else nullcontext():
        if needs == {"inputs"}:
            model(**{name: value for name, value in inputs.items()
                     if name != "labels" or model.config.is_encoder_decoder})
            return
        loss = summed_loss(model, inputs)
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, materialize_grads=True)
    for name, gradient in zip(tensors, found, strict=True):
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        for field in needs & {"gradient", "squares"}:
            value = wide.square() if field == "squares" else wide
            sums[field][name] = sums[field][name].add_(value) if name in sums[field] else value


def _examples(inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Every example of a batch by itself."""
    size = max(len(value) for value in inputs.values() if isinstance(value, Tensor))
    for i in range(size):
        yield {name: value[i:i + 1] if isinstance(value, Tensor) and len(value) == size else value
               for name, value in inputs.items()}


@contextmanager
def _differentiating(model: nn.Module, tensors: Mapping[str, nn.Parameter], is_needed: bool) -> Iterator[None]:
    """Gradients of these tensors and of no others, if of any; afterwards each requires what it did."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = {id(tensor) for tensor in tensors.values()}
    for parameter in before:
        parameter.requires_grad_(is_needed and id(parameter) in chosen)
    try:
        with torch.set_grad_enabled(is_needed):
            yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


@contextmanager
def _noting_inputs(model: nn.Module, tensors: Mapping[str, nn.Parameter], inputs: dict[str, Tensor],
                   squares: dict[str, Tensor]) -> Iterator[None]:
    """Add up the squares of what the linear layers of these tensors read, shaped to go with their weights: (D,), or
    (D, 1) for Conv1D."""
    masks = token_masks(model, inputs).values()
    names = {id(tensor): name for name, tensor in tensors.items()}
    handles = [module.register_forward_pre_hook(_adding(squares, names[id(module.weight)], masks))
               for module in model.modules()
               if isinstance(module, nn.Linear | Conv1D) and id(module.weight) in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(squares: dict[str, Tensor], name: str, masks: Iterable[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows = arguments[0].detach().flatten(0, -2)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).square()  # (N, D)
        mask = next((mask for mask in masks if len(mask) == len(rows)), None)
        value = rows.sum(0) if mask is None else mask.to(rows) @ rows
        value = value.unsqueeze(1) if isinstance(module, Conv1D) else value
        squares[name] = squares[name] + value if name in squares else value
    return hook


def _add_up_over_ranks(sums: Sums, tensors: Mapping[str, Tensor], needs: set[str]) -> None:
    """Every process sees its share of the data; the sums of all of them count."""
    if ranks.world() == 1:
        return
    for field in sorted(needs):
        for name in tensors:
            shapes = [shape for shape in ranks.gather(tuple(sums[field][name].shape) if name in sums[field] else None)
                      if shape is not None]
            if shapes:
                value = sums[field].setdefault(name, torch.zeros(shapes[0], device=tensors[name].device))
                torch.distributed.all_reduce(value)
