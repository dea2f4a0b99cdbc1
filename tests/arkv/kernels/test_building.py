"""Building the C functions for CPUs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from arkv.kernels.cpu import building

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "kernels" / "native.so"
    monkeypatch.setattr(building, "library_path", lambda: path)
    building.library.cache_clear()
    yield path
    building.library.cache_clear()


@needs_compiler
def test_built_once(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert building.build() == elsewhere
    assert building.is_built()
    monkeypatch.setenv("CC", "nowhere")
    assert building.build() == elsewhere
    assert [path.name for path in elsewhere.parent.iterdir()] == ["native.so"]


def test_without_a_compiler(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "nowhere-cc")
    with pytest.raises(building.NotBuilt, match=r"no C compiler: .*nowhere-cc"):
        building.build()
    assert not building.is_built()


def test_a_compiler_that_fails(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{sys.executable} -c 'import sys; sys.exit(\"no such option\")'")
    with pytest.raises(building.NotBuilt, match=r"(?s)failed:\nno such option"):
        building.build()
    assert list(elsewhere.parent.iterdir()) == []


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(building, "library_path", lambda: tmp_path / "file" / "native.so")
    with pytest.raises(building.NotBuilt, match="cannot be written"):
        building.build()


def test_where_the_library_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beside its sources, or among the user's caches."""
    folder, caches = tmp_path / "package", tmp_path / "caches"
    monkeypatch.setattr(building, "_FOLDER", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
    beside = building.library_path()
    assert beside.parent == folder / "__pycache__"
    monkeypatch.setattr(building, "_is_writable", lambda path: path != beside.parent)
    assert building.library_path() == caches / "arkv" / beside.name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert building.library_path() == tmp_path / ".cache" / "arkv" / beside.name
    # One that is there serves, whoever can write.
    beside.parent.mkdir(parents=True)
    beside.write_bytes(b"")
    assert building.library_path() == beside


@needs_compiler
def test_the_command_says_where_it_is() -> None:
    done = subprocess.run([sys.executable, "-m", "arkv.kernels"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == f"CPU kernels: {building.library_path()}\n"
    assert done.stderr == ""
