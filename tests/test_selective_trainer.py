"""The wrapper back end in a Trainer, in two processes, and in the published workflow."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from masked import batches, build, loss_of, train, weights
from test_selective_optimizer import chosen, selective
from tiny_text import build_decoder
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from transformers import Trainer, TrainingArguments
from two_processes import in_two

from stt.errors import InputError
from stt.selective_optimizers.optimizer import SelectiveOptimizer
from stt.selective_optimizers.trainer import SelectiveTrainerMixin
from stt.selective_optimizers.wrap import get_selective_optimizer

STEPS = 10
BUDGET = 1003  # no multiple of the steps


def rows() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 60, (STEPS * 4, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def decoder() -> nn.Module:
    torch.manual_seed(0)
    return build_decoder(vocabulary=60)


def trainer(folder: Path, method: str, model: nn.Module | None = None, **arguments: object) -> Trainer:
    """A Trainer with our optimizer and a falling rate."""
    model = decoder() if model is None else model
    own = {"max_steps": STEPS} if method == "id3" else {}
    optimizer = get_selective_optimizer(AdamW, method)(model.parameters(), lr=1e-2, budget=BUDGET, weight_decay=0.1,
                                                       verify=True, **own)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    return Trainer(model, settings(folder, **arguments), train_dataset=rows(), optimizers=(optimizer, schedule))


def settings(folder: Path, **arguments: object) -> TrainingArguments:
    return TrainingArguments(str(folder), max_steps=STEPS, per_device_train_batch_size=4, report_to="none",
                             use_cpu=True, disable_tqdm=True, **{"save_strategy": "no"} | arguments)


def optimizer_of(run: Trainer) -> SelectiveOptimizer:
    return run.optimizer.optimizer  # accelerate's wrapper is around it


@pytest.mark.parametrize("method", ["id3", "pafi"])
def test_trainer_stops_and_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", method, save_strategy="steps", save_steps=3)
    whole.train()
    assert optimizer_of(whole).get_budget_used() == BUDGET
    assert int((weights(whole.model) != weights(decoder())).sum()) == BUDGET
    optimizer_of(whole).post_train_work()
    again = trainer(tmp_path / "again", method)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert torch.equal(weights(again.model), weights(whole.model))
    optimizer_of(again).post_train_work()


def test_trainer_builds_it_with_a_weight_decay(tmp_path: Path) -> None:
    """D3: the Trainer puts its weight decay into the groups; it acts on the chosen weights alone."""
    model = decoder()
    kind = get_selective_optimizer(AdamW, "id3")
    run = Trainer(model, settings(tmp_path, weight_decay=0.1), train_dataset=rows(),
                  optimizer_cls_and_kwargs=(kind, {"lr": 1e-2, "budget": BUDGET, "max_steps": STEPS}))
    run.train()
    assert int((weights(model) != weights(decoder())).sum()) == BUDGET


def test_trainer_says_of_how_many_passes_a_step_is(tmp_path: Path) -> None:
    """Of three, and of one where the epoch ends: ten batches. Bit for bit as with all gradients at once."""
    class SelectiveTrainer(SelectiveTrainerMixin, Trainer):
        pass

    found = []
    for gather in ("step", "backward"):
        model, most = decoder(), []
        run = SelectiveTrainer(
            model, settings(tmp_path, gradient_accumulation_steps=3, max_grad_norm=0.1), train_dataset=rows(),
            make_optimizer=lambda model, steps, gather=gather: get_selective_optimizer(AdamW, "id3")(
                model.parameters(), lr=1e-2, budget=BUDGET, max_steps=steps, gather=gather))
        before = run.training_step
        run.training_step = lambda *args, before=before, most=most, model=model: (
            before(*args), most.append(sum(p.grad is not None for p in model.parameters())))[0]
        run.train()
        found.append(weights(model))
        assert most[2::10] == [0 if gather == "backward" else len(list(model.parameters()))] * len(most[2::10])
    assert torch.equal(*found)
    assert int((found[0] != weights(decoder())).sum()) == BUDGET


def in_a_process(rank: int) -> dict[str, object]:
    model = build()
    parallel = DistributedDataParallel(model)
    with pytest.raises(InputError, match='several processes.*take gather="step"'):
        selective(model, lr=1e-2, gather="backward")
    optimizer = selective(model, lr=1e-2, max_grad_norm=0.1)
    for inputs, labels in batches(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(inputs[rank::2]), labels[rank::2]).backward()
        optimizer.step()
    return {"weights": weights(model), "chosen": chosen(model, optimizer)}


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """The gradients are those of all processes when a step begins; they cannot be freed before."""
    model = build()
    optimizer = selective(model, lr=1e-2, max_grad_norm=0.1)
    train(model, optimizer, batches(12))
    first, second = in_two(in_a_process, tmp_path)
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["chosen"], second["chosen"])
    assert torch.equal(first["chosen"], chosen(model, optimizer))
    torch.testing.assert_close(first["weights"], weights(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["id3", "pafi", "bitfit"])
def test_the_published_workflow(method: str, tmp_path: Path) -> None:
    """Training and inference as the public package documents them, with `stt.` before its name."""
    from torch.optim import AdamW

    from stt.selective_optimizers.load_store import (
        load_summary_from_disk,
        load_weights_from_summary,
        write_summary_to_disk,
    )
    from stt.selective_optimizers.wrap import get_selective_optimizer

    model, train_loader, criterion = build(), batches(20), nn.CrossEntropyLoss()
    list_of_params_1, list_of_params_2 = list(model[-1].parameters()), list(model[:-1].parameters())

    optimizer_class = get_selective_optimizer(AdamW, method)
    params = [
        {"params": list_of_params_1, "choose_all": True},
        {"params": list_of_params_2},
    ]
    own = {"exp": 0, "eps": 1e-3, "max_steps": 20} if method == "id3" else {}
    optimizer = optimizer_class(params=params, lr=0.0001, budget=100, **own)
    for data, targets in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(data), targets)
        loss.backward()
        optimizer.step()
    optimizer.post_train_work()
    assert optimizer.get_budget_used() == 100
    write_summary_to_disk(str(tmp_path / "summary.pt"), optimizer.get_summary(model))

    fresh = build()
    load_weights_from_summary(fresh, load_summary_from_disk(str(tmp_path / "summary.pt")))
    assert torch.equal(weights(fresh), weights(model))
    assert not torch.equal(weights(fresh), weights(build()))
    assert loss_of(fresh, batches(1)[0]) < loss_of(build(), batches(1)[0])
