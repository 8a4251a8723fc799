"""Selected weights in place, against a dense optimizer whose other weights are put back after every step."""
from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import stt
from stt.errors import InputError
from stt.selection import Selection
from stt.selective_optimizers.in_place import in_place
from stt.selective_optimizers.leaf import LEAF, sync, trained_values
from stt.selective_optimizers.weights import axis_of, named_tensors, read, selection_of, write
from stt.trace import eager_experts

KINDS = ["llama", "qwen2-tied", "gpt2", "bert", "albert", "deberta-v2", "t5", "vit", "swin", "mixtral"]


def plain(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model without its leaves."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if LEAF not in name}


def random_weights(model: nn.Module, share: float = 0.1, seed: int = 0) -> Selection:
    """Some weights of every tensor."""
    generator = torch.Generator().manual_seed(seed)
    tensors = named_tensors(model)
    units = {name: torch.rand(tensor.numel(), generator=generator).topk(max(1, int(share * tensor.numel()))).indices
             for name, tensor in tensors.items()}
    return selection_of(units, {}, tensors, {"unit": "weight"})


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with eager_experts(model):  # grouped products know no float64
        return sum(out.double().square().mean() for out in tiny.outputs(model, batch))


def masks_of(selection: Selection, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    masks = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in tensors.items()}
    for name, ids in selection.items():
        axis = axis_of(selection, name)
        write(masks[name], axis, ids, torch.ones_like(read(masks[name], axis, ids)))
    return masks


class Dense:
    """The slow obvious way: gradients masked, one dense optimizer, every other weight put back."""

    def __init__(self, model: nn.Module, selection: Selection, make: Callable[..., torch.optim.Optimizer]):
        self.model, self.tensors = model, named_tensors(model)
        self.masks = masks_of(selection, self.tensors)
        self.optimizer = make(self.tensors.values())

    def step(self, max_norm: float | None = None) -> None:
        before = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        for name, tensor in self.tensors.items():
            if tensor.grad is not None:
                tensor.grad.mul_(self.masks[name])
        if max_norm:
            nn.utils.clip_grad_norm_(self.tensors.values(), max_norm)
        self.optimizer.step()
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(torch.where(self.masks[name], tensor, before[name]))
        self.optimizer.zero_grad()


def assert_same(model: nn.Module, reference: nn.Module, atol: float = 0.0) -> None:
    found = plain(model)
    for name, tensor in named_tensors(reference).items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)],
    ids=["adamw", "sgd"])
def test_training_equals_a_dense_masked_optimizer(kind: str, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model, batch = tiny.build(kind, torch.float64)
    reference, selection = copy.deepcopy(model), random_weights(model)
    dense = Dense(reference, selection, optimizer)
    start = {name: tensor.clone() for name, tensor in plain(model).items()}
    stt.attach(model, selection)
    sparse = optimizer(stt.selected_parameters(model))
    for _ in range(3):
        for each in (model, reference):
            loss_of(each, batch).backward()
        sparse.step()
        sparse.zero_grad()
        dense.step()
    assert_same(model, reference, 1e-12)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in plain(model).items())
    assert_bits_outside_untouched(model, start, selection)


def assert_bits_outside_untouched(model: nn.Module, start: Mapping[str, Tensor], selection: Selection) -> None:
    for name, mask in masks_of(selection, start).items():
        assert torch.equal(plain(model)[name][~mask], start[name][~mask]), name


@pytest.mark.parametrize(("fused", "atol"), [(False, 0.0), (True, 1e-7)])  # fused rounds the end of a vector otherwise
def test_static_training_in_float32_is_bitwise(fused: bool, atol: float) -> None:
    model, batch = tiny.build("llama")
    reference, selection = copy.deepcopy(model), stt.select_weights(model, score="smallest", budget=500)
    dense = Dense(reference, selection, lambda p: torch.optim.AdamW(p, lr=1e-3, fused=fused))
    stt.attach(model, selection)
    sparse = torch.optim.AdamW(stt.selected_parameters(model), lr=1e-3, fused=fused)
    for _ in range(5):
        for each in (model, reference):
            loss_of(each, batch).backward()
        sparse.step()
        sparse.zero_grad()
        dense.step()
    assert_same(model, reference, atol)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_rows_and_columns_multiply_only_those(kind: str) -> None:
    """A linear layer with selected rows (columns) computes their gradient, not the whole one."""
    model, batch = tiny.build(kind, torch.float64)
    reference = copy.deepcopy(model)
    chosen = in_place(model, stt.select(model, score="magnitude", keep=0.25))
    assert set(chosen.meta["along"].values()) == {0, 1}
    with torch.no_grad():
        masks = masks_of(chosen, named_tensors(reference))
    stt.attach(model, chosen)
    shapes: list[tuple[int, ...]] = []
    with Products(shapes):
        loss_of(model, batch).backward()
    loss_of(reference, batch).backward()
    for name, values in trained_grads(model).items():
        full = named_tensors(reference)[name].grad
        torch.testing.assert_close(values, read(full, axis_of(chosen, name), chosen[name]), rtol=0, atol=1e-12)
        assert not torch.equal(full[~masks[name]], torch.zeros_like(full[~masks[name]])) or masks[name].all()
    whole = {tuple(tensor.shape) for name, tensor in named_tensors(reference).items()
             if name in chosen and tensor.dim() == 2}
    assert not whole & set(shapes)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the shapes of all matrix products."""

    def __init__(self, shapes: list[tuple[int, ...]]):
        super().__init__()
        self.shapes = shapes

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(out.shape))
        return out


def trained_grads(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every selected part, by tensor."""
    leaves = {name.removesuffix(LEAF + ".values"): parameter.grad for name, parameter in model.named_parameters()
              if parameter.requires_grad and LEAF in name}
    own = {name: parameter.grad for name, parameter in model.named_parameters()
           if parameter.requires_grad and LEAF not in name}
    return leaves | own


def test_a_tied_tensor_has_one_leaf_that_both_uses_train() -> None:
    model, batch = tiny.build("llama", torch.float64)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    reference = copy.deepcopy(model)
    selection = selection_of({"model.embed_tokens.weight": torch.arange(0, 300, 3)}, {}, named_tensors(model), {})
    stt.attach(model, selection)
    assert len(stt.selected_parameters(model)) == 1
    labels = batch["input_ids"]
    for each in (model, reference):
        each(**batch, labels=labels).loss.backward()
    full = reference.model.embed_tokens.weight.grad
    torch.testing.assert_close(stt.selected_parameters(model)[0].grad, full.flatten()[0:300:3], rtol=0, atol=1e-12)


def test_accumulation_clipping_and_checkpointing() -> None:
    model, batch = tiny.build("llama", torch.float64)
    reference, selection = copy.deepcopy(model), random_weights(model)
    dense = Dense(reference, selection, lambda p: torch.optim.AdamW(p, lr=1e-2))
    stt.attach(model, selection)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    sparse = torch.optim.AdamW(stt.selected_parameters(model), lr=1e-2)
    for _ in range(3):
        for part in (0, 1):
            (loss_of(model, {name: value[part:part + 1] for name, value in batch.items()}) / 2).backward()
            (loss_of(reference, {name: value[part:part + 1] for name, value in batch.items()}) / 2).backward()
        nn.utils.clip_grad_norm_(stt.selected_parameters(model), 0.01)
        sparse.step()
        sparse.zero_grad()
        dense.step(0.01)
    assert_same(model, reference, 1e-11)


def test_compiled_without_a_break() -> None:
    model, batch = tiny.build("llama")
    stt.attach(model, random_weights(model))
    loss_of(model, batch).backward()
    eager = trained_grads(model)
    model.zero_grad()
    loss_of(torch.compile(model, fullgraph=True, backend="aot_eager"), batch).backward()
    for name, gradient in trained_grads(model).items():
        torch.testing.assert_close(gradient, eager[name], rtol=1e-5, atol=1e-6)


def test_half_precision_weights_train_in_float32() -> None:
    model, batch = tiny.build("llama", torch.bfloat16)
    selection = random_weights(model)
    stt.attach(model, selection)
    assert {parameter.dtype for parameter in stt.selected_parameters(model)} == {torch.float32}
    optimizer = torch.optim.SGD(stt.selected_parameters(model), lr=1e-4)
    before = {name: values.clone() for name, values in trained_values(model).items()}
    loss_of(model, batch).backward()
    optimizer.step()
    for name, values in trained_values(model).items():
        assert torch.equal(plain(model)[name].flatten()[selection[name]], values.to(torch.bfloat16))
    assert any(not torch.equal(values, before[name]) for name, values in trained_values(model).items())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_whole_tensors_of_a_half_precision_model_train(kind: str) -> None:
    """Without autocast, and the model is of one dtype before, meanwhile and afterwards."""
    model, batch = tiny.build(kind, torch.bfloat16)
    stt.attach(model, stt.select_weights(model, score="bias"))
    optimizer = torch.optim.SGD(stt.selected_parameters(model), lr=1e-2)
    before = {name: tensor.clone() for name, tensor in plain(model).items()}
    loss_of(model, batch).backward()
    optimizer.step()
    stt.detach(model)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    assert any(not torch.equal(tensor, before[name]) for name, tensor in plain(model).items())
    tiny.outputs(model, batch)


def test_a_wrapped_model_is_found() -> None:
    model, batch = tiny.build("llama")
    selection = random_weights(model)
    stt.attach(model, selection)
    compiled = torch.compile(model, backend="eager")
    assert stt.patch_of(compiled).selection.keys() == selection.keys()
    stt.detach(compiled)
    assert all(parameter.requires_grad for parameter in model.parameters())
    stt.attach(model, selection)
    with pytest.raises(InputError, match="frozen or renamed"):
        stt.selected_parameters(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))


def test_what_cannot_do_it_says_so() -> None:
    class Scaled(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(3, 3))
            self.gain = nn.Parameter(torch.ones(4))

    model = Scaled()
    with pytest.raises(InputError, match="Scaled.*runs through its children"):
        stt.attach(model, selection_of({"gain": torch.tensor([1])}, {}, named_tensors(model), {}))
    model = nn.Embedding(5, 3, max_norm=1.0)
    with pytest.raises(InputError, match="max_norm"):
        stt.attach(model, selection_of({"weight": torch.tensor([1])}, {}, named_tensors(model), {}))
    model, _ = tiny.build("llama")
    stt.attach(model, random_weights(model))
    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises(InputError, match="DataParallel"):
        layer._replicate_for_data_parallel().__setattr__("weight", layer.weight.detach() * 2)
    with pytest.raises(InputError, match="attached already"):
        stt.select_weights(model, score="largest", budget=5)
    with pytest.raises(NotImplementedError):
        layer.weight_selected(torch.ones(3))


def test_scaler_skips_an_overflow() -> None:
    model, batch = tiny.build("llama")
    stt.attach(model, random_weights(model))
    optimizer, scaler = torch.optim.AdamW(stt.selected_parameters(model), fused=True), torch.amp.GradScaler("cpu")
    start = {name: tensor.clone() for name, tensor in plain(model).items()}
    scaler.scale(loss_of(model, batch) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(tensor, start[name]) for name, tensor in plain(model).items())
    optimizer.zero_grad()
    scaler.scale(loss_of(model, batch)).backward()
    scaler.step(optimizer)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in plain(model).items())


def test_detached_the_model_is_its_own_again() -> None:
    model, batch = tiny.build("llama")
    kinds, names = [type(module) for module in model.modules()], list(model.state_dict())
    model.lm_head.weight.requires_grad_(False)
    stt.attach(model, random_weights(model))
    optimizer = torch.optim.SGD(stt.selected_parameters(model), lr=0.1)
    loss_of(model, batch).backward()
    optimizer.step()
    outputs = tiny.outputs(model, batch)
    stt.detach(model)
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == names
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(torch.equal(a, b) for a, b in zip(tiny.outputs(model, batch), outputs, strict=True))


def test_other_ways_of_changing_values_need_sync() -> None:
    model, batch = tiny.build("llama")
    stt.attach(model, random_weights(model))
    before = tiny.outputs(model, batch)[0]
    with torch.no_grad():
        for values in stt.selected_parameters(model):
            values.add_(1.0)
    assert torch.equal(tiny.outputs(model, batch)[0], before)
    sync(model)
    assert not torch.equal(tiny.outputs(model, batch)[0], before)


def test_errors() -> None:
    model, _ = tiny.build("llama")
    other, _ = tiny.build("gpt2")
    with pytest.raises(InputError, match="unknown tensor"):
        stt.attach(other, random_weights(model))
    with pytest.raises(InputError, match=r"no weights of this model are attached: stt.attach"):
        stt.selected_parameters(model)
    stt.attach(model, random_weights(model))
    with pytest.raises(InputError, match="attached already"):
        stt.attach(model, random_weights(model))
