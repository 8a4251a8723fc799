"""`stt plan` against training steps that were really made."""
from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import small_runs
import torch
from planning import SHIPPED, B, L, T, answer, as_config, loss_of
from safetensors.torch import load_file
from tiny import ARCHITECTURES, MIXTURES
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import stt
from benchmarks import memory
from stt import modes, plan, verbs
from stt.loss import chunked_loss
from stt.plan_arguments import PlanArgs
from stt.plan_step import Batch, step_bytes, step_flops
from stt.plan_table import table
from stt.selecting import measure, measured_for, sites_of
from stt.sites import find_sites
from stt.surgery import count_parameters
from util.torch_flops import flops_of, training_flops


def trained(mode: str, head: str = "train", precision: str = "fp32", checkpointing: bool = False):
    """stt-tiny with real weights, ready to train, and a function that computes its loss on a padded batch or one row.
    """
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    selection = stt.select(model, score="magnitude", keep=0.3) if modes.MODES[mode].score else None
    modes.prepare(modes.find(mode), model, selection, modes.Lora(), head)
    if checkpointing:
        model.activation_checkpointing_enable()
    return model, loss_of(model, precision)


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory) -> str:
    """A folder with the config of a two-layer decoder of 64 positions, where any model will do."""
    folder = tmp_path_factory.mktemp("two-layers")
    as_config(ARCHITECTURES["llama"]()[0], folder)
    return str(folder)


RUNS = [("stt", "train", "fp32", False), ("stt", "train", "bf16", True), ("lora", "freeze", "bf16", False),
        pytest.param("baseline", "untie", "bf16", False, marks=pytest.mark.slow),
        pytest.param("stt_lora", "train", "bf16", False, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("mode", "head", "precision", "checkpointing"), RUNS)
def test_everything_is_as_in_a_real_step(mode, head, precision, checkpointing, capsys):
    kept = ["--keep", "0.3"] if modes.MODES[mode].score else []
    flags = [SHIPPED, "--mode", mode, "--head", head, "--precision", precision, *kept, "--train_batch", str(B),
             "--max_length", str(T), "--answer_length", str(L)]
    found = answer(capsys, *flags, *(["--activation_checkpointing"] if checkpointing else []))["plans"][0]

    model, loss = trained(mode, head, precision, checkpointing)
    counted = count_parameters(model)
    assert found["parameters"] == {"dense": 1_112_320, "kept": counted["total"], "trained": counted["trained"],
                                   "trained_without_head": counted["trained_without_head"]}
    assert B * found["flops"]["training_example"] == training_flops(model, {}, lambda *_: loss())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    saved = memory.saved_bytes(model, loss)
    step()  # makes AdamW's state
    planned = found["memory"]
    assert planned["weights"] == memory.parameter_bytes(model)
    assert planned["gradients"] == memory.gradient_bytes(model)
    assert planned["optimizer"] == memory.optimizer_bytes(optimizer) - 4 * len(optimizer.state)  # its step counters
    assert planned["activations"] == pytest.approx(saved, rel=0.01)
    assert planned["peak"] == pytest.approx(memory.peak_bytes(model, optimizer, step), rel=0.03)


def test_a_single_example_needs_no_mask(capsys):
    flags = [SHIPPED, "--keep", "0.3", "--precision", "fp32", "--max_length", str(T), "--answer_length", str(L)]
    model, loss = trained("stt")
    saved = {n: answer(capsys, *flags, "--train_batch", str(n))["plans"][0]["memory"]["activations"] for n in (1, B)}
    assert saved[1] == pytest.approx(memory.saved_bytes(model, lambda: loss(1)), rel=0.01)
    assert B * saved[1] < 0.95 * saved[B]  # the mask, and the keys and values of every head instead of every group


@pytest.mark.parametrize("name", ["gpt2", "cohere", "bert", "t5", "vit"])
def test_other_architectures(name, tmp_path, capsys):
    """Parameters, and FLOPs of the model's own loss where that is not the chunked one of a decoder."""
    model, batch = ARCHITECTURES[name]()
    as_config(model, tmp_path)
    flags = [str(tmp_path), "--keep", "0.5", "--precision", "fp32", "--max_length", "12", "--train_batch", "1"]
    found = answer(capsys, *flags)["plans"][0]
    modes.prepare(modes.find("stt"), model, stt.select(model, score="magnitude", keep=0.5), modes.Lora(), "train")
    assert found["parameters"]["kept"] == count_parameters(model)["total"]
    assert found["parameters"]["trained"] == count_parameters(model)["trained"]
    ids = torch.arange(12).view(1, 12)
    inputs = {key: ids if value.dtype == torch.long else value[:1] for key, value in batch.items()}
    is_decoder = model.get_output_embeddings() is not None and not model.config.is_encoder_decoder
    if is_decoder:
        chunked_loss(model.train())
        inputs = {"input_ids": ids, "labels": ids}
    assert found["flops"]["training_example"] == training_flops(
        model.train(), inputs, lambda model, batch: model(**batch).loss if is_decoder
        else model(**batch).logits.float().logsumexp(-1).sum())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts(name, precision, tmp_path, capsys):
    """Whoever the tokens are sent to: numbers of a real step, its memory, and the FLOPs of a real selection."""
    as_config(MIXTURES[name]()[0], tmp_path)
    flags = [str(tmp_path), "--keep", "0.4", "--precision", precision, "--max_length", "64", "--train_batch", "1"]
    found = answer(capsys, *flags)["plans"][0]
    model, ids = MIXTURES[name]()[0].float(), torch.randint(3, 90, (1, 64))
    rows = [{"input_ids": ids, "labels": ids}]
    find_sites(model)  # whose trace does not count
    assert found["flops"]["selection_example"] == flops_of(lambda: measure(model, rows, None, ["stt"], progress=False))
    modes.prepare(modes.find("stt"), model, stt.select(model, score="magnitude", keep=0.4), modes.Lora(), "train")
    assert found["parameters"]["kept"] == count_parameters(model)["total"]
    assert found["parameters"]["trained"] == count_parameters(model)["trained"]
    chunked_loss(model.train())

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model(**rows[0]).loss
    assert found["flops"]["training_example"] == training_flops(model, {}, lambda *_: loss())
    assert found["memory"]["activations"] == pytest.approx(memory.saved_bytes(model, loss), rel=0.01)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step(lambda: loss().backward())
    peak = memory.peak_bytes(model, optimizer, lambda: loss().backward())
    assert found["memory"]["peak"] == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize(("units", "mode"), [("heads", "stt"), ("both", "stt"), ("both", "stt_lora")])
def test_heads(units, mode, capsys):
    """Parameters, FLOPs and memory of a real step with as many heads, and the FLOPs of a real selection."""
    flags = [SHIPPED, "--units", units, "--mode", mode, "--keep", "0.3", "--heads_ratio", "0.5", "--precision", "fp32",
             "--max_length", str(T), "--train_batch", "1", "--answer_length", str(L)]
    found = answer(capsys, *flags)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    rows, (methods, score) = [{"input_ids": torch.zeros(1, T, dtype=torch.long)}], measured_for(["stt"], units)
    sites_of(model, True, True)  # whose trace does not count
    selecting = flops_of(lambda: measure(model, rows, None, methods, progress=False, head_score=score))
    selection = stt.select(model, score="magnitude", keep=0.3, units=units, heads_keep=0.5)
    modes.prepare(modes.find(mode), model, selection, modes.Lora(), "train")
    loss = loss_of(model, "fp32")
    one = found["plans"][0]
    assert (one["kept_fraction_of_heads"], one["kept_fraction_of_units"]) == (
        0.5, 1 if units == "heads" else pytest.approx(0.3, abs=0.01))
    assert one["parameters"]["kept"] == count_parameters(model)["total"]
    assert one["parameters"]["trained"] == count_parameters(model)["trained"]
    assert one["flops"]["training_example"] == training_flops(model, {}, lambda *_: loss(1))
    assert one["flops"]["selection_example"] == selecting
    assert one["memory"]["activations"] == pytest.approx(memory.saved_bytes(model, lambda: loss(1)), rel=0.01)
    assert re.search(r"heads kept +50\.0 %", table(found))


def test_the_union_is_of_neurons(two_layers, capsys):
    """Of heads there is one share."""
    both = answer(capsys, two_layers, "--units", "both", "--max_length", "16", "--heads_ratio", "0.5")["plans"]
    assert [plan["kept_fraction_of_heads"] for plan in both] == [0.5, 0.5]
    assert both[1]["kept_fraction_of_units"] == 2 * both[0]["kept_fraction_of_units"]
    assert len(answer(capsys, two_layers, "--units", "heads", "--max_length", "16")["plans"]) == 1


@pytest.mark.parametrize("flags", [["--keep", "0.5"], ["--mode", "lora"]])
def test_experts_one_after_the_other_are_refused(flags, tmp_path, capsys):
    as_config(MIXTURES["dbrx"]()[0], tmp_path)
    assert verbs.main(["plan", str(tmp_path), "--max_length", "12", *flags]) == 2
    assert "sends tokens to experts" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "kept"), [
    ("stt", ["--keep_ratio", "0.4"]), ("train_in_place", ["--keep_ratio", "0.4"]),
    pytest.param("id3", ["--budget", "3001"], marks=pytest.mark.slow)])
def test_totals_are_those_of_a_run(mode, kept, small, tmp_path, capsys):
    """train_llm.py on examples of one length writes the same parameters and FLOPs into results.json, and as large a
    patch."""
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {c}"} for a in (1, 2, 3, 4) for b in (5, 6, 7) for c in (8, 9)]
    path = str(tmp_path / "sums.jsonl")
    Path(path).write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model", SHIPPED, "--train_file", path, "--eval_file", path, *small[2:], "--mode", mode, *kept,
             "--no_eval_epochs", "--max_new_tokens", "2"]
    assert small_runs.run(flags, tmp_path) == 0
    results = small_runs.results(tmp_path)
    from stt.dataset import encode_all, read_own, tokenised
    from stt.loading import load_tokenizer

    tokenizer = load_tokenizer(SHIPPED)
    task = tokenised(read_own(path, path, 2), tokenizer, 256, False)
    encoded = encode_all(task.train, tokenizer, 256, False)[0]
    assert len({(len(row["input_ids"]), sum(label != -100 for label in row["labels"])) for row in encoded}) == 1
    capsys.readouterr()
    found = answer(capsys, SHIPPED, "--mode", mode, *kept, "--examples", str(len(encoded)), "--epochs", "2",
                   "--max_length", str(len(encoded[0]["input_ids"])), "--active_sample_ratio", "0.5", "--answer_length",
                   str(sum(label != -100 for label in encoded[0]["labels"])))["plans"][0]
    for name in ("dense", "kept", "trained", "trained_without_head"):
        assert found["parameters"][name] == results["parameters"][name], name
    for name in ("training", "selection"):
        assert found["flops"][name] == results["flops"].get(name), name
    if found["disk"]:
        held = load_file(tmp_path / "run" / "patch.safetensors")
        assert found["disk"]["patch"] == sum(value.nbytes for name, value in held.items() if "/exact" not in name)


def test_seconds_and_steps_by_hand(two_layers, capsys):
    found = answer(capsys, two_layers, "--mode", "random", "--keep", "0.3", "--gpus", "2", "--tokens", "1000",
                   "--max_length", "64", "--epochs", "3", "--tflops", "0.5", "--train_batch", "2")
    flops = found["plans"][0]["flops"]
    assert flops["training"] == flops["training_example"] * 16 * 3  # 1000 / 64 examples, rounded up
    assert flops["selection"] == flops["selection_example"] * 2
    assert found["steps"] == 3 * 4
    assert found["plans"][0]["seconds"] == {"training": pytest.approx(flops["training"] / 1e12),
                                            "selection": pytest.approx(flops["selection"] / 1e12)}
    assert found["plans"][0]["memory"]["communication"] == found["plans"][0]["memory"]["gradients"]


def test_the_union_is_a_range(two_layers, capsys):
    found = answer(capsys, two_layers, "--max_length", "16")  # the published ratio is the default
    least, most = (each["kept_fraction_of_units"] for each in found["plans"])
    assert least == pytest.approx(0.3, abs=0.01)
    assert most == 2 * least
    model = ARCHITECTURES["llama"]()[0]
    union = stt.select(model, [{"input_ids": torch.randint(3, 90, (2, 30))}], topk_ratio=0.3)
    kept = sum(map(len, union.values())) / sum(union.widths.values())
    assert least <= kept <= most
    assert "union of two sets of 30.0 % of the neurons" in table(found)
    assert re.search(r"neurons kept +29\.\d % +59\.\d %", table(found))


def test_what_does_not_fit_and_what_would(two_layers, monkeypatch, capsys):
    """The peak that a change promises is that of a plan with these flags."""
    flags = [two_layers, "--keep", "0.3", "--gpus", "2", "--max_length", "64"]
    peak = answer(capsys, *flags)["plans"][0]["memory"]["peak"]
    alone = answer(capsys, *flags, "--train_batch", "1")["plans"][0]["memory"]["peak"]
    whole = answer(capsys, *flags, "--train_batch", "1", "--activation_checkpointing", "--shard")["plans"][0]["memory"]
    assert alone > whole["peak"] * 1.1
    monkeypatch.setattr(plan, "CARDS", tuple(size / plan.USABLE / 1e9 for size in (1, whole["peak"], alone, peak)))
    found = answer(capsys, *flags)
    nothing, divided, single, same = found["cards"].values()
    assert same["fits"]
    assert not single["fits"]
    assert (single["change"], single["peak"]) == ("--train_batch 1", alone)
    assert (divided["change"], divided["peak"]) == ("--train_batch 1 --activation_checkpointing --shard", whole["peak"])
    assert not nothing["fits"]
    assert nothing["change"] is None
    assert "does not fit; --train_batch 1 does" in table(found)
    assert "take a larger one" in table(found)


def test_shards_are_those_of_fsdp2():
    """Local bytes of rank 0 of five, of weights that do not divide evenly, by PyTorch itself."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model, _ = trained("stt")
    expected = {name: plan.shard_bytes(parameter, 5) for name, parameter in model.named_parameters()}
    init_process_group("fake", store=FakeStore(), rank=0, world_size=5)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (5,)))
        assert {name: p.to_local().nbytes for name, p in model.named_parameters()} == expected
    finally:
        destroy_process_group()


def test_sharded_memory(capsys):
    """What is gathered: the embedding and the last norm all the time, and two layers; the rest is a fifth."""
    flags = [SHIPPED, "--keep", "0.3", "--precision", "fp32", "--max_length", "16"]
    whole = answer(capsys, *flags)["plans"][0]["memory"]
    model, _ = trained("stt")
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    found = answer(capsys, *flags, "--gpus", "5", "--shard")["plans"][0]["memory"]
    assert found["communication"] == model.lm_head.weight.nbytes + model.model.norm.weight.nbytes + 2 * layer
    for name in ("weights", "gradients", "optimizer"):
        assert found[name] == pytest.approx(whole[name] / 5, rel=0.02), name
    assert found["peak"] < whole["peak"]


CONFIGS = {
    "llama": (LlamaConfig(dtype="bfloat16", architectures=["LlamaForCausalLM"]), 6_738_415_616),
    "qwen2": (Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                          num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False, dtype="bfloat16",
                          architectures=["Qwen2ForCausalLM"]), 7_615_616_512)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_seven_billion_parameters_in_seconds(name, tmp_path, capsys):
    """From config.json alone; sizes by hand, as published for the dense models."""
    config, dense = CONFIGS[name]
    config.save_pretrained(tmp_path)
    started = time.process_time()  # what it takes on an idle core
    found = answer(capsys, str(tmp_path), "--keep", "0.3", "--gpus", "8", "--max_length", "512")
    assert time.process_time() - started < 30
    kept = round(0.3 * config.intermediate_size)
    projections = 3 * config.hidden_size * config.num_hidden_layers
    parameters, used = found["plans"][0]["parameters"], found["plans"][0]["memory"]
    assert parameters["dense"] == dense
    assert parameters["kept"] == dense - projections * (config.intermediate_size - kept)
    assert parameters["trained_without_head"] == projections * kept
    assert parameters["trained"] == projections * kept + config.hidden_size * config.vocab_size
    assert used["weights"] == 4 * parameters["trained"] + 2 * (parameters["kept"] - parameters["trained"])
    assert used["optimizer"] == 8 * parameters["trained"]


@pytest.mark.parametrize(("flags", "said"), [
    (["no/such/folder/here"], "no model folder"),
    ([SHIPPED, "--keep", "0"], "keep must be in (0, 1], got 0"),
    ([SHIPPED, "--keep", "nan"], "keep must be in (0, 1], got nan"),
    ([SHIPPED, "--keep", "0.3", "--topk_ratio", "0.3"], "keep and topk_ratio are two ways"),
    ([SHIPPED, "--examples", "3", "--tokens", "3"], "examples and tokens are two ways"),
    ([SHIPPED, "--mode", "lora", "--keep", "0.3"], "mode 'lora' keeps everything"),
    ([SHIPPED, "--mode", "lora", "--units", "heads"], "mode 'lora' keeps everything"),
    ([SHIPPED, "--heads_ratio", "0.5"], "give --units heads or both"),
    ([SHIPPED, "--units", "head"], "units"),
    ([SHIPPED, "--mode", "sst"], "sst"),
    ([SHIPPED, "--shard"], "give --gpus"),
    ([SHIPPED, "--gpus", "0"], "gpus must be 1 or more"),
    ([SHIPPED, "--tflops", "0"], "tflops must be a number above 0"),
    ([SHIPPED, "--tflops", "3"], "give --examples or --tokens"),
    ([SHIPPED, "--max_length", "9999"], "passes the 256 positions"),
    ([SHIPPED, "--max_length", "8", "--answer_length", "8"], "answer_length must be below max_length 8"),
])
def test_bad_input_is_one_sentence(flags, said, capsys):
    assert verbs.main(["plan", *flags]) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert output.err.count("\n") == 1
    assert not output.out


def test_a_sliced_model_is_refused(tmp_path, capsys):
    model, _ = trained("stt")
    stt.save(model, tmp_path)
    assert verbs.main(["plan", str(tmp_path)]) == 2
    assert "is already sliced" in capsys.readouterr().err


def test_measured_speed(two_layers, capsys):
    """What is measured here is what numpy's product of the same size reaches, give or take a busy machine."""
    found = answer(capsys, two_layers, "--keep", "0.3", "--max_length", "16", "--examples", "10", "--measure",
                   "--precision", "fp32")
    a = torch.randn(512, 512).numpy()
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    assert 0.1 < found["tflops"] / (2 * 512**3 / min(seconds) / 1e12) < 10
    assert "so it takes longer" in table(found)


def test_sharded_training_drops_gradients():
    """A gradient that is gone at once leaves less at the worst moment, and the same to save."""
    def prepared():
        dense = plan._dense(PlanArgs(SHIPPED, precision="fp32"))
        modes.prepare(modes.find("baseline"), dense, None, modes.Lora(), "train")
        return dense

    batch = Batch(1, 16, 15)
    names = [name for name, _ in prepared().named_parameters()]
    with_all, without = (step_bytes(prepared(), batch, None, passing) for passing in ((), names))
    assert with_all.saved == without.saved
    assert with_all.peak - without.peak > 3_000_000  # most of 4.4 MB
    assert step_flops(prepared(), batch, None) == step_flops(prepared(), Batch(8, 16, 15), None)
