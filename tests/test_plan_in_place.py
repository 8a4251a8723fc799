"""`stt plan` of the modes that remove nothing, against training steps that were really made."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import small_runs
import torch
from planning import SHIPPED, B, L, T, answer, as_config, loss_of
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import stt
from benchmarks import memory
from benchmarks.weights import Row, state_and_rest
from stt import modes, verbs
from stt.llm_arguments import LLMArgs
from stt.selective_optimizers import recipe
from stt.selective_optimizers.leaf import Leaf
from stt.selective_optimizers.weights import named_tensors
from util.torch_flops import training_flops

STEPS = 3
FLAGS = {"train_in_place": ["--keep", "0.3"], "pafi": ["--budget", "5%"], "random_weights": ["--budget", "5%"],
         "bitfit": ["--include_norm"], "id3": ["--budget", "5%"]}


def llama() -> nn.Module:
    """A decoder without biases, whose head is its own."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=176, num_hidden_layers=2, vocab_size=900,
                                        num_attention_heads=4, num_key_value_heads=2, dtype="float32"))


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                                                    vocab_size=900, num_attention_heads=4, max_position_embeddings=T,
                                                    hidden_dropout_prob=0, attention_probs_dropout_prob=0))


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
    """Bytes of AdamW's state without its step counters, and of what is held of the chosen weights beside it."""
    leaves = [module for module in model.modules() if isinstance(module, Leaf)]
    state, rest = state_and_rest(Row(model, optimizer, [leaf.ids for leaf in leaves]))
    inner = getattr(optimizer, "_trainer", optimizer)
    pools = getattr(optimizer, "_pools", [])
    gradients = sum(cohort.grad.nbytes for pool in pools for cohort in pool.cohorts)
    return state - 4 * len(inner.state), rest + gradients


def compared(found: dict, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[..., Tensor]) -> None:
    """The plan is what a step takes."""
    assert B * found["flops"]["training_example"] == training_flops(model, {}, lambda *_: loss())

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    saved = memory.saved_bytes(model, loss)
    for _ in range(STEPS - 1):
        step()
    peak = memory.parameter_bytes(model) + memory.extra_bytes(torch.device("cpu"), step)
    state, rest = held(model, optimizer)
    planned = found["memory"]
    assert planned["weights"] == memory.parameter_bytes(model)
    assert planned["gradients"] == memory.gradient_bytes(model)
    assert planned["optimizer"] == state
    assert planned["chosen"] == rest
    assert planned["activations"] == pytest.approx(saved, rel=0.01)
    print("PEAK", planned["peak"], peak + state + rest, planned["peak"] / (peak + state + rest))
    assert planned["peak"] == pytest.approx(peak + state + rest, rel=0.03)


@pytest.mark.parametrize("mode", FLAGS)
@pytest.mark.parametrize(("name", "head", "precision"), [
    ("shipped", "train", "bf16"), ("shipped", "freeze", "fp32"), ("shipped", "untie", "bf16"), ("llama", "train", "fp32"), ("llama", "train", "bf16"), ("bert", "train", "fp32")])
def test_everything_is_as_in_a_real_step(mode, name, head, precision, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32) if name == "shipped" else \
        {"llama": llama, "bert": bert}[name]()
    if precision == "bf16" and name == "llama":
        model.config.dtype = torch.bfloat16
        model = model.to(torch.bfloat16)
    as_config(model, tmp_path)
    flags = FLAGS[mode]
    found = answer(capsys, str(tmp_path), "--mode", mode, *flags, "--head", head, "--precision", precision,
                   "--train_batch", str(B), "--max_length", str(T), "--answer_length", str(L))["plans"][0]
    optimizer = prepared(model, mode, head, flags)
    with capsys.disabled():
        print()
        print(mode, name, head, precision)
        compared(found, model, optimizer, (bert_loss if name == "bert" else loss_of)(model, precision))
