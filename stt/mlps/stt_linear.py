"""STTLinear: a linear layer that holds only the rows or columns of the kept neurons.

To everything else it is an ordinary narrow nn.Linear. A site's layers share one `SiteLayout`, and only that decides
what flows between them: in *scatter* mode full-width activations (dropped neurons are zeros), in *compact* mode kept
neurons only, padded with zeros to a multiple if asked. Both are mathematically equal, because the down projection reads
nothing but kept neurons; the neurons are removed in both.

Shapes: `original` = width of the dense layer, K = kept, P >= K = padded width of the weight.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stt.errors import InputError

Ids = Tensor | Sequence[int] | None


class SiteLayout:
    """The one state of a site: its layers, whether it is compact, and to which multiple it is padded.

    The site is compact when every layer that *produces* kept neurons (gate, up) asks for it, whatever the down
    projection asks: so any order and any subset of `inference_time = ...` leaves the outputs as they are.
    """

    def __init__(self, layers: Sequence[STTLinear]):
        self.layers = list(layers)
        for layer in layers:
            layer.layout = self
        self.refresh()

    def refresh(self) -> None:
        producers = [layer for layer in self.layers if layer.out_indices is not None] or self.layers
        is_compact = all(layer.asks_compact for layer in producers)
        for layer in self.layers:
            layer.is_compact = is_compact

    def pad(self, multiple: int) -> None:
        """Pad every layer of the site with exact zeros to a multiple of `multiple` kept neurons."""
        if not isinstance(multiple, int) or multiple < 1:
            raise InputError(f"pad_to must be a whole number of at least 1, got {multiple}")
        if any(layer.is_adapted for layer in self.layers):
            raise InputError("this site carries a LoRA: merge it (STTLoraLinear.merge_and_convert) before padding")
        for layer in self.layers:
            layer.resize(multiple)


class STTLinear(nn.Linear):
    """`in_features, out_features` are the sizes of the dense layer; `in_indices`, `out_indices` the kept channels
    (None: all). `weight` (P_out, P_in) is narrow. Raises InputError for channels out of range or repeated."""

    def __init__(self, in_features: int, out_features: int, in_indices: Ids = None, out_indices: Ids = None,
                 bias: bool = True, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
                 inference_time: bool = False):
        inputs = _channels("in_indices", in_indices, in_features)
        outputs = _channels("out_indices", out_indices, out_features)
        self.original_in_features, self.original_out_features = in_features, out_features
        self.active_in_features = in_features if inputs is None else len(inputs)
        self.active_out_features = out_features if outputs is None else len(outputs)
        super().__init__(self.active_in_features, self.active_out_features, bias, device, dtype)
        self.register_buffer("in_indices", _on(device, inputs), persistent=False)
        self.register_buffer("out_indices", _on(device, outputs), persistent=False)
        self.asks_compact = self.is_compact = inference_time
        self.is_adapted = False  # a LoRA is attached
        self.blocks = self.interleaved = 1  # of a fused gate-up layer: [gates, ups] is 2 blocks, pairs are 2 deep
        SiteLayout([self])

    @classmethod
    def from_linear(cls, linear: nn.Linear, in_indices: Ids = None, out_indices: Ids = None,
                    inference_time: bool = False) -> STTLinear:
        """The kept part of a dense layer: same values, dtype, device and requires_grad."""
        return cls.from_weights(linear.weight, linear.bias, in_indices, out_indices, inference_time)

    @classmethod
    def from_weights(cls, weight: Tensor, bias: Tensor | None, in_indices: Ids = None, out_indices: Ids = None,
                     inference_time: bool = False) -> STTLinear:
        """As from_linear, from a dense weight (out, in) and bias (out,)."""
        layer = cls(weight.shape[1], weight.shape[0], in_indices, out_indices, bias is not None, "meta", weight.dtype,
                    inference_time)
        layer.in_indices = _on(weight.device, _channels("in_indices", in_indices, weight.shape[1]))
        layer.out_indices = _on(weight.device, _channels("out_indices", out_indices, weight.shape[0]))
        kept = weight.detach() if layer.out_indices is None else weight.detach()[layer.out_indices]
        kept = kept if layer.in_indices is None else kept[:, layer.in_indices]
        layer.weight = nn.Parameter(kept.clone(memory_format=torch.contiguous_format), weight.requires_grad)
        if bias is not None:
            kept = bias.detach() if layer.out_indices is None else bias.detach()[layer.out_indices]
            layer.bias = nn.Parameter(kept.clone(), bias.requires_grad)
        return layer

    @property
    def linear(self) -> STTLinear:
        return self

    @property
    def inference_time(self) -> bool:
        """True asks for compact mode; the site is compact once all its producing layers ask (see SiteLayout)."""
        return self.asks_compact

    @inference_time.setter
    def inference_time(self, value: bool) -> None:
        self.asks_compact = bool(value)
        self.layout.refresh()

    def pad_weights(self, pad_to: int = 128) -> None:
        """Pad the whole site to a multiple of `pad_to` kept neurons with exact zeros; 1 takes the padding away."""
        self.layout.pad(pad_to)

    def resize(self, multiple: int) -> None:
        """Pad this layer alone; the layout calls it for all layers of the site."""
        kept = self.active_out_features // self.blocks
        rows = kept if self.out_indices is None else _round_up(kept, multiple * self.interleaved)
        columns = self.active_in_features if self.in_indices is None else _round_up(self.active_in_features, multiple)
        if self.weight.shape == (rows * self.blocks, columns):
            return
        weight = self.weight.detach().unflatten(0, (self.blocks, -1))[:, :kept, :self.active_in_features]
        weight = F.pad(weight, (0, columns - self.active_in_features, 0, rows - kept))
        self.weight = nn.Parameter(weight.flatten(0, 1).contiguous(), self.weight.requires_grad)
        if self.bias is not None:
            bias = F.pad(self.bias.detach().view(self.blocks, -1)[:, :kept], (0, rows - kept))
            self.bias = nn.Parameter(bias.flatten(), self.bias.requires_grad)
        self.out_features, self.in_features = rows * self.blocks, columns

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.is_compact and x.shape[-1] == self.in_features and x.dtype == weight.dtype:
            return F.linear(x, weight, self.bias)  # the steps below, at the cost of an nn.Linear
        return self.widened(self.product(self.narrowed(x)))

    def narrowed(self, x: Tensor) -> Tensor:
        """What the narrow weight reads: in scatter mode the kept channels of x, padded as the weight is."""
        expected = self.in_features if self.is_compact else self.original_in_features
        if x.shape[-1] != expected:
            mode = "compact" if self.is_compact else "scatter"
            raise InputError(f"this STTLinear is in {mode} mode and reads {expected} features, got {x.shape[-1]}: "
                             "change all layers of a site through its `inference_time` and `pad_weights`")
        if self.is_compact or self.in_indices is None:
            return x
        return F.pad(x.index_select(-1, self.in_indices), (0, self.in_features - self.active_in_features))

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b in the weight's dtype when nothing else (autocast) decides: trained weights are float32."""
        if x.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)
        return F.linear(x, self.weight, self.bias)

    def widened(self, y: Tensor) -> Tensor:
        """What flows on: in scatter mode the dense width, with zeros for the dropped neurons."""
        if self.is_compact or self.out_indices is None:
            return y
        y = y.unflatten(-1, (self.blocks, -1))[..., :self.active_out_features // self.blocks].flatten(-2)
        return y.new_zeros(*y.shape[:-1], self.original_out_features).index_copy(-1, self.out_indices, y)

    def extra_repr(self) -> str:
        mode = "compact" if self.is_compact else "scatter"
        return f"{super().extra_repr()}, original=({self.original_in_features}, {self.original_out_features}), {mode}"


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _on(device: torch.device | str | None, ids: Tensor | None) -> Tensor | None:
    return ids if ids is None or device is None else ids.to(device)


def _channels(name: str, ids: Ids, size: int) -> Tensor | None:
    """The channels as given, int64; InputError if one is out of range or repeated."""
    if ids is None:
        return None
    ids = torch.as_tensor(ids).detach().cpu().long().flatten()
    if len(ids) == 0 or ids.min() < 0 or ids.max() >= size or len(ids.unique()) != len(ids):
        raise InputError(f"{name} must be distinct channels in 0..{size - 1}, at least one, got {ids.tolist()[:8]}")
    return ids
