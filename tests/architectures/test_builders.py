"""The tiny models are what they say: finite, the same every time, nothing in them idle or without effect unseen."""
from __future__ import annotations

import pytest
import torch

from .__main__ import reloaded, row, run
from .build import STATISTICS, Built, build, with_experts
from .overrides import NO_EFFECT, NOT_BUILDABLE, NOT_RUN, NOT_WIDTHS, OVERRIDES
from .rules import HIDDEN, SIZES, VOCABULARY
from .types import MAPPINGS, config_class, model_class, model_types

BUILDABLE = [name for name in model_types() if name not in NOT_BUILDABLE]
SAMPLE = ("albert", "bart", "bert", "blt", "convnextv2", "dbrx", "deepseek_v3", "gemma3", "gemma4", "gpt2", "gpt_oss",
          "jamba", "llama", "mixtral", "modernvbert", "phi4_multimodal", "qwen2_audio", "qwen2_moe", "segformer",
          "siglip", "swin", "t5", "vibevoice", "vit", "wav2vec2", "whisper", "zamba2")
NOT_RELOADED = {"pixio"}  # its own final norm is saved twice under names of which only one is loaded
every_type = pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in BUILDABLE])


def _holds_a_width(built: Built, shape: torch.Size) -> bool:
    """Whether an axis is a feed-forward width, the double of one (fused) or four of them (stacked experts)."""
    return any(size in (width, 2 * width, 4 * width) for width in built.widths.values() for size in shape)


def test_every_type_of_the_mappings_is_listed_once():
    names = model_types()
    assert names == sorted(set(names)) == sorted({name for mapping in MAPPINGS.values() for name in mapping})
    for table in (NOT_BUILDABLE, OVERRIDES, NOT_WIDTHS, NOT_RUN, NO_EFFECT):
        assert set(table) <= set(names)


def test_a_type_that_cannot_be_built_says_why():
    for name, reason in NOT_BUILDABLE.items():
        with pytest.raises(LookupError, match=reason[:20]):
            build(name)


@pytest.mark.parametrize("name", BUILDABLE)
def test_the_class_takes_the_configuration(name: str):
    wanted = model_class(name).config_class
    assert wanted is None or issubclass(config_class(name), wanted)


@every_type
def test_runs_with_finite_outputs_the_same_twice_and_from_a_file(name: str):
    found = row(name)
    assert (found.error, found.finite, found.deterministic) == ("", True, True)
    assert found.reloads is (name not in NOT_RELOADED)


@every_type
def test_is_the_same_model_and_batch_on_every_call(name: str):
    torch.manual_seed(1)
    first = build(name)
    after = torch.rand(1)
    torch.manual_seed(2)
    second = build(name)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after), "building moves the random numbers of the caller"
    for one, other in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert all(map(torch.equal, run(first), run(second)))


@every_type
def test_nothing_is_constant(name: str):
    """An empty or constant tensor would hide that it is sliced wrongly, or not at all."""
    model = build(name).model
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(value, torch.nn.Parameter) or key.endswith(STATISTICS):
            assert value.numel() == 0 or value.any(), key
            assert value.numel() < 3 or not (value == value.flatten()[0]).all(), key
        assert not key.endswith("running_var") or (value > 0).all(), key


@every_type
def test_widths_are_unlike_every_other_size(name: str):
    built = build(name)
    sizes = list(built.widths.values())
    assert len(set(sizes)) == len(sizes)
    assert not set(sizes) & {HIDDEN, VOCABULARY, *SIZES.values()}
    shapes = [parameter.shape for parameter in built.model.parameters()]
    for key, width in built.widths.items():  # recurrent_gemma stores the double
        assert any(size in (width / 2, width, 2 * width, 4 * width) for shape in shapes for size in shape), key


@every_type
def test_every_feed_forward_module_runs_but_the_stated(name: str):
    built, called = build(name), set()
    for module in built.model.modules():
        module.register_forward_pre_hook(lambda module, _: called.add(module))
    run(built)
    used = {parameter for module in called for parameter in module.parameters(recurse=False)}
    idle = {key for key, module in built.model.named_modules() if module not in called
            and any(_holds_a_width(built, parameter.shape) and parameter not in used
                    for parameter in module.parameters(recurse=False))}
    assert {key for key in idle if not key.startswith(built.not_run)} == set()
    assert all(any(key.startswith(prefix) for key in idle) for prefix in built.not_run), "stated, but it runs"


@every_type
def test_every_feed_forward_parameter_changes_the_outputs_but_the_stated(name: str):
    built = build(name)
    before, stated = run(built), built.not_run + NO_EFFECT.get(name, ())
    silent = set()
    for key, parameter in built.model.named_parameters():
        if not _holds_a_width(built, parameter.shape):
            continue
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.neg_().add_(0.1)
            if all(map(torch.equal, run(built), before)):
                silent.add(key)
            parameter.copy_(kept)
    assert {key for key in silent if not key.startswith(stated)} == set()
    assert all(any(key.startswith(prefix) for key in silent) for prefix in stated), "stated, but it has an effect"


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_can_be_run_in_every_way(implementation: str):
    built = build("mixtral")
    before = run(built)
    built = Built(with_experts(built.model, implementation), built.inputs, built.widths)
    assert built.model.config._experts_implementation == implementation
    for one, other in zip(before, run(built), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_class_without_the_choice_of_experts_says_so():
    with pytest.raises(ValueError, match="does not support setting experts"):
        with_experts(build("llama4_text").model, "grouped_mm")


@pytest.mark.parametrize("name", ["mixtral", "bert", "vit"])
def test_other_dtypes(name: str):
    for dtype in (torch.float64, torch.bfloat16):
        built = build(name, dtype)
        assert {parameter.dtype for parameter in built.model.parameters()} == {dtype}
        assert all(value.dtype == dtype and value.isfinite().all() for value in run(built))


def test_reloading_compares_the_weights():
    """The check of the file is one: a changed weight shows."""
    built = build("bert")
    other = reloaded(built)
    assert all(map(torch.equal, run(built), run(other)))
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    assert not all(map(torch.equal, run(built), run(other)))
