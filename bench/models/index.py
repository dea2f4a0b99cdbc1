"""A package index, asked without pip: which ones are set up on this machine, and which has a file.

Environments made by uv or pipx hold no pip. What its users have set is honoured all the same: in order of precedence

    PIP_INDEX_URL, UV_DEFAULT_INDEX, UV_INDEX_URL, index-url in pip's configuration files, https://pypi.org/simple
    PIP_EXTRA_INDEX_URL, UV_INDEX, UV_EXTRA_INDEX_URL, extra-index-url      further ones, asked afterwards
    PIP_FIND_LINKS, find-links                                              folders with wheels, looked through first
    PIP_NO_INDEX, no-index                                                  nothing but those folders
    PIP_CERT, REQUESTS_CA_BUNDLE, SSL_CERT_FILE; PIP_PROXY, HTTPS_PROXY, NO_PROXY

An index answers in JSON (PEP 691) or, as a folder on any web server or disk, in HTML (PEP 503).
"""

from __future__ import annotations

import base64
import configparser
import http.client
import json
import os
import re
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from packaging.utils import canonicalize_name

from bench.errors import UserError

PYPI = "https://pypi.org/simple"
SHARED = Path("/etc")
"""Where pip's configuration for all users lies, except on Windows and macOS."""
TIMEOUT_S = 30.0
"""Without a byte for so long, a connection counts as broken."""
ACCEPTED = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
BROKEN = (OSError, http.client.HTTPException, ValueError)
"""What opening and reading an address raises: no connection, a broken one, an answer that cannot be understood."""


@dataclass(frozen=True)
class Offer:
    """A file as an index offers it."""

    url: str
    sha256: str | None = None
    """Where the index says it."""


class Index:
    """The package indexes and folders that are set up here."""

    def __init__(self) -> None:
        files = _pip_files()

        def pip(option: str) -> str:
            return os.environ.get(f"PIP_{option.upper().replace('-', '_')}") or files.get(option, "")

        def variable(*names: str) -> str:
            return next((value for name in names if (value := os.environ.get(name))), "")

        first = variable("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL") or files.get("index-url") or PYPI
        more = [pip("extra-index-url"), variable("UV_INDEX"), variable("UV_EXTRA_INDEX_URL")]
        self.urls = [] if pip("no-index").lower() in ("1", "true", "yes", "on") else [*map(_unnamed, [first])]
        if self.urls:
            self.urls += [_unnamed(url) for text in more for url in text.split()]
        self.folders = [_folder(item) for item in pip("find-links").split()]
        self._keys = {_host(url): key for url in self.urls if (key := _authorization(url))}

        certificates = pip("cert") or variable("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE") or None
        try:
            context = ssl.create_default_context(cafile=certificates)
        except OSError as error:
            raise UserError(f"The certificates {certificates} cannot be read: {error.strerror or error}") from error
        handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
        if proxy := pip("proxy"):
            handlers.append(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
        self._opener = urllib.request.build_opener(*handlers)

    def open(self, url: str, headers: Mapping[str, str]) -> Any:
        """The response to a request, to be closed by the caller. Raises what :data:`BROKEN` names."""
        request = urllib.request.Request(without_key(url), headers={"User-Agent": "arkv-bench", **headers})
        if key := _authorization(url) or self._keys.get(_host(url)):
            request.add_unredirected_header("Authorization", key)  # for this host, not for one it sends us to
        return self._opener.open(request, timeout=TIMEOUT_S)

    def find(self, requirement: str, file: str) -> Offer:
        """Where ``file`` of the project in ``requirement`` (``name==version``) is had.

        Raises:
            UserError: nowhere; the line says what each index answered.
        """
        for folder in self.folders:
            if folder is not None and (folder / file).is_file():
                return Offer((folder / file).resolve().as_uri())
        project = canonicalize_name(requirement.partition("==")[0].strip())
        answers = []
        for index in self.urls:
            try:
                if (offer := self._listed(index, project).get(file)) is not None:
                    return offer
                answers.append(f"{without_key(index)} does not list it")
            except BROKEN as error:
                answers.append(f"{without_key(index)}: {reason(error)}")
        said = "; ".join(answers) or "no index may be asked (PIP_NO_INDEX)"
        raise UserError(
            f"{file} is nowhere to be had: {said}. Name an index in PIP_INDEX_URL, or a folder that holds the file in "
            "PIP_FIND_LINKS"
        )

    def _listed(self, index: str, project: str) -> dict[str, Offer]:
        """The files of a project, by name."""
        page = f"{index.rstrip('/')}/{project}/"
        if urlsplit(page).scheme == "file":
            page += "index.html"
        with self.open(page, {"Accept": ACCEPTED}) as response:
            base = urljoin(page, response.geturl())
            kind = response.headers.get_content_type()
            content = response.read()
        if kind.endswith("json"):
            return dict(_from_json(json.loads(content), base))
        return dict(_from_html(content.decode("utf-8"), base))


def reason(error: BaseException) -> str:
    """Why an address could not be read, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    inner = getattr(error, "reason", error)
    said = " ".join(str(getattr(inner, "strerror", None) or inner).split()) or type(inner).__name__
    if isinstance(inner, ssl.SSLCertVerificationError):
        return f"{inner.verify_message}: name the certificates to trust in SSL_CERT_FILE"
    return said


def without_key(url: str) -> str:
    """The address without a user's name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _authorization(url: str) -> str | None:
    user = urlsplit(url).netloc.rpartition("@")[0]
    return f"Basic {base64.b64encode(unquote(user).encode()).decode()}" if user else None


def _host(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2]


def _unnamed(index: str) -> str:
    """An index of uv's may bear a name: ``name=https://...``."""
    return re.sub(r"^[\w.-]+=", "", index)


def _folder(item: str) -> Path | None:
    """A folder of find-links; None for a page on the web."""
    parts = urlsplit(item)
    if parts.scheme == "file":
        return Path(urllib.request.url2pathname(parts.path))
    return None if parts.scheme in ("http", "https") else Path(item).expanduser()


def _from_json(page: Any, base: str) -> Iterator[tuple[str, Offer]]:
    """The files of a page as PEP 691 has it. Raises ValueError on anything else."""
    try:
        for file in page["files"]:
            yield file["filename"], Offer(urljoin(base, file["url"]), file.get("hashes", {}).get("sha256"))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("its answer is no page of a package index") from error


def _from_html(page: str, base: str) -> Iterator[tuple[str, Offer]]:
    """The files of a page as PEP 503 has it: one link for each."""
    found: list[str] = []

    class Links(HTMLParser):
        base = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if link := dict(attrs).get("href"):
                if tag == "a":
                    found.append(link)
                elif tag == "base":
                    self.base = link

    links = Links()
    links.feed(page)
    for link in found:
        parts = urlsplit(urljoin(urljoin(base, links.base), link))
        checksum = re.fullmatch(r"sha256=([0-9a-f]{64})", parts.fragment)
        name = unquote(parts.path).rpartition("/")[2]
        yield name, Offer(urlunsplit(parts._replace(fragment="")), checksum[1] if checksum else None)


def _pip_files() -> dict[str, str]:
    """What pip's configuration files say about downloads; a later file wins over an earlier one."""
    named = os.environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return {}
    home, name = Path.home(), "pip.ini" if os.name == "nt" else "pip.conf"
    folders: list[Path] = []
    if sys.platform == "win32":
        folders = [Path(os.environ.get("PROGRAMDATA", r"C:\ProgramData")) / "pip"]
        personal = [home / "pip", Path(os.environ.get("APPDATA", home)) / "pip"]
    else:
        shared = os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg"
        folders = [*(Path(item) / "pip" for item in reversed(shared.split(":"))), SHARED]
        personal = [home / ".pip", Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip"]
        if sys.platform == "darwin":
            folders.insert(0, Path("/Library/Application Support/pip"))
            personal.append(home / "Library" / "Application Support" / "pip")
    files = [folder / name for folder in folders]
    if named is None or not Path(named).exists():
        files += [folder / name for folder in personal]
    files += [Path(sys.prefix) / name, *([Path(named)] if named else [])]

    found: dict[str, str] = {}
    for file in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file} is no configuration of pip: {' '.join(str(error).split())}") from error
        for section in ("global", "install", "download"):
            if parser.has_section(section):
                found |= {option.replace("_", "-"): " ".join(value.split()) for option, value in parser.items(section)}
    return found
