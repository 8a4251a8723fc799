"""Every model type: sliced equals masked, keeps everything bitwise, reloads, and is exported to a plain folder.

By default the types most used; `pytest -m matrix` all of them; `python -m tests.architectures --out` writes the table.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architectures.build import build
from tests.architectures.matrix import measured, tolerance
from tests.architectures.overrides import NOT_BUILDABLE
from tests.architectures.types import model_types
from tests.architectures.worker import Worker

USED = {
    "albert", "bart", "bert", "bloom", "camembert", "clip", "cohere2", "convnext", "deberta-v2", "deepseek_v3",
    "deit", "dinov2", "distilbert", "electra", "esm", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text",
    "glm4", "glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "granite", "hubert", "llama", "llama4_text", "longformer",
    "m2m_100", "marian", "mistral", "mixtral", "modernbert", "mpnet", "mt5", "olmo2", "opt", "phi", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_5", "qwen3_moe", "qwen3_next", "roberta", "segformer", "siglip",
    "smollm3", "starcoder2", "swin", "t5", "vit", "wav2vec2", "whisper", "xlm-roberta"}
WITHOUT = {"bit", "falcon_mamba", "mamba", "mamba2", "mobilenet_v1", "regnet", "resnet", "rt_detr_resnet", "textnet",
           "uvdoc_backbone"}  # no feed-forward block
REFUSED = {"bitnet", "convnextv2", "squeezebert"}  # one that cannot be sliced exactly
NO_WIDTH = {"bloom", "convnext", "dinov3_convnext", "flaubert", "hgnet_v2", "lilt",
            "mobilenet_v2", "mobilevitv2", "mpt", "openai-gpt", "pp_lcnet", "pp_lcnet_v3", "pp_lcnet_v4",
            "siglip", "siglip2", "xlm", "xlstm"}  # whose config has no entry that sets it, and nothing else
NOT_RELOADED = {"pixio"}  # the dense model neither: its final norm is saved twice, under names of which one is loaded
NO_NEURONS = {  # parameters that have an axis of a feed-forward width by chance
    "levit": ("keys_values.",), "nemo_speechlm": ("mixer.in_proj.",)}
LOST = {  # blocks that look like a feed-forward block and are not sliced, each with its reason
    "gemma3n_text": 1, "hgnet_v2": 1, "inkling2_text": 1,
    "mobilenet_v2": 16, "musicgen": 4, "musicgen_melody": 2, "siglip2": 2, "zamba": 10, "zamba2": 1}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as one:
        yield one


@pytest.mark.parametrize("model_type", sorted(USED))
def test_the_most_used_types(model_type: str, worker: Worker, tmp_path: Path) -> None:
    check(model_type, worker, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("model_type", [name for name in model_types() if name not in NOT_BUILDABLE])
def test_every_type(model_type: str, worker: Worker, tmp_path: Path) -> None:
    check(model_type, worker, tmp_path)


def check(model_type: str, worker: Worker, tmp_path: Path) -> None:
    """Sliced, reloaded and exported."""
    row = measured(model_type, worker, tmp_path / "files")
    if model_type in WITHOUT | REFUSED:
        assert (row.blocks, row.reason[:25]) == (0, "no feed-forward site in " + row.model_class[:1])
        return
    assert row.blocks > 0
    assert row.left_out == LOST.get(model_type, 0)
    assert row.effect > max(1e-5, 100 * row.sliced)  # else the oracle proves nothing
    assert row.whole <= tolerance(build(model_type).model)
    assert row.sliced <= 1e-5
    if model_type in NOT_RELOADED:
        return
    assert row.reloaded <= 1e-5
    assert row.exported is None if model_type in NO_WIDTH else row.exported <= 1e-5
    assert ("has no config entry" in row.reason) == (model_type in NO_WIDTH)
    assert not [name for name in row.uncovered if not any(part in name for part in NO_NEURONS.get(model_type, ()))]
