"""--fsdp: what Trainer and accelerate make of it in two processes, and where it is refused.

Accelerate shards on GPUs alone and is silent elsewhere; the test lets it take gloo's processes for such.
"""
from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import accelerator
from accelerate.state import DistributedType, PartialState
from safetensors.torch import load_file
from small_runs import run
from test_distributed import rows
from test_fsdp import check, sliced
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from two_processes import in_two

from stt.errors import InputError
from stt.llm_arguments import LLMArgs
from stt.recipe import check_can_shard
from stt.trainers import loop, sft, shard
from stt.trainers.memory import recompute
from util import ranks


def arguments(folder: str, batch: int, **more: object) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder, per_device_train_batch_size=batch, num_train_epochs=2, learning_rate=1e-2, logging_steps=1,
        lr_scheduler_type="constant", save_strategy="epoch", train_sampling_strategy="sequential", use_cpu=True,
        remove_unused_columns=False, report_to=[], label_names=["labels"], disable_tqdm=True, **more)


def trained_by_trainer(told: TrainingArguments, recomputes: bool, resume: bool = False) -> dict[str, object]:
    """The losses and the state of a sliced model after four steps of eight texts each."""
    model, losses = sliced((7, 3)), []
    if recomputes:
        recompute(model)
    sft.train(model, rows(), 0, told, lambda **row: losses.append(row["loss"]), resume=resume)
    assert not any(isinstance(value, DTensor) for value in model.state_dict().values())
    return {"losses": losses, "state": {name: value.clone() for name, value in model.state_dict().items()}}


def trained_sharded(rank: int, folder: str, recomputes: bool) -> list[dict[str, object]]:
    """All four steps, then the last two once more from the checkpoint after the second; and how often it was sharded.
    """
    sharded = []
    own, told = accelerator.fsdp2_prepare_model, arguments(folder, 4, fsdp=True, fsdp_config=dict(shard.CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerator, "fsdp2_prepare_model", lambda *args: sharded.append(1) or own(*args))
        assert told.device.type == "cpu"  # accelerate's state is made now
        patch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_GPU)
        first = trained_by_trainer(told, recomputes)
        ranks.on_first(lambda: shutil.rmtree(Path(folder) / "checkpoint-4"))
        again = trained_by_trainer(told, recomputes, resume=True)
    return [first, again, len(sharded)]


@pytest.mark.parametrize("recomputes", [False, True])
def test_training_sharded_by_trainer_is_that_of_one_process(recomputes: bool, tmp_path: Path) -> None:
    """Also with --activation_checkpointing."""
    whole = trained_by_trainer(arguments(str(tmp_path / "one"), 8), False)
    for first, again, sharded in in_two(trained_sharded, tmp_path, str(tmp_path / "two"), recomputes):
        assert sharded == 2
        assert first["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        assert again["losses"] == first["losses"][2:]
        check(first["state"], whole["state"])
        assert all(torch.equal(value, first["state"][name]) for name, value in again["state"].items())
    # whole, for any number of processes
    check(load_file(tmp_path / "two" / "checkpoint-4" / "model.safetensors"), whole["state"])


def test_accelerate_would_not_shard_here_so_the_flag_is_refused(small: list[str], tmp_path: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    assert run(small, tmp_path, "--fsdp") == 2
    assert "give --no_eval_epochs" in capsys.readouterr().err
    assert run(small, tmp_path, "--fsdp", "--no_eval_epochs") == 2
    assert "error: fsdp shards a model over GPUs, and there is none here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="several processes, and this is one"):
        check_can_shard(replace(LLMArgs(eval_epochs=False), fsdp=True), torch.device("cuda"))


def test_what_trainer_is_told(tmp_path: Path) -> None:
    args = LLMArgs(fsdp=True, eval_epochs=False, lr=1e-3, train_batch=4, num_epoch=1, schedule=False)
    told = loop.training_arguments(args, tmp_path, torch.device("cpu"), None)
    assert told.fsdp_plugin_args["fsdp_version"] == 2
    assert told.fsdp_plugin_args["state_dict_type"] == "FULL_STATE_DICT"
    plain = loop.training_arguments(replace(args, fsdp=False), tmp_path, torch.device("cpu"), None)
    assert plain.fsdp_plugin_args is None
