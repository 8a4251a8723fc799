"""Mixtures of experts: what is measured of each expert is what a slow loop over its tokens finds."""
from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import stt
from stt import scores
from stt.calibrate import calibrate
from stt.errors import InputError
from stt.sites import find_sites
from tests.architectures.build import build
from tests.architectures.matrix import masked, random_units

Shown = dict[str, dict[int, list[tuple[Tensor, Tensor]]]]  # layer, expert: of each token pre-activation, hidden
def of_mixtral(layer: nn.Module, x: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    gate, up = F.linear(x, layer.gate_up_proj[expert]).chunk(2, -1)
    return gate, F.silu(gate) * up


def of_gpt_oss(layer: nn.Module, x: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    both = x @ layer.gate_up_proj[expert] + layer.gate_up_proj_bias[expert]
    gate, up = both[..., ::2], both[..., 1::2]
    cut = gate.clamp(max=layer.limit)
    return gate, (up.clamp(-layer.limit, layer.limit) + 1) * cut * torch.sigmoid(layer.alpha * cut)


def of_dbrx(layer: nn.Module, x: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    rows = slice(44 * expert, 44 * (expert + 1))
    gate = x @ layer.mlp.w1[rows].T
    return gate, F.silu(gate) * (x @ layer.mlp.v1[rows].T)


ONE_WAY = {"dbrx", "llama4_text"}  # whose experts transformers computes in one way only
REFERENCES = {"mixtral": of_mixtral, "gpt_oss": of_gpt_oss, "dbrx": of_dbrx}


def tokens_of_experts(name: str, model: nn.Module, batch: dict[str, Tensor]) -> Shown:
    """Example by example and token by token: what every expert computes of the real tokens that are sent to it."""
    shown: Shown = {}

    def keep(layer_name: str, layer: nn.Module, args: tuple) -> None:
        hidden, chosen, *_ = args
        for x, experts in zip(hidden.reshape(-1, hidden.shape[-1]), chosen.reshape(len(chosen), -1), strict=True):
            for expert in experts.tolist():
                shown.setdefault(layer_name, {}).setdefault(expert, []).append(REFERENCES[name](layer, x, expert))

    experts = [(key, module) for key, module in model.named_modules() if type(module).__name__.endswith("Experts")]
    hooks = [module.register_forward_pre_hook(lambda layer, args, key=key: keep(key, layer, args))
             for key, module in experts]
    with torch.no_grad():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(input_ids=ids[None, :int(mask.sum())], use_cache=False)
    for hook in hooks:
        hook.remove()
    return shown


@pytest.mark.parametrize("name", REFERENCES)
def test_every_expert_is_measured_on_its_own_tokens(name: str) -> None:
    model, batch = tiny.build(name)
    model.double()
    if name not in ONE_WAY:
        model.set_experts_implementation("eager")
    sites = find_sites(model)
    experts = {site for site in sites if sites[site].form == "experts"}
    assert len(experts) == 8
    assert all(sites[site].is_routed for site in experts)
    found = calibrate(model, sites, [scores.make("activation_mean"), scores.make("contribution")], [batch],
                      progress=False, min_tokens=1)
    shown = tokens_of_experts(name, model, batch)
    assert sum(found.routed.values()) == 2 * 2 * int(batch["attention_mask"].sum())
    for layer, expert in ((layer, expert) for layer, of_layer in shown.items() for expert in of_layer):
        rows = shown[layer][expert]
        site = next(site for site in sites if site.startswith(layer) and site.endswith(f".{expert}"))
        assert found.routed[site] == len(rows)
        gates, hidden = (torch.stack(each) for each in zip(*rows, strict=True))
        torch.testing.assert_close(found.scores[0][site], gates.mean(0), rtol=1e-8, atol=1e-10)
        down = sites[site].members[-1]
        weight = model.get_parameter(down.tensor).detach()
        weight = weight[down.expert] if down.expert is not None else weight
        columns = weight.movedim(down.axis - (down.expert is not None), 0)[down.channels[:, 0]]  # (F, D)
        expected = columns.norm(dim=1) * hidden.square().mean(0).sqrt()
        torch.testing.assert_close(found.scores[1][site], expected, rtol=1e-8, atol=1e-10)


def test_gradients_and_inputs_of_experts() -> None:
    """Taylor, Wanda and the gate product of Mixtral's experts, against the experts' forward written out."""
    model, batch = tiny.build("mixtral")
    model.double().set_experts_implementation("eager")
    sites = find_sites(model)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}  # site: of each call what the expert read, its hidden values

    def written_out(name: str, layer: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert in range(layer.num_experts):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], layer.gate_up_proj[expert]).chunk(2, -1)
            hidden = F.silu(gate) * up
            hidden.retain_grad()
            seen.setdefault(f"{name}.{expert}", []).append((x[token].detach(), hidden))
            result = result.index_add(0, token, F.linear(hidden, layer.down_proj[expert]) * weights[token, place, None])
        return result

    experts = {name: module for name, module in model.named_modules() if name.endswith("experts")}
    for name, module in experts.items():
        module.forward = lambda *args, name=name, module=module: written_out(name, module, *args)
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = ids[None, :int(mask.sum())]
        F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum").backward()
    for module in experts.values():
        del module.forward
    found = calibrate(model, sites, [scores.make(name) for name in ("taylor", "wanda", "gate_product")],
                      [batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}],
                      progress=False, min_tokens=1)
    for site in (site for site in sites if found.routed[site]):
        inputs, hidden = (torch.cat(each) for each in zip(*seen[site], strict=True))
        slopes = torch.cat([h.grad for _, h in seen[site]])
        layer, expert = experts[site.rpartition(".")[0]], int(site.rpartition(".")[2])
        gate = layer.gate_up_proj[expert].detach()[:tiny.NEURONS]
        expected = ((hidden * slopes).abs().sum(0), (gate.abs() * inputs.norm(dim=0)).sum(1), hidden.mean(0))
        for by_site, wanted in zip(found.scores, expected, strict=True):
            torch.testing.assert_close(by_site[site], wanted.detach(), rtol=1e-8, atol=1e-10)


def test_an_expert_with_few_tokens_is_ranked_by_magnitude() -> None:
    model, batch = tiny.build("mixtral")
    sites = find_sites(model)
    few, some = (calibrate(model, sites, [scores.make("contribution"), scores.make("magnitude")], [batch],
                           progress=False, min_tokens=n) for n in (10**6, 1))
    for site in sites:
        assert torch.equal(few.scores[0][site], few.scores[1][site])
        assert torch.equal(some.scores[0][site], some.scores[1][site]) == (some.routed[site] == 0)


# ---------------------------------------------------------------- slicing


@pytest.mark.parametrize(("name", "experts"), [
    (name, experts) for name in tiny.MIXTURES for experts in ("eager", "batched_mm", "grouped_mm")
    if experts == "eager" or name not in ONE_WAY])
def test_sliced_experts_equal_masked_ones(name: str, experts: str) -> None:
    """With every way transformers computes them; a grouped product takes widths of whole 16 bytes."""
    model, batch = tiny.build(name)
    units = random_units(find_sites(model))
    if name not in ONE_WAY:
        model.set_experts_implementation(experts)
    with torch.no_grad():
        dense, expected = tiny.outputs(model, batch), tiny.outputs(masked(model, find_sites(model), units), batch)
        actual = tiny.outputs(stt.apply(model, units), batch)
    for one, other, whole in zip(actual, expected, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, other.abs().max().item()))
        assert (whole - other).abs().max() > 1e-2  # else the mask proves nothing


@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_sliced_experts_train_and_reload(name: str, tmp_path: Path) -> None:
    model, batch = tiny.build(name)
    stt.apply(model, random_units(find_sites(model)))
    trained = stt.train_only(model, head="freeze")
    assert any("experts" in parameter for parameter in trained)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(**batch).logits.square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(trained)
    stt.save(model, tmp_path / "checkpoint")
    loaded = stt.load(tmp_path / "checkpoint")
    with torch.no_grad():
        for one, other in zip(tiny.outputs(loaded, batch), tiny.outputs(model.eval(), batch), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)  # products depend on where a weight lies
    for (key, value), wanted in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), key


def test_experts_of_one_stack_keep_equally_many() -> None:
    model, _ = tiny.build("mixtral")
    sites = find_sites(model)
    units = {name: torch.arange(8 + i % 2) for i, name in enumerate(sites)}
    with pytest.raises(InputError, match="share one tensor: keep equally many"):
        stt.apply(model, units)
    assert model.model.layers[0].mlp.experts.down_proj.shape[-1] == 44


def test_a_selection_of_experts_says_how_many_tokens_each_saw() -> None:
    model, batch = tiny.build("mixtral")
    for score, keep in (("stt", None), ("contribution", 0.4), ("stt", 0.4)):
        selection = stt.select(model, [batch], score=score, keep=keep, min_tokens=2)
        sizes = {site.rpartition(".")[0]: set() for site in selection}
        for site, ids in selection.items():
            sizes[site.rpartition(".")[0]].add(len(ids))
        assert all(len(of_stack) == 1 and of_stack.pop() % 8 == 0 for of_stack in sizes.values())
        assert sum(selection.meta["routed_tokens"].values()) == 2 * 2 * int(batch["attention_mask"].sum())
        assert selection.meta["min_tokens"] == 2
    stt.apply(model, selection)
    assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("min_tokens", [-1, 1.5, True, "8"])
def test_a_least_number_of_tokens_that_is_none(min_tokens: object) -> None:
    model, batch = tiny.build("mixtral")
    with pytest.raises(InputError, match=f"min_tokens must be a whole number of 0 or more, got {min_tokens}"):
        stt.select(model, [batch], min_tokens=min_tokens)


def test_experts_are_not_compensated() -> None:
    model, batch = tiny.build("mixtral")
    with pytest.raises(InputError, match="cannot be compensated .experts.*compensate=\"none\""):
        stt.select(model, [batch], score="contribution", keep=0.4, compensate="lstsq")


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_lora_of_peft_on_sliced_experts(name: str) -> None:
    """Adapters on the stacked tensors: they learn, and merged the model gives the same outputs."""
    model, batch = tiny.build(name)
    stt.apply(model, random_units(find_sites(model)))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=[], target_parameters=[
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    logits = adapted(**batch).logits
    logits.square().mean().backward()
    gradients = {key: p.grad for key, p in adapted.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 2 * 2  # A and B of two tensors of two layers
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    with torch.no_grad():
        torch.testing.assert_close(adapted.merge_and_unload()(**batch).logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("model_type", "is_routed"), [
    ("switch_transformers", True), ("nllb-moe", True), ("mobilevitv2", False), ("swin", False), ("convnext", False)])
def test_experts_in_a_list_are_told_from_stages_of_a_network(model_type: str, is_routed: bool) -> None:
    routed = {name: site.is_routed for name, site in find_sites(build(model_type).model).items()}
    assert any(routed.values()) == is_routed
    assert all(value == ("expert" in name) for name, value in routed.items())
