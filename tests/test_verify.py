"""stt verify: every weight that is not selected, against masks spelled out; the command and its exit codes."""
from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import patches
import pytest
import tiny
import torch
from patches import drawn, mixed, moved
from torch import nn

import stt
from stt import verbs
from stt.errors import InputError
from stt.selection import Selection
from stt.selective_optimizers import verify as module
from stt.selective_optimizers.in_place import in_place
from stt.selective_optimizers.patch import Patch
from stt.selective_optimizers.verify import Report, verify
from stt.selective_optimizers.weights import named_tensors, selection_of


def counted(base: nn.Module, tuned: nn.Module, selection: Selection) -> Report:
    """The same by whole masks and the bytes of every weight."""
    before, after, chosen = named_tensors(base), named_tensors(tuned), patches.masks(base, selection)
    differs = {name: (before[name].detach().flatten().view(torch.uint8).view(before[name].numel(), -1)
                      != tensor.detach().flatten().view(torch.uint8).view(tensor.numel(), -1)).any(1).view(tensor.shape)
               for name, tensor in after.items()}
    outside = {name: int((differ & ~chosen[name]).sum()) for name, differ in differs.items()}
    return Report(sum(tensor.numel() for tensor in after.values()), sum(int(mask.sum()) for mask in chosen.values()),
                  sum(int((differ & chosen[name]).sum()) for name, differ in differs.items()),
                  {name: count for name, count in outside.items() if count})


@pytest.mark.parametrize("chunk", [7, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [*patches.FORMS, None])
def test_counts(form: str | None, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training may have moved what was selected, or what a second selection has beside it."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    base = mixed(dtype)
    selection = drawn(base, form=form)
    tuned = moved(base, selection)
    report = verify(base, tuned, selection)
    assert report.is_exact
    assert report == counted(base, tuned, selection)
    assert 0 < report.changed <= report.selected
    tuned = moved(tuned, drawn(base, 2), 2)
    report = verify(base, tuned, selection)
    assert report == counted(base, tuned, selection)
    assert report.is_exact is (form == "whole")
    assert verify(base, base, selection) == Report(report.weights, report.selected, 0, {})


def test_every_single_weight_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one weight, wherever it is."""
    monkeypatch.setattr(module, "CHUNK", 5)
    base = mixed()
    selection = drawn(base)
    chosen = patches.masks(base, selection)
    for name, mask in chosen.items():
        for i, is_selected in enumerate(mask.flatten().tolist()):
            tuned = copy.deepcopy(base)
            bits = named_tensors(tuned)[name].data.view(-1)[i:i + 1].view(torch.int32)
            bits ^= 1
            report = verify(base, tuned, selection)
            assert (report.changed, report.outside) == ((1, {}) if is_selected else (0, {name: 1}))


def test_zeros_and_nan() -> None:
    base = mixed()
    base.middle.weight.data[:2] = torch.tensor([0.0, torch.nan, 0.0, torch.nan])
    tuned = copy.deepcopy(base)
    tuned.middle.weight.data[0, 0] = -0.0
    selection = selection_of({"middle.weight": torch.tensor([15])}, {}, named_tensors(base), {})
    assert verify(base, tuned, selection).outside == {"middle.weight": 1}


def test_models_of_two_dtypes_and_state_dicts() -> None:
    base = mixed(torch.bfloat16)
    selection = drawn(base, form="flat")
    tuned = moved(copy.deepcopy(base).float(), selection)
    before, after = ({name: tensor.detach() for name, tensor in named_tensors(model).items()}
                     for model in (base, tuned))
    assert verify(before, after, selection).is_exact
    after["convolution.weight"] = after["convolution.weight"] + 1e-6
    assert list(verify(base, after, selection).outside) == ["convolution.weight"]
    del before["scale"]  # what the base does not have counts as changed
    assert verify(before, tuned, Selection({**selection, "scale": []}, {"along": {}})).outside == {"scale": 1}
    assert verify(before, tuned, selection).is_exact
    del before["norm.bias"], after["scale"]
    before["scale"] = base.scale
    with pytest.raises(InputError, match="unknown tensor of the base model 'scale'"):
        verify(base, after, selection_of({"middle.bias": torch.tensor([0])}, {}, after, {}))


def test_models_of_two_kinds() -> None:
    base, wider = mixed(), mixed()
    wider.middle = nn.Linear(5, 4)
    selection = selection_of({"scale": torch.tensor([0])}, {}, named_tensors(base), {})
    with pytest.raises(InputError, match="middle.weight is \\(4, 4\\) in the base model and \\(4, 5\\) in the tuned"):
        verify(base, wider, selection)
    with pytest.raises(InputError, match="unknown tensor 'middle.weights'"):
        verify(base, base, Selection({"middle.weights": [0]}, {"along": {}}))


# ---------------------------------------------------------------- the command


def command(*argv: str | Path) -> int:
    return verbs.main(["verify", *map(str, argv)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned (where the patch lies) and spoilt (one weight more), and the files of the selection and the patch."""
    path = tmp_path_factory.mktemp("verify")
    base, _ = tiny.build("qwen2-tied")
    selection = drawn(base, form="flat", share=0.01)
    tuned = moved(base, selection)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(path / name)
    selection.save(path / "selection")
    Patch.between(base, tuned, selection).save(path / "patch")
    name = "model.layers.1.mlp.up_proj.weight"
    i = min(set(range(99)) - set(selection[name].tolist()))
    named_tensors(tuned)[name].data.view(-1)[i] *= 1 + 2**-22
    tuned.save_pretrained(path / "spoilt")
    tiny.build("gpt2")[0].save_pretrained(path / "other")
    return path


@pytest.mark.parametrize("kind", ["selection", "patch"])
def test_exit_codes(kind: str, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folders / "base", folders / "tuned", folders / kind) == 0
    out = capsys.readouterr().out
    selected = sum(map(len, Selection.load(folders / kind).values()))
    assert f" weights, {selected:,} selected, " in out
    assert "every other weight is the same, bit for bit" in out
    assert command(folders / "base", folders / "spoilt", folders / kind) == 1
    assert "1 weights changed that are not selected:\n  1  model.layers.1.mlp.up_proj.weight\n" in \
        capsys.readouterr().out


REFUSED: dict[str, tuple[tuple[str, str, str], str]] = {
    "no base": (("./none", "tuned", "patch"), "no model folder"), "no tuned": (("base", "./none", "patch"), "no model"),
    "no selection": (("base", "tuned", "none"), "no selection file"),
    "another kind": (("other", "tuned", "patch"), "is of type gpt2 and the other model qwen2"),
    "another tuned": (("base", "other", "patch"), "unknown tensor 'model.embed_tokens.weight'"),
    "no safetensors": (("base", "tuned", "base/config.json"), "not a readable safetensors"),
}


@pytest.mark.parametrize(("names", "said"), REFUSED.values(), ids=REFUSED)
def test_bad_input(names: tuple[str, str, str], said: str, folders: Path, monkeypatch: pytest.MonkeyPatch,
                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folders)
    if names[1] == "other":
        names = ("other", "other", names[2])
    assert command(*names) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


def test_a_selection_of_neurons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, batch = tiny.build("llama")
    neurons = stt.select(base, [batch], keep=0.3)
    base.save_pretrained(tmp_path / "base")
    neurons.save(tmp_path / "neurons")
    moved(base, in_place(base, neurons)).save_pretrained(tmp_path / "tuned")
    assert command(tmp_path / "base", tmp_path / "tuned", tmp_path / "neurons") == 0
    moved(base, drawn(base, form="rows", share=0.9)).save_pretrained(tmp_path / "tuned")
    assert command(tmp_path / "base", tmp_path / "tuned", tmp_path / "neurons") == 1
    assert "that are not selected" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["the encoder alone", "another number of classes"])
def test_a_new_head(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base has no values of it, so it counts as changed: it must be selected whole."""
    tuned, _ = tiny.build("bert")
    base = copy.deepcopy(tuned)
    if how == "the encoder alone":
        base.bert.save_pretrained(tmp_path / "base")
    else:
        base.classifier, base.config.num_labels = nn.Linear(base.config.hidden_size, 5), 5
        base.save_pretrained(tmp_path / "base")
    bias = "bert.encoder.layer.0.attention.self.query.bias"
    units = {bias: torch.tensor([3]), "classifier.weight": torch.arange(3), "classifier.bias": torch.arange(3)}
    moved(tuned, selection_of({bias: units[bias]}, {}, named_tensors(tuned), {})).save_pretrained(tmp_path / "tuned")
    for names, code in (((*units,), 0), ((bias, "classifier.weight"), 1)):
        axes = {"classifier.weight": 0}
        selection_of({name: units[name] for name in names}, axes, named_tensors(tuned), {}).save(tmp_path / "selection")
        assert command(tmp_path / "base", tmp_path / "tuned", tmp_path / "selection") == code
    assert "  3  classifier.bias" in capsys.readouterr().out


def test_a_sliced_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = tiny.build("llama")
    model.save_pretrained(tmp_path / "base")
    stt.apply(model, stt.select(model, [batch], keep=0.5))
    sliced = stt.save(model, tmp_path / "sliced")
    assert command(tmp_path / "base", sliced, sliced / "selection.safetensors") == 2
    assert "is sliced" in capsys.readouterr().err


LOSSES: list[Callable[[Path], object]] = [lambda path: (path / "model.safetensors").unlink(),
                                          lambda path: (path / "model.safetensors").write_bytes(b"x")]


@pytest.mark.parametrize("damage", LOSSES, ids=["gone", "damaged"])
def test_a_damaged_model_is_refused(damage: Callable[[Path], object], folders: Path, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    moved(tiny.build("qwen2-tied")[0], drawn(tiny.build("qwen2-tied")[0], form="flat")).save_pretrained(tmp_path / "t")
    damage(tmp_path / "t")
    assert command(folders / "base", tmp_path / "t", folders / "patch") == 2
    assert capsys.readouterr().err.startswith("error: cannot load the model")
