"""Building the C functions for CPUs."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from arkv.kernels.cpu import building
from tests.arkv.kernels.conftest import needs_compiler


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "kernels" / "native.so"
    monkeypatch.setattr(building, "library_path", lambda: path)
    building.library.cache_clear()
    yield path
    building.library.cache_clear()


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
    """Among the user's caches, wherever the package is installed."""
    monkeypatch.delenv("ARKV_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    path = building.library_path()
    assert path.parent == tmp_path / "caches" / "arkv"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert building.library_path() == tmp_path / ".cache" / "arkv" / path.name
    monkeypatch.setenv("ARKV_CACHE", "~/own")
    assert building.library_path() == tmp_path / "own" / "kernels" / path.name


@pytest.mark.parametrize("changed", ["_processor", "_c_library"])
def test_another_machine_has_a_library_of_its_own(monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    path = building.library_path()
    monkeypatch.setattr(building, changed, lambda: "another")
    assert building.library_path() not in (path, path.parent)
    assert building.library_path().parent == path.parent


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One that writes down what it is asked and makes empty files, after a while."""
    log, script = tmp_path / "log", tmp_path / "compiler.sh"
    script.write_text(f'echo "$@" >> {log}\nsleep 0.05\nfor last; do :; done\ntouch "$last"\n')
    monkeypatch.setenv("CC", f"sh {script}")
    return log


def test_many_that_ask_at_once_compile_once(elsewhere: Path, compiler: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(building.build())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [elsewhere] * 4
    assert len(compiler.read_text().splitlines()) == len(building._SOURCES) + 1
    assert [path.name for path in elsewhere.parent.iterdir()] == ["native.so"]


@needs_compiler
def test_the_first_use_compiles_once_and_says_so(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Whether it is fast is another's concern, and a compiler that does not try to make it so is done sooner.
    monkeypatch.setattr(building, "_OPTIONS", tuple("-O0" if item == "-O3" else item for item in building._OPTIONS))
    with caplog.at_level("INFO"):
        assert not building.is_built()
        assert building.library() is not None
    assert building.is_built()
    (said,) = caplog.messages
    assert said == f"compiling the CPU kernels into {elsewhere.parent}, once for this machine"
    monkeypatch.setenv("CC", "nowhere")
    assert building.build() == elsewhere
    assert [path.name for path in elsewhere.parent.iterdir()] == ["native.so"]


def test_without_a_compiler_torch_serves_and_the_log_says_why(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "nowhere-cc")
    assert building.library() is None
    assert building.library() is None
    (said,) = caplog.messages
    assert said.startswith("no CPU kernels, so that torch's operations serve, which are slower: no C compiler")


def test_a_library_that_does_not_load_is_said(
    elsewhere: Path, compiler: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert building.library() is None
    assert "file too short" in caplog.messages[-1]


@needs_compiler
def test_the_command_says_where_it_is() -> None:
    done = subprocess.run([sys.executable, "-m", "arkv.kernels"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == f"CPU kernels: {building.library_path()}\n"
    assert done.stderr == ""
