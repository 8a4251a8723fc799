"""Changing a model: replace a module, choose what trains, count parameters."""
from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stt.errors import InputError, unknown_name
from stt.mlps.stt_linear import STTLinear
from stt.narrow import sliced_tensors
from stt.selective_optimizers.weights import tensor_of

logger = logging.getLogger(__name__)

HEADS = ("train", "freeze", "untie")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule called `name`."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)


class BoundForward(functools.partial):
    """A forward bound to its module that pickles and deep-copies; wrappers (accelerate's autocast) find in `__func__`
    what a method would have there."""

    @property
    def __func__(self) -> Callable[..., object]:
        return self.func


def override_forward(module: nn.Module, forward: Callable[..., object]) -> None:
    """Let `module` compute `forward(module, ...)` instead of its class's forward, until `restore_forward`.

    Survives deepcopy and pickling, and `inspect.signature(module.forward)` is that of `forward` without the module.
    """
    module.forward = BoundForward(forward, module)
    module._replicate_for_data_parallel = BoundForward(_replica, module)


def restore_forward(module: nn.Module) -> None:
    """Undo `override_forward`; nothing happens to a module that computes its class's forward."""
    module.__dict__.pop("forward", None)
    module.__dict__.pop("_replicate_for_data_parallel", None)


def _replica(module: nn.Module) -> nn.Module:
    """nn.DataParallel's copy of the module: its forward is bound to itself."""
    replica = type(module)._replicate_for_data_parallel(module)
    override_forward(replica, module.forward.func)
    return replica


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the task head: the output projection, what lies outside the model's body, and a pooler in it.

    A head tied to the input embedding is that one shared parameter, under the embedding's name.
    """
    body = getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model
    of_body = {id(p) for p in body.parameters()} if body is not model else {id(p) for p in model.parameters()}
    heads = {id(p) for p in model.parameters() if id(p) not in of_body}
    for module in (model.get_output_embeddings(), getattr(body, "pooler", None), *_class_layers(model, body)):
        heads |= {id(p) for p in module.parameters()} if isinstance(module, nn.Module) else set()
    return {name: p for name, p in model.named_parameters() if id(p) in heads}


def _class_layers(model: nn.Module, body: nn.Module) -> list[nn.Module]:
    """Linear layers that yield a number for every class, beside a body that has no name of its own (CLIP's image
    classifier)."""
    return [child for child in model.children() if body is model and isinstance(child, nn.Linear)
            and child.out_features == model.config.num_labels]


def head_is_tied(model: nn.Module) -> bool:
    """True if the output projection is the input embedding."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def tie(model: PreTrainedModel) -> None:
    """Let parameters that the class ties be one, also where transformers is told to leave them apart."""
    for target, source in model.all_tied_weights_keys.items():
        owner, _, attribute = target.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter_or_buffer(source))


def untie_head(model: nn.Module) -> None:
    """Give a tied output projection its own weight, so that training it leaves the embedding alone."""
    if head_is_tied(model):
        output = model.get_output_embeddings()
        output.weight = nn.Parameter(output.weight.detach().clone())
        model.config.tie_word_embeddings = False


def train_only(model: nn.Module, parameters: Iterable[str] | None = None, head: str = "train") -> list[str]:
    """Freeze everything but the named parameters (default: all STTLinear layers) and the head; names of what trains.

    `head`: "train", "freeze", or "untie" (train a copy of a tied head). Trained parameters become float32, frozen ones
    keep their dtype: bf16 weights hardly move at fine-tuning learning rates. Run a half-precision model under autocast.
    Raises InputError, before anything changes, for an unknown name or policy, or if nothing (by default: nothing but
    the head) would train.
    """
    if head not in HEADS:
        raise unknown_name("head policy", head, HEADS)
    chosen = set(sliced_parameters(model) if parameters is None else parameters)
    for name in sorted(chosen - dict(model.named_parameters()).keys()):
        raise unknown_name("parameter", name, dict(model.named_parameters()))
    if not chosen and (parameters is None or head == "freeze" or not head_parameters(model)):
        raise InputError("nothing would train: the model has no STTLinear layer; apply a selection first or name the "
                         "parameters")
    if head == "untie":
        untie_head(model)
    if head == "train" and head_is_tied(model):
        logger.info("the head is tied to the input embedding: training it trains both, %s weights",
                    f"{model.get_input_embeddings().weight.numel():,}")
    if head != "freeze":
        chosen |= head_parameters(model).keys()
    known = dict(model.named_parameters())
    for name, parameter in known.items():
        parameter.requires_grad_(name in chosen)
        if name in chosen:
            parameter.data = parameter.data.to(torch.float32)
    return [name for name in known if name in chosen]


def sliced_parameters(model: nn.Module) -> list[str]:
    """Names of all parameters of STTLinear layers, and of the tensors that were narrowed in place."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, STTLinear)]
    of_layers = [f"{name}.{each}" for name, module in layers for each, _ in module.named_parameters(recurse=False)]
    return [*of_layers, *sliced_tensors(model)]


def narrow_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of a sliced model (or `state`, gathered elsewhere) without the padding of its layers; the model is
    left as it was."""
    state = dict(model.state_dict() if state is None else state)
    for name, layer in model.named_modules():
        if not isinstance(layer, STTLinear):
            continue
        rows = layer.active_out_features // layer.blocks
        weight = state[f"{name}.weight"].unflatten(0, (layer.blocks, -1))[:, :rows, :layer.active_in_features]
        state[f"{name}.weight"] = weight.flatten(0, 1)
        if layer.bias is not None:
            state[f"{name}.bias"] = state[f"{name}.bias"].view(layer.blocks, -1)[:, :rows].flatten()
    return state


def pad_sites(model: nn.Module, multiple: int) -> None:
    """Pad every sliced site with exact zeros to a multiple of `multiple` kept units; 1 takes the padding away."""
    for module in model.modules():
        if isinstance(module, STTLinear):
            module.pad_weights(multiple)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters in all, trained, and trained without the head; shared ones count once, and the values of attached
    weights are those of their tensors."""
    heads, sizes = head_parameters(model), {name: p.numel() for name, p in model.named_parameters()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return {"total": sum(size for name, size in sizes.items() if tensor_of(name) == name),
            "trained": sum(sizes[name] for name in trained),
            "trained_without_head": sum(sizes[name] for name in trained if tensor_of(name) not in heads)}


def widest_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The floating dtype that holds every value of every tensor."""
    return functools.reduce(torch.promote_types, {value.dtype for value in tensors if value.is_floating_point()})
