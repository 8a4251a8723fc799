"""Feed-forward blocks with convolutions are measured, selected and trained like any other."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stt
from stt import scores
from stt.calibrate import calibrate
from stt.sites import find_sites
from tests.architectures.build import build

TYPES = ("mobilenet_v2", "poolformer", "segformer", "pvt_v2", "swiftformer", "mobilevitv2")


def channels_last(module: nn.Module, value: Tensor) -> Tensor:
    """(N, C): a convolution's channels stand in front."""
    is_conv = isinstance(module, nn.Conv1d | nn.Conv2d)
    return (value.flatten(2).transpose(1, 2) if is_conv else value).reshape(-1, module_width(module, value))


def module_width(module: nn.Module, value: Tensor) -> int:
    return value.shape[1] if isinstance(module, nn.Conv1d | nn.Conv2d) else value.shape[-1]


@pytest.mark.parametrize("model_type", TYPES)
def test_statistics_equal_those_of_the_tensors_themselves(model_type: str) -> None:
    built = build(model_type)
    model, sites = built.model, find_sites(built.model)
    assert {site.form for site in sites.values()} == {"conv"}
    outputs, inputs = {}, {}
    for site in sites.values():
        gate, down = model.get_submodule(site.gate_module), model.get_submodule(site.down_module)
        gate.register_forward_hook(lambda module, _, y, name=site.name: outputs.update({name: (module, y)}))
        down.register_forward_hook(lambda module, args, _, name=site.name: inputs.update({name: (module, args[0])}))
    with torch.no_grad():
        model(**built.inputs)
    found = calibrate(model, sites, [scores.make("activation_mean"), scores.make("contribution")], [built.inputs],
                      progress=False, count_padding=True)
    for name in sites:
        means = channels_last(*outputs[name]).double().mean(0)
        torch.testing.assert_close(found.scores[0][name], means, rtol=1e-5, atol=1e-6)
        down, read = inputs[name]
        columns = down.weight.detach().flatten(1).double().norm(dim=0)
        expected = columns * channels_last(down, read).double().square().mean(0).sqrt()
        torch.testing.assert_close(found.scores[1][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", TYPES)
def test_selected_applied_and_trained(model_type: str) -> None:
    built = build(model_type)
    model = built.model
    selection = stt.select(model, [built.inputs], score="contribution", keep=0.5, count_padding=True)
    stt.apply(model, selection)
    trained = stt.train_only(model, head="freeze")
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.eval()(**built.inputs)[0].square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert changed <= set(trained)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)
