"""A run: every document of every task through every cell of the grid, into a run folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bench import records
from bench.config import RunConfig
from bench.engine import Engine
from bench.errors import UserError
from bench.harness import HarnessTasks
from bench.methods import Cell, grid
from bench.models import LoadedModel, load
from bench.predictions import clear_predictions, write_predictions
from bench.progress import ProgressReporter
from bench.results import rows, to_sample
from tasks.base import Document, Task, TaskError, TaskGroup, TaskSettings
from tasks.registry import flatten, get_task


@dataclass
class Outcome:
    """What a run did: rows of the table, and what failed with its reason."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    measured: int = 0
    """Samples measured now, as opposed to found in the folder."""


def _prompt_hash(document: Document) -> str:
    return hashlib.sha256(json.dumps(document.request.prompt_ids).encode()).hexdigest()[:16]


def _file_hash(path: Path | None) -> str | None:
    return None if path is None or not path.is_file() else hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprint(config: RunConfig, models: dict[str, str]) -> dict[str, Any]:
    """Everything that changes an answer and is not part of a sample's key.

    A folder may grow by documents, tasks and cells; it must not mix models, data, precision or versions.
    """
    packages = records.environment()["packages"]
    return {
        "models": models,
        "versions": {name: packages.get(name) for name in ("arkv-bench", "torch", "transformers", "lm-eval")},
        "device": config.device,
        "dtype": config.dtype,
        "seed": config.seed,
        "max_length": config.max_length,
        "samples": config.samples,
        "num_fewshot": config.num_fewshot,
        "haystack": _file_hash(config.haystack),
    }


def _settings(config: RunConfig, model: LoadedModel, task: Task) -> TaskSettings:
    longest = model.context_length
    if config.max_length is not None:
        longest = min(config.max_length, longest) if longest is not None else config.max_length
    if longest is None:
        raise UserError(f"model {model.name} does not say how long its context is: give --max-length")
    return TaskSettings(
        tokenizer=model.tokenizer,
        max_length=longest,
        model_type=model.model.config.model_type,
        context_length=model.context_length,
        seed=config.seed,
        limit=config.limit,
        sampling_ratio=config.sampling_ratio,
        data_dir=config.data_dir,
        options={name: getattr(config, name) for name in task.option_names if getattr(config, name, None) is not None},
    )


def make_task(name: str) -> Task | TaskGroup:
    """A task or group of tasks of the suite, or of lm-eval.

    Raises :class:`TaskError` for an unknown name, with the nearest ones.
    """
    return get_task(name, fallback=HarnessTasks())


def execute(
    config: RunConfig,
    path: Path,
    console: Console,
    *,
    fresh: bool = False,
    origin: dict[str, str] | None = None,
) -> Outcome:
    """Do the run, or what is left of it, and write its folder.

    Args:
        config: settings.
        path: the run folder.
        console: where progress goes.
        fresh: forget what an earlier run left in the folder.
        origin: where each setting came from, for the record.

    Raises:
        UserError, arkv.ConfigError, TaskError: what was asked for makes no sense; nothing has been measured.
    """
    cells = grid(config.quant_type, config.budgets, config.window_size, config.quant_format, config.method_settings)
    tasks = flatten(make_task(name) for name in config.tasks)
    outcome = Outcome(path)
    started = records.now()
    loaded: dict[str, LoadedModel] = {}
    for reference in config.model:
        console.print(f"Loading {escape(reference)} ...", highlight=False)
        model = load(reference, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code)
        if model.name in loaded:
            raise UserError(f"--model: {reference!r} has the name of another one, {model.name!r}; rename its folder")
        loaded[model.name] = model
    models = {model.name: model.fingerprint for model in loaded.values()}
    with records.RunFolder(path, fingerprint(config, models), fresh=fresh) as folder:
        if fresh:
            clear_predictions(path)
        record = {
            "started": started,
            "finished": None,
            "command": records.command_line(),
            "settings": config.to_json(),
            "origin": origin or {},
            "cells": {cell.key: cell.label for cell in cells},
            "models": {
                name: {
                    "source": model.source,
                    "fingerprint": model.fingerprint,
                    "dtype": model.dtype,
                    "device": model.device,
                    "context_length": model.context_length,
                }
                for name, model in loaded.items()
            },
            "tasks": {},
            "failures": outcome.failures,
            **records.environment(),
        }
        folder.write_record(record)
        for name, model in loaded.items():
            engine = Engine(model.model, model.tokenizer, cells)
            engine.warm_up()
            for task in tasks:
                try:
                    documents = list(task.load(_settings(config, model, task)))
                except TaskError as error:
                    if error.usage:
                        raise
                    outcome.failures.append({"model": name, "task": task.name, "error": str(error)})
                    console.print(f"[red]{escape(task.name)}: {escape(str(error))}[/red]", highlight=False)
                    continue
                outcome.measured += _measure(name, task, documents, cells, engine, folder, console)
                record["tasks"][task.name] = {
                    "documents": len(documents),
                    "truncated": sum(document.truncated for document in documents),
                    "data_sha256": task.data_hash() or None,
                }
                wanted = {document.id: _prompt_hash(document) for document in documents}
                mine = {
                    (sample["document"], sample["cell"]): sample
                    for sample in folder.samples.values()
                    if sample["model"] == name
                    and sample["task"] == task.name
                    and wanted.get(sample["document"]) == sample["prompt_sha256"]
                }
                outcome.rows.extend(rows(name, task, documents, cells, mine))
                write_predictions(path, task, documents, cells, mine, model=name if len(loaded) > 1 else None)
                folder.write_results(outcome.rows)
        folder.write_results(outcome.rows)
        folder.write_record({**record, "finished": records.now()})
    return outcome


def _measure(
    model: str,
    task: Task,
    documents: list[Document],
    cells: list[Cell],
    engine: Engine,
    folder: records.RunFolder,
    console: Console,
) -> int:
    """Answer what is not answered yet. Returns the number of new samples."""
    left: dict[str, list[Cell]] = {}
    for document in documents:
        prompt_hash = _prompt_hash(document)
        open_cells = [
            cell
            for cell in cells
            if folder.samples.get((model, task.name, document.id, cell.key), {}).get("prompt_sha256") != prompt_hash
        ]
        if open_cells:
            left[document.id] = open_cells
    total = len(documents) * len(cells)
    done = total - sum(map(len, left.values()))
    if done:
        found = f"{task.name}: {done} of {total} answers are in {folder.path} already"
        console.print(found, markup=False, highlight=False, soft_wrap=True)
    measured = 0
    with ProgressReporter(console, f"{model} {task.name}", total, done) as progress:
        for document in documents:
            if document.id not in left:
                continue
            for measurement in engine.answer(document, left[document.id]):
                folder.append(to_sample(model, task, document, _prompt_hash(document), measurement))
                measured += 1
                progress.advance()
    return measured
