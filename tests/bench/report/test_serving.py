"""The page of a run that is served: to this machine alone, with what is new."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.cli import main
from bench.errors import UserError
from bench.report import viewer
from bench.report.serving import HOST, Site, server_of
from tests.bench.browser import Browser, chromium
from tests.bench.report.test_page import make_run, sample
from tests.bench.report.test_viewer import made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four documents, three cells; not ended."""
    folder = made(tmp_path / "run")
    record = json.loads((folder / "record.json").read_text())
    cells = {name: name for name in ("full-None", "mix-512", "window-512")}
    more = {"finished": None, "tasks": {"needle": {"documents": 6, "truncated": 0}}, "models": {"tiny": {}}}
    (folder / "record.json").write_text(json.dumps({**record, **more, "cells": cells}))
    return folder


@pytest.fixture
def port(run: Path, tmp_path: Path) -> Iterator[int]:
    with server_of(Site(run, tmp_path), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def get(port: int, path: str, host: str = HOST) -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    connection.request("GET", path, headers={"Host": host})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def test_progress_grows_with_the_samples(run: Path, port: int) -> None:
    def now() -> tuple[int, int | None, bool]:
        found = json.loads(get(port, "/progress")[1])
        return found["answers"], found["asked"], found["finished"]

    assert now() == (12, 18, False)
    with open(run / "samples.jsonl", "a") as samples:
        samples.write(json.dumps(sample("full-None", "d9")) + "\n" + '{"half')
    assert now() == (13, 18, False)


def test_only_the_page_and_its_files_are_served(run: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "INLINE", 0)
    status, page = get(port, "/")
    assert status == 200
    assert 'data-answers="12"' in page
    assert "connect-src &#39;self&#39;" in page or "connect-src 'self'" in page
    assert get(port, "/samples-1/0.js")[1].startswith("arkvChunk(0,[")
    for path in ("/record.json", "/samples-1/9.js", "/samples-1/../record.json", "/../../etc/passwd"):
        assert get(port, path)[0] == 404
    # Another site's name that leads to this machine.
    assert get(port, "/", "elsewhere.example")[0] == 403


def test_a_run_without_answers_is_waited_for(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", samples=[])
    (folder / "results.csv").unlink()
    html = Site(folder, tmp_path).page()
    assert "has no results.csv" in html
    assert 'data-answers="0"' in html


def test_a_port_in_use_is_said(run: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={number}: it is in use: give another one, or 0"):
            server_of(Site(run, tmp_path), number)


def test_what_is_no_run_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["view", str(tmp_path)])
    assert ended.value.code == 2
    assert "is no run folder: it has no record.json" in capsys.readouterr().err
    (tmp_path / "study.jsonl").touch()
    with pytest.raises(SystemExit) as ended:
        main(["view", str(tmp_path)])
    assert ended.value.code == 2
    assert "holds a search (tune): give the folder of a run" in capsys.readouterr().err


@pytest.mark.slow
def test_new_answers_are_offered(run: Path, port: int, tmp_path: Path) -> None:
    program = chromium()
    with Browser(program, tmp_path / "profile") as browser:
        browser.call("Page.navigate", url=f"http://{HOST}:{port}/")
        browser.wait("document.querySelector('#live span')?.textContent.includes('12 of 18 answers')", 60)
        with open(run / "samples.jsonl", "a") as samples:
            samples.write(json.dumps(sample("full-None", "d9")) + "\n")
        browser.wait("document.querySelector('#live span').textContent.includes('1 are new')")
        browser.evaluate("document.querySelector('#live button').click()")
        browser.wait("document.getElementById('count')?.textContent.startsWith('5 of 5')", 60)
