"""The published calls of load_store, and files as the public package writes them, made here under its module's name."""
from __future__ import annotations

import contextlib
import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import patches
import public_summary
import pytest
import torch
from patches import drawn, mixed, moved, state_bits
from public_summary import SelectivePeftSummary
from torch import Tensor, nn

from stt.errors import InputError
from stt.selective_optimizers.load_store import (
    load_summary_from_disk,
    load_weights_from_summary,
    write_summary_to_disk,
)
from stt.selective_optimizers.patch import Patch


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """public_summary.write, to the same file each time."""
    yield lambda summary, **how: public_summary.write(summary, tmp_path / "summary.pt", **how)
    assert public_summary.PACKAGE not in sys.modules  # nor did reading import it


def published(model: nn.Module, chosen: dict[str, Tensor | None]) -> SelectivePeftSummary:
    """The summary of a trained model with these masks (None: a frozen tensor), as the public package makes it."""
    values, pointers, shapes = [], [], []
    for name, parameter in model.named_parameters():
        mask = chosen[name]
        values.append(None if mask is None else parameter.data[mask])
        pointers.append(None if mask is None else mask.nonzero())
        shapes.append(parameter.shape)
    norms = [{name: buffer.clone() for name, buffer in module.named_buffers()} for module in model.modules()
             if isinstance(module, nn.BatchNorm1d)]
    return SelectivePeftSummary(values, pointers, shapes, norms, sum(mask.sum().item() for mask in chosen.values()
                                                                    if mask is not None))


def trained(dtype: torch.dtype = torch.float32, form: str = "flat") -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A base model, a trained one, and what of it was selected."""
    base = mixed(dtype)
    selection = drawn(base, form=form)
    tuned = moved(base, selection)
    tuned.train()(torch.randn(5, 3, 4, dtype=dtype), torch.arange(5))
    return base, tuned.eval(), patches.masks(base, selection)


# ---------------------------------------------------------------- our own


def test_the_published_workflow(tmp_path: Path) -> None:
    base, tuned, _ = trained()
    summary = Patch.between(base, tuned, drawn(base, form="flat"))
    write_summary_to_disk(str(tmp_path / "summary.pt"), summary)
    assert (tmp_path / "summary.pt").read_bytes()[8:9] == b"{"  # safetensors, whatever its name
    applied = load_weights_from_summary(base, load_summary_from_disk(str(tmp_path / "summary.pt")))
    assert state_bits(base) == state_bits(tuned)
    applied.revert()
    assert state_bits(base) == state_bits(mixed())


def test_a_header_of_any_length_is_no_pickle(tmp_path: Path) -> None:
    """The first byte of safetensors is the low byte of a length; 0x80 also begins a pickle."""
    base, tuned, _ = trained()
    patch = Patch.between(base, tuned, drawn(base))
    for extra in range(0, 300, 8):
        patch.selection.meta["note"] = "x" * extra
        write_summary_to_disk(tmp_path / "patch", patch)
        if (tmp_path / "patch").read_bytes()[:1] == b"\x80":
            break
    else:
        pytest.fail("no header of such a length")
    assert isinstance(load_summary_from_disk(tmp_path / "patch"), Patch)


# ---------------------------------------------------------------- the public package's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["flat", "columns", "whole"])
@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_a_published_file(dtype: torch.dtype, form: str, how: dict[str, bool], write: Callable[..., Path]) -> None:
    base, tuned, chosen = trained(dtype, form)
    summary = load_summary_from_disk(write(published(tuned, chosen), **how))
    assert summary.budget_used == sum(int(mask.sum()) for mask in chosen.values())
    before = state_bits(base)
    applied = load_weights_from_summary(base, summary)
    assert state_bits(base) == state_bits(tuned)
    applied.revert()
    assert state_bits(base) == before


def test_frozen_tensors_and_tensors_without_a_choice(write: Callable[..., Path]) -> None:
    base = mixed()
    selection = drawn(base, form="flat")
    chosen = patches.masks(base, selection) | {"scale": None, "words.weight": torch.zeros(7, 4, dtype=torch.bool)}
    tuned = moved(base, selection)
    tuned.scale, tuned.words.weight.data = base.scale, base.words.weight.data.clone()
    load_weights_from_summary(base, load_summary_from_disk(write(published(tuned, chosen))))
    assert state_bits(base) == state_bits(tuned)


def test_entries_in_any_order(write: Callable[..., Path]) -> None:
    base, tuned, chosen = trained()
    summary = published(tuned, chosen)
    for i, (values, pointers) in enumerate(zip(summary.values, summary.pointers, strict=True)):
        order = torch.randperm(len(values))
        summary.values[i], summary.pointers[i] = values[order], pointers[order]
    load_weights_from_summary(base, load_summary_from_disk(write(summary)))
    assert state_bits(base) == state_bits(tuned)


def reordered(model: nn.Module) -> nn.Module:
    """The same modules, two of one size the other way round."""
    order = ("convolution", "norm", "words", "head", "middle")
    model._modules = {name: model._modules[name] for name in order}
    return model


OTHER_MODELS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "one parameter more": (lambda model: model.register_parameter("more", nn.Parameter(torch.ones(1))),
                           "is of 9 tensors and the model has 10"),
    "one parameter less": (lambda model: setattr(model.head, "bias", None), "is of 9 tensors and the model has 8"),
    "another shape": (lambda model: setattr(model, "middle", nn.Linear(5, 4)), r"where the model has middle.weight"),
    "another order": (reordered, "where the model has head.bias of \\(7,\\)"),
    "no batch norm": (lambda model: setattr(model, "norm", nn.GroupNorm(1, 4)), "of 1 batch norms and the model 0"),
}


@pytest.mark.parametrize(("change", "said"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_d11_another_model_is_refused_and_left_alone(change: Callable[[nn.Module], object], said: str,
                                                     write: Callable[..., Path]) -> None:
    base, tuned, chosen = trained()
    summary = load_summary_from_disk(write(published(tuned, chosen)))
    change(base)
    before = state_bits(base)
    with pytest.raises(InputError, match=said):
        load_weights_from_summary(base, summary)
    assert state_bits(base) == before


def test_d11_named_summaries_find_their_tensors() -> None:
    """Also in a model whose modules stand in another order."""
    base, tuned, _ = trained()
    patch = Patch.between(base, tuned, drawn(base, form="flat"))
    other = reordered(copy.deepcopy(base))
    load_weights_from_summary(other, patch)
    assert state_bits(other) == state_bits(reordered(tuned))


def edited(change: Callable[[SelectivePeftSummary], object]) -> Callable[[SelectivePeftSummary], object]:
    def edit(summary: SelectivePeftSummary) -> object:
        made = change(summary)
        return summary if made is None else made
    return edit


FOREIGN: dict[str, Callable[[SelectivePeftSummary], object]] = {
    "a state dict": lambda summary: {"values": summary.values},
    "a tensor": lambda summary: summary.values[0],
    "a class": lambda summary: SelectivePeftSummary,
    "a list too short": edited(lambda summary: summary.shapes.pop() and None),
    "no list": edited(lambda summary: setattr(summary, "values", 3)),
    "a field is gone": edited(lambda summary: delattr(summary, "pointers")),
    "values without places": edited(lambda summary: summary.pointers.__setitem__(0, None)),
    "places that are floats": edited(lambda summary: summary.pointers.__setitem__(0, torch.ones(2, 3))),
    "values that are names": edited(lambda summary: summary.values.__setitem__(0, "weight")),
    "values out of nothing": edited(lambda summary: summary.values.__setitem__(0, torch.zeros(1).expand(10**12))),
    "values without memory": edited(lambda summary: summary.values.__setitem__(0, torch.zeros(5, device="meta"))),
    "statistics that are numbers": edited(lambda summary: summary.bn_metadata.__setitem__(0, {"running_mean": 1.0})),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_summary(make: Callable[[SelectivePeftSummary], object], write: Callable[..., Path]) -> None:
    _, tuned, chosen = trained()
    path = write(make(published(tuned, chosen)))
    with pytest.raises(InputError, match="summary of the public package"):
        load_summary_from_disk(path)


PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "outside": lambda places: places + 100, "negative": lambda places: places - 1,
    "of other dimensions": lambda places: places[:, :1], "too few": lambda places: places[:-1],
    "twice the same": lambda places: places[:1].expand_as(places).clone()}


@pytest.mark.parametrize("change", PLACES.values(), ids=PLACES)
def test_places_that_cannot_be(change: Callable[[Tensor], Tensor], write: Callable[..., Path]) -> None:
    base, tuned, chosen = trained()
    summary = published(tuned, chosen)
    summary.pointers[1] = change(summary.pointers[1])
    before = state_bits(base)
    with pytest.raises(InputError, match="convolution|unit ids of"):
        load_weights_from_summary(base, load_summary_from_disk(write(summary)))
    assert state_bits(base) == before


def test_damaged_files(write: Callable[..., Path], tmp_path: Path) -> None:
    _, tuned, chosen = trained()
    path = write(published(tuned, chosen))
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for end in torch.randint(4, len(whole), (40,), generator=generator).tolist():
        path.write_bytes(whole[:end])
        with pytest.raises(InputError):
            load_summary_from_disk(path)
    for place in torch.randint(4, len(whole), (200,), generator=generator).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1:])
        with contextlib.suppress(InputError):  # a changed value goes unseen: the format has no digest
            load_summary_from_disk(path)
    for content in (b"", b"\x80", b"PK\x03\x04", pickle.dumps({"a": 1}), b"no summary at all"):
        path.write_bytes(content)
        with pytest.raises(InputError):
            load_summary_from_disk(path)
    with pytest.raises(InputError, match="no summary at"):
        load_summary_from_disk(tmp_path / "none.pt")


def test_nothing_stays_allowed(write: Callable[..., Path]) -> None:
    """What reading such a file allows torch to unpickle ends with it, also where reading fails."""
    _, tuned, chosen = trained()
    before = set(torch.serialization.get_safe_globals())
    path = write(published(tuned, chosen))
    load_summary_from_disk(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError):
        load_summary_from_disk(path)
    assert set(torch.serialization.get_safe_globals()) == before
