"""Copies, pickles, state dicts and patches of a model with attached weights."""
from __future__ import annotations

import copy
import io
from collections.abc import Mapping

import pytest
import tiny
import torch
from test_leaf import loss_of, plain, random_weights
from torch import Tensor, nn

import stt
from stt.errors import InputError
from stt.selection import Selection
from stt.selective_optimizers.in_place import in_place
from stt.selective_optimizers.leaf import put_patch
from stt.selective_optimizers.weights import named_tensors
from stt.sites import find_sites


def test_copies_train_apart() -> None:
    model, batch = tiny.build("llama")
    stt.attach(model, random_weights(model))
    twin = copy.deepcopy(model)
    start = {name: tensor.clone() for name, tensor in plain(model).items()}
    optimizer = torch.optim.SGD(stt.selected_parameters(twin), lr=0.1)
    loss_of(twin, batch).backward()
    optimizer.step()
    assert all(torch.equal(tensor, start[name]) for name, tensor in plain(model).items())
    assert any(not torch.equal(tensor, start[name]) for name, tensor in plain(twin).items())


@pytest.mark.parametrize("kind", ["qwen2-tied", "gpt2", "albert"])
@pytest.mark.parametrize("form", ["weights", "neurons"])
def test_a_pickle_comes_back_attached(kind: str, form: str) -> None:
    """And trains on, as its original does, without moving it."""
    model, batch = tiny.build(kind)
    stt.attach(model, random_weights(model) if form == "weights" else in_place(model, neurons(model)))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    start = {name: tensor.clone() for name, tensor in plain(model).items()}
    step(twin, batch)
    assert all(torch.equal(tensor, start[name]) for name, tensor in plain(model).items())
    step(model, batch)
    assert all(torch.equal(tensor, plain(twin)[name]) for name, tensor in plain(model).items())
    assert any(not torch.equal(tensor, start[name]) for name, tensor in plain(model).items())
    stt.detach(twin)
    assert list(twin.state_dict()) == list(tiny.build(kind)[0].state_dict())


def neurons(model: nn.Module) -> Selection:
    """The first half of every site's."""
    sites = find_sites(model)
    return Selection({name: torch.arange(site.width // 2) for name, site in sites.items()},
                     {"widths": {name: site.width for name, site in sites.items()}})


def step(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    optimizer = torch.optim.SGD(stt.selected_parameters(model), lr=0.1)
    loss_of(model, batch).backward()
    optimizer.step()
    model.zero_grad()


def test_tying_again_changes_nothing() -> None:
    """As accelerate asks of every model that it shares out."""
    model, batch = tiny.build("qwen2-tied")
    own = model.tie_weights
    stt.attach(model, random_weights(model))
    twin = copy.deepcopy(model)
    twin.tie_weights()
    assert twin.lm_head._parameters["weight"] is twin.model.embed_tokens._parameters["weight"]
    assert list(twin.state_dict()) == list(model.state_dict())
    step(model, batch)
    step(twin, batch)
    assert all(torch.equal(tensor, plain(twin)[name]) for name, tensor in plain(model).items())
    stt.detach(model)
    assert model.tie_weights == own


def test_a_state_dict_comes_back() -> None:
    model, batch = tiny.build("llama")
    twin, selection = copy.deepcopy(model), random_weights(model)
    stt.attach(model, selection)
    optimizer = torch.optim.SGD(stt.selected_parameters(model), lr=0.1)
    loss_of(model, batch).backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    stt.attach(twin, selection)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(tiny.outputs(model, batch), tiny.outputs(twin, batch), strict=True))


def test_a_patch_goes_back_on_the_attached_model() -> None:
    """Whatever trained since; not one of other weights, though they hold the same values (all biases are 0)."""
    model, batch = tiny.build("bert")
    for name, tensor in named_tensors(model).items():
        if name.endswith(".bias"):
            tensor.data.zero_()
    twin, selection = copy.deepcopy(model), random_weights(model)
    stt.attach(model, selection)
    step(model, batch)
    patch, then = stt.patch_of(model), copy.deepcopy(model.state_dict())
    step(model, batch)
    now = copy.deepcopy(model.state_dict())
    assert not torch.equal(plain(model)["bert.pooler.dense.bias"], then["bert.pooler.dense.bias"])
    other = {**selection, "bert.pooler.dense.bias": (selection["bert.pooler.dense.bias"] + 1) % 32}
    stt.attach(twin, Selection(other, selection.meta))
    with pytest.raises(InputError, match="not of the weights of bert.pooler.dense.bias that are attached"):
        put_patch(twin, patch)
    changed = copy.deepcopy(model)
    changed.stt_attached.start["bert.embeddings.word_embeddings.weight"][0] += 1
    with pytest.raises(InputError, match="word_embeddings.weight does not hold what it held"):
        put_patch(changed, patch)
    assert all(torch.equal(value, now[name]) for name, value in changed.state_dict().items())
    put_patch(model, patch)
    assert all(torch.equal(value, then[name]) for name, value in model.state_dict().items())
