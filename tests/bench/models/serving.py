"""A package index on this machine, which can be told to fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Served:
    """What the index has, and what it was asked."""

    def __init__(self, form: str) -> None:
        self.form = form
        """``json`` or ``html``."""
        self.files: dict[str, bytes] = {}
        self.says: dict[str, str] = {}
        """Checksums in the place of the files' own."""
        self.ends_after: list[int] = []
        """Bytes after which the next answers with a file break off."""
        self.resumes = True
        self.key: str | None = None
        """What must stand in ``Authorization``."""
        self.asked: list[tuple[str, str | None]] = []
        """Paths, and their ``Range``."""
        self.url = ""

    def page(self, project: str) -> tuple[str, bytes] | None:
        names = [name for name in self.files if name.split("-")[0].replace("_", "-") == project]
        sums = {name: self.says.get(name, hashlib.sha256(self.files[name]).hexdigest()) for name in names}
        if not names:
            return None
        if self.form == "json":
            files = [
                {"filename": name, "url": f"../../files/{name}", "hashes": {"sha256": sums[name]}} for name in names
            ]
            return "application/vnd.pypi.simple.v1+json", json.dumps({"files": files}).encode()
        links = "".join(f'<a href="../../files/{name}#sha256={sums[name]}">{name}</a>\n' for name in names)
        return "text/html; charset=utf-8", f"<!DOCTYPE html><html><body>{links}</body></html>".encode()


@contextmanager
def serve(form: str) -> Iterator[Served]:
    served = Served(form)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            served.asked.append((self.path, self.headers["Range"]))
            kind, *rest = self.path.strip("/").split("/")
            if served.key is not None and self.headers["Authorization"] != served.key:
                self.send_error(401)
            elif kind == "simple" and (page := served.page(rest[0])):
                self.answer(200, page[0], page[1])
            elif kind == "files" and rest[0] in served.files:
                self.give(served.files[rest[0]])
            else:
                self.send_error(404)

        def give(self, content: bytes) -> None:
            begin = 0
            if served.resumes and (asked := self.headers["Range"]):
                begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            until = begin + served.ends_after.pop(0) if served.ends_after else len(content)
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            self.wfile.write(content[begin:until])

        def answer(self, status: int, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}/simple"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield served
        server.shutdown()
        thread.join()
