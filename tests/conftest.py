"""Offline, one thread, quiet; real data through the environment variable STT_TEST_DATA."""
from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data; skips the test where there is none."""
    given = os.environ.get("STT_TEST_DATA")
    if not given:
        pytest.skip("STT_TEST_DATA is not set: give it a folder of real data sets")
    if not Path(given).is_dir():
        pytest.skip(f"STT_TEST_DATA={given} is no folder")
    return Path(given)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run of seconds (small_runs.py)."""
    from small_runs import small_flags

    return small_flags(tmp_path_factory.mktemp("small"))
