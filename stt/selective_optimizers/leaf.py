"""Training selected weights in place: every tensor stays frozen, and a leaf beside it holds the selected values.

The model computes what it always did, on its own tensors. The backward pass yields the gradient of the leaves alone, so
that any optimizer, scheduler, clipping, scaler, Trainer or DDP works on few numbers; after a step of any torch
optimizer the values go back into their places.
"""
from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stt.errors import InputError
from stt.selection import Selection
from stt.selective_optimizers.deltas import read_units
from stt.selective_optimizers.in_place import in_place
from stt.selective_optimizers.patch import Patch, buffers_of
from stt.selective_optimizers.route import LinearOfInputs, LinearOfOutputs, Route
from stt.selective_optimizers.sharded import whole, write_part
from stt.selective_optimizers.weights import (
    LEAF,
    axis_of,
    check_fits,
    is_of_weights,
    is_whole,
    named_tensors,
    read,
    write,
)

ATTACHED = "stt_attached"  # attribute of a model
LEAVES: weakref.WeakValueDictionary[int, Leaf] = weakref.WeakValueDictionary()  # all there are, in the same order in
NUMBERS = itertools.count()  # every process: what they exchange must match


class Leaf(nn.Module):
    """What trains of one tensor: `values`, float32 or wider, shaped as weights.read returns them."""

    def __init__(self, owner: nn.Module, attribute: str, axis: int | None, ids: Tensor):
        super().__init__()
        tensor = owner._parameters[attribute]
        self._home, self.axis = (owner, attribute), axis  # in a tuple: the owner is no part of its leaf
        self.register_buffer("ids", ids.to(tensor.device), persistent=False)
        wide = torch.promote_types(tensor.dtype, torch.float32)
        self.values = nn.Parameter(read(tensor.detach(), axis, ids).to(wide))
        LEAVES[next(NUMBERS)] = self

    def route(self, tensor: Tensor) -> Tensor:
        """The frozen tensor, with the gradient routed here. A leaf is no layer: calling it is an error."""
        return Route.apply(tensor, self.values, self.axis, self.ids)

    @property
    def tensor(self) -> Tensor:
        owner, attribute = self._home
        return owner._parameters[attribute]

    def sync(self) -> None:
        """Put the values into their tensor."""
        write_part(self.tensor, self.axis, self.ids, whole(self.values.detach()))

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        LEAVES[next(NUMBERS)] = self  # a copy


@dataclass(frozen=True)
class Attached:
    """What `attach` did: the selection, the values it started from, by tensor, and what trained before."""

    selection: Selection
    start: Mapping[str, Tensor]
    trained_before: frozenset[str]


def attach(model: nn.Module, selection: Selection) -> nn.Module:
    """Freeze the model but for the selected weights, which train in place; the model.

    `selection` is one of weights (select_weights), or of neurons or heads, whose rows and columns then train while the
    others stay and are computed. Selected weights are float32 parameters (or wider) whatever the dtype of the model; a
    tensor of which everything is selected trains itself. Values go into their tensors after every step of a torch
    optimizer; after another way of changing them call `sync(model)`. `detach` ends it. Attach first, and then share
    the model out (`fully_shard`), compile it or put adapters on it.

    Raises InputError, before anything changes, if the model is attached or shared out already, the selection is of
    another one, or a module cannot do it: a container that runs through its children, an embedding that rescales its
    weight (max_norm) or has sparse gradients.

    >>> stt.attach(model, stt.select_weights(model, score="smallest", budget=320_000))
    >>> optimizer = torch.optim.AdamW(stt.selected_parameters(model))
    """
    if any(isinstance(module, Leaf) or ATTACHED in module.__dict__ for module in model.modules()):
        raise InputError("weights of this model are attached already: stt.detach(model) first")
    selection = selection if is_of_weights(selection) else in_place(model, selection)
    tensors = named_tensors(model)
    check_fits(selection, tensors)
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        raise InputError("the model is shared out over processes already: stt.attach first, then fully_shard")
    start = {name: read(tensors[name].detach(), axis_of(selection, name), ids).cpu().clone()
             for name, ids in selection.items()}
    before = frozenset(name for name, tensor in tensors.items() if tensor.requires_grad)
    place(model, {name: (axis_of(selection, name), ids) for name, ids in selection.items()})
    setattr(model, ATTACHED, Attached(selection, start, before))
    if isinstance(model, PreTrainedModel):
        model.tie_weights = functools.partial(_tie_weights, model)
    model._ddp_params_and_buffers_to_ignore = [name for name, _ in model.named_buffers()  # they never change
                                               if name.endswith(f"{LEAF}.ids")]
    return model


def place(model: nn.Module, units: Mapping[str, tuple[int | None, Tensor]]) -> None:
    """Freeze the model but for these units of its tensors, axis and ids by name: a leaf trains them; or the tensor
    itself, if it is float32 and all of it is selected. Works on the meta device, too. Raises InputError, before
    anything changes, for a module that cannot do it."""
    tensors = named_tensors(model)
    _check_owners(model, {id(tensors[name]) for name in units})
    model.requires_grad_(False)
    for name, (axis, ids) in units.items():
        tensor = tensors[name]
        if is_whole(tensor, axis, ids) and tensor.dtype == torch.promote_types(tensor.dtype, torch.float32):
            tensor.requires_grad_(True)
        else:
            _add_leaf(model, tensor, axis, ids)


def detach(model: nn.Module) -> Selection:
    """The plain model again, with the trained values in their places; the selection. Raises InputError if no weights
    are attached."""
    model, attached = _attached(model)
    sync(model)
    for module in list(model.modules()):
        if "_selected_from" in module.__dict__:
            module.__class__ = module.__dict__.pop("_selected_from")
            module.__dict__.pop("_leaves")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Leaf):
                delattr(module, name)
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name in attached.trained_before)
    delattr(model, ATTACHED)
    model.__dict__.pop("tie_weights", None)
    del model._ddp_params_and_buffers_to_ignore
    return attached.selection


def sync(model: nn.Module) -> None:
    """Put the values of every leaf into its tensor, as a step of a torch optimizer does by itself."""
    for module in model.modules():
        if isinstance(module, Leaf):
            module.sync()


def selected_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer trains. Raises InputError if no weights are attached."""
    _attached(model)  # raises
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """The selected values as they are now, by tensor, shaped as weights.read returns them."""
    model, attached = _attached(model)
    selection = attached.selection
    leaves = {id(module.tensor): module.values for module in model.modules() if isinstance(module, Leaf)}
    tensors = named_tensors(model)
    return {name: whole(leaves.get(id(tensors[name]), tensors[name]).detach()) for name in selection}


def patch_of(model: nn.Module, new: Collection[str] = ()) -> Patch:
    """What training changed so far, to keep and to put on the base model; `new` names tensors that the base has no
    values of (a head drawn at random). Raises InputError if no weights are attached."""
    model, attached = _attached(model)
    return Patch.from_values(model, attached.selection, attached.start, trained_values(model), new)


def put_patch(model: nn.Module, patch: Patch) -> None:
    """The opposite of `patch_of`: the attached model as it was when the patch was made, whatever trained since. Tensors
    of the patch that are not attached are written too, if they are new or as in the base. Raises InputError, before
    anything changes, for a patch of another model, of other start values, or of other weights than are attached."""
    model, attached = _attached(model)
    tensors, buffers = own_tensors(model), buffers_of(model)
    patch.check_shapes(tensors, buffers)
    for name, ids in attached.selection.items():
        is_other = axis_of(patch.selection, name) != axis_of(attached.selection, name)
        if len(ids) and (is_other or not torch.equal(patch.selection.get(name, ids[:0]), ids)):
            raise InputError(f"the patch is not of the weights of {name} that are attached: attach patch.selection")
    start = {name: attached.start[name] if name in attached.start else read_units(tensors[name], patch.selection, name)
             for name in patch.selection}
    patch.check_start(start)
    leaves = {id(module.tensor): module for module in model.modules() if isinstance(module, Leaf)}
    for name, ids in patch.selection.items():
        leaf, values = leaves.get(id(tensors[name])), patch.values(name, start[name])
        if leaf is not None:
            leaf.values.data.copy_(values)
            leaf.sync()
        else:
            write(tensors[name], axis_of(patch.selection, name), ids, values)
    for name, value in patch.extras.items():
        buffers[name].copy_(value)


def own_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the model has when no weights of it are attached."""
    leaves = {id(module.values) for module in model.modules() if isinstance(module, Leaf)}
    return {name: tensor for name, tensor in named_tensors(model).items() if id(tensor) not in leaves}


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before weights of it were attached."""
    return module.__dict__.get("_selected_from", type(module))


def _attached(model: nn.Module) -> tuple[nn.Module, Attached]:
    """The attached model, inside of whatever was put around it, and what `attach` did. Raises InputError if there is
    none, or if something has frozen or renamed what trains since."""
    inner = next((module for module in model.modules() if ATTACHED in module.__dict__), None)
    if inner is None:
        raise InputError("no weights of this model are attached: stt.attach(model, selection) first")
    leaves = [module for module in inner.modules() if isinstance(module, Leaf)]
    attached = getattr(inner, ATTACHED)
    if not all(leaf.values.requires_grad for leaf in leaves) or attached.selection.keys() - named_tensors(inner).keys():
        raise InputError("the attached weights were frozen or renamed since, as adapters of another library do: put "
                         "the adapters on first, and then stt.attach(model, selection)")
    return inner, attached


def _check_owners(model: nn.Module, selected: set[int]) -> None:
    """Raises InputError, naming it, for a module in which a part of a tensor cannot train."""
    for name, module in model.named_modules():
        if not any(id(parameter) in selected for parameter in module._parameters.values()):
            continue
        reason = ""
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            reason = "runs through its children, among which a leaf would be"
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag) and (module.max_norm is not None or module.sparse):
            reason = "rescales its weight (max_norm), or has sparse gradients"
        if reason:
            raise InputError(f"{name or type(model).__name__} ({type(module).__name__}) {reason}: exclude its weights "
                             "from the selection")


def _add_leaf(model: nn.Module, tensor: nn.Parameter, axis: int | None, ids: Tensor) -> None:
    """A leaf on the first module that has the tensor, which all that have it (a tied head) read through."""
    leaf = None
    for module in list(model.modules()):
        for attribute, parameter in list(module._parameters.items()):
            if parameter is tensor:
                if leaf is None:
                    leaf = Leaf(module, attribute, axis, ids)
                    module.add_module(attribute + LEAF, leaf)
                _read_through(module, attribute, leaf)


def _read_through(module: nn.Module, attribute: str, leaf: Leaf) -> None:
    """Let `module.attribute` be the tensor with its gradient routed to the leaf, wherever it is read."""
    plain = plain_class(module)
    leaves = {**module.__dict__.get("_leaves", {}), attribute: (leaf,)}
    has_rows = plain in (nn.Linear, Conv1D) and "weight" in leaves and leaves["weight"][0].axis is not None
    module.__class__ = _reading(plain, tuple(sorted(leaves)), has_rows)
    module.__dict__.update(_selected_from=plain, _leaves=leaves)


@functools.cache
def _reading(plain: type[nn.Module], attributes: tuple[str, ...], has_rows: bool) -> type[nn.Module]:
    """A subclass that reads these tensors through their leaves; a linear layer with selected rows or columns multiplies
    only those in its backward pass."""
    body: dict[str, object] = {attribute: property(_through(attribute), _refuse) for attribute in attributes}
    body |= {"__reduce_ex__": _reduced, "_made_of": (plain, attributes, has_rows)}
    if has_rows:
        body["forward"] = _linear
    return type(plain.__name__, (plain,), body | {"__module__": plain.__module__})


def _reduced(self: nn.Module, protocol: int) -> tuple[object, ...]:
    """For a copy or a pickle: the class is made, and is not found under the name it bears."""
    return _blank, self._made_of, *nn.Module.__reduce_ex__(self, protocol)[2:]


def _blank(plain: type[nn.Module], attributes: tuple[str, ...], has_rows: bool) -> nn.Module:
    kind = _reading(plain, attributes, has_rows)
    return kind.__new__(kind)


def _tie_weights(model: nn.Module, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
    """transformers' own, which accelerate calls before it shares a model out, and which needs parameters: that is what
    is read where nothing is routed."""
    with torch.no_grad():
        type(model).tie_weights(model, missing_keys, recompute_mapping)


def _through(attribute: str) -> Callable[[nn.Module], Tensor]:
    def tensor(self: nn.Module) -> Tensor:
        frozen = self._parameters[attribute]
        return self._leaves[attribute][0].route(frozen) if torch.is_grad_enabled() else frozen
    return tensor


def _refuse(self: nn.Module, value: object) -> None:
    raise InputError("a tensor with selected weights cannot be replaced, as nn.DataParallel does: start with torchrun, "
                     "or stt.detach(model) first")


def _linear(self: nn.Linear | Conv1D, x: Tensor) -> Tensor:
    leaf, weight = self._leaves["weight"][0], self._parameters["weight"]
    bias, values = self.bias, leaf.values
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    axis = leaf.axis
    if self._selected_from is Conv1D:  # which keeps (D, F)
        weight, values, axis = weight.T, values.T, 1 - axis
    return (LinearOfOutputs if axis == 0 else LinearOfInputs).apply(x, weight, bias, values, leaf.ids)


def _sync_after(optimizer: torch.optim.Optimizer, *_: object) -> None:
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for leaf in list(LEAVES.values()):
        if id(leaf.values) in trained:
            leaf.sync()


register_optimizer_step_post_hook(_sync_after)
