"""A sliced model goes to the hub and comes back; the hub is a folder here, at the level of its client."""
from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from test_checkpoint import assert_equal_outputs, assert_same, sliced_tiny
from transformers import AutoModelForCausalLM

import stt
from stt.errors import InputError
from stt.selection import SELECTION, Selection

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """What HfApi does to one repository, in a folder; a commit is a folder of the cache that from_pretrained reads."""

    def __init__(self, cache: Path, patch: pytest.MonkeyPatch):
        self.cache, self.calls = cache, {}
        self.snapshot = cache / "models--me--sliced" / "snapshots" / COMMIT
        self.snapshot.mkdir(parents=True)
        (cache / "models--me--sliced" / "refs").mkdir()
        (cache / "models--me--sliced" / "refs" / "main").write_text(COMMIT)
        for name in ("create_repo", "create_branch", "file_exists", "upload_folder"):
            patch.setattr(huggingface_hub.HfApi, name, self.instead_of(getattr(huggingface_hub.HfApi, name)))

    def instead_of(self, method: Callable) -> Callable:
        """Ours, for a call that theirs takes, too."""
        def call(api: huggingface_hub.HfApi, *args: object, **options: object) -> object:
            inspect.signature(method).bind(api, *args, **options)
            return getattr(self, method.__name__)(*args, **options)
        return call

    def create_repo(self, repo_id: str, **options: object) -> SimpleNamespace:
        self.calls["create_repo"] = options
        return SimpleNamespace(repo_id=f"me/{repo_id.removeprefix('me/')}")

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        self.calls["create_branch"] = branch

    def file_exists(self, repo_id: str, filename: str, *, revision: str | None) -> bool:
        return (self.snapshot / filename).exists()

    def upload_folder(self, *, repo_id: str, folder_path: str, ignore_patterns: list[str] | None,
                      **options: object) -> str:
        assert repo_id == "me/sliced"
        self.calls["upload_folder"] = options
        shutil.copytree(folder_path, self.snapshot, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns(*(ignore_patterns or ())))
        return "the commit"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(tmp_path / "cache", monkeypatch)


def test_push_to_hub_uploads_what_from_pretrained_loads(hub: FakeHub) -> None:
    model, batch = sliced_tiny("llama")
    answer = model.push_to_hub("me/sliced", commit_message="narrow", private=True, revision="new", tags=["sea"])
    assert answer == "the commit"
    assert hub.calls["create_repo"] == {"private": True, "exist_ok": True}
    assert hub.calls["create_branch"] == "new"
    assert hub.calls["upload_folder"] == {"revision": "new", "create_pr": False, "commit_message": "narrow",
                                          "commit_description": None}
    assert sorted(path.name for path in hub.snapshot.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", SELECTION]
    assert "sea" in ModelCard.load(hub.snapshot / "README.md").data.tags
    loaded = AutoModelForCausalLM.from_pretrained("me/sliced", cache_dir=hub.cache)
    assert_same(loaded, model)
    assert_equal_outputs(loaded, model, batch)


def test_saving_and_pushing_in_one_call_keeps_the_card_of_the_repository(hub: FakeHub, tmp_path: Path) -> None:
    model, _ = sliced_tiny("llama")
    (hub.snapshot / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "sliced", push_to_hub=True, token="secret", max_shard_size="20KB")
    assert hub.calls["upload_folder"]["commit_message"] == "Upload model"
    assert (hub.snapshot / "README.md").read_text() == "mine"
    assert (hub.snapshot / "model.safetensors.index.json").exists()
    assert_same(AutoModelForCausalLM.from_pretrained("me/sliced", cache_dir=hub.cache), model)
    assert_same(stt.load(tmp_path / "sliced"), model)


def test_the_selection_is_fetched_from_the_commit_of_the_weights(hub: FakeHub, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = sliced_tiny("llama")
    model.save_pretrained(hub.snapshot / "deep" / "folder")
    selection = hub.snapshot / "deep" / "folder" / SELECTION
    selection.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no selection file in me/sliced on the hub") as raised:
        AutoModelForCausalLM.from_pretrained("me/sliced", subfolder="deep/folder", cache_dir=hub.cache)
    assert "\n" not in str(raised.value)
    asked = []

    def fetch(*args: object, **options: object) -> str:
        asked.append((args, options))
        return str(tmp_path / "elsewhere")

    monkeypatch.setattr("stt.hub.cached_file", fetch)
    loaded = AutoModelForCausalLM.from_pretrained("me/sliced", subfolder="deep/folder", cache_dir=hub.cache)
    assert loaded.stt_selection == Selection.load(tmp_path / "elsewhere") == model.stt_selection
    assert asked == [(("me/sliced", SELECTION),
                      {"cache_dir": hub.cache, "revision": COMMIT, "subfolder": "deep/folder"})]
