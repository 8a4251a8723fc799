"""STTLoraLinear: low-rank adaptation of a narrow layer.   arxiv.org/abs/2106.09685, section 4.1"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stt.errors import InputError
from stt.mlps.stt_linear import STTLinear
from stt.surgery import replace_module

# Shapes: R rank, P_in and P_out widths of the narrow weight.


class STTLoraLinear(nn.Module):
    """W x + (alpha / R) B A dropout(x) on a frozen STTLinear; A (R, P_in) and B (P_out, R) are float32, B starts at 0.

    Works in scatter and compact mode: A reads what the narrow weight reads. Raises InputError for a rank below 1, a
    dropout outside [0, 1), or a layer that is no STTLinear.
    """

    def __init__(self, stt_linear: STTLinear, r: int = 16, lora_alpha: float = 32, lora_dropout: float = 0.1,
                 merge_weights: bool = False):
        super().__init__()
        if not isinstance(stt_linear, STTLinear):
            raise InputError(f"STTLoraLinear adapts an STTLinear, got {type(stt_linear).__name__}: slice the model "
                             "first")
        if r < 1 or not 0 <= lora_dropout < 1:
            raise InputError(f"r must be at least 1 and lora_dropout in [0, 1), got {r} and {lora_dropout}")
        self.stt_linear = stt_linear.requires_grad_(False)
        stt_linear.is_adapted = True
        self.scaling = lora_alpha / r
        self.dropout = nn.Dropout(lora_dropout)
        device = stt_linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, stt_linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(stt_linear.out_features, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.merged = False
        self.train(stt_linear.training)
        if merge_weights:
            self.merge()

    def forward(self, x: Tensor) -> Tensor:
        layer = self.stt_linear
        if self.merged:
            return layer(x)
        x = layer.narrowed(x)
        y = layer.product(x)
        update = F.linear(F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A), self.lora_B) * self.scaling
        return layer.widened(y + update.to(y.dtype))

    @property
    def weight(self) -> Tensor:
        """The narrow weight without the update; models ask a projection for its dtype."""
        return self.stt_linear.weight

    def delta(self) -> Tensor:
        """(alpha / R) B A: (P_out, P_in)."""
        return self.scaling * self.lora_B @ self.lora_A

    def merge(self) -> None:
        """Add the update to the narrow weight; forward then uses that alone."""
        if not self.merged:
            self.stt_linear.weight.data += self.delta().detach().to(self.stt_linear.weight.dtype)
            self.merged = True

    def unmerge(self) -> None:
        """Take the update out of the narrow weight again (exact to rounding)."""
        if self.merged:
            self.stt_linear.weight.data -= self.delta().detach().to(self.stt_linear.weight.dtype)
            self.merged = False

    @staticmethod
    def merge_and_convert(model: nn.Module) -> int:
        """Merge every STTLoraLinear of the model and put its STTLinear back in place; how many there were.

        A half-precision weight becomes float32 first, so that the update is not rounded away.
        """
        adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, STTLoraLinear)]
        for name, module in adapted:
            if not module.merged:
                module.stt_linear.to(torch.promote_types(module.weight.dtype, torch.float32))
            module.merge()
            module.stt_linear.is_adapted = False
            replace_module(model, name, module.stt_linear)
        return len(adapted)


def add_stt_lora(model: nn.Module, r: int, lora_alpha: float, lora_dropout: float) -> list[str]:
    """Adapt every STTLinear of the model; names of the new parameters. Raises InputError if there is none left."""
    narrow = [name for name, module in model.named_modules() if isinstance(module, STTLinear) and not module.is_adapted]
    if not narrow:
        raise InputError("the model has no STTLinear layer to adapt (a stack of experts or a convolution is none): "
                         "apply a selection of linear layers first")
    for name in narrow:
        replace_module(model, name, STTLoraLinear(model.get_submodule(name), r, lora_alpha, lora_dropout))
    return [f"{name}.{matrix}" for name in narrow for matrix in ("lora_A", "lora_B")]
