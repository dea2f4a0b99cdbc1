"""Rows: local ones in the place of a download, and the hash of those that were used."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tasks.base import missing_rows
from tasks.errors import TaskError, nearest
from tasks.jsonl import read_jsonl


class LocalRows(NamedTuple):
    """Local rows in the place of a download."""

    settings: dict[str, Any]
    """What makes lm-eval take them."""
    files: list[Path]
    notes: tuple[str, ...]
    """What a person should know of them."""


def local_rows(task: str, config: Mapping[str, Any], data_dir: Path, shots: int) -> LocalRows:
    """A task's rows from ``data_dir``. Raises :class:`TaskError`."""
    import datasets

    if "class" in config:
        raise TaskError(f"{task} loads its rows with code of its own; it cannot read local ones")
    dataset = str(config.get("dataset_path") or task).rpartition("/")[2]
    folder = next((data_dir / name for name in (task, dataset) if (data_dir / name).is_dir()), data_dir / task)
    evaluation = config.get("test_split") or config.get("validation_split")
    fewshot = _fewshot_split(config) if shots else None
    subset = config.get("dataset_name")
    if subset and (folder / subset).is_dir():
        folder, subset = folder / subset, None
    tables, files, notes = {}, [], []
    for split in dict.fromkeys((evaluation, fewshot)):
        if split is None:
            continue
        path = _split_file(task, folder, split, data_dir)
        files.append(path)
        rows = _read_rows(path, config, subset)
        # Where examples come from the evaluated rows, the row in question is set aside.
        if split == fewshot and len(rows) < shots + (fewshot == evaluation):
            raise TaskError(f"{path} has {len(rows)} rows, too few to draw {shots} examples from")
        tables[split] = datasets.Dataset.from_list(_with_all_fields(rows))
        notes += _notes(path, rows, config)
    # lm-eval opens every split that the configuration names, asked for or not.
    roles = ("test_split", "validation_split", "training_split", "fewshot_split")
    unused = {role: None for role in roles if config.get(role) not in (None, *tables)}

    def custom_dataset(**_: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict(tables)

    return LocalRows({"custom_dataset": custom_dataset, **unused}, files, tuple(notes))


def _with_all_fields(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with the fields of all: a table has None where a row lacks one, as the datasets library reads JSON."""
    known = dict.fromkeys(field for row in rows for field in row)
    return [{field: row.get(field) for field in known} for row in rows]


def _notes(path: Path, rows: Sequence[dict[str, Any]], config: Mapping[str, Any]) -> list[str]:
    """What of the rows may not be meant: fields that some lack, and an answer that is the same for all."""
    having = Counter(field for row in rows for field in row)
    notes = [
        f"{len(rows) - count} of {len(rows)} rows of {path} have no field {field!r}, which is null there"
        for field, count in having.items()
        if count < len(rows)
    ]
    target = config.get("doc_to_target")
    if isinstance(target, str) and target.isidentifier() and target not in having:
        notes.append(f"no row of {path} has a field {target!r}: doc_to_target is this very word, as lm-eval reads it")
    return notes


def _fewshot_split(config: Mapping[str, Any]) -> str | None:
    """The split that examples are drawn from, by lm-eval's order; None where the configuration holds them itself."""
    fewshot = config.get("fewshot_config") or {}
    if split := fewshot.get("split") or config.get("fewshot_split"):
        return split
    if fewshot.get("samples") is not None:
        return None
    return config.get("training_split") or config.get("validation_split") or config.get("test_split")


def _split_file(task: str, folder: Path, split: str, data_dir: Path) -> Path:
    """``<split>.jsonl``, or else the one ``<split>_*.jsonl``. Raises :class:`TaskError`."""
    if (exact := folder / f"{split}.jsonl").is_file():
        return exact
    files = sorted(folder.glob(f"{split}_*.jsonl"))
    if not files:
        raise TaskError(
            f"{task}: no local rows for its split {split!r}: looked for {exact} and {split}_*.jsonl beside it",
            reason=missing_rows(data_dir),
        )
    if len(files) > 1:
        raise TaskError(f"{task}: {len(files)} files for the split {split!r}: keep one of {', '.join(map(str, files))}")
    return files[0]


def _read_rows(path: Path, config: Mapping[str, Any], subset: str | None) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; each must have the fields that the templates in ``config`` read.

    Code of a task may read any field: for one that has some, each row must have the fields that others have. Where rows
    have a field ``subject``, only those whose subject is ``subset``. Raises :class:`TaskError` with the file, line and
    field.
    """
    try:
        stat = path.stat()
        rows = _parse_rows(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from error
    if not rows:
        raise TaskError(f"{path} has no rows")
    if subset and any("subject" in row for _, row in rows):
        for where, row in rows:
            if "subject" not in row:
                raise TaskError(f"{where}: no field 'subject', which other rows have")
        subjects = {row["subject"] for _, row in rows}
        rows = [(where, row) for where, row in rows if row["subject"] == subset]
        if not rows:
            raise TaskError(f"{path} has no rows of the subject {subset!r}: {nearest(subset, map(str, subjects))}")
    # What process_docs makes of the rows is what the templates read.
    if not config.get("process_docs"):
        _check_fields(path, rows, config)
    if config.get("process_docs") or config.get("process_results"):
        _check_same_fields(path, rows)
    return [dict(row) for _, row in rows]


@functools.lru_cache(maxsize=8)
def _parse_rows(path: Path, size: int, changed: int) -> list[tuple[str, dict[str, Any]]]:
    """Rows with their places; read once for all the tasks that share a file of this size and time of change."""
    return list(read_jsonl(str(path), path.read_bytes()))


def _check_fields(path: Path, rows: Sequence[tuple[str, dict[str, Any]]], config: Mapping[str, Any]) -> None:
    """Render every template with every numbered row: which fields a template needs may depend on the row."""
    from jinja2 import UndefinedError
    from lm_eval.utils import env

    known = {field for _, row in rows for field in row}
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix", "description"):
        template = config.get(key)
        if not isinstance(template, str):
            continue
        # Templates may name a field outright. What names none is a text, which choices cannot be made of, and which is
        # right among several only if it is one of them.
        choices = config.get("doc_to_choice")
        meant = choices is None or (isinstance(choices, list) and template in choices)
        named = key == "doc_to_choice" or (key == "doc_to_target" and not meant)
        if named and template.isidentifier() and template not in known:
            raise TaskError(f"{rows[0][0]}: no field {template!r}, which the task's {key} names")
        compiled = env.from_string(f"{{{{ {template} }}}}" if template in known else template)
        for where, row in rows:
            try:
                compiled.render(**row)
            except UndefinedError as error:
                raise TaskError(f"{where}: the task's {key} misses a field: {error}") from error


def _check_same_fields(path: Path, rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    known = dict.fromkeys(field for _, row in rows for field in row)
    for where, row in rows:
        for field in known:
            if field not in row:
                raise TaskError(f"{where}: no field {field!r}, which other rows have")


def hash_rows(task: Any) -> str:
    """SHA-256 over the rows of the evaluated split and those that examples are drawn from."""
    digest = hashlib.sha256()
    for rows in (task.eval_docs, getattr(getattr(task, "sampler", None), "df", ())):
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
            digest.update(b"\n")
        digest.update(b"\0")
    return digest.hexdigest()
