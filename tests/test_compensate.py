"""Compensation against plain least squares on the rows themselves, and the models that come out of it."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import stt
from stt.compensate import RIDGES, Moments, fold
from stt.errors import InputError
from stt.export import export_dense, export_hf
from stt.scores.base import Seen
from stt.selection import Selection
from stt.sites import find_sites

ARCHITECTURES = ["llama", "llama-bias", "phi3", "gpt2", "opt", "bloom", "bert", "t5", "vit", "modernbert"]
KEPT, WIDTH, D = 5, 12, 7


def rows_of(seed: int, n: int) -> Tensor:
    """Correlated rows with a mean, (n, F): the removed neurons are partly a function of the kept ones."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) @ mixing + torch.arange(WIDTH).double() / 3


def moments(rows: Tensor, with_products: bool = True) -> dict[str, Tensor]:
    statistic = Moments(with_products=with_products)
    statistic.update("a", Seen(hidden=rows[:3]))
    statistic.update("a", Seen(hidden=torch.cat([rows[3:], rows[:2] * 9]), is_token=torch.tensor([1.0] * (len(rows) - 3)
                                                                                                 + [0.0, 0.0])))
    return statistic.sums["a"]


def by_augmented_rows(rows: Tensor, weight: Tensor, kept: list[int], ridge: float) -> tuple[Tensor, Tensor]:
    """D and the shift of the bias by numpy-style least squares on centred rows, with one more row per kept neuron for
    the ridge."""
    removed = [i for i in range(WIDTH) if i not in kept]
    mean = rows.mean(0)
    x, target = (rows - mean)[:, kept], (rows - mean)[:, removed] @ weight[:, removed].T
    penalty = (ridge * x.square().mean(0).mean() * len(rows)) ** 0.5 * torch.eye(len(kept), dtype=torch.float64)
    stacked = torch.cat([x, penalty]), torch.cat([target, torch.zeros(len(kept), len(weight), dtype=torch.float64)])
    update = torch.linalg.lstsq(*stacked).solution.T
    return update, weight[:, removed] @ mean[removed] - update @ mean[kept]


def problem() -> tuple[Tensor, Tensor, list[int], Tensor, Tensor]:
    torch.manual_seed(2)
    return (torch.randn(D, WIDTH, dtype=torch.float64), torch.randn(D, dtype=torch.float64),
            sorted(torch.randperm(WIDTH)[:KEPT].tolist()), rows_of(3, 40), rows_of(4, 25))


def test_least_squares_equals_augmented_rows() -> None:
    weight, bias, kept, a, b = problem()
    folded = fold(weight, bias, torch.tensor(kept), (moments(a), moments(b)), "lstsq")
    assert folded.ridge in RIDGES
    update, shift = by_augmented_rows(torch.cat([a, b]), weight, kept, folded.ridge)
    torch.testing.assert_close(folded.weight, weight[:, kept] + update, rtol=0, atol=1e-8)
    torch.testing.assert_close(folded.bias, bias + shift, rtol=0, atol=1e-8)
    assert (folded.weight - weight[:, kept]).abs().max() > 0.1


@pytest.mark.parametrize("has_bias", [True, False])
def test_least_squares_through_the_origin(has_bias: bool) -> None:
    """No row is centred, and the bias stays what it is."""
    weight, bias, kept, a, b = problem()
    folded = fold(weight, bias if has_bias else None, torch.tensor(kept), (moments(a), moments(b)), "lstsq_weights")
    assert folded.bias is None
    assert folded.ridge in RIDGES
    rows, removed = torch.cat([a, b]), [i for i in range(WIDTH) if i not in kept]
    x, target = rows[:, kept], rows[:, removed] @ weight[:, removed].T
    penalty = (folded.ridge * x.square().mean(0).mean() * len(rows)) ** 0.5 * torch.eye(len(kept), dtype=torch.float64)
    stacked = torch.cat([x, penalty]), torch.cat([target, torch.zeros(len(kept), D, dtype=torch.float64)])
    update = torch.linalg.lstsq(*stacked).solution.T
    torch.testing.assert_close(folded.weight, weight[:, kept] + update, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "llama-bias", "opt"])
def test_weights_alone_become_a_plain_folder(name: str, tmp_path: Path) -> None:
    """What `lstsq` cannot do for a class without biases."""
    model, batch = tiny.build(name, torch.float32)
    batches = batches_for(model, batch)
    selection = stt.select(model, batches, score="contribution", keep=0.5, compensate="lstsq_weights")
    plainly = stt.select(model, batches, score="contribution", keep=0.5)
    of_both = []
    for chosen in (selection, plainly):
        sliced, _ = tiny.build(name, torch.float32)
        of_both.append(stt.apply(sliced, chosen))
    biases = {key for key in of_both[0].state_dict() if key.endswith("bias")}
    assert biases == {key for key in of_both[1].state_dict() if key.endswith("bias")}
    stt.save(of_both[0], tmp_path / "sliced")
    export_hf(tmp_path / "sliced", tmp_path / "plain")
    with torch.no_grad():
        wanted, without = (one.eval()(**batch).logits for one in of_both)
        got = type(model).from_pretrained(tmp_path / "plain").eval()(**batch).logits
        loaded = stt.load(tmp_path / "sliced")(**batch).logits
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(loaded, wanted)
    assert (wanted - without).abs().max() > 1e-3


def test_the_ridge_has_the_smallest_error_on_held_out_rows() -> None:
    """Of noise, the mean alone is best; of a function of the kept neurons, the smallest ridge that solves it."""
    weight, bias, kept, a, b = problem()
    errors = {}
    for ridge in RIDGES:
        errors[ridge] = 0.0
        for fit, held_out in ((a, b), (b, a)):
            update, shift = by_augmented_rows(fit, weight, kept, ridge)
            removed = [i for i in range(WIDTH) if i not in kept]
            residual = held_out[:, removed] @ weight[:, removed].T - held_out[:, kept] @ update.T - shift
            errors[ridge] += float(residual.square().sum(1).mean())
    folded = fold(weight, bias, torch.tensor(kept), (moments(a), moments(b)), "lstsq")
    assert folded.ridge == min(errors, key=errors.__getitem__)

    noise = [torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
             for seed in (0, 1)]
    of_noise = fold(weight, bias, torch.tensor(kept), tuple(moments(rows) for rows in noise), "lstsq")
    by_mean = fold(weight, bias, torch.tensor(kept), tuple(moments(rows) for rows in noise), "mean")
    assert of_noise.ridge is None
    assert torch.equal(of_noise.weight, by_mean.weight)
    torch.testing.assert_close(of_noise.bias, by_mean.bias)


def test_the_mean_needs_no_products() -> None:
    weight, bias, kept, a, b = problem()
    sums = tuple(moments(rows, with_products=False) for rows in (a, b))
    assert "products" not in sums[0]
    folded = fold(weight, None, torch.tensor(kept), sums, "mean")
    removed = [i for i in range(WIDTH) if i not in kept]
    assert torch.equal(folded.weight, weight[:, kept])
    torch.testing.assert_close(folded.bias, weight[:, removed] @ torch.cat([a, b]).mean(0)[removed])


# ---------------------------------------------------------------- in a model


def hidden_rows(model: nn.Module, site: object, batches: list[dict[str, Tensor]]) -> Tensor:
    rows: list[Tensor] = []
    hook = model.get_submodule(site.down_module).register_forward_pre_hook(lambda m, args: rows.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat([row.flatten(0, -2) for row in rows])


def batches_for(model: nn.Module, batch: dict[str, Tensor], n: int = 6) -> list[dict[str, Tensor]]:
    """`n` different batches without padding."""
    torch.manual_seed(3)
    made = []
    for _ in range(n):
        one = {name: torch.randn_like(value) if value.is_floating_point() else torch.randint_like(value, 3, 90)
               for name, value in batch.items() if name not in ("attention_mask", "labels")}
        made.append(one | {name: value for name, value in batch.items() if name == "labels"})
    return made


@pytest.mark.parametrize("how", ["mean", "lstsq"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_compensated_model_is_the_dense_one_with_a_regression_in_it(name: str, how: str) -> None:
    """The first site reads what the dense model reads: there the output must be the regression on its real rows."""
    model, batch = tiny.build(name, torch.float64)
    batches = batches_for(model, batch)
    selection = stt.select(model, batches, score="contribution", keep=0.5, compensate=how)
    name, site = next(iter(find_sites(model).items()))
    kept = selection[name].tolist()
    down = model.get_submodule(site.down_module)
    weight = (down.weight.T if isinstance(down, Conv1D) else down.weight).detach()
    bias = torch.zeros(len(weight), dtype=torch.float64) if down.bias is None else down.bias.detach()
    rows = hidden_rows(model, site, batches)
    if how == "lstsq" and selection.meta["ridge"][name] is not None:
        update, shift = ridge_of_rows(rows, weight, kept, selection.meta["ridge"][name])
    else:
        removed = [i for i in range(rows.shape[1]) if i not in kept]
        update, shift = 0, weight[:, removed] @ rows.mean(0)[removed]
    sliced = stt.apply(model, selection).get_submodule(site.down_module)
    torch.testing.assert_close(sliced.weight, weight[:, kept] + update, rtol=0, atol=1e-8)
    torch.testing.assert_close(sliced.bias, bias + shift, rtol=0, atol=1e-8)


def ridge_of_rows(rows: Tensor, weight: Tensor, kept: list[int], ridge: float) -> tuple[Tensor, Tensor]:
    """As by_augmented_rows, through the normal equations, one output at a time."""
    removed = [i for i in range(rows.shape[1]) if i not in kept]
    centred = rows - rows.mean(0)
    x, target = centred[:, kept], centred[:, removed] @ weight[:, removed].T
    gram = x.T @ x / len(rows)
    regular = gram + ridge * gram.trace() / len(kept) * torch.eye(len(kept), dtype=torch.float64)
    update = torch.stack([torch.linalg.solve(regular, x.T @ column / len(rows)) for column in target.T])
    return update, weight[:, removed] @ rows.mean(0)[removed] - update @ rows.mean(0)[kept]


def test_each_step_of_compensation_brings_the_block_nearer() -> None:
    """On the tokens it was measured on, mean cannot be worse than none, nor least squares than mean."""
    errors = {}
    for how in ("none", "mean", "lstsq"):
        model, batch = tiny.build("llama", torch.float64)
        batches = batches_for(model, batch, 40)
        selection = stt.select(model, batches, score="contribution", keep=0.5, compensate=how)
        site = next(iter(find_sites(model).values()))
        rows = hidden_rows(model, site, batches)
        expected = model.get_submodule(site.down_module)(rows)
        sliced = stt.apply(model, selection).get_submodule(site.down_module)
        errors[how] = float((sliced(rows[:, selection[site.name]]) - expected).detach().square().mean())
    assert errors["lstsq"] < 0.95 * errors["mean"] < 0.95 * errors["none"]


def test_padding_and_batching_do_not_count() -> None:
    model, batch = tiny.build("llama", torch.float64)
    ids = torch.randint(3, 90, (6, 5))
    padded = torch.cat([ids, torch.zeros(6, 3, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(6, 5), torch.zeros(6, 3)], 1).long()
    options = {"score": "fluctuation", "keep": 0.5, "compensate": "lstsq"}
    expected = stt.select(model, [{"input_ids": ids}], **options)
    actual = stt.select(model, [{"input_ids": padded[i:i + 2], "attention_mask": mask[i:i + 2]} for i in (4, 0, 2)],
                        **options)
    assert dict(actual.meta["calibration"]) == dict(expected.meta["calibration"])
    for name, value in expected.new_values.items():
        torch.testing.assert_close(actual.new_values[name], value, rtol=0, atol=1e-8)


def test_without_two_halves_the_mean_is_compensated(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = tiny.build("llama")
    one = [{"input_ids": batch["input_ids"][:1]}]
    by_mean, by_least_squares = (stt.select(model, one, keep=0.5, compensate=how) for how in ("mean", "lstsq"))
    assert "only the mean is compensated; select on more examples" in caplog.text
    assert set(by_least_squares.meta["ridge"].values()) == {None}
    for name, value in by_mean.new_values.items():
        torch.testing.assert_close(by_least_squares.new_values[name], value)


def test_constant_neurons_predict_nothing() -> None:
    """Their covariance is rounding noise: no ridge makes a use of it."""
    weight, bias, kept, a, b = problem()
    for rows in (a, b):
        rows[:, kept] = torch.arange(1.0, KEPT + 1).double() / 3
    sums = moments(a), moments(b)
    folded, by_mean = (fold(weight, bias, torch.tensor(kept), sums, how) for how in ("lstsq", "mean"))
    assert folded.ridge is None
    assert torch.equal(folded.weight, weight[:, kept])
    torch.testing.assert_close(folded.bias, by_mean.bias)


def test_one_dead_neuron_among_the_kept_is_no_harm() -> None:
    weight, bias, kept, a, b = problem()
    for rows in (a, b):
        rows[:, kept[0]] = 0.0
    folded = fold(weight, bias, torch.tensor(kept), (moments(a), moments(b)), "lstsq")
    update, shift = by_augmented_rows(torch.cat([a, b]), weight, kept, folded.ridge)
    torch.testing.assert_close(folded.weight, weight[:, kept] + update, rtol=0, atol=1e-7)


def test_a_site_that_loses_nothing_gets_no_new_values() -> None:
    model, batch = tiny.build("llama")
    whole = stt.select(model, batches_for(model, batch), keep=1.0, compensate="lstsq")
    assert not whole.new_values
    stt.apply(model, whole)
    assert "compensate" not in model.config.stt


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_patch_is_saved_and_applied_again(name: str, tmp_path: Path) -> None:
    model, batch = tiny.build(name)
    selection = stt.select(model, batches_for(model, batch), score="contribution", keep=0.4, compensate="lstsq")
    selection.save(tmp_path / "selection.safetensors")
    again = Selection.load(tmp_path / "selection.safetensors")
    assert again == selection
    assert again.meta == json.loads(json.dumps(selection.meta))
    assert again != selection.without_new_values()
    other, _ = tiny.build(name)
    expected = tiny.outputs(stt.apply(model, selection), batch)
    for actual, value in zip(tiny.outputs(stt.apply(other, again), batch), expected, strict=True):
        assert torch.equal(actual, value)


@pytest.mark.parametrize("by", ["stt.save", "save_pretrained", "shards"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_compensated_model_is_saved_and_loaded_bitwise(name: str, by: str, tmp_path: Path) -> None:
    model, batch = tiny.build(name)
    stt.apply(model, stt.select(model, batches_for(model, batch), score="contribution", keep=0.4, compensate="lstsq"))
    stt.train_only(model)
    if by == "stt.save":
        stt.save(model, tmp_path / "model")
    else:
        model.save_pretrained(tmp_path / "model", max_shard_size="20KB" if by == "shards" else "1GB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (by == "shards")
    loaded = stt.load(tmp_path / "model")
    assert loaded.config.stt == model.config.stt
    for actual, value in zip(tiny.outputs(loaded, batch), tiny.outputs(model, batch), strict=True):
        assert torch.equal(actual, value)


def test_save_pretrained_leaves_the_padding_out(tmp_path: Path) -> None:
    model, batch = tiny.build("llama")
    stt.apply(model, stt.select(model, [batch], keep=0.4))
    expected = tiny.outputs(model, batch)
    stt.surgery.pad_sites(model, 32)
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "gathered", True, model.state_dict())
    for folder in ("model", "gathered"):
        for actual, value in zip(tiny.outputs(stt.load(tmp_path / folder), batch), expected, strict=True):
            assert torch.equal(actual, value)


def test_removed_units_cannot_be_put_back_beside_compensated_ones(tmp_path: Path) -> None:
    model, batch = tiny.build("llama")
    dense, _ = tiny.build("llama")
    stt.apply(model, stt.select(model, batches_for(model, batch), keep=0.4, compensate="mean"))
    with pytest.raises(InputError, match="the kept units were compensated for the removed ones, which cannot be put"):
        stt.restore(model, dense)
    dense.save_pretrained(tmp_path / "dense")
    stt.save(model, tmp_path / "sliced")
    with pytest.raises(InputError, match="cannot be put back"):
        export_dense(tmp_path / "sliced", tmp_path / "out", tmp_path / "dense")


def test_export_keeps_a_bias_where_there_is_a_place_for_it(tmp_path: Path) -> None:
    for name in ("gpt2", "llama"):
        model, batch = tiny.build(name)
        stt.apply(model, stt.select(model, batches_for(model, batch), keep=0.4, compensate="lstsq"))
        stt.save(model, tmp_path / name)
        if name == "llama":
            with pytest.raises(InputError, match="2 biases that a plain LlamaForCausalLM lacks"):
                export_hf(tmp_path / name, tmp_path / "plain")
            continue
        export_hf(tmp_path / name, tmp_path / "plain")
        plain = type(model).from_pretrained(tmp_path / "plain")
        for actual, value in zip(tiny.outputs(plain, batch), tiny.outputs(model, batch), strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)
        shutil.rmtree(tmp_path / "plain")


# ---------------------------------------------------------------- what is refused


def test_bad_input_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.build("llama")
    with pytest.raises(InputError, match="unknown compensation 'ols'.*Choose one of: lstsq, lstsq_weights, mean, none"):
        stt.select(model, [batch], compensate="ols")
    monkeypatch.setattr(os, "sysconf", lambda name: 1000 if name == "SC_PAGE_SIZE" else 2 * 44**2 * 8 * 2 // 1000)
    with pytest.raises(InputError, match="compensate='lstsq' keeps 0 GB of products of neurons on cpu, and 0 GB are"):
        stt.select(model, [batch], compensate="lstsq")
    monkeypatch.undo()
    selection = stt.select(model, [batch], compensate="mean")
    down = "model.layers.0.mlp.down_proj.weight"
    wrong = Selection(dict(selection), selection.meta, selection.new_values | {down: torch.zeros(3, 3)})
    with pytest.raises(InputError, match=r"holds a weight of \(3, 3\) where the sliced layer has"):
        stt.apply(model, wrong)
    bare = Selection(dict(selection), {"widths": selection.widths}, selection.new_values)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert stt.apply(model, bare).config.stt["compensate"] == "by other values"
