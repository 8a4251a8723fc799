"""Two processes, each with half of the data, measure and train what one process does on all of it."""
from __future__ import annotations

from pathlib import Path

import torch
from tiny_text import build_decoder
from torch import Tensor
from two_processes import in_two

from stt.errors import InputError
from stt.selecting import Budget, Measured, kept, measure


def measured(batches: list[torch.Tensor]) -> Measured:
    return measure(build_decoder(vocabulary=60), batches, None, ["stt", "wanda"], progress=False)


def told(found: Measured) -> dict[str, object]:
    """All that was measured, and what it was measured on."""
    shown = found.calibration
    return {"scores": found.scores, "halves": found.halves, "selection": dict(kept(found, "stt", Budget(0.3))),
            "shown": (shown.tokens, shown.examples, shown.digest)}


def of_half_the_batches(rank: int, batches: list[torch.Tensor]) -> dict[str, object]:
    return told(measured(batches[rank::2]))


def test_statistics_add_up_over_ranks(tmp_path: Path):
    batches = list(torch.randint(3, 60, (5, 2, 9), generator=torch.Generator().manual_seed(0)))
    whole = told(measured(batches))
    for found in in_two(of_half_the_batches, tmp_path, batches):
        torch.testing.assert_close(found["scores"], whole["scores"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["halves"], whole["halves"], rtol=1e-6, atol=1e-6)
        assert found["shown"] == whole["shown"]
        assert all(torch.equal(found["selection"][site], ids) for site, ids in whole["selection"].items())


def of_all_or_nothing(rank: int, batches: list[torch.Tensor]) -> str:
    """The first process has all the data, the second none."""
    try:
        measured(batches if rank == 0 else [])
    except InputError as error:
        return str(error)
    return "nothing was raised"


def test_a_rank_without_data_is_an_error_on_every_rank(tmp_path: Path):
    for said in in_two(of_all_or_nothing, tmp_path, [torch.randint(3, 60, (2, 9))]):
        assert said == "the calibration data is empty on one of the ranks: give at least one batch"


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


def trained_on_half(rank: int, folder: str) -> list[Tensor]:
    return trained(Path(folder), 2, 2)


def test_training_is_that_of_one_process(tmp_path: Path):
    """Two processes, two micro-batches of two texts each, of which one has no labelled token: as one batch of eight."""
    before = [parameter.detach() for parameter in build_decoder(vocabulary=60).parameters()]
    whole = trained(tmp_path, 8, 1)
    assert max((one - other).abs().max() for one, other in zip(before, whole, strict=True)) > 1e-3
    first, second = in_two(trained_on_half, tmp_path, str(tmp_path))
    for parameter, other, expected in zip(first, second, whole, strict=True):
        assert torch.equal(parameter, other)
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6)
