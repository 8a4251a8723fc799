"""What the training recipes do in the modes that train a model's weights where they are."""
from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from stt.arguments import RunArgs
from stt.selection import Selection
from stt.selective_optimizers.amount import weights_in
from stt.selective_optimizers.in_place import in_place
from stt.selective_optimizers.leaf import attach, detach
from stt.selective_optimizers.patch import Patch
from stt.selective_optimizers.progress import changed
from stt.selective_optimizers.select import select_weights
from stt.selective_optimizers.weights import is_of_weights, named_tensors, sizes, with_whole
from stt.surgery import head_parameters, train_only, untie_head
from util import ranks

if TYPE_CHECKING:
    from stt.selective_optimizers.optimizer import SelectiveOptimizer


def choose(model: nn.Module, score: str, args: RunArgs) -> Selection:
    """`--budget` weights outside the head, by a score that needs no data. Raises InputError as select_weights does."""
    if args.head == "untie":
        untie_head(model)
    options = {"include_norm": args.include_norm} if score == "bias" else {}
    return select_weights(model, score=score, budget=args.budget, exclude=list(head_parameters(model)), seed=args.seed,
                          **options)


def prepare(model: nn.Module, selection: Selection | None, head: str) -> list[str]:
    """Freeze the model but for the selected weights, neurons or heads, and the head as a whole; None is for an
    optimizer that chooses while it trains. Names of what trains."""
    if head == "untie":
        untie_head(model)
    heads = {} if head == "freeze" else head_parameters(model)
    if selection is None:
        return train_only(model, [name for name in named_tensors(model) if name not in head_parameters(model)], head)
    chosen = selection if is_of_weights(selection) else in_place(model, selection)
    attach(model, with_whole(chosen, named_tensors(model), heads))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@dataclass
class Growing:
    """Makes the optimizer that chooses weights at every step, once it is known how many there are, and keeps it."""

    args: RunArgs
    optimizer: SelectiveOptimizer | None = None
    tensors: list[dict[str, object]] | None = None  # for the record, when the training is over

    def __call__(self, model: nn.Module, steps: int) -> SelectiveOptimizer:
        from stt.selective_optimizers.wrap import get_selective_optimizer

        args = self.args
        body, head = _split(model)
        groups = [{"params": body}, *([{"params": head, "choose_all": True}] if head else [])]
        kind = get_selective_optimizer(torch.optim.AdamW, "id3")
        self.optimizer = kind(groups, lr=args.lr, weight_decay=args.wd, budget=self._budget(model) + _count(head),
                              max_steps=steps, exp=args.d3_exp, eps=args.d3_eps,
                              bias_correction=args.bias_correction, gather=gathering(args))
        return self.optimizer

    def counts(self, model: nn.Module) -> dict[str, int]:
        """How many parameters will be trained when the training is over, and how many of them outside the head."""
        _, head = _split(model)
        return {"trained": self._budget(model) + _count(head), "trained_without_head": self._budget(model)}

    def _budget(self, model: nn.Module) -> int:
        """Of the body; a share is one of the whole model, as for weights that are chosen at once."""
        return weights_in(self.args.budget, _count(model.parameters()))


def gathering(args: RunArgs) -> str:
    """When the optimizer takes the gradients: as soon as they are there, unless they must be added up over processes or
    unscaled first."""
    return "step" if ranks.world() > 1 or args.precision == "fp16" else "backward"


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What trains of the body, and of the head."""
    heads = head_parameters(model)
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return ([tensor for name, tensor in trained.items() if name not in heads],
            [tensor for name, tensor in trained.items() if name in heads])


def _count(tensors: Iterable[nn.Parameter]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def finished(model: nn.Module, growing: Growing | None, new: Collection[str] = ()) -> Patch:
    """What was trained in place, and the plain model again. `new` are tensors that the base model has no values of;
    they are in the patch whether they trained or not."""
    if growing is None:
        start = model.stt_attached.start
        selection = detach(model)
    else:
        start, selection = growing.optimizer.start_values(model), growing.optimizer.selection(model)
        growing.tensors = described(selection, model)
    return changed(model, selection, start, new)


def described(selection: Selection, model: nn.Module) -> list[dict[str, object]]:
    """The tensors of a selection of weights for the record."""
    tensors = named_tensors(model)
    return [{"name": name, "units": "weights", "width": tensors[name].numel(), "kept": count}
            for name, count in sizes(selection, tensors).items()]
