"""The loss of a decoder without its logits, in every mode and under any trainer.

The body runs once; the head and the cross-entropy run only where there is a label, CHUNK_ROWS positions at a time, and
each chunk's gradients are computed while its logits are at hand: never all logits exist, and none is computed twice.
"""
from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_utils import unwrap_peft_model

from stt.errors import InputError
from stt.surgery import override_forward
from stt.trace import evaluating

logger = logging.getLogger(__name__)

# Shapes: B examples, T tokens, N = B T positions, L labelled ones, C of these in a chunk, D model width, V words.

CHUNK_ROWS = 512  # logits (CHUNK_ROWS, V) at a time: the head's matrix products are slower below 256 rows on a CPU
IGNORED = -100
LOSS_ARGUMENTS = {"labels", "shift_labels", "num_items_in_batch", "ignore_index", "logits_to_keep", "return_dict",
                  "output_router_logits"}  # what the body is not asked


def chunked_loss(model: nn.Module) -> nn.Module:
    """The model itself; from now on its training forward computes the loss in chunks and returns no logits.

    In training mode and with `labels` (B, T), forward returns CausalLMOutput(loss): the cross-entropy of position t's
    prediction and label t+1, summed where that is not -100, over `num_items_in_batch` (None: their number here). A
    batch without labels gives 0, with a graph. Everything else is the model's own forward. Value and gradients are
    those of the model's own loss. Where its logits are not scale, bias or soft cap of head(body) by plain modules (a
    head that carries a LoRA), its own logits at the labelled positions are used.

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
        recipe = _recipe(decoder)
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
    recipe = _installed(decoder) or _recipe(decoder)
    with torch.no_grad(), evaluating(model):
        found = recipe.summed(decoder, {**inputs, "labels": labels})
    return found.loss.item(), found.count


class Transform(NamedTuple):
    """From the head's product x to the logits: cap * tanh(scale * x / cap), or scale * x without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = self.scale * x
        return x if self.cap is None else torch.tanh(x / self.cap) * self.cap


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
        head = model.get_output_embeddings()
        if self.body is None or not _is_plain(head) or not self._body_takes(arguments):
            return self._from_own_logits(model, arguments, targets)
        outputs = self.outputs(model, arguments)
        loss, count = summed_cross_entropy(outputs["last_hidden_state"], head.weight, head.bias, targets,
                                           self.transform)
        return Summed(loss, count, outputs)

    def outputs(self, model: PreTrainedModel, arguments: Mapping[str, object]) -> Mapping[str, object]:
        """What the body returns; it keeps no cache, which nobody could read."""
        named = {name: value for name, value in arguments.items() if _takes(self.body, name)}
        cache = {"use_cache": False} if _takes(self.body, "use_cache") else {}
        return model.base_model(**cache | named, return_dict=True)

    def _body_takes(self, arguments: Mapping[str, object]) -> bool:
        """False if the model's own forward would do something itself with one of the arguments."""
        return all(name in self.body.parameters for name in arguments if name in self.own.parameters)

    def _from_own_logits(self, model: PreTrainedModel, arguments: Mapping[str, object], targets: Tensor) -> Summed:
        arguments = {**arguments, "return_dict": True}
        if "logits_to_keep" in self.own.parameters:  # positions at which any example has a label
            keep = (targets != IGNORED).any(0).nonzero().squeeze(1)
            arguments["logits_to_keep"], targets = keep, targets[:, keep]
        outputs = type(model).forward(model, **arguments)
        is_labelled = targets != IGNORED
        logits = outputs["logits"][is_labelled]  # (L, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, targets[is_labelled], reduction="sum")
        return Summed(loss, len(logits), outputs)


# ---------------------------------------------------------------- the loss and its gradients


@torch.compiler.disable
def summed_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
                         transform: Transform) -> tuple[Tensor, int]:
    """(sum, number) of cross-entropies of `transform(hidden weight^T + bias)` and `targets` where these are not -100.

    hidden (..., D), weight (V, D), bias (V,), targets (...). Under autocast the matrix products run in its dtype; the
    softmax and the weight's gradient are float32 (float64 for float64 weights).
    """
    if hidden.shape[:-1] != targets.shape:
        raise InputError(f"the labels have shape {tuple(targets.shape)} and the model's states "
                         f"{tuple(hidden.shape[:-1])}: give one label a position")
    targets = targets.flatten().to(hidden.device)  # (N,)
    rows = (targets != IGNORED).nonzero().squeeze(1)  # (L,)
    return cross_entropy_at(hidden, weight, bias, rows, targets[rows], transform), len(rows)


def cross_entropy_at(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, answers: Tensor,
                     transform: Transform) -> Tensor:
    """The same sum, of the positions `rows` (L,) of hidden (..., D) and the words that follow them, `answers` (L,)."""
    needs = [value is not None and value.requires_grad and torch.is_grad_enabled() for value in (hidden, weight, bias)]
    return _CrossEntropy.apply(hidden.flatten(0, -2), weight, bias, rows, answers, transform, needs)


class _CrossEntropy(torch.autograd.Function):
    """Differentiable by hidden, weight and bias: their gradients are ready before backward, which scales them."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
                transform: Transform, needs: list[bool]) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            loss, ctx.gradients = _in_chunks(hidden, weight, bias, rows, targets, transform, needs, dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss keeps its gradients for one backward pass: compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(upstream) for gradient in gradients), *[None] * 4


def _in_chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
               transform: Transform, needs: list[bool], dtype: torch.dtype) -> tuple[Tensor, list[Tensor | None]]:
    """The summed loss of the positions `rows` of hidden (N, D), and the gradients that are needed."""
    exact = torch.promote_types(dtype, torch.float32)
    total = torch.zeros((), dtype=exact, device=hidden.device)
    of_hidden = torch.zeros_like(hidden) if needs[0] else None
    of_bias = torch.zeros_like(bias, dtype=exact) if needs[2] else None
    of_weight = None  # of the first chunk, which is there even if it is empty, is not added to zeros
    matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)  # (V, D), (V,)
    for at, answers in zip(rows.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True):
        states = hidden[at].to(dtype)  # (C, D)
        slopes = F.linear(states, matrix, offset).to(exact)  # (C, V), the logits first
        total += _cross_entropy_(slopes, answers, transform, any(needs))
        if of_bias is not None:
            of_bias += slopes.sum(0)
        slopes = slopes.to(dtype)
        if of_hidden is not None:
            of_hidden[at] = (slopes @ matrix).to(hidden.dtype)
        if needs[1]:
            of_weight = _plus_product(of_weight, slopes.T, states, exact)
    of_weight, of_bias = (None if gradient is None else gradient.to(value.dtype)
                          for gradient, value in ((of_weight, weight), (of_bias, bias)))
    return total, [of_hidden, of_weight, of_bias]


def _cross_entropy_(x: Tensor, answers: Tensor, transform: Transform, needs_slopes: bool) -> Tensor:
    """The summed cross-entropy of one chunk; x (C, V), the head's product, becomes the derivative by it."""
    scale, cap = transform
    bend = None
    if scale != 1:
        x.mul_(scale)
    if cap is not None:
        x.div_(cap).tanh_()
        bend = 1 - x * x if needs_slopes else None  # (C, V), the derivative of the cap
        x.mul_(cap)
    x.sub_(x.amax(-1, keepdim=True))
    answers = answers.unsqueeze(1)  # (C, 1)
    chosen = x.gather(1, answers)  # (C, 1)
    weights = x.exp_().sum(-1, keepdim=True)  # (C, 1)
    if needs_slopes:
        x.div_(weights).scatter_add_(1, answers, torch.full_like(chosen, -1))  # the softmax less the answer
        if bend is not None:
            x.mul_(bend)
        if scale != 1:
            x.mul_(scale)
    return (weights.log_() - chosen).sum()


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total (V, D), in place if there is one, plus (V, C) (C, D), summed in `dtype`."""
    if total is None:
        return (left @ right).to(dtype)
    if left.dtype == dtype:
        return torch.addmm(total, left, right, out=total)  # counters of FLOPs do not know addmm_
    return total.add_(left @ right)


# ---------------------------------------------------------------- what a model does to its logits


def _recipe(model: PreTrainedModel) -> DecoderLoss:
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
    """True if the model is a body and a plain head, and no other module."""
    head, body = model.get_output_embeddings(), model.base_model
    return body is not model and _is_plain(head) and set(model.modules()) - set(body.modules()) == {model, head}


def _is_plain(head: nn.Module) -> bool:
    """True for an nn.Linear that does nothing but its product: no adapter, hook, quantized or sharded weight."""
    if type(head) is not nn.Linear or "forward" in vars(head):
        return False
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return not any(hooks) and type(head.weight) is nn.Parameter and head.weight.shape == (head.out_features,
                                                                                          head.in_features)


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
