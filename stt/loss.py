"""The loss of a decoder without its logits, in every mode and under any trainer.

The body runs once; the head and the cross-entropy run only where there is a label, chunk by chunk (stt/chunked.py), and
each chunk's gradients are computed while its logits are at hand: never all logits exist, and none is computed twice.
"""
from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_utils import unwrap_peft_model

from stt import chunked
from stt.chunked import IGNORED, Objective, Transform
from stt.errors import InputError
from stt.selective_optimizers.leaf import plain_class
from stt.surgery import override_forward
from stt.trace import evaluating

logger = logging.getLogger(__name__)

# Shapes: B examples, T tokens, D model width, V words.

LOSS_ARGUMENTS = {"labels", "shift_labels", "num_items_in_batch", "ignore_index", "logits_to_keep", "return_dict",
                  "output_router_logits"}  # what the body is not asked

# teach(what the body is given, targets (B, T)): the objective of a batch
Teach = Callable[[Mapping[str, object], Tensor], Objective]


def chunked_loss(model: nn.Module, teach: Teach | None = None) -> nn.Module:
    """The model itself; from now on its training forward computes the loss in chunks and returns no logits.

    In training mode and with `labels` (B, T), forward returns CausalLMOutput(loss): the cross-entropy of position t's
    prediction and label t+1, summed where that is not -100, over `num_items_in_batch` (None: their number here). A
    batch without labels gives 0, with a graph. Everything else is the model's own forward. Value and gradients are
    those of the model's own loss; `teach` puts another objective in the cross-entropy's place (stt/distill.py). Where
    the logits are not scale, bias or soft cap of head(body) by plain modules (a head that carries a LoRA), the model's
    own logits at the labelled positions are used.

    Lives in `model.forward`, so it works under any trainer that takes the model's loss (one that reads the training
    logits must do without), DDP, autocast and gradient checkpointing; for a PEFT model, in that of the decoder inside.
    `surgery.restore_forward` takes it away. Under torch.compile the loss is a graph break. Raises InputError for
    anything but a decoder whose own loss is that cross-entropy.
    """
    decoder = unwrap_peft_model(model)
    if _installed(decoder) is None:
        if "forward" in vars(decoder):
            raise InputError(f"the forward of this {type(decoder).__name__} is replaced already: call chunked_loss "
                             "before anything else that changes it (accelerate, device maps, other losses)")
        recipe = replace(recipe_of(decoder), teach=teach)
        if recipe.body is None:
            logger.info("the loss of %s uses the model's own logits at the labelled positions: they are not a scaled "
                        "or capped product of a plain head and what its body returns", type(decoder).__name__)
        override_forward(decoder, recipe)
    return model


def answer_nll(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[float, int]:
    """(summed negative log-likelihood in nats, number) of the labelled tokens: `labels` (B, T), -100 = not labelled.

    Evaluation mode, no gradients, in chunks; with or without `chunked_loss`. Raises InputError as `chunked_loss` does,
    and for PEFT's virtual prompts.
    """
    decoder = unwrap_peft_model(model)
    if decoder is not model and model.active_peft_config.is_prompt_learning:
        raise InputError("answer_nll cannot place the labels behind PEFT's virtual tokens: give the decoder alone")
    recipe = replace(_installed(decoder) or recipe_of(decoder), teach=None)
    with torch.no_grad(), evaluating(model):
        found = recipe.summed(decoder, {**inputs, "labels": labels})
    return found.loss.item(), found.count


class Summed(NamedTuple):
    """The loss summed over `count` labelled positions, and what the body returned."""

    loss: Tensor
    count: int
    outputs: Mapping[str, object]


@dataclass(frozen=True)
class DecoderLoss:
    """The forward that `chunked_loss` installs. `body` None: the model's own logits are used."""

    own: inspect.Signature
    body: inspect.Signature | None
    transform: Transform
    teach: Teach | None = None

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's own, which trainers read, and `num_items_in_batch` by any keyword."""
        named = [p for p in self.own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        return self.own.replace(parameters=[*named, inspect.Parameter("loss_kwargs", inspect.Parameter.VAR_KEYWORD)])

    def __call__(self, model: PreTrainedModel, *args: object, **kwargs: object) -> object:
        given = dict(zip(list(self.own.parameters)[1:], args, strict=False)) | kwargs
        if not model.training or given.get("labels") is None:
            if not _takes(self.own, "num_items_in_batch"):
                kwargs.pop("num_items_in_batch", None)
            return type(model).forward(model, *args, **kwargs)
        found = self.summed(model, given)
        items = given.get("num_items_in_batch")
        if items is None:
            items = max(found.count, 1)
        loss = found.loss / (items.to(found.loss.device) if isinstance(items, Tensor) else items)
        output = CausalLMOutput(loss=loss, hidden_states=found.outputs.get("hidden_states"),
                                attentions=found.outputs.get("attentions"))
        returns_dict = model.config.return_dict if given.get("return_dict") is None else given["return_dict"]
        return output if returns_dict else output.to_tuple()

    def summed(self, model: PreTrainedModel, given: Mapping[str, object]) -> Summed:
        """The summed loss of a batch, whatever mode the model is in. Raises InputError for a router's loss."""
        _refuse_router_loss(model, given.get("output_router_logits"))
        targets = _targets(**{name: given[name] for name in ("labels", "shift_labels", "ignore_index")
                              if given.get(name) is not None})
        arguments = {name: value for name, value in given.items() if name not in LOSS_ARGUMENTS and value is not None}
        objective = chunked.cross_entropy if self.teach is None else self.teach(arguments, targets)
        if not self.is_chunked(model, arguments):
            return self._from_own_logits(model, arguments, targets, objective)
        outputs, head = self.outputs(model, arguments), model.get_output_embeddings()
        loss, count = chunked.summed(outputs["last_hidden_state"], head.weight, head.bias, targets, self.transform,
                                     objective)
        return Summed(loss, count, outputs)

    def outputs(self, model: PreTrainedModel, arguments: Mapping[str, object]) -> Mapping[str, object]:
        """What the body returns; it keeps no cache, which nobody could read."""
        named = {name: value for name, value in arguments.items() if _takes(self.body, name)}
        cache = {"use_cache": False} if _takes(self.body, "use_cache") else {}
        return model.base_model(**cache | named, return_dict=True)

    def is_chunked(self, model: PreTrainedModel, arguments: Mapping[str, object]) -> bool:
        """True if the logits are `transform` of a plain head of what the body returns; False also if the model's own
        forward would do something itself with one of the arguments."""
        return self.body is not None and _is_plain(model.get_output_embeddings()) and all(
            name in self.body.parameters for name in arguments if name in self.own.parameters)

    def _from_own_logits(self, model: PreTrainedModel, arguments: Mapping[str, object], targets: Tensor,
                         objective: Objective) -> Summed:
        arguments = {**arguments, "return_dict": True}
        if "use_cache" in self.own.parameters:  # with a cache transformers does not look for packed examples
            arguments["use_cache"] = False
        if "logits_to_keep" in self.own.parameters:  # positions at which any example has a label
            keep = (targets != IGNORED).any(0).nonzero().squeeze(1)
            arguments["logits_to_keep"], targets = keep, targets[:, keep]
        outputs = type(model).forward(model, **arguments)
        return Summed(*chunked.summed(outputs["logits"], None, None, targets, Transform(), objective), outputs)


# ---------------------------------------------------------------- what a model does to its logits


def recipe_of(model: PreTrainedModel) -> DecoderLoss:
    """How this model's loss is computed, tried on four tokens. Raises InputError if it has another one."""
    own, kind = _signature(type(model)), type(model).__name__
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None or "labels" not in own.parameters:
        raise InputError(f"{kind} is no decoder with a language head and labels: chunked_loss needs a causal "
                         "language model")
    _refuse_router_loss(model)
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(3, 11, device=device).view(2, 4) % model.get_input_embeddings().num_embeddings  # (B, T)
    labels = ids.masked_fill(ids % 3 == 0, IGNORED)
    with torch.no_grad(), evaluating(model), _compute_dtype(model, device):
        found = type(model).forward(model, input_ids=ids, labels=labels, return_dict=True)
        logits, targets = found["logits"].flatten(0, 1), _targets(labels).flatten()
        expected = F.cross_entropy(logits.float(), targets)
        if not torch.allclose(found["loss"].float(), expected, rtol=1e-5, equal_nan=True):
            raise InputError(f"the loss of {kind} is not the cross-entropy of its logits and the next tokens (on four "
                             f"tokens {float(found['loss']):.6g}, not {float(expected):.6g}): train with its own loss")
        recipe = DecoderLoss(own, _signature(type(model.base_model)), Transform())
        transform = _found_transform(model, recipe, ids) if is_head_on_body(model) else None
    return DecoderLoss(own, None, Transform()) if transform is None else replace(recipe, transform=transform)


def _found_transform(model: PreTrainedModel, recipe: DecoderLoss, ids: Tensor) -> Transform | None:
    """What follows the head, seen by making the head answer known numbers; None if it is nothing we know, or if the
    head does not read what the body returns."""
    head, read, made = model.get_output_embeddings(), [], []

    def answer(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        dtype = torch.promote_types(output.dtype, torch.float32)
        read.append(inputs[0])
        made.append(torch.linspace(-60, 60, output.numel(), dtype=dtype, device=output.device).view_as(output))
        return made[-1]

    handle = head.register_forward_hook(answer)
    try:
        logits = type(model).forward(model, input_ids=ids, return_dict=True)["logits"]
    finally:
        handle.remove()
    states = recipe.outputs(model, {"input_ids": ids})["last_hidden_state"]
    if len(read) != 1 or read[0].shape != states.shape or not _is_close(states, read[0]):
        return None
    known = (each for each in _known_transforms(model.config.get_text_config()) if _is_close(each(made[0]), logits))
    return next(known, None)


def _known_transforms(config: object) -> Iterator[Transform]:
    """Those that the config's numbers allow: most models have none; Cohere multiplies, Granite divides, Gemma caps."""
    named = {name: getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")}
    scales = [1.0, *(number for scale in (named["logit_scale"], named["logits_scaling"]) if scale
                     for number in (scale, 1 / scale))]
    return itertools.starmap(Transform, itertools.product(scales, (None, named["final_logit_softcapping"])))


def is_head_on_body(model: PreTrainedModel) -> bool:
    """True if the model is a body and a plain head, and no other module but what trains of these in place."""
    head, body = model.get_output_embeddings(), model.base_model
    if body is model or not _is_plain(head):
        return False
    return set(model.modules()) - set(body.modules()) - set(head.children()) == {model, head}


def _is_plain(head: nn.Module) -> bool:
    """True for an nn.Linear that does nothing but its product: no adapter, hook, quantized or sharded weight. It may
    train in place: what it reads as its weight takes the gradient."""
    if plain_class(head) is not nn.Linear or "forward" in vars(head):
        return False
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    weight = head._parameters.get("weight")
    return not any(hooks) and type(weight) is nn.Parameter and weight.shape == (head.out_features, head.in_features)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding; NaN is equal to nothing."""
    is_half = min(torch.finfo(value.dtype).bits for value in (found, expected)) < 32
    return bool((found - expected).abs().max() <= (1e-2 if is_half else 1e-5) * expected.abs().max())


def _compute_dtype(model: nn.Module, device: torch.device) -> torch.autocast:
    """Autocast for a model with weights of half and of full precision; nothing for another."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    half = next(iter(dtypes & {torch.float16, torch.bfloat16}), None)
    return torch.autocast(device.type, half, enabled=half is not None and len(dtypes) > 1)


def _refuse_router_loss(model: PreTrainedModel, asked: bool | None = None) -> None:
    """Raises InputError if the model would add a router's balancing loss, by its config or by what the call asks."""
    if getattr(model.config, "output_router_logits", False) if asked is None else asked:
        raise InputError(f"{type(model).__name__} adds the routers' balancing loss, which chunked_loss leaves out: set "
                         "config.output_router_logits to False or train with the model's own loss")


def _targets(labels: Tensor, shift_labels: Tensor | None = None, ignore_index: int = IGNORED) -> Tensor:
    """The label that each position predicts, -100 for none: (B, T)."""
    targets = F.pad(labels[..., 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    return targets if ignore_index == IGNORED else targets.masked_fill(targets == ignore_index, IGNORED)


def _signature(kind: type[nn.Module]) -> inspect.Signature:
    """That of the class's forward, without annotations (they do not pickle)."""
    signature = inspect.signature(kind.forward)
    empty = inspect.Signature.empty
    return signature.replace(parameters=[p.replace(annotation=empty) for p in signature.parameters.values()],
                             return_annotation=empty)


def _takes(signature: inspect.Signature, name: str) -> bool:
    kinds = (parameter.kind for parameter in signature.parameters.values())
    return name in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds


def _installed(decoder: nn.Module) -> DecoderLoss | None:
    """The loss that `chunked_loss` put there, also under accelerate's autocast."""
    forward = vars(decoder).get("forward")
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    recipe = getattr(forward, "func", forward)
    return recipe if isinstance(recipe, DecoderLoss) else None
