"""`stt plan` of the modes that remove nothing, against training steps that were really made."""
from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planning import SHIPPED, B, L, T, answer, as_config, loss_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import stt
from benchmarks import memory
from benchmarks.weights import Row, state_and_rest
from stt import modes, plan, verbs
from stt.llm_arguments import LLMArgs
from stt.plan_table import table
from stt.selective_optimizers import recipe
from stt.selective_optimizers.leaf import Leaf
from util.torch_flops import training_flops

STEPS = 6
FLAGS = {"train_in_place": ["--keep", "0.3"], "pafi": ["--budget", "5%"], "random_weights": ["--budget", "5%"],
         "bitfit": ["--include_norm"], "id3": ["--budget", "5%"]}


def llama(words: int = 900, width: int = 64, layers: int = 2) -> nn.Module:
    """A decoder without biases, whose head is its own."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                                        vocab_size=words, num_attention_heads=4, num_key_value_heads=2,
                                        dtype="float32"))


def bert() -> nn.Module:
    """A classifier with biases that are no longer 0, which the smallest weights of a new model are."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                                                     vocab_size=900, num_attention_heads=4, max_position_embeddings=T,
                                                     hidden_dropout_prob=0, attention_probs_dropout_prob=0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def shipped() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)


MODELS = {"llama": llama, "bert": bert, "shipped": shipped}


def bert_loss(model: nn.Module, precision: str) -> Callable[..., Tensor]:
    """As the plan counts a classifier: the cross-entropy of its logits."""
    model.train()

    def loss(examples: int = B) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=torch.randint(3, 90, (examples, T))).logits
            return nn.functional.cross_entropy(logits.float(), torch.zeros(examples, dtype=torch.long))
    return loss


def prepared(model: nn.Module, mode: str, head: str, flags: list[str]) -> torch.optim.Optimizer:
    """The model as the recipes prepare it, and its optimizer. Growing ones are taken to their last step but one."""
    budget = flags[1] if flags[0] == "--budget" else None
    args = LLMArgs(mode=mode, head=head, budget=budget, include_norm="--include_norm" in flags, lr=1e-3)
    row = modes.find(mode)
    if row.trains == "growing":
        recipe.prepare(model, None, head)
        return recipe.Growing(args)(model, STEPS)
    selection = stt.select(model, score="magnitude", keep=0.3) if row.chooses_units else \
        recipe.choose(model, row.score, args)
    recipe.prepare(model, selection, head)
    return torch.optim.AdamW(stt.selected_parameters(model))


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of AdamW's state without its step counters, and of what is held of the chosen weights beside it: with a
    counter for each."""
    leaves = [module for module in model.modules() if isinstance(module, Leaf)]
    state, rest = state_and_rest(Row(model, optimizer, [leaf.ids for leaf in leaves]))
    inner = getattr(optimizer, "_trainer", optimizer)
    counters = [entry["step"] for entry in inner.state.values()]
    return (state - sum(counter.nbytes for counter in counters),
            rest + sum(counter.nbytes for counter in counters if counter.dim()))


def compared(found: dict, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[..., Tensor],
             rel: float, peak_rel: float = 0.03) -> None:
    """The plan is what a step takes; `rel` is how far off the numbers of tensors that are chosen whole may be."""
    assert B * found["flops"]["training_example"] == training_flops(model, {}, lambda *_: loss())

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    saved = memory.saved_bytes(model, loss)
    loss().backward()
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    optimizer.zero_grad()
    for _ in range(STEPS - 1):
        step()
    before = memory.parameter_bytes(model) + sum(held(model, optimizer))
    peak = before + memory.extra_bytes(torch.device("cpu"), step)
    state, rest = held(model, optimizer)
    planned = found["memory"]
    assert planned["weights"] == pytest.approx(memory.parameter_bytes(model), rel=rel)
    assert planned["gradients"] == gradients
    assert planned["optimizer"] == state
    assert planned["chosen"] == pytest.approx(rest, rel=10 * rel)
    assert planned["activations"] == pytest.approx(saved, rel=0.01)
    assert planned["peak"] == pytest.approx(peak, rel=peak_rel)


def planned(model: nn.Module, mode: str, head: str, precision: str, folder: Path, capsys: pytest.CaptureFixture,
            *flags: str) -> dict:
    as_config(model, folder)
    return answer(capsys, str(folder), "--mode", mode, *flags, "--head", head, "--precision", precision,
                  "--train_batch", str(B), "--max_length", str(T), "--answer_length", str(L))["plans"][0]


SLOW = [pytest.param("shipped", mode, *how, marks=pytest.mark.slow) for mode in FLAGS
        for how in (("train", "bf16"), ("freeze", "fp32"), ("untie", "bf16"))]


@pytest.mark.parametrize(("name", "mode", "head", "precision"), [
    *(("llama", mode, "train", "bf16") for mode in FLAGS), *(("bert", mode, "train", "fp32") for mode in FLAGS), *SLOW])
def test_everything_is_as_in_a_real_step(name, mode, head, precision, tmp_path, capsys):
    """Whatever rounds to half precision is stored in it: the llama."""
    model = MODELS[name]()
    if precision == "bf16" and name == "llama":
        model.config.dtype = torch.bfloat16
        model = model.to(torch.bfloat16)
    found = planned(model, mode, head, precision, tmp_path, capsys, *FLAGS[mode])
    total = sum(parameter.numel() for parameter in model.parameters())
    optimizer = prepared(model, mode, head, FLAGS[mode])
    assert found["parameters"]["dense"] == total
    compared(found, model, optimizer, (bert_loss if name == "bert" else loss_of)(model, precision),
             0.01 if mode == "pafi" else 0)


@pytest.mark.parametrize(("size", "budget", "head"), [((30000, 32, 1), "0.5%", "train"),
                                                      pytest.param((900, 128, 4), "60%", "freeze",
                                                                   marks=pytest.mark.slow)])
def test_a_step_that_chooses(size, budget, head, tmp_path, capsys):
    """Where scores, or putting the chosen weights in order, take more than the forward and backward pass."""
    model = llama(*size)
    found = planned(model, "id3", head, "fp32", tmp_path, capsys, "--budget", budget, "--examples", str(B * STEPS))
    optimizer = prepared(model, "id3", head, ["--budget", budget])
    compared(found, model, optimizer, loss_of(model, "fp32"), 0, 0.05)


def test_where_the_biases_end(tmp_path, capsys):
    """The first of the model up to the budget; a head is no part of it."""
    model = bert()
    found = planned(model, "bitfit", "freeze", "fp32", tmp_path, capsys, "--budget", "1000")
    optimizer = prepared(model, "bitfit", "freeze", ["--budget", "1000"])
    assert found["parameters"]["trained"] == found["parameters"]["trained_without_head"] == 1000
    compared(found, model, optimizer, bert_loss(model, "fp32"), 0)


def test_the_budget_of_the_recipes(tmp_path, capsys):
    """Where none is given: another one for a shipped model."""
    as_config(llama(), tmp_path)
    for folder, share in ((SHIPPED, 0.02), (str(tmp_path), 0.002)):
        found = answer(capsys, folder, "--mode", "random_weights", "--max_length", "16")
        dense = found["plans"][0]["parameters"]["dense"]
        assert found["plans"][0]["parameters"]["trained_without_head"] == round(share * dense)
        assert f"with a budget of {share:.1%}, bf16".replace(".0", "") in table(found)


def test_the_union_is_a_range_in_place(tmp_path, capsys):
    as_config(llama(), tmp_path)
    found = answer(capsys, str(tmp_path), "--mode", "train_in_place", "--max_length", "16", "--units", "both")
    least, most = (plan["parameters"] for plan in found["plans"])
    assert least["kept"] == most["kept"] == least["dense"]
    assert least["trained"] < most["trained"] < least["kept"]
    assert re.search(r"neurons trained +29\.7 % +59\.4 %", table(found))
    assert re.search(r"heads trained +50\.0 % +50\.0 %", table(found))


def test_what_does_not_fit_is_not_sharded(tmp_path, monkeypatch, capsys):
    as_config(llama(), tmp_path)
    monkeypatch.setattr(plan, "CARDS", (1e-6, 24))
    found = answer(capsys, str(tmp_path), "--mode", "pafi", "--gpus", "2", "--max_length", "16")
    assert found["plans"][0]["memory"]["communication"] == found["plans"][0]["memory"]["gradients"]
    assert "does not fit; take a larger one, a smaller --max_length" in table(found)
    assert "shard" not in table(found)


@pytest.mark.parametrize(("flags", "said"), [
    (["--mode", "pafi", "--keep", "0.3"], "mode 'pafi' keeps everything; give --budget"),
    (["--mode", "id3", "--units", "heads"], "mode 'id3' keeps everything; give --budget"),
    (["--mode", "train_in_place", "--budget", "5"], "budget is about single weights"),
    (["--mode", "stt", "--budget", "0.2%"], "budget is about single weights"),
    (["--mode", "pafi", "--budget", "0"], "budget must be a number of weights"),
    (["--mode", "id3", "--budget", "lots"], "budget must be a number of weights"),
    (["--mode", "id3", "--budget", "99999999"], "budget must be at most"),
    (["--mode", "pafi", "--budget", "100%"], "weights outside the head: lower it"),
    (["--mode", "pafi", "--include_norm"], "include_norm is about the biases of mode 'bitfit'"),
    (["--mode", "bitfit", "--budget", "50%"], "biases: lower it"),
    (["--mode", "bitfit", "--gpus", "2", "--shard"], "shard divides what mode 'bitfit' trains in place"),
    (["--mode", "paffi"], "Did you mean 'pafi'")])
def test_bad_input_is_one_sentence(flags, said, capsys):
    assert verbs.main(["plan", SHIPPED, *flags]) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert output.err.count("\n") == 1
    assert not output.out


def test_a_model_without_biases(tmp_path, capsys):
    as_config(llama(), tmp_path)
    assert verbs.main(["plan", str(tmp_path), "--mode", "bitfit", "--max_length", "16"]) == 2
    assert "the model has none: give --include_norm" in capsys.readouterr().err
