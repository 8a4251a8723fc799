"""Blocks of structures no real architecture has: found exactly, or refused with the reason."""
from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import tiny
import torch
from test_sites import described
from tiny import HIDDEN, NEURONS
from torch import Tensor, nn
from torch.nn import functional as F

import stt
from stt import scores
from stt.calibrate import calibrate
from stt.errors import InputError
from stt.sites import find_sites
from tests.architectures.build import build


def up_first(x: Tensor, fused: nn.Linear) -> Tensor:
    up, gate = fused(x).chunk(2, -1)
    return up * F.silu(gate)


def pairs(x: Tensor, fused: nn.Linear) -> Tensor:
    y = fused(x)
    return F.silu(y[..., ::2]) * y[..., 1::2]


def relu_pairs_up_first(x: Tensor, fused: nn.Linear) -> Tensor:
    y = fused(x)
    return y[..., ::2] * F.relu(y[..., 1::2])


ONE, TWO, FUSED_TWO = [(HIDDEN, NEURONS)], [(HIDDEN, NEURONS)] * 2, [(HIDDEN, 2 * NEURONS)]
DOWN = [(NEURONS, HIDDEN)]
RANGE = list(range(NEURONS))


@pytest.mark.parametrize(("shapes", "middle", "kind", "gate_module", "gate"), [
    (FUSED_TWO, up_first, "glu_fused", "0", [NEURONS + i for i in RANGE]),
    (FUSED_TWO, pairs, "glu_fused", "0", [2 * i for i in RANGE]),
    (FUSED_TWO, relu_pairs_up_first, "glu_fused", "0", [2 * i + 1 for i in RANGE]),
    (TWO, lambda x, a, b: a(x) * F.relu(b(x)), "glu", "1", RANGE),
    (TWO, lambda x, a, b: F.relu(a(x)) * b(x), "glu", "0", RANGE),
    (TWO, lambda x, a, b: a(x) * F.relu(b(x)).square(), "glu", "1", RANGE),
    (TWO, lambda x, a, b: a(x) * b(x).sigmoid(), "glu", "1", RANGE),
    (TWO, lambda x, a, b: a(x) * b(x), "glu", "0", RANGE),  # bilinear: neither bends, the first counts
    (ONE, lambda x, a: F.softplus(a(x)), "plain", "0", RANGE),  # not 0 at 0
    (ONE, lambda x, a: a(x), "plain", "0", RANGE),
], ids=["up-first", "pairs", "relu-pairs", "relu-second", "relu-first", "relu2", "sigmoid", "bilinear", "softplus",
        "linear"])
def test_gate_and_channels_of_unusual_blocks(shapes: list, middle: Callable, kind: str, gate_module: str,
                                             gate: list) -> None:
    model, _ = tiny.toy(shapes + DOWN, middle)
    for site in find_sites(model).values():
        assert (site.kind, site.gate_module[-1], site.gate.tolist()) == (kind, gate_module, gate)


class ScaledBlock(tiny.Block):
    def __init__(self) -> None:
        super().__init__(ONE + DOWN, lambda x, a: a(x))
        self.scale = nn.Parameter(torch.rand(NEURONS))
        self.middle = lambda x, a: F.gelu(a(x)) * self.scale


class RolledBlock(ScaledBlock):
    """A parameter as wide as the block that does not belong to its neurons one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = lambda x, a: F.gelu(a(x)) * (self.scale + self.scale.roll(1))


def test_a_layer_that_is_used_in_parts_is_refused() -> None:
    class Parts(tiny.Block):
        def forward(self, x: Tensor) -> Tensor:
            first, second = self.linears[1].weight.chunk(2, 1)
            return F.linear(F.gelu(self.linears[0](x)), first) + F.linear(torch.sin(x[..., :20]), second)

    with pytest.raises(InputError, match="used elsewhere"):
        find_sites(tiny.Toy(lambda: Parts([(HIDDEN, 20), (40, HIDDEN)], lambda x, a: x)))


def test_a_parameter_of_every_neuron_goes_with_it() -> None:
    model, batch = tiny.Toy(ScaledBlock), {"input_ids": torch.arange(14).view(2, 7)}
    sites = find_sites(model)
    assert [(site.form, [member.tensor for member in site.along]) for site in sites.values()] == \
        [("conv", [f"layers.{i}.scale"]) for i in (0, 1)]
    kept = torch.tensor([0, 3, 5, 40])
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for layer in masked.layers:
            layer.linears[1].weight[:, ~torch.isin(torch.arange(NEURONS), kept)] = 0
        expected = masked(**batch)["logits"]
        stt.apply(model, dict.fromkeys(sites, kept))
        torch.testing.assert_close(model(**batch)["logits"], expected, rtol=0, atol=1e-6)
    assert model.layers[0].scale.shape == (4,)


def test_one_number_a_position_is_no_part_of_the_block() -> None:
    model, _ = tiny.toy(ONE + [(HIDDEN, 1)] + DOWN, lambda x, a, b: F.gelu(a(x)) * b(x).sigmoid())
    assert [[member.module for member in site.members] for site in find_sites(model).values()] == \
        [[f"layers.{i}.linears.0", f"layers.{i}.linears.2"] for i in (0, 1)]


@pytest.mark.parametrize(("shapes", "middle", "reason"), [
    (ONE, lambda x, a: F.layer_norm(a(x), (NEURONS,)), "mixes neurons"),
    (ONE, lambda x, a: a(x) * a(x).mean(-1, keepdim=True), "used elsewhere|mixes neurons"),
    (ONE, lambda x, a: F.gelu(a(x)).roll(3, -1), "change places"),
    (ONE, lambda x, a: F.gelu(a(x)).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2), "change places"),
    (ONE, lambda x, a: F.gelu(a(x)) + F.gelu(a(2 * x)), "used elsewhere"),
    (ONE, lambda x, a: F.gelu(a(x)).cumsum(1), "mixes positions"),
], ids=["norm", "mean", "roll", "shuffle", "called-twice", "mixes-tokens"])
def test_inexact_blocks_are_refused_with_the_reason(shapes: list, middle: Callable, reason: str) -> None:
    model, _ = tiny.toy(shapes + DOWN, middle)
    with pytest.raises(InputError, match=reason):
        find_sites(model)


def test_a_neuron_that_also_reaches_both_its_neighbours_is_refused() -> None:
    """On average every channel reaches its own place: only the third probe tells."""
    spread = torch.eye(NEURONS)
    inner = torch.arange(1, NEURONS - 1)
    spread[inner, inner - 1] = spread[inner, inner + 1] = 0.5
    with pytest.raises(InputError, match="mixes neurons"):
        find_sites(tiny.toy(ONE + DOWN, lambda x, a: a(x) @ spread)[0])


def test_more_kinds_of_refusal() -> None:
    with pytest.raises(InputError, match="reads the parameter layers.0.scale"):
        find_sites(tiny.Toy(RolledBlock))
    concatenated, _ = tiny.toy(TWO + [(2 * NEURONS, HIDDEN)], lambda x, a, b: torch.cat([F.gelu(a(x)), b(x)], -1))
    with pytest.raises(InputError, match="channel counts"):
        find_sites(concatenated)


def test_activation_that_leaves_the_block_is_no_site() -> None:
    class Leaking(tiny.Block):
        def forward(self, x: Tensor) -> Tensor:
            hidden = F.gelu(self.linears[0](x))
            return self.linears[1](hidden) + hidden[..., :HIDDEN]

    with pytest.raises(InputError, match="no feed-forward site"):
        find_sites(tiny.Toy(lambda: Leaking(ONE + DOWN, lambda x, a: x)))


def test_two_blocks_never_share_a_projection() -> None:
    model, _ = tiny.toy(ONE + [(NEURONS, NEURONS)] + DOWN, lambda x, a, b: F.gelu(b(F.gelu(a(x)))))
    sites = find_sites(model)
    used = [member.module for site in sites.values() for member in site.members]
    assert len(sites) == 2
    assert len(set(used)) == len(used)
    assert sites.lost


def test_activation_that_is_returned_is_no_site() -> None:
    class Returning(tiny.Toy):
        def forward(self, input_ids: Tensor, **_: object) -> dict[str, Tensor]:
            x = self.embedding(input_ids)
            hidden = [F.gelu(layer.linears[0](x)) for layer in self.layers]
            return {"logits": self.head(x + self.layers[0].linears[1](hidden[0])
                                        + self.layers[1].linears[1](hidden[1])), "hidden": hidden[1]}

    assert list(find_sites(Returning(lambda: tiny.Block(ONE + DOWN, lambda x, a: x)))) == ["layers.0.linears"]


def test_forward_may_ask_a_weight_for_its_device_and_draw_random_numbers() -> None:
    class Curious(tiny.Toy):
        def forward(self, input_ids: Tensor, **options: object) -> dict[str, Tensor]:
            noise = torch.rand(input_ids.shape, device=self.head.weight.device) > 2
            return super().forward(input_ids + noise.to(self.device), **options)

    model = Curious(lambda: tiny.Block(ONE + DOWN, lambda x, a: F.gelu(a(x))))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    expected = [described(site) for site in find_sites(model).values()]
    assert torch.equal(torch.get_rng_state(), before)
    model.__dict__.pop("_stt_sites")
    assert [described(site) for site in find_sites(model.to("meta")).values()] == expected


@pytest.mark.parametrize("share", ["module", "weight"])
def test_tied_layers_in_two_places_are_one_site(share: str) -> None:
    """Each place must become narrow: the outputs are those of the dense model with the other neurons masked."""
    model, batch = tiny.toy(ONE + DOWN, lambda x, a: F.gelu(a(x)))
    first, second = (layer.linears for layer in model.layers)
    if share == "module":
        second[0], second[1] = first[0], first[1]
    else:
        second[0].weight, second[1].weight = first[0].weight, first[1].weight
    if share == "weight":
        second[0].bias, second[1].bias = first[0].bias, first[1].bias
    sites = find_sites(model)
    assert [(name, site.form, site.calls) for name, site in sites.items()] == [("layers.0.linears", "shared", 2)]
    shown = []
    hooks = [linear.register_forward_hook(lambda layer, args, output: shown.append(output.flatten(0, 1)))
             for linear in dict.fromkeys((first[0], second[0]))]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    found = calibrate(model, sites, [scores.make("activation_mean")], [batch], progress=False)
    torch.testing.assert_close(found.scores[0]["layers.0.linears"], torch.cat(shown).double().mean(0))
    assert len(shown) == 2
    kept = torch.tensor([0, 3, 5, 40])
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.layers[0].linears[1].weight[:, ~torch.isin(torch.arange(NEURONS), kept)] = 0
        expected = masked(**batch)["logits"]
        stt.apply(model, {"layers.0.linears": kept})
        torch.testing.assert_close(model(**batch)["logits"], expected, rtol=0, atol=1e-6)
    assert {tuple(linear.weight.shape) for layer in model.layers for linear in layer.linears} == {(4, 32), (32, 4)}


def test_one_block_called_twice_is_one_site() -> None:
    model, _ = tiny.toy(ONE + DOWN, lambda x, a: F.gelu(a(x)))
    model.layers[1] = model.layers[0]
    assert list(find_sites(model)) == ["layers.0.linears"]


def test_small_side_blocks_are_left_out_by_name() -> None:
    class WithAdapter(tiny.Block):
        def __init__(self) -> None:
            super().__init__(ONE + DOWN, lambda x, a: F.gelu(a(x)))
            self.adapter = nn.ModuleList([nn.Linear(HIDDEN, 4), nn.Linear(4, HIDDEN)])

        def forward(self, x: Tensor) -> Tensor:
            x = F.layer_norm(x + super().forward(x), (HIDDEN,))
            return self.adapter[1](self.adapter[0](x).relu())

    sites = find_sites(tiny.Toy(WithAdapter))
    assert list(sites) == ["layers.0.linears", "layers.1.linears"]
    assert [(entry.name, entry.reason) for entry in sites.left_out] == \
        [(f"layers.{i}.adapter", "a small side block") for i in (0, 1)]


class WithStack(tiny.Block):
    """A feed-forward block, and beside it a stack of matrices that is multiplied entry by entry."""

    def __init__(self, experts: int) -> None:
        super().__init__(ONE + DOWN, lambda x, a: F.gelu(a(x)))
        self.stack = nn.Parameter(torch.randn(experts, HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x[..., None, :, None] * self.stack).sum(-2).mean(-2)


@pytest.mark.parametrize(("experts", "is_loss"), [(2, False), (4, True)])
def test_a_stack_of_no_known_structure_is_a_loss_if_it_is_most_of_its_layer(experts: int, is_loss: bool) -> None:
    sites = find_sites(tiny.Toy(lambda: WithStack(experts)))
    assert len(sites) == 2
    assert [(entry.reason, entry.is_loss) for entry in sites.left_out] == \
        [("a stack of weights of no known structure", is_loss)] * 2


def test_a_block_that_shows_nothing_by_itself_leaves_no_reason_behind() -> None:
    """Nothing can be made up for the whole model, and of its attention alone rows of no batch make no sense."""
    sites = find_sites(build("siglip2").model)
    assert [name.rpartition(".")[2] for name in sites] == ["mlp", "mlp"]
    assert not sites.lost
    assert not [entry.name for entry in sites.left_out if "attn" in entry.name]


def test_rows_for_every_codebook_are_made_up() -> None:
    """So nothing of it was looked at by itself: its heads are called."""
    assert not find_sites(build("musicgen_melody").model).left_out


def test_what_follows_a_shared_block_is_no_loss() -> None:
    """A projection of what the block returns, in the layer that calls it again."""
    sites = find_sites(build("zamba").model)
    assert not sites.lost
    assert "model.layers.3.linear" in {entry.name for entry in sites.left_out}


def test_of_a_chain_every_other_projection_is_in_a_block() -> None:
    """Convolutions of one pixel with a depthwise one and a ReLU6 between each two."""
    sites = find_sites(build("mobilenet_v1").model)
    used = [member.tensor for site in sites.values() for member in site.members]
    assert len(used) == len(set(used)) == 12  # of 13


def test_a_dense_block_beside_experts_is_no_side_block() -> None:
    """Neither is a stack of experts, each of which is small beside a dense block; a router's own block is one."""
    sites = find_sites(build("longcat_flash").model)
    assert [name.removeprefix("model.layers.0.") for name in sites if ".0." in name[:15]] == \
        [*(f"mlp.experts.{expert}" for expert in range(4)), "mlps.0", "mlps.1"]
    left_out = find_sites(build("zaya").model).left_out
    assert {entry.reason for entry in left_out if entry.name.endswith("router_mlp")} == {"a small side block"}


def test_a_block_outside_the_layers_that_was_not_called_is_named() -> None:
    left_out = find_sites(build("voxtral").model).left_out
    assert [(entry.name, entry.reason, entry.is_loss) for entry in left_out] == \
        [("model.multi_modal_projector", "outside the repeated layers", False)]
