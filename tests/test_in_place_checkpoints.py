"""Checkpoints of training in place: a patch in the place of the model, from which training goes on bit for bit."""
from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_text import build_decoder
from torch import Tensor, nn
from training import Cut, arguments, assert_equal, cut_at, run, selection_of
from transformers import Qwen2Config, Qwen2ForCausalLM, ResNetConfig, ResNetForImageClassification, set_seed
from two_processes import in_two

from stt import modes
from stt.errors import InputError
from stt.llm_arguments import LLMArgs, resolved
from stt.selective_optimizers import recipe
from stt.selective_optimizers.optimizer import SelectiveOptimizer
from stt.selective_optimizers.patch import Patch
from stt.selective_optimizers.progress import PATCH
from stt.selective_optimizers.schedules import Rotate
from stt.surgery import head_parameters
from stt.trainers import checkpoints, loop
from util import ranks

STEPS, PER_EPOCH = 10, 5
BUDGET = 403  # no multiple of the steps
CHOSEN = ("train_in_place", "bitfit")  # modes without a budget


def base(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The decoder that all trainings here begin with; with another seed others of its shape."""
    model = build_decoder(vocabulary=60)
    for parameter in model.parameters() if seed else ():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return model.to(dtype)


def start(folder: Path, mode: str, model: nn.Module | None = None, budget: int = BUDGET, head: str = "train",
          **more: object) -> dict[str, Tensor]:
    """What the recipes do in this mode; the model's weights and the leaves'."""
    model = base() if model is None else model
    own = {} if mode in CHOSEN else {"budget": str(budget)}
    args = resolved(LLMArgs(mode=mode, head=head, lr=1e-2, **own))
    row = modes.IN_PLACE[mode]
    growing = recipe.Growing(args) if row.trains == "growing" else None
    if growing:
        selection = None
    else:
        selection = selection_of(model) if row.trains == "in_place" else recipe.choose(model, row.score, args)
    recipe.prepare(model, selection, head)
    return run(folder, model=model, make_optimizer=growing, **{"save_steps": 1, "save_total_limit": None} | more)


def cut_off(folder: Path, after: int) -> Path:
    """The folder as it was when the run ended after this step."""
    for path in checkpoints.in_order(folder)[after:]:
        shutil.rmtree(path)
    return folder


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize(("mode", "budget", "dtype", "stops"), [
    ("id3", BUDGET, torch.float32, (1, 4, 5, 9)), ("id3", 400, torch.float32, (3, 10)),
    ("pafi", BUDGET, torch.float32, (1, 5)), ("pafi", BUDGET, torch.bfloat16, (4, 7)),
    ("random_weights", 400, torch.float32, (6,)), ("bitfit", BUDGET, torch.float32, (2,)),
    ("train_in_place", BUDGET, torch.float32, (2, 9)), ("train_in_place", BUDGET, torch.bfloat16, (3,))])
def test_resumed_is_uninterrupted(mode: str, budget: int, dtype: torch.dtype, stops: tuple[int, ...],
                                  tmp_path: Path) -> None:
    """Bitwise, also the float32 values of what trains of a half-precision model."""
    changes = {"weight_decay": 0.1, "lr_scheduler_type": "linear", "bf16": dtype == torch.bfloat16}
    expected = start(tmp_path / "whole", mode, base(dtype=dtype), budget, **changes)
    assert not torch.equal(expected["lm_head.weight"], base(dtype=dtype).lm_head.weight)
    for stop in stops:
        shutil.copytree(tmp_path / "whole", tmp_path / str(stop))
        cut_off(tmp_path / str(stop), stop)
        found = start(tmp_path / str(stop), mode, base(dtype=dtype), budget, resume=True, **changes)
        assert_equal(found, expected)


@pytest.mark.parametrize("mode", ["id3", "pafi", "train_in_place"])
def test_a_checkpoint_is_a_patch_of_the_base(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which makes the model as it was after that step."""
    cut_at(3, monkeypatch)
    with pytest.raises(Cut):
        start(tmp_path, mode, model := base())
    names = {path.name for path in checkpoints.path_of(tmp_path, 3).iterdir()}
    assert PATCH in names
    assert not names & {"model.safetensors", "config.json", "training_args.bin", "pytorch_model.bin"}
    fresh = base()
    Patch.load(checkpoints.path_of(tmp_path, 3) / PATCH).apply(fresh)
    held = model.state_dict()
    assert_equal(fresh.state_dict(), {name: held[name] for name in fresh.state_dict()})


def test_blocks_in_turn_keep_the_whole_model(tmp_path: Path) -> None:
    """What they started from is nowhere."""
    def of_blocks(model: nn.Module, steps: int) -> SelectiveOptimizer:
        blocks = [list(layer.parameters()) for layer in model.model.layers]
        schedule = Rotate(blocks, 3, "ascending")
        return SelectiveOptimizer(model.named_parameters(), torch.optim.AdamW, schedule, budget="90%", lr=1e-2)

    expected = run(tmp_path, model=base(), make_optimizer=of_blocks, save_steps=1, save_total_limit=None)
    cut_off(tmp_path, 4)
    assert {"model.safetensors"} == {path.name for path in checkpoints.path_of(tmp_path, 4).glob("*.safetensors")}
    assert_equal(run(tmp_path, model=base(), make_optimizer=of_blocks, resume=True), expected)


class Drawn:
    """Images of noise, and a classifier with batch-norm statistics whose head is drawn by a seed."""

    def __init__(self, head: str):
        self.head = head
        generator = torch.Generator().manual_seed(0)
        self.rows = [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": torch.tensor(i % 3)}
                     for i in range(20)]

    @staticmethod
    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def start(self, folder: Path, seed: int, resume: bool = False) -> dict[str, Tensor]:
        set_seed(0)
        model = ResNetForImageClassification(ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)).train()
        set_seed(seed)
        nn.init.normal_(model.classifier[1].weight)
        args = resolved(LLMArgs(mode="pafi", budget="50", head=self.head))
        recipe.prepare(model, recipe.choose(model, "smallest", args), self.head)
        set_seed(3)
        loop.train(model, self.rows, self.collate, arguments(folder, save_strategy="steps", save_steps=1,
                                                             num_train_epochs=2),
                   lambda **_: None, resume=resume, new=head_parameters(model))
        return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("head", ["train", "freeze"])
def test_statistics_and_a_new_head_come_back(head: str, tmp_path: Path) -> None:
    """The head that the resumed run draws is another one."""
    drawn = Drawn(head)
    expected = drawn.start(tmp_path, seed=1)
    statistics = [name for name in expected if name.endswith("running_var")]
    assert statistics
    assert all(float((expected[name] - 1).abs().max()) > 0 for name in statistics)
    cut_off(tmp_path, 4)
    assert_equal(drawn.start(tmp_path, seed=2, resume=True), expected)


# ---------------------------------------------------------------- what it takes


def sizes_of(model: nn.Module, folder: Path, mode: str, head: str, budget: int) -> tuple[int, int]:
    """Bytes of the last checkpoint, and of the model."""
    start(folder, mode, model, budget, head, save_steps=0, num_train_epochs=1)
    checkpoint, _ = checkpoints.newest(folder)
    return (sum(path.stat().st_size for path in checkpoint.iterdir()),
            sum(parameter.numel() * 4 for name, parameter in model.named_parameters() if "_selected" not in name))


@pytest.mark.parametrize(("mode", "per_weight"), [("pafi", 24), ("random_weights", 24), ("id3", 48)])
@pytest.mark.parametrize("head", ["train", "freeze"])
def test_the_folder_is_as_large_as_the_budget(mode: str, per_weight: int, head: str, tmp_path: Path) -> None:
    """8 to 16 bytes of the patch, 8 of AdamW, and for ID3 the positions, places, starts and values of the pool; of
    weights of the head 16 in all, and 4 of their start for ID3."""
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=60, hidden_size=192, intermediate_size=768, num_hidden_layers=4,
                                         num_attention_heads=4, num_key_value_heads=2, pad_token_id=None))
    budget = 20_000
    of_head = 20 * 60 * 192 if head == "train" else 0
    found, whole = sizes_of(model, tmp_path, mode, head, budget)
    assert whole > 8_000_000
    assert 16 * budget < found < per_weight * budget + of_head + 60_000


# ---------------------------------------------------------------- the best epoch


@pytest.mark.parametrize("mode", ["id3", "pafi", "train_in_place"])
@pytest.mark.parametrize("resumes", [False, True])
def test_the_best_epoch_is_what_is_left(mode: str, resumes: bool, tmp_path: Path) -> None:
    """The weights as they were when it was validated: what the second epoch moved or chose is back at its place."""
    changes = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    seen = []

    def trained(**more: object) -> dict[str, Tensor]:
        model = base()

        def validate() -> float:
            seen.append(copy.deepcopy(model.state_dict()))
            return 1 / len(seen)
        return start(tmp_path, mode, model, validate=validate, **changes, **more)

    found = trained()
    if resumes:
        cut_off(tmp_path, 7)
        found = trained(resume=True)
    assert_equal(found, seen[0])
    assert any(not torch.equal(value, seen[1][name]) for name, value in found.items())


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(("mode", "of"), [("random_weights", "does not hold what it held"),
                                          ("id3", "does not hold what it held")])
def test_another_base_is_refused(mode: str, of: str, tmp_path: Path) -> None:
    start(tmp_path, mode)
    cut_off(tmp_path, 4)
    with pytest.raises(InputError, match=f"checkpoint-4 was trained from another model .*{of}.*: start again"):
        start(tmp_path, mode, other := base(seed=1), resume=True)
    expected = base(seed=1).state_dict()
    assert_equal({name: value for name, value in other.state_dict().items() if name in expected}, expected)


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    start(tmp_path, "id3")
    cut_off(tmp_path, 4)
    with pytest.raises(InputError, match="checkpoint-4 was trained from another model"):
        start(tmp_path, "id3", build_decoder(vocabulary=60, layers=1), resume=True)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
def test_a_damaged_patch_is_never_read(damage: Callable[[Path], object], tmp_path: Path) -> None:
    expected = start(tmp_path / "run", "pafi")
    cut_off(tmp_path / "run", 4)
    damage(checkpoints.path_of(tmp_path / "run", 4) / PATCH)
    newest, faults = checkpoints.newest(tmp_path / "run")
    assert newest.name == "checkpoint-3"
    assert PATCH in faults["checkpoint-4"]
    assert_equal(start(tmp_path / "run", "pafi", resume=True), expected)


# ---------------------------------------------------------------- two processes


def in_a_process(rank: int, mode: str, folder: str) -> list[dict[str, Tensor]]:
    """All steps, then from the sixth on."""
    whole = start(Path(folder), mode, per_device_train_batch_size=2)
    ranks.on_first(lambda: cut_off(Path(folder), 6))
    return [whole, start(Path(folder), mode, per_device_train_batch_size=2, resume=True)]


@pytest.mark.parametrize("mode", ["id3", "pafi"])
def test_two_processes_go_on_as_they_were(mode: str, tmp_path: Path) -> None:
    one, two = in_two(in_a_process, tmp_path, mode, str(tmp_path / "run"))
    for found in (one[1], two[0], two[1]):
        assert_equal(found, one[0])
    assert not torch.equal(one[0]["lm_head.weight"], base().lm_head.weight)
