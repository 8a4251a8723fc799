"""Every model type: sliced equals masked, keeps everything bitwise, reloads, and is exported to a plain folder.

By default the types most used; `pytest -m matrix` all of them; `python -m tests.architectures --out` writes the table.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architectures.expected import failures
from tests.architectures.matrix import measured
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
    """Sliced, covered, reloaded and exported."""
    assert not failures(measured(model_type, worker, tmp_path / "files"))
