"""A training step on tensors that have a shape and no data: its FLOPs, what its forward saves, the most it holds.

The step is the real one: PyTorch's FakeTensorMode runs every operation of forward and backward, autocast and the fused
blocks included, as the CPU would and computes only shapes. That takes seconds for 7B parameters and no memory.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stt.calibrate import body_of, last_site
from stt.chunked import Transform, summed_at
from stt.dummy import dummy_inputs, fitting_inputs
from stt.errors import InputError
from stt.loss import is_head_on_body
from stt.observe import Done
from stt.selecting import sites_of
from stt.trace import evaluating
from util.torch_flops import flops_of, training_flops

# Shapes: B examples, T tokens, L labelled positions of an example, V words; E experts, N rows, I inputs, O outputs.

WITHOUT_MASK = "sdpa_without_mask"  # transformers makes a mask wherever it cannot look for padding
AttentionInterface.register(WITHOUT_MASK, sdpa_attention_forward)
AttentionMaskInterface.register(WITHOUT_MASK, lambda *_, **__: None)
UNKNOWN_WITHOUT_DATA = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@dataclass(frozen=True)
class Held:
    """Bytes of a training step: what its forward saves for its backward, and what there is besides the model's own
    weights and buffers at the worst moment: gradients, activations, everything in between."""

    saved: int
    peak: int


@dataclass(frozen=True)
class Batch:
    """B examples of T tokens, L of them labelled; more than one example means padding, so a mask."""

    examples: int
    length: int
    labelled: int


def step_flops(model: PreTrainedModel, batch: Batch, autocast_dtype: torch.dtype | None) -> int:
    """FLOPs of training on one example of the batch, forward and backward. `model` is on the meta device and ready to
    train, and of no other use afterwards."""
    head = _head_of_chunks(model)
    with _without_data(model.train()):
        loss = _loss(model, replace(batch, examples=1), head, autocast_dtype)
        return training_flops(model, {}, lambda *_: loss())


def step_bytes(model: PreTrainedModel, batch: Batch, autocast_dtype: torch.dtype | None,
               passing: Collection[str] = (), scores: int = 0) -> Held:
    """What a training step holds; `model` as above.

    Gradients of the parameters `passing` are gone as soon as they are there, after `scores` bytes for each of their
    numbers: sharded training keeps its part elsewhere, and an optimizer that chooses takes what it needs.
    """
    head = _head_of_chunks(model)
    with _without_data(model.train()):
        loss = _loss(model, batch, head, autocast_dtype)
        owned = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        for parameter in (parameter for name, parameter in model.named_parameters() if name in passing):
            parameter.register_post_accumulate_grad_hook(lambda one: _pass(one, scores))
        saved = _Saved(owned)
        with _Alive(owned) as alive:
            with saved.hooks():
                result = loss()
            saved_bytes = saved.total()
            result.backward()
    return Held(saved_bytes, alive.peak)


def selection_flops(model: PreTrainedModel, length: int, units: str = "neurons") -> int:
    """FLOPs of showing one example to scores of these units that need a forward pass and no gradients: it ends at the
    last site. `model` is dense, on the meta device, and of no other use afterwards."""
    sites = sites_of(model, units != "heads", units != "neurons")
    with _without_data(model), evaluating(model), torch.no_grad():
        inputs, last = _inputs(model, 1, length), last_site(model, sites, set())
        if last is not None:
            model.get_submodule(sites[last].down_module).register_forward_pre_hook(_end)
        return flops_of(lambda: _until_done(body_of(model, sites), inputs))


def _until_done(body: nn.Module, inputs: Mapping[str, object]) -> None:
    with suppress(Done):
        body(**inputs)


def _end(module: nn.Module, args: tuple) -> None:
    raise Done


def _pass(parameter: Tensor, scores: int) -> None:
    torch.empty(scores * parameter.numel(), dtype=torch.uint8, device=parameter.device)
    parameter.grad = None


# ---------------------------------------------------------------- inputs and loss


def _inputs(model: PreTrainedModel, examples: int, length: int) -> dict[str, Tensor | bool]:
    """A batch of what the model reads; token ids are (B, T), anything else is as large as the model wants it."""
    reads_text = model.main_input_name == "input_ids"
    made = next(dummy_inputs(model)) if reads_text else fitting_inputs(model)
    if made is None:
        raise InputError(f"no input can be made up for {type(model).__name__}, so its step cannot be counted: give a "
                         "model of text, pictures or sound")
    if examples == 1 and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(WITHOUT_MASK)
    elif model.config._attn_implementation == WITHOUT_MASK:
        model.set_attn_implementation("sdpa")
    shapes = {name: (examples, length) if value.dtype == torch.long else (examples, *value.shape[1:])
              for name, value in made.items() if isinstance(value, Tensor)}
    return made | {name: torch.zeros(shape, dtype=made[name].dtype) for name, shape in shapes.items()}


def _head_of_chunks(model: PreTrainedModel) -> nn.Linear | None:
    """The head of a decoder whose loss the recipes compute in chunks."""
    is_decoder = model.get_output_embeddings() is not None and not model.config.is_encoder_decoder
    return model.get_output_embeddings() if is_decoder and is_head_on_body(model) else None


def _loss(model: PreTrainedModel, batch: Batch, head: nn.Linear | None,
          autocast_dtype: torch.dtype | None) -> Callable[[], Tensor]:
    """The loss of the recipes, to be computed: in chunks, at the labelled positions, if that is the `head`'s."""
    inputs = _inputs(model, batch.examples, batch.length)
    rows = torch.zeros(batch.examples * batch.labelled, dtype=torch.long)  # (B L,), any of them

    def loss() -> Tensor:
        with torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None):
            if head is None:
                return _own_loss(model(**inputs))
            hidden = model.base_model(**inputs, return_dict=True).last_hidden_state  # (B, T, D)
            return summed_at(hidden, head.weight, head.bias, rows, rows, Transform())
    return loss


def _own_loss(outputs: Mapping[str, object]) -> Tensor:
    """The cross-entropy of the logits (..., V), or a sum of the first output of a model that has none."""
    if "logits" not in outputs:
        return next(value for value in outputs.values() if isinstance(value, Tensor)).float().sum()
    logits = outputs["logits"].flatten(0, -2).float()
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


# ---------------------------------------------------------------- tensors without data


@contextmanager
def _without_data(model: nn.Module) -> Iterator[None]:
    """The parameters and buffers of a meta-device model get to stand for CPU tensors, shared ones once.

    Raises InputError for a model whose shapes depend on values.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _GroupedProducts():
            made: dict[int, Tensor] = {}
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, value in tensors.items():
                        if value is not None and value.is_meta:
                            tensors[name] = made.setdefault(id(value), _on_cpu(value))
            yield
    except UNKNOWN_WITHOUT_DATA as error:
        raise InputError(f"what {type(model).__name__} computes depends on the values it reads ({error}), so its step "
                         "cannot be counted without data: time a short run instead") from error


def _on_cpu(value: Tensor) -> Tensor:
    empty = torch.empty_like(value, device="cpu")
    return nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty


class _GroupedProducts(TorchDispatchMode):
    """The shape of a product of rows with the matrices of their experts, whoever they are sent to: PyTorch's own rule
    without data knows bfloat16 alone."""

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (),
                           kwargs: Mapping[str, object] | None = None) -> object:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        left, right, ends = args[:3]
        if right.ndim == 3:
            return left.new_empty(len(left), right.shape[-1])  # (N, I) @ (E, I, O) -> (N, O)
        return left.new_empty(len(ends), len(left), right.shape[-1])  # (I, N) @ (N, O) -> (E, I, O)


class _Saved:
    """The storages saved for backward, each once, those in `owned` never."""

    def __init__(self, owned: set[int]):
        self.owned = owned
        self.storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.owned:
            self.storages[storage._cdata] = storage
        return tensor

    def total(self) -> int:
        """Bytes; from now on nothing is held."""
        total = sum(storage.nbytes() for storage in self.storages.values())
        self.storages.clear()
        return total


class _Alive(TorchDispatchMode):
    """Follows the bytes of the storages that operations make, until they are freed; those in `owned` do not count."""

    def __init__(self, owned: set[int]):
        super().__init__()
        self.known = set(owned)
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (),
                           kwargs: Mapping[str, object] | None = None) -> object:
        output = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(output):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self.known:
                self._add(value.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size
