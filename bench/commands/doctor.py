"""``arkv-bench doctor``: what works on this machine and what to install."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import typer

from bench.names import install_extra
from bench.settings.doctor import DoctorConfig
from bench.settings.options import given, takes

if TYPE_CHECKING:
    from packaging.requirements import Requirement


HUB_S = 2.0
"""Seconds that the hub has to answer in."""
WIDTH = len("model qwen2.5-coder-1.5b")
"""Columns for what is looked at."""


class Finding(NamedTuple):
    """One line: whether it works, what was looked at, what was found and what to do."""

    ok: bool | None
    """None: optional and absent."""
    what: str
    found: str


def _requirements() -> dict[str, list[Requirement]]:
    """What the two distributions ask for, by extra; "" is what everybody needs.

    Raises:
        importlib.metadata.PackageNotFoundError: one of them is not installed.
    """
    from packaging.requirements import Requirement

    found: dict[str, list[Requirement]] = {"": []}
    known: set[str] = set()
    for distribution in ("arkv", "arkv-bench"):
        extras = metadata.metadata(distribution).get_all("Provides-Extra") or []
        for requirement in map(Requirement, metadata.requires(distribution) or []):
            if requirement.name in known:  # its range is the library's
                continue
            known.add(requirement.name)
            for extra in ("", *extras):
                if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                    found.setdefault(extra, []).append(requirement)
                    break
    return found


def _lacking(requirement: Requirement) -> str | None:
    """What is wrong with the version that is installed; None where nothing is."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "missing"
    return None if requirement.specifier.contains(version, prereleases=True) else f"{version} is installed"


def _packages() -> Iterator[Finding]:
    try:
        needed = _requirements()
    except metadata.PackageNotFoundError as error:
        yield Finding(
            False, "packages", f"{error.name} is not installed: pip install ./arkv . (or scripts/setup_env.sh)"
        )
        return
    for requirement in needed.pop(""):
        wrong = _lacking(requirement)
        asked = f"{requirement.name}{requirement.specifier}"
        found = metadata.version(requirement.name) if wrong is None else f"{wrong}: pip install '{asked}'"
        yield Finding(wrong is None, requirement.name, found)
    for extra, requirements in needed.items():
        lacking = [item.name for item in requirements if _lacking(item)]
        found = "installed" if not lacking else f"without {', '.join(lacking)}: {install_extra(extra)}"
        yield Finding(None if lacking else True, f"extra {extra}", found)


def _kernels() -> Finding:
    """Compiles them, as the first use would: only that shows whether it works here."""
    from bench.models.imports import import_lightly

    import_lightly()
    from arkv.kernels.cpu import building
    from bench.models.kernels import announce_compiling

    try:
        announce_compiling()
        path = building.build()
    except building.NotBuilt as error:
        why = str(error).partition("\n")[0]
        return Finding(None, "CPU kernels", f"not compiled, so that decoding on the CPU is slower: {why}")
    if building.library() is None:
        return Finding(None, "CPU kernels", f"{path} does not load: delete it, then run python -m arkv.kernels")
    return Finding(True, "CPU kernels", f"compiled: {path}")


def _devices() -> Iterator[Finding]:
    if find_spec("torch") is None:
        yield Finding(False, "device", "torch is missing: pip install torch")
        return
    import torch

    yield Finding(True, "device cpu", f"{torch.get_num_threads()} threads")
    yield _kernels()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
            yield Finding(True, f"device cuda:{index}", found)
    else:
        yield Finding(None, "device cuda", "none (torch sees no NVIDIA GPU): everything runs on the CPU")
    for name in ("float32", "bfloat16", "float16", "float8_e4m3fn"):
        dtype = getattr(torch, name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.ones(8, device=device).to(dtype).float().sum().item()
            works, found = True, f"on {device}"
        except (RuntimeError, TypeError) as error:
            works, found = False, str(error).splitlines()[0]
        yield Finding(works, f"dtype {name}", found)


def _index() -> str:
    from bench.models.index import Index, without_key

    return ", ".join(map(without_key, Index().urls)) or "the folders of find-links"


def _models() -> Iterator[Finding]:
    from bench.models.embedded import list_models
    from bench.models.storage import cache_root
    from bench.progress import MB

    root = cache_root()
    for row in list_models():
        if row.present:
            found = f"in {root}, {row.disk / MB:,.0f} MB; {row.licence}"
        else:
            found = f"not here: its first run fetches {row.download / MB:,.0f} MB from {_index()}; {row.licence}"
        yield Finding(True if row.present else None, f"model {row.name}", found)


class _Hub(Thread):
    """Asks the hub while everything else is looked at: to find out that nobody knows its name can take longer than any
    timeout of a connection."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        self._offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        self._end = time.monotonic() + HUB_S
        self._answers = False
        self._said = f"no answer within {HUB_S:g} s"

    def run(self) -> None:
        """Ask it once."""
        if self._offline:
            return
        try:
            urlopen(Request(self._url, method="HEAD"), timeout=HUB_S).close()
            self._answers = True
        except HTTPError as error:
            # Somebody is there.
            self._answers, self._said = error.code < 500, f"status {error.code}"
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            self._said = " ".join(str(getattr(reason, "strerror", None) or reason).split())

    def findings(self) -> Iterator[Finding]:
        """What came of it, once its time is over at the latest."""
        from bench.models.index import without_key

        shown = without_key(self._url)
        if self._offline:
            yield Finding(
                None, "hub", f"{shown} is not asked: HF_HUB_OFFLINE is set, so only what is in its cache is there"
            )
            return
        self.join(max(0.0, self._end - time.monotonic()))
        found = (
            shown if self._answers else f"{shown} is out of reach ({self._said}): only what is in its cache is there"
        )
        yield Finding(True if self._answers else None, "hub", found)


def _data(data_dir: Path | None) -> Iterator[Finding]:
    yield Finding(True, "task needle", "generated, needs no data")
    if data_dir is None:
        yield Finding(None, "local data", "none given: doctor --data-dir FOLDER looks through one")
        return
    if not data_dir.is_dir():
        yield Finding(False, "local data", f"{data_dir} is no folder: give one that holds TASK/test.jsonl")
        return
    folders = sorted(item.name for item in data_dir.iterdir() if item.is_dir() and any(item.glob("*.jsonl")))
    found = ", ".join(folders) or f"{data_dir} has no folder with JSONL files: rows are in TASK/test.jsonl"
    yield Finding(bool(folders), "local data", found)


def _safely(check: Callable[[], Iterator[Finding]], what: str) -> Iterator[Finding]:
    """A check that breaks is a finding: this command is for machines on which something is broken."""
    try:
        yield from check()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        yield Finding(False, what, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


@takes(DoctorConfig)
def doctor(**typed: Any) -> None:
    """Say what works on this machine: packages, devices, number types, model, data. Exit code 1 if something needed
    is broken."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    config = DoctorConfig(**given(DoctorConfig, typed))
    hub = _Hub()
    hub.start()
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("packages", _packages),
        ("devices", _devices),
        ("models", _models),
        ("hub", hub.findings),
        ("data", lambda: _data(config.data_dir)),
    )
    console, broken = Console(), False
    marks = {True: "ok", False: "[red]FAIL[/red]", None: "[dim]-[/dim]"}
    for what, check in checks:
        for finding in _safely(check, what):
            # As they are found: torch alone takes seconds to import.
            table = Table(box=None, show_header=False, pad_edge=False)
            table.add_column(min_width=len("FAIL"))
            table.add_column(no_wrap=True, min_width=WIDTH)
            table.add_column(overflow="fold")
            table.add_row(marks[finding.ok], finding.what, escape(finding.found))
            console.print(table, highlight=False)
            broken = broken or finding.ok is False
    if broken:
        raise typer.Exit(1)
