"""Models of a given size with random weights: the dense one, the natively narrow one with the same values, batches."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.sizes import Size

# Shapes: B batch, T tokens, D model width, F neurons, K kept neurons.

Kept = Mapping[str, Tensor]  # name of a layer -> ids of the neurons kept in it: (K,)


@dataclass(frozen=True)
class Architecture:
    """Where the neurons of an architecture are: names inside one layer, and the modules of the head."""

    model_class: str
    feeding: tuple[str, ...]  # one output channel per neuron; the first is the one that is measured
    down: str  # one input channel per neuron
    heads: tuple[str, ...]


ARCHITECTURES = {
    "qwen2": Architecture("Qwen2ForCausalLM", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", ("lm_head",)),
    "vit": Architecture("ViTForImageClassification", ("mlp.fc1",), "mlp.fc2", ("classifier",)),
    "bert": Architecture("BertForSequenceClassification", ("intermediate.dense",), "output.dense",
                         ("classifier", "bert.pooler")),
}


def dense(size: Size, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The dense model, in training mode: the same weights at every call."""
    torch.manual_seed(size.seed)
    with torch.device(device):
        return _initialised(size)


def narrow(source: PreTrainedModel, size: Size, kept: Kept) -> PreTrainedModel:
    """A model that transformers builds with the kept width, with the values of `source`."""
    with torch.device("meta"):
        model = _initialised(size, intermediate_size=size.kept)
    state = source.state_dict()
    architecture = ARCHITECTURES[size.architecture]
    for layer, ids in kept.items():
        for name in architecture.feeding:
            for parameter in state.keys() & {f"{layer}.{name}.weight", f"{layer}.{name}.bias"}:
                state[parameter] = state[parameter][ids.to(source.device)]  # (K, D) or (K,)
        down = f"{layer}.{architecture.down}.weight"
        state[down] = state[down][:, ids.to(source.device)]  # (D, K)
    model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    for name, value in source.named_buffers():  # those that no state dict holds
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, value.clone())
    return model


def layers(model: nn.Module, size: Size) -> list[str]:
    """Names of the repeated layers."""
    end = "." + ARCHITECTURES[size.architecture].feeding[0]
    return [name.removesuffix(end) for name, _ in model.named_modules() if name.endswith(end)]


def random_neurons(model: nn.Module, size: Size) -> dict[str, Tensor]:
    """`size.kept` neurons of each layer, drawn at random, ascending."""
    generator = torch.Generator().manual_seed(size.seed)
    return {layer: torch.randperm(size.width, generator=generator)[:size.kept].sort().values
            for layer in layers(model, size)}


def neurons_and_head(model: nn.Module, size: Size) -> list[str]:
    """Names of the parameters of the feed-forward projections and of the head: what a narrow model trains."""
    architecture = ARCHITECTURES[size.architecture]
    projections = (*architecture.feeding, architecture.down)
    modules = [f"{layer}.{name}" for layer in layers(model, size) for name in projections]
    inside = tuple(f"{module}." for module in (*modules, *architecture.heads))
    return [name for name, _ in model.named_parameters() if name.startswith(inside)]


def head_names(model: nn.Module, size: Size) -> list[str]:
    """Names of the parameters of the head."""
    inside = tuple(f"{module}." for module in ARCHITECTURES[size.architecture].heads)
    return [name for name, _ in model.named_parameters() if name.startswith(inside)]


def batch(size: Size, device: torch.device | str = "cpu", number: int = 0) -> dict[str, Tensor]:
    """Batch `number` of random inputs with labels, the same at every call."""
    generator = torch.Generator().manual_seed(1000 * (size.seed + 1) + number)
    if not size.length:
        side = int(size.config["image_size"])
        made = {"pixel_values": torch.randn(size.batch, 3, side, side, generator=generator),
                "labels": torch.randint(int(size.config["num_labels"]), (size.batch,), generator=generator)}
        return {name: value.to(device) for name, value in made.items()}
    ids = torch.randint(int(size.config["vocab_size"]), (size.batch, size.length), generator=generator)  # (B, T)
    if "num_labels" in size.config:
        labels = torch.randint(int(size.config["num_labels"]), (size.batch,), generator=generator)
    else:
        labels = ids.clone()
        labels[:, :size.length - (size.answer or size.length)] = -100
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(device) for name, value in made.items()}


def _initialised(size: Size, **changes: object) -> PreTrainedModel:
    model_class = getattr(transformers, ARCHITECTURES[size.architecture].model_class)
    return model_class(model_class.config_class(**{**size.config, **changes})).train()
