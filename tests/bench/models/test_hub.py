"""Models of the hub, without the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.models.loading import fetch, load
from bench.models.references import resolve
from tests.bench.models.conftest import refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one model in it, and no way to the hub. Gives the snapshot folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, repository / "snapshots" / COMMIT))


@pytest.mark.parametrize("reference", ["org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"])
def test_cached_hub_model_loads_offline(hub: Path, reference: str) -> None:
    loaded = load(reference)
    assert (loaded.name, loaded.source, loaded.folder) == ("org/tiny", "org/tiny", hub)
    assert (loaded.revision, loaded.fingerprint) == (COMMIT, COMMIT)


def test_commit_is_found_in_the_cache_when_the_connection_fails(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors, snapshot_download

    def download(name: str, *, local_files_only: bool = False, **settings: Any) -> str:
        if not local_files_only:
            raise errors.HTTPError("no connection")
        return snapshot_download(name, local_files_only=True, **settings)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch(resolve(f"org/tiny@{COMMIT}")) == hub
    assert "the hub is out of reach" in str(refused(f"org/tiny@{COMMIT[::-1]}"))


@pytest.mark.parametrize("reference", ["org/other", "org/tiny@other"])
def test_uncached_hub_model_offline(hub: Path, reference: str) -> None:
    assert "the hub is out of reach" in str(refused(reference))


def test_hub_model_without_safetensors(hub: Path) -> None:
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    assert "org/tiny at its newest revision holds no model.safetensors" in str(refused("org/tiny"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("GatedRepoError", "org/tiny is gated: accept its terms"),
        ("RepositoryNotFoundError", "The hub has no model org/tiny"),
        ("RevisionNotFoundError", "org/tiny has no revision v2"),
        ("HfHubHTTPError", "org/tiny could not be fetched from the hub: HTTP 500"),
    ],
)
def test_hub_errors_are_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch, error: str, said: str) -> None:
    from huggingface_hub import errors

    def download(name: str, **_: object) -> str:
        response = SimpleNamespace(headers={}, request=None)
        raise getattr(errors, error)("HTTP 500\n\nserver error", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert said in str(refused("org/tiny@v2"))


def test_hub_code_is_downloaded_only_when_trusted(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(hub)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = resolve("org/tiny")
    fetch(source)
    fetch(source, trust_remote_code=True)
    assert ["*.py" in patterns for patterns in asked] == [False, True]
    assert not any(pattern in ("*", "*.bin", "*.pt") for patterns in asked for pattern in patterns)
