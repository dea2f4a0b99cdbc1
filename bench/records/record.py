"""``record.json``: what a run was asked for, what it ran on, and what became of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from bench.names import RECORD
from bench.records.files.json_ import json_text, read_json
from bench.records.lacking import no_run_folder
from bench.records.version import FORMAT_VERSION, Versioned

_OPEN = ConfigDict(extra="allow", allow_inf_nan=False)


class Fingerprint(BaseModel):
    """Everything that changes an answer and is not part of a sample's key; further settings by their names."""

    model_config = _OPEN

    models: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str | None] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict)
    """Hash of each task's rows; may grow, task by task."""
    plugins: dict[str, str] = Field(default_factory=dict)
    """Hash of each plugin file; may grow, as do the next three."""
    definitions: dict[str, str] = Field(default_factory=dict)
    """Hash of each task's definition."""
    libraries: dict[str, str] = Field(default_factory=dict)
    """Versions of libraries whose methods are asked for."""
    loaded: dict[str, str] = Field(default_factory=dict)
    """Precision and kind of device of each model."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Hashes of the files beside the weights that answers depend on."""


class Start(BaseModel):
    """One time that the run's command was started, and what it ran on."""

    model_config = _OPEN

    started: str | None = None
    finished: str | None = None
    command: str | None = None
    commit: str | None = None
    dirty: bool | None = None
    packages: dict[str, str] | None = None
    hardware: dict[str, Any] | None = None
    cell_order: str | None = None
    """In which order the cells answered a document; unknown in older records."""


class ModelRecord(BaseModel):
    """A model of a run."""

    model_config = _OPEN

    source: str | None = None
    fingerprint: str | None = None
    context_length: int | None = None
    dtype: str | None = None
    """Unknown before the model is loaded, as is the device."""
    device: str | None = None
    warm_up: str | None = None
    """What went through every cell before the first document; unknown in older records."""
    one_by_one: str | None = None
    """Why documents are answered one by one, where more were to stand side by side."""


class TaskRecord(BaseModel):
    """A task of a run."""

    model_config = _OPEN

    documents: int = 0
    truncated: int = 0
    data_sha256: str | None = None
    higher_is_better: bool | None = None
    """Of its first metric; unknown in older records."""


class FailureRecord(BaseModel):
    """What failed: a plugin, a task of a model, or one cell in one document."""

    model_config = _OPEN

    plugin: str | None = None
    model: str | None = None
    task: str | None = None
    cell: str | None = None
    document: str | None = None
    error: str


class Record(Versioned):
    """The record of ``arkv-bench run``."""

    started: str | None = None
    finished: str | None = None
    """None as long as the run has not ended."""
    command: str = ""
    continued: list[Start] = Field(default_factory=list)
    """Of format 1: when the command was given again."""
    starts: list[Start] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)
    origin: dict[str, Any] = Field(default_factory=dict)
    """Where each setting came from."""
    cells: dict[str, str] = Field(default_factory=dict)
    """Label of each cell, by its key."""
    models: dict[str, ModelRecord] = Field(default_factory=dict)
    tasks: dict[str, TaskRecord] = Field(default_factory=dict)
    failures: list[FailureRecord] = Field(default_factory=list)
    python: str | None = None
    platform: str | None = None
    packages: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, Any] = Field(default_factory=dict)
    commit: str | None = None
    dirty: bool | None = None
    executor: dict[str, Any] = Field(default_factory=dict)
    fingerprint: Fingerprint

    def as_given(self) -> dict[str, Any]:
        """What the file holds, or what was given to make it."""
        return self.model_dump(exclude_unset=True)


_RECORD = TypeAdapter(Record)


def read_record(path: Path) -> Record:
    """``record.json`` of a run folder. Raises :class:`UserError` when it is missing or damaged."""
    file = path / RECORD
    if not file.is_file():
        raise no_run_folder(path, RECORD)
    return read_json(file, _RECORD, "the record of a run")


def record_text(record: Record) -> str:
    """What ``record.json`` holds: everything that was given, of the format of now."""
    content = record.as_given()
    content.pop("format_version", None)
    return json_text({"format_version": FORMAT_VERSION, **content})
