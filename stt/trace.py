"""Weightless trace: which channel of which linear layer feeds which channel of which other, without reading a weight.

Every call of a linear-like layer on a parameter of the model is answered with a fresh random leaf tensor of the right
shape. So nothing is multiplied (a 7B model costs as little as its activations, and may live on the meta device), and
autograd graphs end at the nearest linear layers: whatever lies between two layers is exactly what the graph holds.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from stt.errors import InputError

DTYPE, DEVICE = torch.Tensor.dtype.__get__, torch.Tensor.device.__get__  # made anew at each access: compare with ==
TRANSPOSES = (torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.Tensor.t, torch.t)
PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
TOKENS = 6  # enough positions to tell a layer that mixes them from one that does not


@dataclass
class Source:
    """A leaf of the trace: the output of a linear layer, or a parameter used in any other way."""

    parameter: str
    is_linear: bool
    value: Tensor
    input: Tensor | None = None  # what the layer read, with its graph
    reads: int = 0  # bit set of the sources its input depends on
    consumers: set[int] = field(default_factory=set)  # positions of the layers that read it; -1 is the model's output


class WeightlessTrace(TorchFunctionMode):
    """Records one forward pass as a list of Source; parameters and buffers are float32 on the CPU to all who look."""

    def __init__(self, model: nn.Module, seed: int = 0):
        super().__init__()
        self.sources: list[Source] = []
        self._random = torch.Generator().manual_seed(seed)
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._buffers = {id(b): b for b in model.buffers()}
        self._linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)}
        self._transposed: dict[int, tuple[Tensor, Tensor]] = {}  # id of a transposed weight -> it and the parameter
        self._stand_ins: dict[int, Tensor] = {}

    def __torch_function__(self, func: Callable, types: Sequence[type], args: tuple = (),
                           kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if func == DTYPE and self._is_ours(args[0]):
            return torch.float32 if args[0].is_floating_point() else func(*args)
        if func == DEVICE and self._is_ours(args[0]):
            return torch.device("cpu")
        if func is F.linear and id(self._weight(args, kwargs)) in self._linear:
            weight = self._weight(args, kwargs)
            return self._answer(args[0] if args else kwargs["input"], weight, weight.shape[0], is_linear=True)
        if func is torch.addmm and len(args) == 3 and id(args[2]) in self._linear:
            return self._answer(args[1], args[2], args[2].shape[1], is_linear=True)
        if func in TRANSPOSES and id(args[0]) in self._linear:
            view = torch.empty(()).expand(args[0].shape[::-1])
            self._transposed[id(view)] = (view, args[0])
            return view
        if func in PRODUCTS and id(args[1]) in self._transposed:
            weight = self._transposed[id(args[1])][1]
            return self._answer(args[0], weight, weight.shape[0], is_linear=True)
        if func is F.embedding and id(self._weight(args, kwargs)) in self._parameters:
            weight = self._weight(args, kwargs)
            ids = args[0] if args else kwargs["input"]
            return self._leaf(weight, (*ids.shape, weight.shape[1]), is_linear=False).value.clone()
        if func in CONVOLUTIONS and id(self._weight(args, kwargs)) in self._parameters:
            return self._convolution(func, args, kwargs)
        if getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map(self._stand_in, (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _weight(args: tuple, kwargs: dict) -> Tensor | None:
        return args[1] if len(args) > 1 else kwargs.get("weight")

    def _is_ours(self, value: object) -> bool:
        return id(value) in self._parameters or id(value) in self._buffers

    def _answer(self, x: Tensor, weight: Tensor, out_features: int, is_linear: bool) -> Tensor:
        source = self._leaf(weight, (*x.shape[:-1], out_features), is_linear)
        source.input = x
        return source.value.clone()  # models may add to it in place, which a leaf forbids

    def _convolution(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        """The output shape of the convolution comes from the meta device; its values are random as everywhere."""
        weight, x = self._weight(args, kwargs), args[0] if args else kwargs["input"]
        args, kwargs = pytree.tree_map(
            lambda a: a.detach().to("meta", torch.float32) if isinstance(a, Tensor) else a, (args, kwargs))
        source = self._leaf(weight, func(*args, **kwargs).shape, is_linear=False)
        source.input = x
        return source.value.clone()

    def _leaf(self, parameter: Tensor, shape: tuple[int, ...], is_linear: bool) -> Source:
        """Values in ±[0.5, 1.5]: positive in the first half of the rows (no activation is dead there), random signs
        in the second half (which tells a gate from the factor it multiplies)."""
        value = torch.rand(shape, generator=self._random) + 0.5
        rows = value.view(-1, shape[-1])
        half = rows[len(rows) // 2:]
        half *= torch.randint(0, 2, half.shape, generator=self._random) * 2 - 1
        source = Source(self._parameters[id(parameter)], is_linear, value.requires_grad_())
        self.sources.append(source)
        return source

    def _stand_in(self, value: object) -> object:
        """A float32 CPU copy in place of a parameter (a leaf of the trace) or of a buffer; anything else as it is."""
        if not self._is_ours(value):
            return value
        if id(value) not in self._stand_ins:
            copy = torch.ones_like(value, device="cpu") if value.is_meta else value.detach().to("cpu", copy=True)
            copy = copy.float() if copy.is_floating_point() else copy
            if id(value) in self._parameters:
                copy.requires_grad_()
                self.sources.append(Source(self._parameters[id(value)], False, copy))
            self._stand_ins[id(value)] = copy
        return self._stand_ins[id(value)]


def trace(model: nn.Module, inputs: Mapping[str, Tensor], is_made_up: bool) -> list[Source]:
    """One weightless forward pass, with gradients enabled by the caller; every Source knows what it reads and who reads
    it. The model is left as it was. Raises InputError for a model that made-up inputs do not fit."""
    buffers = [(module, dict(module.named_buffers(recurse=False))) for module in model.modules()]
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]), WeightlessTrace(model) as recorder:
            outputs = model(**inputs)
    except (AttributeError, TypeError, ValueError) as error:
        if not is_made_up or isinstance(error, InputError):
            raise
        raise InputError(f"a made-up batch of {', '.join(inputs)} does not fit {type(model).__name__} ({error}): "
                         "pass a batch of your data as find_sites(model, example=...)") from error
    finally:
        for module, own in buffers:
            for name, buffer in own.items():
                setattr(module, name, buffer)  # a forward that assigns one has assigned a stand-in
    _connect(recorder.sources, outputs)
    return recorder.sources


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is back in the mode it was in by itself."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _connect(sources: list[Source], outputs: object) -> None:
    """Fill in `reads` and `consumers` by walking each input's graph down to the leaves once."""
    bits = {id(source.value): 1 << i for i, source in enumerate(sources)}
    known: dict[object, int] = {}
    for position, source in enumerate(sources):
        if source.input is not None:
            source.reads = _leaves(source.input, bits, known)
            for i in bit_positions(source.reads):
                sources[i].consumers.add(position)
    for tensor in _tensors(outputs):
        for i in bit_positions(_leaves(tensor, bits, known)):
            sources[i].consumers.add(-1)


def _leaves(tensor: Tensor, bits: dict[int, int], known: dict[object, int]) -> int:
    """Bit set of the sources a tensor depends on (depth first, each graph node visited once)."""
    if tensor.grad_fn is None:
        return bits.get(id(tensor), 0)
    stack = [tensor.grad_fn]
    while stack:
        node = stack[-1]
        pending = [child for child, _ in node.next_functions if child is not None and child not in known]
        if pending:
            stack.extend(pending)
            continue
        stack.pop()
        found = bits.get(id(node.variable), 0) if hasattr(node, "variable") else 0
        for child, _ in node.next_functions:
            found |= known[child] if child is not None else 0
        known[node] = found
    return known[tensor.grad_fn]


def bit_positions(bits: int) -> Iterator[int]:
    """Positions of the set bits, lowest first."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def _tensors(outputs: object) -> list[Tensor]:
    leaves = pytree.tree_leaves(list(outputs.values()) if isinstance(outputs, Mapping) else outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def dummy_inputs(model: nn.Module) -> dict[str, Tensor]:
    """A batch of two for the model's main input: token ids (ending in EOS), pixels, or both sides of an
    encoder-decoder. Raises InputError for any other kind of input."""
    config, text = model.config, model.config.get_text_config()
    main, accepted = model.main_input_name, inspect.signature(model.forward).parameters
    vocabulary, eos = getattr(text, "vocab_size", None), getattr(text, "eos_token_id", None)
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) % max(vocabulary - 4, 1) + 3 if vocabulary else None
    inputs: dict[str, Tensor] = {}
    if main == "input_ids" and ids is not None:
        ids[:, -1] = eos if isinstance(eos, int) and 0 <= eos < vocabulary else ids[:, -1]
        inputs["input_ids"] = ids
    elif main == "pixel_values":
        size = getattr(config, "image_size", 64)
        size = size if isinstance(size, list | tuple) else (size, size)
        inputs["pixel_values"] = torch.rand(2, config.num_channels, *size, generator=torch.Generator().manual_seed(0))
    else:
        raise InputError(f"cannot make a dummy {main!r} for {type(model).__name__}: "
                         "pass a batch of your data as find_sites(model, example=...)")
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids.clone()
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs
