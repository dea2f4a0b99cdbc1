"""Rows of LongBench: JSONL files, the official ``data.zip``, or that archive from the hub at a pinned revision.

The hub has LongBench as a script, which current versions of the datasets library refuse, and as re-formatted copies,
whose contexts hold parts of the prompts. The archive beside the script is what the official code reads.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.base import TaskError, missing_rows
from tasks.hub import fetch
from tasks.jsonl import read_jsonl
from tasks.longbench.datasets import Dataset
from tasks.longbench.metrics import check_row

REPOSITORY = "zai-org/LongBench"
REVISION = "7956e94fb272285d5ed77fe3ba9843ed250ce6f4"
ARCHIVE = "data.zip"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question of a dataset."""

    input: str
    context: str
    answers: tuple[str, ...]
    length: int
    """Words, or characters of a Chinese text; sorts the rows of LongBench-E into buckets."""
    all_classes: tuple[str, ...]
    """Empty but for classifications."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a dataset, in the order of the file."""

    rows: list[Row]
    sha256: str
    """Of the file's bytes."""


def load_rows(dataset: Dataset, data_dir: Path | None, *, extended: bool = False) -> Rows:
    """The rows of a dataset; of its LongBench-E version if ``extended``.

    Args:
        data_dir: a folder with ``<dataset>.jsonl`` (``<dataset>_e.jsonl`` for LongBench-E), or with these in a folder
            ``longbench`` or ``data``; a folder with the official ``data.zip``, or that file. None: the hub.

    Raises:
        TaskError: no such data, or a damaged file (file, line and field are named).
    """
    name = f"{dataset.name}_e.jsonl" if extended else f"{dataset.name}.jsonl"
    source, content = _from_hub(name) if data_dir is None else _from_disk(data_dir, name)
    rows = [_row(dataset, fields, where) for where, fields in read_jsonl(source, content)]
    if not rows:
        raise TaskError(f"{source} has no rows")
    return Rows(rows=rows, sha256=hashlib.sha256(content).hexdigest())


# --- Where the bytes are ---


def _from_disk(data_dir: Path, name: str) -> tuple[str, bytes]:
    """What to call the file, and its bytes."""
    files = [data_dir / name, data_dir / "longbench" / name, data_dir / "data" / name]
    archives = [data_dir, data_dir / ARCHIVE, data_dir / "longbench" / ARCHIVE]
    try:
        for path in files:
            if path.is_file():
                return str(path), path.read_bytes()
        for path in archives:
            if path.is_file():
                return _from_archive(path, name)
    except OSError as error:
        raise TaskError(f"longbench: {path} cannot be read: {error.strerror}") from error
    raise TaskError(
        f"longbench: no {name}: looked for {', '.join(map(str, files))}, and for the official {ARCHIVE} in {data_dir}",
        reason=missing_rows(data_dir),
    )


def _from_archive(path: Path, name: str) -> tuple[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                # macOS puts a twin of each file, with its attributes, into the archives that it makes.
                if member.rpartition("/")[2] == name and not member.startswith("__MACOSX/"):
                    return f"{path}/{member}", archive.read(member)
    # The last is what zipfile raises for encrypted members and for a compression that it does not know.
    except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise TaskError(f"longbench: {path} is not a sound zip archive: {error}") from error
    raise TaskError(f"longbench: {path} holds no {name}")


def _from_hub(name: str) -> tuple[str, bytes]:
    instead = f"without a connection, give --data-dir with one <dataset>.jsonl each, or with the official {ARCHIVE}"
    return _from_archive(fetch("longbench", REPOSITORY, ARCHIVE, REVISION, instead), name)


# --- Reading ---


def get_field(fields: dict[str, Any], name: str, where: str, is_valid: Callable[[Any], bool], wanted: str) -> Any:
    """The field ``name``. Raises :class:`TaskError`, which names file, line and field, if it is absent or invalid."""
    if name not in fields:
        raise TaskError(f"{where}: no field {name!r}")
    if not is_valid(fields[name]):
        raise TaskError(f"{where}: the field {name!r} must be {wanted}, not {str(fields[name])[:60]!r}")
    return fields[name]


def is_texts(value: Any) -> bool:
    """A list of strings, perhaps empty."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def answers_of(
    dataset: Dataset, fields: dict[str, Any], where: str
) -> tuple[tuple[str, ...], tuple[str, ...], int | None]:
    """``answers``, ``all_classes`` and ``length`` of a row of data or of predictions, checked.

    ``all_classes`` may be absent or null where the metric does not need it. Raises :class:`TaskError`.
    """
    answers = get_field(fields, "answers", where, is_texts, "a list of texts")
    classes = fields.get("all_classes")
    if dataset.metric == "classification":
        classes = get_field(fields, "all_classes", where, is_texts, "a list of texts")
    length = fields.get("length")
    if length is not None and type(length) is not int:
        raise TaskError(f"{where}: the field 'length' must be a whole number, not {str(length)[:60]!r}")
    try:
        check_row(dataset, answers, classes or ())
    except TaskError as error:
        raise TaskError(f"{where}: {error}") from error
    return tuple(answers), tuple(classes or ()), length


def _row(dataset: Dataset, fields: dict[str, Any], where: str) -> Row:
    def text(name: str) -> str:
        value: str = get_field(fields, name, where, lambda value: isinstance(value, str), "a text")
        return value

    answers, all_classes, length = answers_of(dataset, fields, where)
    if length is None:
        raise TaskError(f"{where}: no field 'length'")
    return Row(input=text("input"), context=text("context"), answers=answers, length=length, all_classes=all_classes)
