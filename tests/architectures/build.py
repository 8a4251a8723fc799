"""Builds the tiny random model of a model type.

Every parameter, and every statistic a normalisation has as a buffer, is drawn anew, so that no weight is zero, no norm
is the identity and a forgotten bias shows.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .inputs import batch_for
from .overrides import CODED_WIDTHS, NOT_BUILDABLE, NOT_RUN, NOT_WIDTHS, OVERRIDES
from .rules import Numbers, tiny_config
from .types import config_class, model_class

EXPERT_OF_WORD = "tid2eid"  # a table of DeepSeek V4: not drawn, all words would go to expert 0
GAIN = 1.4  # of convolutions: what stands between two of them, as a ReLU6, makes activations smaller
STATISTICS = ("running_mean", "running_var", "e_score_correction_bias")


@dataclass(frozen=True)
class Built:
    """A model in evaluation mode, a batch for its forward, and the configuration entries that are feed-forward widths
    with their values (those that the code makes, by number); `not_run` names the towers the batch does not execute."""

    model: PreTrainedModel
    inputs: dict[str, object]
    widths: dict[str, int]
    not_run: tuple[str, ...] = field(default=())


def build(model_type: str, dtype: torch.dtype = torch.float32) -> Built:
    """The model, batch and widths of this type, the same on every call.

    Experts run as the library chooses, but one by one in other dtypes than float32: its grouped kernel refuses float64,
    and these widths in bfloat16. Raises LookupError with the reason for a type of NOT_BUILDABLE.
    """
    if model_type in NOT_BUILDABLE:
        raise LookupError(f"{model_type} cannot be built: {NOT_BUILDABLE[model_type]}")
    numbers = Numbers()
    config = tiny_config(config_class(model_type), OVERRIDES.get(model_type, {}), numbers)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = randomised(model_class(model_type)(config)).eval()
        inputs = batch_for(model, model_type)
    model.to(dtype)
    if dtype != torch.float32 and model.config._experts_implementation == "grouped_mm":
        with_experts(model, "eager")
    widths = {key: width for key, width in numbers.widths.items() if key not in NOT_WIDTHS.get(model_type, ())}
    widths |= {f"coded.{place}": width for place, width in enumerate(CODED_WIDTHS.get(model_type, ()))}
    return Built(model, _cast(inputs, dtype), widths, NOT_RUN.get(model_type, ()))


def _cast(value: object, dtype: torch.dtype) -> object:
    """The same batch with its floating-point tensors in this dtype."""
    if isinstance(value, dict):
        return {name: _cast(part, dtype) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def with_experts(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """The same model with its experts run by "eager", "batched_mm" or "grouped_mm". Raises ValueError for a class that
    has no such choice."""
    model.set_experts_implementation(implementation)
    return model


def randomised(model: nn.Module) -> nn.Module:
    """Weights as wide as keeps activations near 1; norm weights near what they were, of batch norms near 1 (some start
    at 0, and hide what stands before them); nothing is zero. Sinusoidal position tables stay: they are computed, not
    loaded."""
    convolutions, norms = ({module.weight for module in model.modules() if isinstance(module, kind)}
                           for kind in (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm))
    for name, parameter in model.named_parameters():
        if "embed_positions" in name and not parameter.requires_grad:
            continue
        noise = torch.randn_like(parameter)
        if parameter in convolutions:
            parameter.copy_(noise * GAIN * parameter[0].numel() ** -0.5)
        elif parameter.ndim > 1:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.copy_((1.0 if parameter in norms else parameter) + 0.2 * noise)
    for name, buffer in model.named_buffers():
        if name.endswith(STATISTICS):
            buffer.copy_(0.5 + torch.rand_like(buffer) if name.endswith("var") else 0.2 * torch.randn_like(buffer))
        elif name.endswith(EXPERT_OF_WORD):
            buffer.random_(model.config.n_routed_experts)
    return model
