"""A patch as a PEFT adapter: PEFT's own loading gives what the patched model gives."""
from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import patches
import pytest
import tiny
import torch
from patches import drawn
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stt.errors import InputError
from stt.selection import Selection
from stt.selective_optimizers.patch import Patch
from stt.selective_optimizers.peft_formats import to_peft
from stt.selective_optimizers.weights import named_tensors, selection_of


def linears(model: nn.Module, seed: int = 0, form: str | None = None, share: float = 0.1) -> Selection:
    """Part of the weights of the feed-forward blocks and queries, another share of each kind."""
    whole = drawn(model, seed, form, share)
    return only(model, whole, lambda name: "mlp" in name or "q_proj" in name)


def only(model: nn.Module, selection: Selection, is_meant: Callable[[str], bool]) -> Selection:
    units = {name: ids for name, ids in selection.items() if is_meant(name)}
    return selection_of(units, {name: axis for name, axis in selection.meta["along"].items() if name in units},
                        named_tensors(model), {})


def shifted(model: nn.Module, selection: Selection) -> nn.Module:
    """The selected weights, moved a little."""
    tuned = copy.deepcopy(model)
    for name, mask in patches.masks(model, selection).items():
        tensor = named_tensors(tuned)[name]
        tensor.data += (0.1 * mask * torch.randn(tensor.shape)).to(tensor)
    return tuned


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("form", [*patches.FORMS, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peft_gives_the_patched_model(form: str | None, dtype: torch.dtype, tmp_path: Path) -> None:
    base, batch = tiny.build("llama")
    base.to(dtype).save_pretrained(tmp_path / "base")
    selection = linears(base, form=form)
    tuned = shifted(base, selection)
    patch = Patch.between(base, tuned, selection)
    folder = to_peft(patch, tmp_path / "adapter", str(tmp_path / "base"))
    loaded = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), folder).eval()
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    before, expected = logits(base, batch), logits(tuned, batch)
    assert (before - expected).abs().max() > 0.01
    if dtype == torch.float32:
        torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-6)
    merged = named_tensors(loaded.merge_and_unload())
    for name, tensor in named_tensors(tuned).items():  # PEFT rounds the delta too: two roundings against one
        step = torch.finfo(dtype).eps * (tensor.abs() + 2 * (tensor - named_tensors(base)[name]).abs())
        assert bool(((merged[name] - tensor).abs() <= step).all())
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_uneven_shares_are_filled_up(tmp_path: Path) -> None:
    base, batch = tiny.build("llama")
    units = {"model.layers.0.mlp.up_proj.weight": torch.arange(1), "model.layers.1.mlp.down_proj.weight":
             torch.arange(7, 707), "model.layers.1.self_attn.k_proj.weight": torch.tensor([5, 31])}
    selection = selection_of(units, {}, named_tensors(base), {})
    tuned = shifted(base, selection)
    folder = to_peft(Patch.between(base, tuned, selection), tmp_path / "adapter", base)
    tensors = load_file(folder / "adapter_model.safetensors")
    counts = {name: len(tensor) for name, tensor in tensors.items() if name.endswith("indices")}
    assert counts == {f"base_model.model.{module}.supertuning_indices": count for module, count in (
        ("model.layers.0.mlp.up_proj", 700), ("model.layers.1.mlp.down_proj", 700),
        ("model.layers.1.self_attn.k_proj", 256))} | counts
    assert len(counts) == 3
    loaded = PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(logits(loaded, batch), logits(tuned, batch), rtol=0, atol=1e-6)


def test_a_new_head_is_a_module_to_save(tmp_path: Path) -> None:
    base, batch = tiny.build("bert")
    head = {"classifier.weight": torch.arange(3), "classifier.bias": torch.arange(3)}
    query = "bert.encoder.layer.0.attention.self.query.weight"
    selection = selection_of({query: torch.arange(0, 99, 3), **head}, dict.fromkeys(head, 0), named_tensors(base), {})
    tuned = shifted(base, selection)
    patch = Patch.between(base, tuned, selection, new=tuple(head))
    folder = to_peft(patch, tmp_path / "adapter", base)
    nn.init.normal_(base.classifier.weight)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(logits(loaded, batch), logits(tuned, batch), rtol=0, atol=1e-6)


def norm(model: PreTrainedModel) -> Patch:
    selection = only(model, drawn(model), lambda name: name == "model.norm.weight" or "layers.0.mlp.up" in name)
    return Patch.between(model, shifted(model, selection), selection)


def buffer(model: PreTrainedModel) -> Patch:
    patch = Patch.between(model, shifted(model, linears(model)), linears(model))
    name, value = next(iter(model.named_buffers()))
    model.register_buffer("steps", value)
    return Patch(patch.selection, patch.deltas, patch.starts, extras={"steps": value})


def half_new(model: PreTrainedModel) -> Patch:
    selection = linears(model, form="flat")
    return Patch.between(model, shifted(model, selection), selection, new=("model.layers.0.mlp.up_proj.weight",))


def all_new(model: PreTrainedModel) -> Patch:
    selection = only(model, drawn(model, form="whole"), lambda name: name == "lm_head.weight")
    return Patch.between(model, shifted(model, selection), selection, new=("lm_head.weight",))


REFUSED: dict[str, tuple[str, Callable[[PreTrainedModel], Patch], str]] = {
    "a norm": ("llama", norm, "the patch holds model.norm.weight: leave it out"),
    "an embedding": ("llama", lambda model: Patch.between(model, model, drawn(model)), "model.embed_tokens.weight"),
    "a bias": ("llama-bias", lambda model: Patch.between(model, model, only(model, drawn(model), lambda name: name.
                                                                            endswith("up_proj.bias"))), "up_proj.bias"),
    "a layer of another class": ("gpt2", lambda model: Patch.between(model, model, only(
        model, drawn(model), lambda name: name.endswith("c_fc.weight"))), "mlp.c_fc.weight"),
    "a buffer": ("llama", buffer, "the buffer 'steps'"),
    "part of a new tensor": ("llama", half_new, "takes new modules as a whole"),
    "nothing but a head": ("llama", all_new, "needs a weight to add to"),
}


@pytest.mark.parametrize(("kind", "make", "said"), REFUSED.values(), ids=REFUSED)
def test_what_it_has_no_place_for(kind: str, make: Callable[[PreTrainedModel], Patch], said: str,
                                  tmp_path: Path) -> None:
    base, _ = tiny.build(kind)
    with pytest.raises(InputError, match=said):
        to_peft(make(base), tmp_path / "adapter", base)
    assert not any(tmp_path.iterdir())


def test_another_model_and_a_full_folder(tmp_path: Path) -> None:
    base, _ = tiny.build("llama")
    patch = Patch.between(base, base, linears(base))
    with pytest.raises(InputError, match="unknown tensor"):
        to_peft(patch, tmp_path / "adapter", tiny.build("gpt2")[0])
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        to_peft(patch, tmp_path, base)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
