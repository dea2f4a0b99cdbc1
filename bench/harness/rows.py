"""Rows: local ones in the place of a download, and the hash of those that were used."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.base import TaskError, missing_rows, nearest


def local_rows(task: str, config: Mapping[str, Any], data_dir: Path, shots: int) -> tuple[dict[str, Any], list[Path]]:
    """Settings that make lm-eval take a task's rows from ``data_dir``, and the files. Raises :class:`TaskError`."""
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
    tables, files = {}, []
    for split in dict.fromkeys((evaluation, fewshot)):
        if split is None:
            continue
        path = _split_file(task, folder, split, data_dir)
        files.append(path)
        rows = _read_rows(path, config, subset)
        # Where examples come from the evaluated rows, the row in question is set aside.
        if split == fewshot and len(rows) < shots + (fewshot == evaluation):
            raise TaskError(f"{path} has {len(rows)} rows, too few to draw {shots} examples from")
        tables[split] = datasets.Dataset.from_list(rows)
    # lm-eval opens every split that the configuration names, asked for or not.
    roles = ("test_split", "validation_split", "training_split", "fewshot_split")
    unused = {role: None for role in roles if config.get(role) not in (None, *tables)}

    def custom_dataset(**_: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict(tables)

    return {"custom_dataset": custom_dataset, **unused}, files


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
        for number, row in rows:
            if "subject" not in row:
                raise TaskError(f"{path}, line {number}: no field 'subject', which other rows have")
        subjects = {row["subject"] for _, row in rows}
        rows = [(number, row) for number, row in rows if row["subject"] == subset]
        if not rows:
            raise TaskError(f"{path} has no rows of the subject {subset!r}: {nearest(subset, map(str, subjects))}")
    # What process_docs makes of the rows is what the templates read.
    if not config.get("process_docs"):
        _check_fields(path, rows, config)
    if config.get("process_docs") or config.get("process_results"):
        _check_same_fields(path, rows)
    return [dict(row) for _, row in rows]


@functools.lru_cache(maxsize=8)
def _parse_rows(path: Path, size: int, changed: int) -> list[tuple[int, dict[str, Any]]]:
    """Rows with their line numbers; read once for all the tasks that share a file of this size and time of change."""
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TaskError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise TaskError(f"{path}, line {number}: not a JSON object")
            rows.append((number, row))
    return rows


def _check_fields(path: Path, rows: Sequence[tuple[int, dict[str, Any]]], config: Mapping[str, Any]) -> None:
    """Render every template with every numbered row: which fields a template needs may depend on the row."""
    from jinja2 import UndefinedError
    from lm_eval.utils import env

    known = {field for _, row in rows for field in row}
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix", "description"):
        template = config.get(key)
        if not isinstance(template, str):
            continue
        # Templates may name a field outright.
        if key in ("doc_to_target", "doc_to_choice") and template.isidentifier() and template not in known:
            raise TaskError(f"{path}, line {rows[0][0]}: no field {template!r}, which the task's {key} names")
        compiled = env.from_string(f"{{{{ {template} }}}}" if template in known else template)
        for number, row in rows:
            try:
                compiled.render(**row)
            except UndefinedError as error:
                raise TaskError(f"{path}, line {number}: the task's {key} misses a field: {error}") from error


def _check_same_fields(path: Path, rows: Sequence[tuple[int, dict[str, Any]]]) -> None:
    known = dict.fromkeys(field for _, row in rows for field in row)
    for number, row in rows:
        for field in known:
            if field not in row:
                raise TaskError(f"{path}, line {number}: no field {field!r}, which other rows have")


def hash_rows(task: Any) -> str:
    """SHA-256 over the rows of the evaluated split and those that examples are drawn from."""
    digest = hashlib.sha256()
    for rows in (task.eval_docs, getattr(getattr(task, "sampler", None), "df", ())):
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
            digest.update(b"\n")
        digest.update(b"\0")
    return digest.hexdigest()
