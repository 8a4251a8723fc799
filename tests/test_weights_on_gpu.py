"""Chosen weights on a GPU: as on the CPU in float64; overflows of a loss scaler, bfloat16 masters, a compiled step."""
from __future__ import annotations

import copy
import io

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

import stt
from stt.selective_optimizers.wrap import get_selective_optimizer
from stt.trace import eager_experts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
KINDS = ["llama", "qwen2-tied", "gpt2", "bert", "vit", "mixtral"]
STEPS = 6


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=4, vocab_size=512)
    return LlamaForCausalLM(config).to("cuda", dtype)


def tokens() -> Tensor:
    return torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(1)).cuda()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    with eager_experts(model):  # grouped products know no float64
        found = tiny.outputs(model, {name: value.to(device) for name, value in batch.items()})
    return sum(out.double().square().mean() for out in found)


def attached(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model after some steps of its smallest weights, as leaves."""
    stt.attach(model, stt.select_weights(model, score="smallest", budget="5%"))
    optimizer = AdamW(stt.selected_parameters(model), lr=1e-2)
    for _ in range(STEPS):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    stt.detach(model)
    return state(model)


def wrapped(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model after some steps of ID3."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = get_selective_optimizer(AdamW, "id3")(trained, lr=1e-2, budget=101, max_steps=STEPS - 1, exp=0.5)
    for _ in range(STEPS):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.get_budget_used() == 101
    return state(model)


def wrapped_and_resumed(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model after ID3 with steps that are counted by entry, half of them by an optimizer that took over the state
    as a checkpoint has it, on the CPU."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = None
    for _ in range(2):
        optimizer = get_selective_optimizer(AdamW, "id3")(trained, lr=1e-2, budget=101, max_steps=STEPS - 1,
                                                          bias_correction="entry")
        if saved is not None:
            saved.seek(0)
            optimizer.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
        for _ in range(STEPS // 2):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        saved = io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
    assert optimizer.get_budget_used() == 101
    return state(model)


@pytest.mark.parametrize("train", [attached, wrapped, wrapped_and_resumed])
@pytest.mark.parametrize("kind", KINDS)
def test_as_on_the_cpu(kind: str, train: object) -> None:
    model, batch = tiny.build(kind, torch.float64)
    before, on_gpu = state(model), copy.deepcopy(model).cuda()
    expected, actual = train(model, batch), train(on_gpu, batch)
    for name, tensor in expected.items():
        assert torch.equal(tensor != before[name], actual[name] != before[name]), name
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("method", ["leaf", "id3"])
def test_overflows_of_a_loss_scaler_change_nothing(method: str) -> None:
    model, ids = llama(), tokens()
    before = state(model)
    if method == "leaf":
        stt.attach(model, stt.select_weights(model, score="smallest", budget=500))
        optimizer = AdamW(stt.selected_parameters(model), lr=1e-2)
    else:
        optimizer = get_selective_optimizer(AdamW, "id3")(model.parameters(), lr=1e-2, budget=500, max_steps=4)
    scaler, scales = torch.amp.GradScaler("cuda", init_scale=2.0**40), []
    for _ in range(40):
        with torch.autocast("cuda", torch.float16):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scales.append(scaler.get_scale())
        scaler.update()
        if scaler.get_scale() < scales[-1]:  # it overflowed
            assert all(torch.equal(before[name], value) for name, value in state(model).items() if name in before)
        optimizer.zero_grad()
    assert scales[-1] < scales[0]
    if method == "leaf":
        stt.detach(model)
    moved = sum(int((value != before[name]).sum()) for name, value in state(model).items())
    assert 0 < moved <= 500


def test_bfloat16_keeps_float32_masters_and_its_patch_gives_the_same_model() -> None:
    model, ids = llama(torch.bfloat16), tokens()
    base = copy.deepcopy(model)
    stt.attach(model, stt.select_weights(model, score="largest", budget="2%"))
    assert {parameter.dtype for parameter in stt.selected_parameters(model)} == {torch.float32}
    optimizer = AdamW(stt.selected_parameters(model), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    patch = stt.patch_of(model)
    stt.detach(model)
    patch.apply(base)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_compiled_step_has_no_break_and_is_the_same() -> None:
    models, ids = (llama(), llama()), tokens()
    found = []
    for model, run in zip(models, (lambda model: model, lambda model: torch.compile(model, fullgraph=True)),
                          strict=True):
        stt.attach(model, stt.select_weights(model, score="largest", budget="2%"))
        run(model)(input_ids=ids, labels=ids).loss.backward()
        found.append([parameter.grad for parameter in stt.selected_parameters(model)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)
