"""The file of a patch: its bytes, what a selection file shares with it, and what is refused."""
from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import patches
import pytest
import torch
from patches import dense, drawn, made
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stt.errors import InputError
from stt.selection import FORMAT_VERSION, Selection
from stt.selective_optimizers.patch import Patch
from stt.selective_optimizers.weights import named_tensors


@pytest.mark.parametrize(("dtype", "form", "most"), [(None, "flat", 8), (torch.bfloat16, "flat", 6),
                                                     (None, "rows", 4.2), (torch.bfloat16, "columns", 2.2)])
def test_bytes_per_weight(dtype: torch.dtype | None, form: str, most: float, tmp_path: Path) -> None:
    """Of the tensors; the header is about 200 bytes for each of them."""
    base = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(3)))
    selection = drawn(base, form=form)
    tuned = copy.deepcopy(base)
    for name, mask in patches.masks(base, selection).items():
        named_tensors(tuned)[name].data += 1e-3 * mask * torch.randn(100, 100)
    Patch.between(base, tuned, selection).save(tmp_path / "patch", dtype)
    header = int.from_bytes((tmp_path / "patch").read_bytes()[:8], "little")
    weights = sum(int(mask.sum()) for mask in patches.masks(base, selection).values())
    assert header < 2000
    corrected = sum(len(file.get_tensor(name)) for file in [safe_open(tmp_path / "patch", "pt")]
                    for name in file.keys() if name.startswith("values/exact/"))  # noqa: SIM118
    assert corrected < 0.02 * weights
    assert (tmp_path / "patch").stat().st_size - 8 - header - 8 * corrected <= most * weights


def test_rounded_patches_say_so(tmp_path: Path) -> None:
    base, tuned, patch = made()
    patch.save(tmp_path / "exact")
    patch.save(tmp_path / "patch", torch.bfloat16)
    loaded = Patch.load(tmp_path / "patch")
    assert (patch.rounded, loaded.rounded, loaded.exact) == (None, "bfloat16", {})
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "patch").read_bytes()
    before = dense(base)
    loaded.apply(base)
    for name, tensor in named_tensors(base).items():
        step = (dense(tuned)[name] - before[name]).abs()
        assert bool(((tensor.detach() - dense(tuned)[name]).abs() <= step * 2**-8 + 1e-6).all())
    patch.save(tmp_path / "patch", torch.float32)
    assert (tmp_path / "patch").stat().st_size < (tmp_path / "exact").stat().st_size
    assert all(torch.equal(delta, patch.deltas[name]) for name, delta in Patch.load(tmp_path / "patch").deltas.items())
    assert Patch.load(tmp_path / "patch").rounded == "float32"
    with pytest.raises(InputError, match="in torch.float32 or torch.bfloat16, got torch.float16"):
        patch.save(tmp_path / "patch", torch.float16)
    assert Patch.compose([patch, loaded]).rounded == "bfloat16"


def test_a_patch_file_is_a_selection_file(tmp_path: Path) -> None:
    _, _, patch = made()
    patch.save(tmp_path / "patch")
    assert Selection.load(tmp_path / "patch").without_new_values() == patch.selection
    assert [path.name for path in tmp_path.iterdir()] == ["patch"]
    assert repr(Patch.load(tmp_path / "patch")) == repr(patch) == f"Patch({len(patch.deltas)} tensors, " \
        f"{patch.budget_used} weights)"


Parts = dict[str, Tensor]
BROKEN: dict[str, Callable[[Parts, dict[str, object]], object]] = {
    "a delta is gone": lambda parts, meta: parts.pop("values/scale"),
    "a delta too long": lambda parts, meta: parts.update({"values/norm.bias": torch.zeros(3)}),
    "a delta of whole numbers": lambda parts, meta: parts.update({"values/scale": torch.zeros(1, dtype=torch.int32)}),
    "flat ids, a matrix of values": lambda parts, meta: parts.update({"values/scale": torch.zeros(1, 2)}),
    "no starts": lambda parts, meta: meta["patch"].pop("starts"),
    "starts without a tensor": lambda parts, meta: meta["patch"]["starts"].pop("scale"),
    "starts of another tensor": lambda parts, meta: meta["patch"]["starts"].update(other=["00"]),
    "starts that are no lists": lambda parts, meta: meta["patch"].update(starts={"scale": 3}),
    "new that is no list": lambda parts, meta: meta["patch"].update(new="scale"),
    "an axis that is none": lambda parts, meta: meta["along"].update({"middle.weight": 5}),
    "axes that are no table": lambda parts, meta: meta.update(along=[1]),
    "exact values too few": lambda parts, meta: parts.update({"values/exact_at/norm.bias": torch.arange(2),
                                                              "values/exact/norm.bias": torch.zeros(1)}),
    "exact values outside": lambda parts, meta: parts.update({"values/exact_at/norm.bias": torch.tensor([99]),
                                                              "values/exact/norm.bias": torch.zeros(1)}),
    "where of another length": lambda parts, meta: parts.update({"values/where/0/norm.bias": torch.ones(9) > 0}),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_parts_that_do_not_go_together(damage: Callable[[Parts, dict[str, object]], object], tmp_path: Path) -> None:
    path = tmp_path / "patch"
    made()[2].save(path)
    with safe_open(path, "pt") as file:
        parts, meta = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["stt"])  # noqa: SIM118
    damage(parts, meta)
    save_file(parts, path, metadata={"stt": json.dumps(meta)})
    with pytest.raises(InputError, match="parts do not go together"):
        Patch.load(path)


def test_files_that_are_no_patch(tmp_path: Path) -> None:
    path = tmp_path / "patch"
    patch = made()[2]
    with pytest.raises(InputError, match="no selection file"):
        Patch.load(path)
    patch.selection.save(path)
    with pytest.raises(InputError, match="is a selection and not a patch"):
        Patch.load(path)
    patch.save(path)
    whole = path.read_bytes()
    for end in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match="not a readable safetensors file"):
            Patch.load(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"stt": json.dumps({"format_version": FORMAT_VERSION + 1})})
    with pytest.raises(InputError, match="update stt"):
        Patch.load(path)
