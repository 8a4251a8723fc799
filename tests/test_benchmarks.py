"""The benchmark at toy sizes: what it compares is equal, what it counts is right, and its files hold what they promise.
No time is asserted."""
from __future__ import annotations

import copy
import importlib.util
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure, memory, models, neurons, sizes, straightforward, timing, variants, weights
from benchmarks.sizes import Plan, Size
from benchmarks.table import Table

CPU = torch.device("cpu")
QWEN2 = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "vocab_size": 97,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
DECODER = Size("decoder", "", "qwen2", QWEN2, 2, 12, sizes.ROWS)
ENCODER = {"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_hidden_layers": 2}
VIT = Size("image encoder", "", "vit", {**sizes.VIT, **ENCODER, "image_size": 32}, 2, 0, sizes.ENCODER_ROWS)
BERT = Size("text encoder", "_bert", "bert", {**sizes.BERT, **ENCODER, "vocab_size": 97}, 2, 12, sizes.ENCODER_ROWS)
ANSWER = replace(DECODER, rows=sizes.ANSWER_ROWS, answer=5)
SELECTION = replace(DECODER, rows=sizes.PASSES)
SIZES = {"qwen2": DECODER, "answer": ANSWER, "vit": VIT, "bert": BERT}
KEYS = {"step_vs_narrow", "answer_only_step_vs_narrow", "saved_activations_vs_narrow", "selection_vs_forward",
        "selection_vs_forward_152k", "prefill_vs_narrow", "decode_vs_narrow", "encoder_step_vs_narrow",
        "encoder_step_vs_narrow_bert", "peak_memory_vs_narrow"}


def toy_plan(is_quick: bool) -> Plan:
    rows = {"rows": sizes.PAIR} if is_quick else {}
    seconds = dict.fromkeys(("step", "answer", "forward", "prefill", "decode", "encoder", "selection"), 0.01)
    selections = SELECTION, replace(SELECTION, suffix="_152k")
    encoders = replace(VIT, **rows), replace(BERT, **rows)
    return Plan((replace(DECODER, **rows),), (replace(ANSWER, **rows),), selections, encoders, selection_batches=2,
                new_tokens=2, seconds=seconds, is_quick=is_quick, prompt=4)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of the toy plan, three rounds each."""
    monkeypatch.setattr(sizes, "plan", lambda device, quick: replace(toy_plan(quick), total_seconds=0))


# ---------------------------------------------------------------- the whole


@pytest.mark.usefixtures("fast")
def test_quick_writes_every_ratio_its_interval_and_the_circumstances(tmp_path, capsys):
    assert neurons.main(["--quick", "--json", str(tmp_path / "out.json"), "--threads", "1"]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written.keys() >= KEYS
    for key in KEYS:
        low, high = written[f"{key}_interval"]
        assert 0 < low <= written[key] <= high < math.inf, key
        assert written["rounds"][key] == (1 if key in {"saved_activations_vs_narrow", "peak_memory_vs_narrow"} else 3)
    assert written["threads"] == written["machine"]["threads"] == 1
    assert len(written["load"]["before"]) == len(written["load"]["after"]) == 3
    assert written["versions"]["torch"] == torch.__version__
    assert "44 neurons of which 13 are kept" in written["sizes"]["decoder"]
    printed = capsys.readouterr().out
    for key, limit in neurons.LIMITS.items():
        row = next(line for line in printed.splitlines() if line.startswith(f"| {key} "))
        assert f"| {limit:.2f} " in row, row
        assert ("within" in row) == (written[key] <= limit), row


@pytest.mark.usefixtures("fast")
def test_the_whole_run_writes_all_rows_of_all_tables(tmp_path, capsys):
    assert neurons.main(["--out", str(tmp_path / "RESULTS.md")]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("# Benchmark of the neurons family")
    assert "python benchmarks/neurons.py --out" in text
    for heading in ("Ratios and their limits", "Training and inference", "Encoder: vit", "Encoder: bert",
                    "Selection pass", "Training on the answer only"):
        assert f"\n## {heading}" in text, heading
    table = text[text.index("## Training and inference"):]
    for name in sizes.ROWS:
        row = next(line for line in table.splitlines() if line.startswith(f"| {variants.TITLES[name]} "))
        assert "–" not in row.split("|")[2] or variants.missing(name), row
    assert text.count("| plain forward, head included ") == 2
    assert "natively narrow" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--threads", "0"], ["--json", "no/such/folder/out.json"], ["--device", "tpu"],
                                   ["--device", "cuda", "--clock", "cpu"]])
def test_wrong_arguments_exit_with_2(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        neurons.main(wrong)
    assert "error:" in capsys.readouterr().err


def test_trl_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(variants.importlib.util, "find_spec", lambda name: None)
    assert variants.build(replace(DECODER, rows=("narrow", "narrow_trl")), CPU).keys() == {"narrow"}
    table = measure._table("title", ("narrow", "narrow_trl"), {"s": {"narrow": 1.0}})
    assert [tuple(row) for row in table.rows] == [("natively narrow", 1.0), ("narrow, TRL's chunked loss", None)]
    assert "trl is not installed" in table.markdown()


# ---------------------------------------------------------------- what is compared is equal


def reference_logits(dense: nn.Module, size: Size, kept: dict[str, Tensor]) -> nn.Module:
    """The dense model with every neuron that is not kept multiplied by 0 in front of the down projection."""
    masked = copy.deepcopy(dense).eval()
    for layer, ids in kept.items():
        mask = torch.zeros(size.width)
        mask[ids] = 1
        down = masked.get_submodule(f"{layer}.{models.ARCHITECTURES[size.architecture].down}")
        down.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,))
    return masked


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_scatter_narrow_and_ours_are_the_masked_dense_model(size):
    dense = models.dense(size)
    kept = models.random_neurons(dense, size)
    assert all(len(ids) == 13 for ids in kept.values())
    assert len(kept) == 2
    inputs = {name: value for name, value in models.batch(size).items() if name != "labels"}
    expected = reference_logits(dense, size, kept)(**inputs).logits
    for name, variant in variants.build(replace(size, rows=("scatter", "narrow", "ours")), CPU).items():
        actual = variant.model.eval()(**inputs).logits
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_all_rows_give_the_same_loss_and_move_the_same_weights(size):
    built, batch = variants.build(size, CPU), models.batch(size)
    results = {name: variants.computed(variant, batch) for name, variant in built.items()}
    variants.check_same(results)
    assert all(p.grad is None for variant in built.values() for p in variant.model.parameters())
    for name in ("scatter", "ours", "narrow"):
        before = {key: value.clone() for key, value in built[name].model.state_dict().items()}
        built[name].step(batch)
        moved = {key for key, value in built[name].model.state_dict().items() if not torch.equal(value, before[key])}
        assert moved == set(models.neurons_and_head(built[name].model, size)), name
    after = [variants.computed(built[name], batch).loss for name in ("scatter", "ours", "narrow")]
    assert after[0] != results["scatter"].loss
    assert after == pytest.approx([after[0]] * 3, rel=1e-5)


def test_frozen_weights_of_equal_rows_are_there_once():
    built = variants.build(DECODER, CPU)
    frozen = {p.data_ptr() for variant in built.values() for p in variant.model.parameters() if not p.requires_grad}
    trained = [p.data_ptr() for variant in built.values() for p in variant.model.parameters() if p.requires_grad]
    assert not frozen & set(trained)
    assert len(trained) == len(set(trained))
    weights = {row: built[row].model.model.layers[0].self_attn.q_proj.weight for row in ("ours", "narrow", "scatter")}
    assert len({weight.data_ptr() for weight in weights.values()}) == 1
    assert built["ours_lora"].model.model.layers[0].mlp.gate_proj.weight.data_ptr() in frozen


def test_only_the_answer_is_labelled():
    labels = models.batch(ANSWER)["labels"]
    assert (labels[:, :7] == -100).all()
    assert torch.equal(labels[:, 7:], models.batch(ANSWER)["input_ids"][:, 7:])
    assert torch.equal(models.batch(DECODER)["labels"], models.batch(DECODER)["input_ids"])


def other_weights(built: dict[str, variants.Variant]) -> None:
    built["ours"].model.lm_head.weight.data[0] += 0.1


def other_gradients(built: dict[str, variants.Variant]) -> None:
    built["ours"].model.model.layers[0].mlp.gate_proj.weight.register_hook(lambda gradient: 1.1 * gradient)


def fewer_trained(built: dict[str, variants.Variant]) -> None:
    built["ours"].model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)


def not_a_number(built: dict[str, variants.Variant]) -> None:
    for variant in built.values():
        variant.model.lm_head.weight.data[0] = math.nan


@pytest.mark.parametrize(("change", "what"), [
    (other_weights, "losses"), (other_gradients, "gradient norms of .*0.mlp.gate_proj"),
    (fewer_trained, "trained parameters"), (not_a_number, "losses")])
def test_different_computations_are_refused(change, what, monkeypatch):
    build = variants.build

    def changed(*args: object) -> dict[str, variants.Variant]:
        built = build(*args)
        change(built)
        return built
    monkeypatch.setattr(variants, "build", changed)
    monkeypatch.setattr(measure, "alternate", lambda *_: pytest.fail("timed all the same"))
    with pytest.raises(variants.DifferentComputations, match=what):
        measure.decoder(replace(DECODER, rows=sizes.PAIR), measure.Setting(toy_plan(True), CPU))


def test_number_of_trained_parameters_is_compared_exactly():
    same = variants.Computed(1.0, {"w": 1.0}, 1_000_000)
    with pytest.raises(variants.DifferentComputations, match="trained parameters"):
        variants.check_same({"ours": same, "narrow": replace(same, trained=1_000_001)})
    variants.check_same({"ours": same, "ours_lora": variants.Computed(1.0, {"a": 0.1}, 5),
                         "full": variants.Computed(2.0, {"w": 3.0}, 4)})
    with pytest.raises(variants.DifferentComputations, match="losses"):
        variants.check_same({"full": same, "lora": replace(same, loss=1.001)})


def test_statistics_of_the_hooks_are_those_of_a_slow_loop_and_ours(monkeypatch):
    model = models.dense(DECODER).eval()
    batches = [{"input_ids": models.batch(DECODER, number=number)["input_ids"]} for number in range(2)]
    name = "model.layers.1.mlp.gate_proj"
    rows = []
    gate = model.get_submodule(name)
    hook = gate.register_forward_hook(lambda module, args, output: rows.extend(output.flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    found = straightforward.measure(model, [name], batches)[name]
    torch.testing.assert_close(found["mean"], torch.stack(rows).mean(0))
    assert torch.equal(found["rate"], sum((row >= 0.01).float() for row in rows) / 48)
    slow = straightforward.measure
    monkeypatch.setattr(straightforward, "measure", lambda *args: {
        name: {"mean": of["mean"], "rate": of["rate"] + 0.1} for name, of in slow(*args).items()})
    with pytest.raises(variants.DifferentComputations, match="rate of model.layers.0.mlp differs"):
        measure.selection(SELECTION, measure.Setting(toy_plan(True), CPU))


# ---------------------------------------------------------------- what is counted is right


class Tiny(nn.Module):
    """x (3, 8) -> linear to 16 -> sigmoid -> times itself -> sum."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.linear(x))
        return (y * y.view(3, 16)).sum()


def test_saved_bytes_are_those_counted_by_hand():
    x = torch.randn(3, 8)
    expected = 4 * (3 * 8 + 3 * 16)  # what the linear layer read; the sigmoid's output, saved three times, one storage
    assert memory.saved_bytes(Tiny(), lambda: Tiny()(x)) == expected
    model = Tiny()
    assert memory.saved_bytes(model, lambda: model(x.clone().requires_grad_())) == expected  # not the weight, too


@pytest.mark.parametrize(("row", "size"), [("full", DECODER), ("scatter", DECODER), ("narrow", DECODER), ("ours", VIT)])
def test_saved_bytes_are_what_the_allocator_still_holds_after_the_forward(row, size):
    """Of losses that make no gradients in their forward, as ours for decoders does."""
    variant, batch = variants.build(replace(size, rows=(row,)), CPU)[row], models.batch(size)
    variant.step(batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = variant.loss(batch)
    held = sum(event.self_cpu_memory_usage for event in recorded.key_averages())
    assert memory.saved_bytes(variant.model, lambda: variant.loss(batch)) == pytest.approx(held, rel=0.02)
    assert loss.requires_grad


def test_bytes_of_parameters_gradients_and_optimizer():
    variant = variants.build(replace(DECODER, rows=("narrow",)), CPU)["narrow"]
    variant.step(models.batch(DECODER))
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 32 + 16 * 2 + 2 * 32  # q and o, k and v, their biases, norms
    trained = 2 * 3 * 32 * 13 + 97 * 32
    assert memory.parameter_bytes(variant.model) == 4 * (97 * 32 + 2 * layer + 32 + trained)
    assert memory.gradient_bytes(variant.model) == 4 * trained
    steps = 4 * len(variant.optimizer.state)
    assert memory.optimizer_bytes(variant.optimizer) == 8 * trained + steps


def test_peak_is_the_worst_moment():
    model = nn.Linear(100, 100, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    kept = []

    def step() -> None:
        first = torch.empty(1000)
        kept.append(torch.empty(5000))
        del first
        kept.append(torch.empty(3000))
        kept.clear()
    assert memory.peak_bytes(model, optimizer, step) == pytest.approx(4 * (10_000 + 8_000), abs=64)


def test_layers_that_fit():
    six = replace(DECODER, rows=("full", "narrow", "lora")).with_layers(6)
    needs = {layers: memory.resident_bytes(six.with_layers(layers)) for layers in (1, 3, 6)}
    dense = sum(p.numel() for p in models.dense(DECODER.with_layers(1)).model.layers.parameters())
    neurons, attention = 3 * 32 * 13, dense - 3 * 32 * 44
    assert needs[3] - needs[1] == 2 * 4 * (4 * dense + 4 * neurons + attention + dense)  # full, narrow, frozen of lora
    assert memory.layers_that_fit(six, int(needs[6] / 0.79)).layers == 6
    assert memory.layers_that_fit(six, int(needs[6] / 0.81)).layers == 5
    assert memory.layers_that_fit(six, 10**12).layers == 6
    assert memory.layers_that_fit(six, int(needs[1] / 0.79)).layers == 1
    with pytest.raises(memory.TooLarge, match="needs .* GB with one layer"):
        memory.layers_that_fit(six, needs[1])


def test_sizes_of_the_plans():
    cpu, cuda = sizes.plan("cpu", quick=False), sizes.plan("cuda", quick=False)
    assert [size.kept for size in every(cpu)] == [1459, 1459, 461, 922, 1459, 1459]
    assert all(size.kept % 128 == 0 for size in every(cuda))
    assert memory.resident_bytes(sizes.plan("cpu", quick=True).answers[0]) < 11e9
    assert memory.layers_that_fit(cuda.decoders[0], 75 * 10**9).layers == 24
    large = memory.layers_that_fit(cuda.decoders[1], 75 * 10**9)
    assert 1 <= large.layers < 28
    assert large.width == 18944
    for whole in (cpu, cuda):
        quick = sizes.plan("cpu" if whole is cpu else "cuda", quick=True)
        assert {size.name for size in every(quick)} <= {size.name for size in every(whole)}
        for size in (*whole.decoders, *whole.answers, *whole.encoders):
            assert {"narrow", "ours"} <= set(size.rows) <= variants.BUILDERS.keys() == variants.TITLES.keys()
        for size in (*quick.decoders, *quick.answers, *quick.encoders):
            assert size.rows == ("narrow", "ours")
        assert len({size.name for size in every(whole)}) == len(every(whole))


def every(plan: Plan) -> tuple[Size, ...]:
    return *plan.decoders, *plan.answers, *plan.encoders, *plan.selections


# ---------------------------------------------------------------- times


def test_every_round_runs_everything_once_in_an_order_that_rotates():
    order: list[str] = []
    works = {name: timing.Work(lambda given, name=name: order.append(name + given), lambda: "!") for name in "abc"}
    seconds = timing.alternate(works, timing.Patience(seconds=0, at_least=3, discard=1), CPU)
    assert "".join(order).replace("!", "") == "cab" + "abc" + "bca" + "cab"
    assert len(order) == "".join(order).count("!")
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_rounds_end_with_the_deadline():
    works = {"a": timing.Work(lambda _: None)}
    over = timing.Patience(seconds=100, at_least=30, deadline=0)
    assert len(timing.alternate(works, over, CPU)["a"]) == timing.FEWEST == 3
    assert len(timing.alternate(works, timing.Patience(seconds=0, at_least=30), CPU)["a"]) == 30


def test_the_ratio_is_that_of_paired_rounds():
    assert timing.ratio([2, 40, 3], [1, 10, 1]) == timing.Ratio(3, 2, 4, 3)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (30, 10), (100, 40)])
def test_interval_of_the_median(n, k):
    """k as in the printed tables of the sign test at 5 %, two-sided."""
    values = [float(value) for value in torch.randperm(n)]
    assert timing.interval_of_median(values) == (k - 1, n - k)


def test_garbage_is_not_collected_in_between():
    import gc

    with timing.without_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_table():
    table = Table("T", ("", "a"), [("row", 0.12345), ("other", 1234.5), ("none", None)], ["Note."])
    assert table.markdown() == ("## T\n\n|       | a     |\n|-------|-------|\n| row   | 0.123 |\n| other | 1234  |\n"
                                "| none  | –     |\n\nNote.\n")


def test_the_benchmark_of_weights_names_every_row(tmp_path, capsys) -> None:
    assert weights.main(["--size", "tiny", "--seconds", "0.01", "--out", str(tmp_path / "WEIGHTS.md")]) == 0
    page = (tmp_path / "WEIGHTS.md").read_text()
    assert page == capsys.readouterr().out.removesuffix("\n")
    for name, (package, _) in weights.ROWS.items():
        assert (f"| {name} " in page) == (package is None or importlib.util.find_spec(package) is not None)


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--budget", "0"], "--budget must be 1 or more weights, got 0"),
    (["--out", "nowhere/WEIGHTS.md"], "cannot write nowhere/WEIGHTS.md: its folder does not exist")])
def test_the_benchmark_of_weights_refuses_at_once(flags, sentence, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        weights.main(["--size", "tiny", *flags])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_bytes_of_the_rows_of_weights_are_those_of_hand_counts() -> None:
    model = weights.decoder(weights.SIZES["tiny"], CPU)
    count = sum(parameter.numel() for parameter in model.parameters())
    ids = torch.zeros(2, 16, dtype=torch.long)
    made = {name: make(copy.deepcopy(model), 1000) for name, make in
            (("full", weights.full(False)), ("leaf", weights.leaf), ("lora", weights.lora))}
    for row in made.values():
        weights.passed(row.model, ids)
        row.optimizer.step()
    assert abs(weights.state_and_rest(made["full"])[0] - 8 * count) < 4 * 100  # and a step for each tensor
    state, held = weights.state_and_rest(made["leaf"])
    assert abs(state - 8 * 1000) < 4 * 100
    assert held == 1000 * (4 + 8 + 4)  # values, places, what they started from
    adapters = [parameter.numel() for parameter in made["lora"].model.parameters() if parameter.requires_grad]
    assert weights.state_and_rest(made["lora"])[1] == 4 * sum(adapters)
