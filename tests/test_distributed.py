"""Two processes, each with half of the data, measure and train what one process does on all of it."""
from __future__ import annotations

import os
from pathlib import Path

import torch
from tiny_text import build_decoder
from torch import Tensor, multiprocessing

from stt.selecting import Budget, kept, measure


def measured(batches: list[torch.Tensor]):
    return measure(build_decoder(vocabulary=60), batches, None, ["stt", "wanda"], progress=False)


def worker(rank: int, folder: str, batches: list[torch.Tensor]) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = measured(batches[rank::2])
    torch.save({"scores": found.scores, "selection": dict(kept(found, "stt", Budget(0.3)))}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_statistics_add_up_over_ranks(tmp_path: Path):
    batches = list(torch.randint(3, 60, (5, 2, 9), generator=torch.Generator().manual_seed(0)))
    whole = measured(batches)
    multiprocessing.spawn(worker, (str(tmp_path), batches), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, sites in whole.scores.items():
        for site, score in sites.items():
            assert torch.equal(one["scores"][name][site], other["scores"][name][site])
            torch.testing.assert_close(one["scores"][name][site], score, rtol=1e-6, atol=1e-6)
    expected = kept(whole, "stt", Budget(0.3))
    assert all(torch.equal(one["selection"][site], ids) for site, ids in expected.items())


def rows() -> list[dict[str, list[int]]]:
    """Sixteen texts with none to four labelled tokens; the third and the fourth have none."""
    ids = torch.randint(3, 60, (16, 7), generator=torch.Generator().manual_seed(0)).tolist()
    counts = [1, 4, 0, 0, 2, 3, 1, 1, 4, 4, 2, 1, 3, 1, 1, 2]
    return [{"input_ids": row, "labels": [-100] * (7 - count) + row[7 - count:]}
            for row, count in zip(ids, counts, strict=True)]


def trained(folder: Path, batch: int, accumulated: int) -> list[Tensor]:
    """The weights after four steps of eight texts each."""
    from transformers import TrainingArguments

    from stt.trainers.sft import train

    model = build_decoder(vocabulary=60)
    train(model, rows(), 0, TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, optim="sgd",
        num_train_epochs=2, learning_rate=1e-2, max_grad_norm=1.0, lr_scheduler_type="constant", save_strategy="no",
        train_sampling_strategy="sequential", use_cpu=True, remove_unused_columns=False, report_to=[],
        label_names=["labels"], disable_tqdm=True), lambda **_: None)
    return [parameter.detach() for parameter in model.parameters()]


def training_worker(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(trained(Path(folder), 2, 2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_training_is_that_of_one_process(tmp_path: Path):
    """Two processes, two micro-batches of two texts each, of which one has no labelled token: as one batch of eight."""
    before = [parameter.detach() for parameter in build_decoder(vocabulary=60).parameters()]
    whole = trained(tmp_path, 8, 1)
    assert max((one - other).abs().max() for one, other in zip(before, whole, strict=True)) > 1e-3
    multiprocessing.spawn(training_worker, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        for parameter, expected in zip(torch.load(tmp_path / f"{rank}.pt"), whole, strict=True):
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6)
