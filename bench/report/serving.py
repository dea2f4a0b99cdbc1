"""The page of one run, served to this machine alone, with how the run goes."""

from __future__ import annotations

import errno
import json
import re
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from bench.errors import UserError
from bench.names import DOCUMENTS, RECORD, RESULTS, SAMPLES
from bench.records.finished import read_runs
from bench.records.record import read_record
from bench.records.unfinished import answers_asked
from bench.report.page import SERVED, build, render

HOST = "127.0.0.1"
WATCHED = (SAMPLES, DOCUMENTS, RECORD, RESULTS)
"""What a page is made of."""
BLOCK = 1 << 20


class Site:
    """What is served of a folder.

    Args:
        run: the folder; may still be written to.
        place: a folder for chunks of samples, which is somebody else's to remove.
    """

    def __init__(self, run: Path, place: Path) -> None:
        self._run, self._place = run, place
        self._lock = Lock()
        self._made: tuple[Any, str] | None = None
        self._pages = 0
        self._read = self._lines = 0

    def page(self) -> str:
        """The page of what is there now; made once for the same files."""
        with self._lock:
            stamp = [file.stat().st_mtime_ns for name in WATCHED if (file := self._run / name).is_file()]
            if self._made is None or self._made[0] != stamp:
                self._made = stamp, self._new_page()
            return self._made[1]

    def _new_page(self) -> str:
        # A page that is open goes on with the chunks that it was made with.
        self._pages += 1
        try:
            return build(read_runs([self._run]), self._place / f"samples-{self._pages}", live=True).html
        except UserError as error:
            return render("waiting.html.j2", self._run.name, SERVED, said=str(error), live=0)

    def chunk(self, path: str) -> bytes | None:
        """A file of a page; None where there is none."""
        if not re.fullmatch(r"/samples-\d+/\d+\.js", path):
            return None
        file = self._place / path[1:]
        return file.read_bytes() if file.is_file() else None

    def progress(self) -> dict[str, Any]:
        """How many answers are there, of how many that the tasks begun so far ask for, and how old the newest is."""
        record = read_record(self._run) if (self._run / RECORD).is_file() else None
        file = self._run / SAMPLES
        with self._lock:
            answers = self._count(file)
        age = time.time() - file.stat().st_mtime if answers else None
        return {
            "answers": answers,
            "asked": None if record is None else answers_asked(record, answers),
            "finished": record is not None and record.finished is not None,
            "age_s": age,
        }

    def _count(self, file: Path) -> int:
        """Whole lines; only what is new is read."""
        size = file.stat().st_size if file.is_file() else 0
        if size < self._read:
            self._read = self._lines = 0
        if size > self._read:
            with open(file, "rb") as samples:
                samples.seek(self._read)
                while block := samples.read(BLOCK):
                    self._lines += block.count(b"\n")
                    self._read += len(block)
        return self._lines


def server_of(site: Site, port: int) -> ThreadingHTTPServer:
    """A server on :data:`HOST`.

    Args:
        port: 0 is any that is free.

    Raises:
        UserError: it is in use, or not this user's to take.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page elsewhere that has its name lead to this machine would read the run.
            if (self.headers.get("Host") or "").partition(":")[0] not in (HOST, "localhost"):
                self._answer(HTTPStatus.FORBIDDEN, b"", "text/plain")
            elif self.path == "/":
                self._answer(HTTPStatus.OK, site.page().encode(), "text/html")
            elif self.path == "/progress":
                self._answer(HTTPStatus.OK, json.dumps(site.progress()).encode(), "application/json")
            elif (found := site.chunk(self.path)) is not None:
                self._answer(HTTPStatus.OK, found, "text/javascript")
            else:
                self._answer(HTTPStatus.NOT_FOUND, b"", "text/plain")

        def _answer(self, status: HTTPStatus, content: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            # A page that was closed meanwhile wants no answer.
            with suppress(ConnectionError):
                self.wfile.write(content)

        def log_message(self, format: str, *values: Any) -> None:
            """Requests are nobody's to read."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise UserError(f"--port={port}: it {what}: give another one, or 0 for any that is free") from None
