"""The run folder: what a run leaves, readable years later.

``samples.jsonl``  one line per document and cell, appended as it is measured;
``documents.jsonl``  what each document asked, once, unless the run was told not to keep it;
``record.json``    settings, versions, commit, hardware, hashes of model and data;
``curve.csv``      divergence over the position, where a task compares distributions;
``results.csv``    one row per model, task, metric and cell;
``states.json``    states maps of the first document of each task, where the run was asked for them.

Samples and documents are only appended; the other files are replaced whole, so that a run killed at any moment leaves a
folder that the same command continues.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.errors import UserError
from bench.names import CURVE, DOCUMENTS, RECORD, RESULTS, SAMPLES, STATES
from bench.records.curve import CurveRow, curve_csv
from bench.records.document import Prompt, Prompts, prompt_line
from bench.records.files.text import write_atomic
from bench.records.record import Record, read_record, record_text
from bench.records.row import Row, rows_csv
from bench.records.sample import NotFinite, Sample, sample_line
from bench.records.samples import Samples
from bench.runs.locked import LockedFolder
from bench.settings.secrets import redacted_arguments

DATA, PLUGINS, DEFINITIONS, LIBRARIES, LOADED = "data", "plugins", "definitions", "libraries", "loaded"
GROWING = (DATA, PLUGINS, DEFINITIONS, LIBRARIES, LOADED)
"""Parts of the fingerprint that may grow: hashes of each task's rows and of its definition, of each plugin file,
versions of the libraries whose methods are asked for, and dtype and kind of device of each model."""
CODE, INPUTS = "code", "inputs"
MEANING = {
    CODE: "the source code that answers are made by",
    INPUTS: "the file",
    LIBRARIES: "the version of",
    "versions": "the version of",
}
"""What parts of the fingerprint are for a person."""
REMEDY = "give another --outdir, or --fresh to start it anew"
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What a file that cannot grow any more is reported with."""
BLOCK = 1 << 16
"""Bytes that are looked through at a time for the end of a line."""


class _Appended:
    """A file that lines are appended to, each of which survives the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Unbuffered: what cannot be written is an error now, not when it is closed.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def append(self, text: str) -> int:
        """Write a line; returns the byte that it begins at. Raises :class:`OSError` where it cannot be written."""
        if not os.fstat(self._file.fileno()).st_nlink:
            # Of a file that is gone, what is written would be lost without a word.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path))
        place = self._file.seek(0, os.SEEK_END)
        line = memoryview(f"{text}\n".encode())
        while line:
            line = line[self._file.write(line) :]
        return place

    def close(self) -> None:
        self._file.close()


class RunFolder(LockedFolder):
    """A run folder that is open for writing; a context manager that holds its lock.

    Args:
        path: the folder, made if absent.
        fingerprint: everything that changes an answer; a folder with another one is refused.
        fresh: forget what an earlier run left in the folder.

    Raises:
        UserError: another process writes there, or the folder belongs to a run with other settings.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], *, fresh: bool = False) -> None:
        super().__init__(path, "run")
        self.path = path
        self.fresh = fresh
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.samples = Samples()
        """What has been answered, by what it answers; answers themselves are read from the file."""
        self.prompts = Prompts()
        """What has been asked."""
        self.previous: dict[str, Any] | None = None
        """The record of the run that this one continues."""
        self._asked: _Appended | None = None
        """The file of prompts, once there is one to write."""

    def _open(self, folder: Path) -> None:
        if self.fresh:
            # Only now that the lock is held: another run may be writing.
            clear(self.path)
        old = read_record(self.path).as_given() if (self.path / RECORD).is_file() else None
        known = {} if old is None else dict(old["fingerprint"])
        for part in (DATA, DEFINITIONS, LOADED):
            self.fingerprint.setdefault(part, {})
        path = self.path / SAMPLES
        if old is not None and _differences(known, self.fingerprint):
            self._cut_unfinished_line(path)
            # A model that has answered nothing, since it could not be used, may have been mended.
            answered = {sample.model for sample in Samples(path).values()}
            mended = known.get("models", {}).keys() & self.fingerprint.get("models", {}).keys() - answered
            before, now = (_without(mended, fingerprint) for fingerprint in (known, self.fingerprint))
            if different := _differences(before, now):
                raise UserError(f"{self.path} holds a run with other settings: {', '.join(different)}; {REMEDY}")
        for part in GROWING:
            self.fingerprint[part] = {**known.get(part, {}), **self.fingerprint.get(part, {})}
        self.previous = old
        # What a run that was killed while it replaced a file has left.
        for name in (RECORD, RESULTS, CURVE, STATES):
            for stale in self.path.glob(f".{name}.*.tmp"):
                stale.unlink()
        self._cut_unfinished_line(path)
        self.samples = Samples(path, answered=True)
        asked = self.path / DOCUMENTS
        self._cut_unfinished_line(asked)
        self.prompts = Prompts(asked)
        # Open as long as the folder is.
        self._file = _Appended(path)

    @staticmethod
    def _cut_unfinished_line(path: Path) -> None:
        """A killed run can leave half a line; the next sample must not be appended to it."""
        if not path.is_file():
            return
        with open(path, "r+b") as file:
            end = file.seek(0, os.SEEK_END)
            complete = end
            while complete > 0:
                begin = max(complete - BLOCK, 0)
                file.seek(begin)
                newline = file.read(complete - begin).rfind(b"\n")
                if newline >= 0:
                    complete = begin + newline + 1
                    break
                complete = begin
            if complete < end:
                file.truncate(complete)

    def _close(self) -> None:
        self._file.close()
        if self._asked is not None:
            self._asked.close()

    def append(self, sample: Sample) -> None:
        """Write one sample; it survives the process.

        Raises:
            NotFinite: NaN and infinity are no JSON.
            OSError: it cannot be written.
        """
        try:
            text = sample_line(sample)
        except ValueError:
            raise NotFinite("the answer holds numbers that are not finite") from None
        self.samples.add(sample, self._file.append(text))

    def keep(self, prompt: Prompt) -> None:
        """Write what a document asks, unless it is there. Raises :class:`OSError` where it cannot be written."""
        if prompt.key not in self.prompts:
            if self._asked is None:
                self._asked = _Appended(self.path / DOCUMENTS)
            self.prompts.add(prompt, self._asked.append(prompt_line(prompt)))

    def claim(self, part: str, name: str, value: str, said: str) -> None:
        """Note a fact that the folder's samples depend on; :meth:`write_record` keeps it.

        Args:
            part: of the fingerprint, such as :data:`DATA`.
            name: of the task or model.
            said: how samples differ under another value, for a person.

        Raises:
            UserError: the folder's samples are under another value.
        """
        known = self.fingerprint[part].setdefault(name, value)
        if known != value:
            was, now = (f"SHA-256 {_shown(item)}" if len(item) == 64 else item for item in (known, value))
            raise UserError(f"{self.path} holds samples of {name} {said} ({was}, now {now}); {REMEDY}")

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace ``record.json``."""
        content = Record.model_validate({**record, "fingerprint": self.fingerprint})
        write_atomic(self.path / RECORD, record_text(content))

    def write_results(self, rows: Iterable[Row]) -> None:
        """Replace ``results.csv``."""
        write_atomic(self.path / RESULTS, rows_csv(rows))

    def write_curve(self, rows: Sequence[CurveRow]) -> None:
        """Replace ``curve.csv``; nothing where there are no rows."""
        if rows:
            write_atomic(self.path / CURVE, curve_csv(rows))


def _differences(known: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, with both values. What only one of them has is no difference in the parts
    that may grow."""
    said = []
    for name in sorted({*known, *mine}):
        there, here, meant = known.get(name), mine.get(name), MEANING.get(name, name)
        if not all(value is None or isinstance(value, dict) for value in (there, here)) or there is here is None:
            if there != here:
                said.append(f"{meant} is {_shown(there)} there and {_shown(here)} here")
            continue
        there, here = there or {}, here or {}
        for key in sorted(there.keys() & here.keys() if name in GROWING else there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                said.append(f"{meant} {key} is {_shown(there.get(key))} there and {_shown(here.get(key))} here")
    return said


def _without(models: Container[str], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint without what it says of some models."""
    of_files = {
        key: value for key, value in fingerprint.get(INPUTS, {}).items() if key.rpartition("/")[0] not in models
    }
    of_models = {key: value for key, value in fingerprint.get("models", {}).items() if key not in models}
    return {**fingerprint, "models": of_models, INPUTS: of_files}


def _shown(value: Any) -> str:
    """A value of a fingerprint for a person: hashes and long texts by their beginning."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def clear(path: Path) -> None:
    """Remove the files of an earlier run, and nothing else."""
    for name in (SAMPLES, DOCUMENTS, RECORD, RESULTS, CURVE, STATES):
        (path / name).unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Versions, commit and hardware of this process."""
    import torch

    from arkv.kernels.cpu import building
    from bench.models.products import cpu_instructions

    packages = {}
    for name in (
        "arkv-bench",
        "arkv",
        "torch",
        "transformers",
        "lm-eval",
        "datasets",
        "numpy",
        "kvpress",
        "optimum-quanto",
        "hqq",
    ):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device: dict[str, Any] = {
        "cpu": _cpu_name(),
        "instructions": cpu_instructions(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if torch.cuda.is_available():
        device["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "hardware": {**device, "torch_threads": torch.get_num_threads(), "cpu_kernel": building.is_built()},
        **_commit(),
    }


def source_sha256(parts: Sequence[str] = ("",)) -> str:
    """Of the project's own source files: two processes with the same hash run the same code.

    Args:
        parts: only of the files whose names, such as ``arkv/cache.py``, begin so.
    """
    digest = hashlib.sha256()
    for package in ("arkv", "bench", "tasks"):
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        # Each package may be installed somewhere else.
        root = Path(spec.origin).resolve().parent
        for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".c", ".h")):
            name = f"{package}/{path.relative_to(root).as_posix()}"
            if name.startswith(tuple(parts)):
                digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _commit() -> dict[str, Any]:
    """Commit and dirty flag of the source tree, empty when the suite was installed without one."""
    root = Path(__file__).resolve().parents[2]
    try:
        top, commit, status = (
            subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (["rev-parse", "--show-toplevel"], ["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    if Path(top.strip()) != root:
        return {"commit": None, "dirty": None}
    return {"commit": commit.strip(), "dirty": bool(status.strip())}


def now() -> str:
    """The time of day in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def command_line() -> str:
    """What was typed, without the path of the program and what is secret."""
    import shlex

    return shlex.join([Path(sys.argv[0]).name, *redacted_arguments(sys.argv[1:])])
