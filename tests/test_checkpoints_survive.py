"""Checkpoints: sealed, checked before they are used, kept until there is a newer one; training goes on exactly."""
from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training import Cut, assert_equal, cut_at, examples, prepared, rows, run

from stt.errors import InputError, TrainingFailed
from stt.trainers import checkpoints
from stt.trainers.loop import PROGRESS, checkpoint_of

PER_EPOCH = 5  # steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run of two epochs that saved after every step and kept all, and its final weights."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(folder, save_steps=1, save_total_limit=None)


@pytest.fixture
def copy(whole: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """Its first four checkpoints and its record."""
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    for path in checkpoints.in_order(folder)[4:]:
        shutil.rmtree(path)
    return folder


# ---------------------------------------------------------------- sealed


def test_every_file_is_in_the_manifest(whole: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = whole
    assert [checkpoints.step_of(path) for path in checkpoints.in_order(folder)] == list(range(1, 2 * PER_EPOCH + 1))
    for checkpoint in checkpoints.in_order(folder):
        files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "manifest.json"}
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        assert manifest == {"format_version": 1, "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}}
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
                "selection.safetensors", PROGRESS} <= files.keys()
        assert "training_args.bin" not in files
    assert not (folder / ".saving").exists()


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first bit": lambda path: flip(path, 0), "middle bit": lambda path: flip(path, 0.5),
    "last bit": lambda path: flip(path, 1), "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""), "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_and_the_previous_checkpoint_taken(damage: Callable[[Path], object],
                                                                   copy: Path) -> None:
    last, previous = copy / "checkpoint-4", copy / "checkpoint-3"
    names = sorted(path.name for path in last.iterdir())
    assert len(names) >= 10
    for name in names:
        before = (last / name).read_bytes()
        damage(last / name)
        path, faults = checkpoints.newest(copy)
        assert path == previous
        assert faults.keys() == {"checkpoint-4"}
        assert name in faults["checkpoint-4"] or name == "manifest.json"
        (last / name).write_bytes(before)
    assert checkpoints.newest(copy) == (last, {})


def test_every_byte_of_the_manifest(copy: Path) -> None:
    path = copy / "checkpoint-4" / "manifest.json"
    before = path.read_bytes()
    for i in range(0, len(before), 3):
        path.write_bytes(before[:i] + bytes([before[i] ^ 4]) + before[i + 1:])
        assert checkpoints.fault(copy / "checkpoint-4") is not None, before[i - 5:i + 5]


def test_a_file_that_was_not_saved(copy: Path) -> None:
    (copy / "checkpoint-4" / ".DS_Store").write_bytes(b"of somebody who looked")
    assert checkpoints.fault(copy / "checkpoint-4") is None
    (copy / "checkpoint-4" / "pytorch_model.bin").write_bytes(b"")
    assert checkpoints.fault(copy / "checkpoint-4") == "pytorch_model.bin was not saved with it"


def test_nothing_whole_is_an_error(copy: Path, tmp_path: Path) -> None:
    for path in checkpoints.in_order(copy):
        (path / "optimizer.pt").unlink()
    with pytest.raises(InputError, match="every checkpoint .* is damaged .checkpoint-4: optimizer.pt is missing; "):
        checkpoints.newest(copy)
    with pytest.raises(InputError, match="nothing to resume: .* holds no checkpoint"):
        checkpoints.newest(tmp_path / "missing")


def test_a_selection_of_other_neurons_is_refused(copy: Path) -> None:
    assert checkpoint_of(prepared(), copy) == copy / "checkpoint-4"
    for model in (prepared(seed=1), prepared("baseline")):
        with pytest.raises(InputError, match="checkpoint-4 was trained with another selection"):
            checkpoint_of(model, copy)


def test_two_are_kept_and_damaged_ones_replaced(whole: tuple[Path, dict[str, Tensor]], copy: Path) -> None:
    """checkpoint-4 is damaged: training goes on from 3, writes 4 anew, and ends as if nothing had been."""
    (copy / "checkpoint-4" / "scheduler.pt").unlink()
    (copy / "checkpoint-99").mkdir()
    (copy / ".saving").mkdir()
    (copy / ".saving" / "left").write_text("by a process that was killed")
    assert_equal(run(copy, resume=True, save_steps=1), whole[1])
    assert rows(copy) == rows(whole[0])
    assert [path.name for path in checkpoints.in_order(copy)] == ["checkpoint-9", "checkpoint-10"]
    assert not (copy / ".saving").exists()


def test_a_failed_save_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoints.seal

    def full(staged: Path, target: Path) -> None:
        if target.name == "checkpoint-3":
            raise OSError(28, "No space left on device")
        real(staged, target)

    monkeypatch.setattr(checkpoints, "seal", full)
    with pytest.raises(TrainingFailed, match="cannot write .*checkpoint-3: No space left on device; .*checkpoint-2 is"):
        run(tmp_path / "run", save_steps=1)
    assert checkpoints.newest(tmp_path / "run") == (tmp_path / "run" / "checkpoint-2", {})
    assert not (tmp_path / "run" / ".saving").exists()


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize(("mode", "stop", "changes"), [
    ("stt", 3, {"gradient_accumulation_steps": 2, "save_steps": 2, "per_device_train_batch_size": 2}),
    ("stt_lora", PER_EPOCH, {"optim": "adafactor", "lr_scheduler_type": "linear"}),
    ("lora", 7, {"train_sampling_strategy": "group_by_length", "save_steps": 1, "bf16": True}),
], ids=["stt", "stt_lora", "lora"])
def test_cut_off_and_resumed_is_uninterrupted(mode: str, stop: int, changes: dict[str, object], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise, with dropout, rows of the record over several steps, and validation."""
    changes = {"logging_steps": 4, "eval_strategy": "epoch"} | changes

    def start(name: str, **more: object) -> dict[str, Tensor]:
        return run(tmp_path / name, model=prepared(mode, dropout=0.1), validate=lambda: 0.5, **changes, **more)

    expected = start("whole")
    with monkeypatch.context() as patch:
        cut_at(stop, patch)
        with pytest.raises(Cut):
            start("cut")
    assert_equal(start("cut", resume=True), expected)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "whole")] == [4, PER_EPOCH, 8, 2 * PER_EPOCH]


MODES, OPTIMIZERS = ("stt", "stt_lora", "baseline", "lora"), ("adamw_torch", "adafactor", "sgd")
STOPS = (2, PER_EPOCH, 7, 2 * PER_EPOCH)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", MODES)
def test_exact_resumption(mode: str, optimizer: str, accumulated: int, dropout: float, tmp_path: Path) -> None:
    """4 modes x 3 optimizers x 2 accumulations x 2 dropouts x 4 stops (after a step, at the end of an epoch, in the
    second epoch, at the very end) = 192 resumptions, each from a checkpoint with all later ones gone."""
    changes = {"optim": optimizer, "gradient_accumulation_steps": accumulated, "logging_steps": 4,
               "per_device_train_batch_size": 4 // accumulated, "save_steps": 1, "eval_strategy": "epoch"}

    def start(folder: Path, **more: object) -> dict[str, Tensor]:
        return run(folder, model=prepared(mode, dropout), validate=lambda: 0.5, **changes, **more)

    expected = start(tmp_path / "whole", save_total_limit=None)
    for stop in STOPS:
        shutil.copytree(tmp_path / "whole", tmp_path / str(stop))
        for path in checkpoints.in_order(tmp_path / str(stop))[stop:]:
            shutil.rmtree(path)
        assert_equal(start(tmp_path / str(stop), resume=True), expected)
        assert rows(tmp_path / str(stop)) == rows(tmp_path / "whole")


def test_the_order_of_lengths_follows_from_the_epoch(tmp_path: Path) -> None:
    from stt.trainers.loop import ByLength

    orders = []
    for epoch in (0, 1, 1, 0):
        sampler = ByLength(4, examples(40), seed=3)
        sampler.set_epoch(epoch)
        torch.rand(5)  # of others
        orders.append(list(sampler))
    assert orders[0] == orders[3] != orders[1] == orders[2]
    assert sorted(orders[0]) == list(range(40))


@pytest.mark.parametrize("changes", [{}, {"max_steps": 7}], ids=["end of an epoch", "within an epoch"])
def test_a_finished_training_takes_no_more_steps(changes: dict[str, object], tmp_path: Path) -> None:
    expected, calls = run(tmp_path / "run", **changes), []
    before = rows(tmp_path / "run")
    found = run(tmp_path / "run", resume=True, log=lambda **numbers: calls.append(numbers), **changes)
    assert_equal(found, expected)
    assert calls == []
    assert rows(tmp_path / "run") == before
    assert len(before) == changes.get("max_steps", 2 * PER_EPOCH)


# ---------------------------------------------------------------- the best epoch


@pytest.mark.parametrize(("answers", "best", "stop"), [((0.9, 0.1), PER_EPOCH, PER_EPOCH), ((0.9, 0.1), PER_EPOCH, 9),
                                                       ((0.1, 0.9), 2 * PER_EPOCH, 2 * PER_EPOCH)])
def test_the_best_epoch_is_found_after_a_resumption(answers: tuple[float, float], best: int, stop: int, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a run folder that was moved. The validation of the epoch that a checkpoint ends is repeated."""
    changes = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "accuracy",
               "save_steps": 1}
    asked = itertools.count()
    expected = run(tmp_path / "whole", validate=lambda: answers[next(asked)], save_total_limit=None, **changes)
    first = len([path for path in checkpoints.in_order(tmp_path / "whole") if checkpoints.step_of(path) < stop])
    folder = tmp_path / "elsewhere"
    shutil.move(tmp_path / "whole", folder)
    for path in checkpoints.in_order(folder)[first + 1:]:
        shutil.rmtree(path)
    left = iter(answers[(stop - 1) // PER_EPOCH:])
    found = run(folder, resume=True, validate=lambda: next(left), **changes)
    assert list(left) == []
    assert_equal(found, expected)
    assert checkpoints.path_of(folder, best).is_dir()
    from safetensors.torch import load_file

    saved = load_file(checkpoints.path_of(folder, best) / "model.safetensors")
    assert all(torch.equal(saved[name], found[name]) for name in saved)


def test_a_damaged_best_epoch_is_not_shipped(tmp_path: Path) -> None:
    changes = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    answers = iter([0.9, 0.1])

    def validate() -> float:
        flip(tmp_path / "run" / f"checkpoint-{PER_EPOCH}" / "model.safetensors", 0.9)
        return next(answers)

    with pytest.raises(TrainingFailed, match="checkpoint-5 is damaged .model.safetensors is not what was saved"):
        run(tmp_path / "run", validate=lambda: validate() if not (tmp_path / "run" / "checkpoint-10").exists()
            else next(answers), **changes)


