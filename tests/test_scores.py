"""Every score against a slow loop over single, unpadded examples and their tokens, on every kind of architecture.

The loop is written from the definitions: it knows hooks and plain sums, nothing of padding, masks or batches.
"""
from __future__ import annotations

import math
import re
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stt import scores
from stt.calibrate import Calibration, calibrate
from stt.errors import InputError
from stt.scores.base import Seen, Weights
from stt.sites import find_sites

DECODERS = ["llama", "phi3", "gpt2", "gptj", "gpt_neo", "opt", "bloom", "falcon", "gemma2"]
ENCODERS = ["bert", "bert-mlm", "roberta", "distilbert", "albert", "deberta-v2", "modernbert", "mpnet"]
SEQ2SEQ = ["t5", "mt5", "bart"]
VISION = ["vit", "swin", "dinov2-swiglu"]
IN_FLOAT32 = ("gptj", "gpt_neo")  # compute their attention in it, whatever the weights are
THRESHOLD = 0.2
MEASURED = {"activation_mean": {}, "activation_rate": {"threshold": THRESHOLD}, "gate_product": {}, "wanda": {},
            "taylor": {}, "contribution": {}, "fluctuation": {}, "outside_score:MeanSize": {}}
Example = dict[str, Tensor]


# ---------------------------------------------------------------- the slow loop


class Recorder:
    """What one site sees, token by token."""

    def __init__(self, model: nn.Module, gate: str, down: str):
        self.rows: dict[str, list[Tensor]] = {"x": [], "pre": [], "hidden": [], "gradient": []}
        self.hidden: list[Tensor] = []
        self.hooks = [model.get_submodule(gate).register_forward_hook(self.at_gate),
                      model.get_submodule(down).register_forward_pre_hook(self.at_down)]

    def at_gate(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.rows["x"] += tokens(args[0])
        self.rows["pre"] += tokens(output)

    def at_down(self, module: nn.Module, args: tuple) -> None:
        args[0].retain_grad()
        self.hidden.append(args[0])

    def after_backward(self) -> None:
        for hidden in self.hidden:
            self.rows["hidden"] += tokens(hidden)
            self.rows["gradient"] += tokens(hidden.grad)
        self.hidden.clear()

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def slow(model: nn.Module, examples: list[Example]) -> dict[str, dict[str, Tensor]]:
    """Scores by name and site. `examples` have one row and no padding."""
    recorders = {name: Recorder(model, site.gate_module, site.down_module) for name, site in find_sites(model).items()}
    for example in examples:
        loss(model, example).backward()
        for recorder in recorders.values():
            recorder.after_backward()
    for recorder in recorders.values():
        recorder.remove()
    model.zero_grad(set_to_none=True)
    return {score: {site: one(model, site, recorder.rows) for site, recorder in recorders.items()}
            for score, one in LOOPS.items()}


def tokens(activation: Tensor) -> list[Tensor]:
    return [row.detach().double() for row in activation.reshape(-1, activation.shape[-1])]


def loss(model: nn.Module, example: Example) -> Tensor:
    """Minus the log probability of every label, added up."""
    labels = example["labels"][0]
    if model.config.is_encoder_decoder:
        logits = model(**example).logits[0]
    else:
        logits = model(**{name: value for name, value in example.items() if name != "labels"}).logits[0]
    if labels.ndim == 0:
        return -logits.log_softmax(-1)[labels]
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        logits, labels = logits[:-1], labels[1:]
    labelled = [t for t in range(len(labels)) if labels[t] != -100]
    return 0 * logits.sum() - sum(logits[t].log_softmax(-1)[labels[t]] for t in labelled)


def gate_rows(model: nn.Module, site: str) -> Tensor:
    found = find_sites(model)[site]
    module = model.get_submodule(found.gate_module)
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    return weight.detach().double()[:found.width]  # of a fused layer the first half, in these architectures


def mean(model: nn.Module, site: str, seen: dict[str, list[Tensor]]) -> Tensor:
    width = find_sites(model)[site].width
    return torch.tensor([sum(row[i].item() for row in seen["pre"]) / len(seen["pre"]) for i in range(width)])


def rate(model: nn.Module, site: str, seen: dict[str, list[Tensor]]) -> Tensor:
    width, rows = find_sites(model)[site].width, [row.tolist() for row in seen["pre"]]
    return torch.tensor([sum(row[i] >= THRESHOLD for row in rows) / len(rows) for i in range(width)])


def gate_product(model: nn.Module, site: str, seen: dict[str, list[Tensor]]) -> Tensor:
    return sum(seen["hidden"]) / len(seen["hidden"])


def wanda(model: nn.Module, site: str, seen: dict[str, list[Tensor]]) -> Tensor:
    norm = [math.sqrt(sum(x[j].item() ** 2 for x in seen["x"])) for j in range(len(seen["x"][0]))]
    rows = gate_rows(model, site).tolist()
    return torch.tensor([sum(abs(w) * n for w, n in zip(row, norm, strict=True)) for row in rows])


def taylor(model: nn.Module, site: str, seen: dict[str, list[Tensor]]) -> Tensor:
    return sum((a * g).abs() for a, g in zip(seen["hidden"], seen["gradient"], strict=True))


def down_columns(model: nn.Module, site: str) -> list[list[float]]:
    module = model.get_submodule(find_sites(model)[site].down_module)
    return (module.weight if isinstance(module, Conv1D) else module.weight.T).tolist()


def contribution(model: nn.Module, site: str, seen: dict[str, list[Tensor]]) -> Tensor:
    """Root of the mean square of the vectors that a neuron adds to the output, one per token."""
    rows = [row.tolist() for row in seen["hidden"]]
    sizes = [math.sqrt(sum(w * w for w in column)) for column in down_columns(model, site)]
    return torch.tensor([math.sqrt(sum((row[i] * size) ** 2 for row in rows) / len(rows))
                         for i, size in enumerate(sizes)], dtype=torch.float64)


def fluctuation(model: nn.Module, site: str, seen: dict[str, list[Tensor]]) -> Tensor:
    """Mean squared distance of those vectors from their mean."""
    rows = [row.tolist() for row in seen["hidden"]]
    means = [sum(values) / len(rows) for values in zip(*rows, strict=True)]
    return torch.tensor([sum((row[i] - means[i]) ** 2 for row in rows) / len(rows) * sum(w * w for w in column)
                         for i, column in enumerate(down_columns(model, site))], dtype=torch.float64)


def mean_size(model: nn.Module, site: str, seen: dict[str, list[Tensor]]) -> Tensor:
    return sum(row.abs() for row in seen["hidden"]) / len(seen["hidden"])


LOOPS = {"activation_mean": mean, "activation_rate": rate, "gate_product": gate_product, "wanda": wanda,
         "taylor": taylor, "contribution": contribution, "fluctuation": fluctuation,
         "outside_score:MeanSize": mean_size}


# ---------------------------------------------------------------- examples, and batches made of them


def examples_for(name: str, model: nn.Module) -> list[Example]:
    torch.manual_seed(7)
    if name in VISION:
        size = model.config.image_size
        return [{"pixel_values": torch.randn(1, 3, size, size).double(), "labels": torch.tensor([i % 3])}
                for i in range(5)]
    made = []
    for i, length in enumerate((7, 3, 5, 1, 6)):
        ids = torch.randint(3, tiny.VOCABULARY, (1, length))
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        if name in SEQ2SEQ:
            made[-1]["labels"] = torch.randint(3, tiny.VOCABULARY, (1, (2, 6, 1, 4, 3)[i]))
        elif name in DECODERS or name == "bert-mlm":
            made[-1]["labels"] = ids.clone()
            made[-1]["labels"][0, :length // 2] = -100  # the prompt
        else:
            made[-1]["labels"] = torch.tensor([i % 3])
    return made


def padded(examples: list[Example], left: bool = False, extra: int = 0) -> Example:
    """One batch of several examples."""
    batch = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        if values[0].ndim != 2:
            batch[name] = torch.cat(values)
            continue
        length = max(value.shape[1] for value in values) + extra
        batch[name] = torch.full((len(values), length), -100 if name == "labels" else 0)
        for row, value in zip(batch[name], values, strict=True):
            row[slice(length - value.shape[1], None) if left else slice(value.shape[1])] = value[0]
    return batch


def measured(model: nn.Module, batches: list[Example], **options: object) -> Calibration:
    made = [scores.make(name, **settings) for name, settings in MEASURED.items()]
    return calibrate(model, find_sites(model), made, batches, progress=False, **options)


def assert_equal(actual: Calibration, expected: dict[str, dict[str, Tensor]], tolerance: float) -> None:
    for (name, by_site), result in zip(expected.items(), actual.scores, strict=True):
        assert list(result) == list(by_site)
        for site, value in by_site.items():
            got = result[site]
            assert (got.dtype, got.shape, got.device.type) == (torch.float64, value.shape, "cpu")
            error = (got - value.double()).abs().max() / value.abs().max()
            assert error < (tolerance if value.dtype == torch.float64 else 1e-6), f"{name} of {site}: {error:.1e}"


@pytest.mark.parametrize("name", DECODERS + ENCODERS + SEQ2SEQ + VISION)
def test_every_score_equals_the_loop_however_batches_are_made(name: str) -> None:
    model, _ = tiny.build(name, torch.float64)
    examples = examples_for(name, model)
    expected = slow(model, examples)
    seen = [measured(model, batches) for batches in (
        [padded(examples)],
        examples,
        [padded(examples[::-1][:2]), padded(examples[:3])],
        [padded(examples, left=name not in SEQ2SEQ, extra=4)],
    )]
    for calibration in seen:
        assert_equal(calibration, expected, 1e-6 if name in IN_FLOAT32 else 1e-10)
        assert (calibration.examples, calibration.tokens) == (5, 5 if name in VISION else 22)
        assert calibration.digest == seen[0].digest
    assert measured(model, [padded(examples[:4])]).digest != seen[0].digest


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_counting_padding_is_what_the_published_code_does(name: str) -> None:
    """Every position of the padded batch counts, wherever the padding is."""
    model, _ = tiny.build(name, torch.float64)
    for left in (False, True):
        batch = padded(examples_for(name, model), left)
        sites = find_sites(model)
        recorders = {key: Recorder(model, site.gate_module, site.down_module) for key, site in sites.items()}
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for recorder in recorders.values():
            recorder.remove()
        result = dict(zip(MEASURED, measured(model, [batch], count_padding=True).scores, strict=True))
        ignoring = dict(zip(MEASURED, measured(model, [batch]).scores, strict=True))
        for site, recorder in recorders.items():
            pre = torch.stack(recorder.rows["pre"])
            torch.testing.assert_close(result["activation_mean"][site], pre.mean(0))
            assert torch.equal(result["activation_rate"][site], (pre >= THRESHOLD).double().mean(0))
            assert not torch.allclose(result["activation_mean"][site], ignoring["activation_mean"][site], atol=1e-2)


@pytest.mark.parametrize(("gate", "up"), [(slice(44, 88), slice(44)), (slice(1, None, 2), slice(0, None, 2))],
                         ids=["up-first", "pairs-up-first"])
def test_the_gate_of_a_fused_layer_need_not_come_first(gate: slice, up: slice) -> None:
    def middle(x: Tensor, fused: nn.Linear) -> Tensor:
        y = fused(x)
        return y[..., up] * y[..., gate].relu()

    model, batch = tiny.toy([(tiny.HIDDEN, 88), (44, tiny.HIDDEN)], middle)
    outputs: list[Tensor] = []
    model.layers[1].linears[0].register_forward_hook(lambda m, args, out: outputs.append(out))
    with torch.no_grad():
        model(**batch)
    both = [scores.make("activation_mean"), scores.make("magnitude")]
    by_mean, magnitude = calibrate(model, find_sites(model), both, [batch], progress=False).scores
    torch.testing.assert_close(by_mean["layers.1.linears"], outputs[-1].flatten(0, 1).double().mean(0)[gate])
    weight = model.layers[1].linears[0].weight.detach()
    torch.testing.assert_close(magnitude["layers.1.linears"], weight.double().abs().sum(1)[gate])


# ---------------------------------------------------------------- options, one score at a time


def seen_rows() -> tuple[Seen, Tensor, Tensor]:
    torch.manual_seed(1)
    x, pre = torch.randn(9, 4), torch.randn(9, 6)
    return Seen(torch.tensor([1.0] * 6 + [0.0] * 3), x, pre, pre * 2, pre * 3), x[:6], pre[:6]


def result(name: str, weight: Tensor | None = None, **options: object) -> Tensor:
    score = scores.make(name, **options)
    score.update("a", seen_rows()[0])
    return score.result("a", of_gate(torch.zeros(6, 4) if weight is None else weight))


def of_gate(weight: Tensor) -> Weights:
    return Weights(lambda: weight, lambda: torch.zeros(1, len(weight)))


def test_options() -> None:
    _, x, pre = seen_rows()
    weight = torch.randn(6, 4)
    absolute = result("activation_rate", threshold=0.5, use_abs=True)
    assert torch.equal(absolute, (pre.abs() >= 0.5).double().mean(0))
    assert not torch.equal(absolute, result("activation_rate", threshold=0.5))
    at_a_value = result("activation_rate", threshold=pre[2, 3].item())
    assert torch.equal(at_a_value[3], (pre[:, 3] >= pre[2, 3]).double().mean())
    torch.testing.assert_close(result("wanda", weight, norm="l1"), weight.double().abs() @ x.abs().sum(0).double())
    torch.testing.assert_close(result("wanda", weight), weight.double().abs() @ x.square().sum(0).double().sqrt())
    with pytest.raises(InputError, match="unknown norm 'l3'"):
        scores.make("wanda", norm="l3")


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "t5"])
def test_magnitude_and_random_need_no_data(name: str) -> None:
    model, _ = tiny.build(name)
    sites = find_sites(model)

    def without_data(**seeds: int) -> list[dict[str, Tensor]]:
        return calibrate(model, sites, [scores.make("magnitude"), scores.make("random", **seeds)]).scores

    magnitude, at_random = without_data(seed=3)
    for site in sites:
        expected = [sum(abs(w) for w in row) for row in gate_rows(model, site).tolist()]
        torch.testing.assert_close(magnitude[site], torch.tensor(expected, dtype=torch.float64))
        assert len(at_random[site].unique()) == sites[site].width
        assert torch.equal(without_data(seed=3)[1][site], at_random[site])
        assert not torch.equal(without_data(seed=4)[1][site], at_random[site])
    first, second, *_ = at_random.values()
    assert not torch.equal(first, second)


def test_random_uses_every_bit_of_its_seed_and_leaves_torch_alone() -> None:
    before = torch.get_rng_state()
    rows = of_gate(torch.zeros(50, 1))
    drawn = [scores.make("random", seed=seed).result("a", rows) for seed in (0, 1, 2, 2**32, 2**40)]
    assert len({tuple(values.tolist()) for values in drawn}) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_the_folder_is_the_registry() -> None:
    inside = [name for name in MEASURED if ":" not in name]
    assert scores.names() == sorted([*inside, "magnitude", "random"])
    with pytest.raises(InputError, match="unknown score 'wands'. Did you mean 'wanda'. Choose one of: activation_m"):
        scores.make("wands")


def test_scores_of_installed_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints([EntryPoint("mean_size", "outside_score:MeanSize", scores.GROUP)])
    monkeypatch.setattr(scores, "entry_points", lambda **chosen: points.select(**chosen))
    assert "mean_size" in scores.names()
    assert type(scores.make("mean_size")) is type(scores.make("outside_score:MeanSize"))
    assert type(scores.make("magnitude")).__module__ == "stt.scores.magnitude"


@pytest.mark.parametrize(("name", "said"), [
    ("nowhere:Score", "cannot load the score 'nowhere:Score' (No module named 'nowhere'): give package.module:Class"),
    ("outside_score:Absent", "cannot load the score 'outside_score:Absent' (module 'outside_score' has no attribute"),
    ("outside_score:Plain", "must be a @dataclass, a subclass of"),
    ("..x:S", "cannot load the score '..x:S'"),
    ("math:sqrt", "'math:sqrt' is no score"),
    ("collections:OrderedDict", "is no score: it must be a @dataclass, a subclass of"),
    ("stt.scores.base:Score", "is no score")])
def test_what_is_no_score_is_refused(name: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        scores.make(name)


# ---------------------------------------------------------------- precision


def test_small_batches_add_up_after_a_large_one() -> None:
    """2^24 + 1 is 2^24 in float32."""
    score = scores.make("wanda", norm="l1")
    for value in (2.0**24, *[1.0] * 8):
        score.update("a", Seen(inputs=torch.tensor([[value]])))
    assert score.result("a", of_gate(torch.ones(1, 1))).tolist() == [2**24 + 8]


@pytest.mark.parametrize("under_autocast", [False, True])
def test_sums_are_not_rounded_to_half_precision(under_autocast: bool) -> None:
    """bf16 counts only to 256: a rate over 2000 tokens would show it."""
    model, _ = tiny.build("llama", torch.float32 if under_autocast else torch.bfloat16)
    batches = [{"input_ids": torch.randint(3, tiny.VOCABULARY, (20, 50)), "attention_mask": torch.ones(20, 50).long()}
               for _ in range(2)]
    pre: dict[str, list[Tensor]] = {site: [] for site in find_sites(model)}
    hooks = [model.get_submodule(site.gate_module).register_forward_hook(
        lambda m, args, out, key=key: pre[key].append(out.reshape(-1, out.shape[-1])))
        for key, site in find_sites(model).items()]
    with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        by_mean, by_rate, *_ = measured(model, batches).scores
    for hook in hooks:
        hook.remove()
    for site, outputs in pre.items():
        rows = torch.cat(outputs)
        assert rows.dtype == torch.bfloat16
        torch.testing.assert_close(by_mean[site], rows.double().mean(0), rtol=1e-5, atol=1e-6)
        assert torch.equal(by_rate[site], (rows >= THRESHOLD).double().mean(0))
