"""A run: every document of every task through every cell of the grid, into a run folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bench import records
from bench.config import RunConfig
from bench.engine import Engine, Failure
from bench.errors import UserError
from bench.harness import HarnessTasks
from bench.methods import Cell, grid
from bench.models import LoadedModel, load
from bench.predictions import clear_predictions, write_predictions
from bench.progress import ProgressReporter
from bench.results import TaskResults, group_rows, rows, to_sample
from tasks.base import Document, Task, TaskError, TaskGroup, TaskSettings
from tasks.registry import get_task


@dataclass
class Outcome:
    """What a run did: rows of the table, and what failed with its reason."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    """``model``, ``task`` and ``error``; ``cell`` and ``document`` where one cell failed in one document."""
    measured: int = 0
    """Samples measured now, as opposed to found in the folder."""


def _prompt_hash(document: Document) -> str:
    """Of everything that was asked: token ids and how to go on from them."""
    request = document.request
    asked = {"request": type(request).__name__, **dataclasses.asdict(request)}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


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
        "apply_chat_template": config.apply_chat_template,
        "system_instruction": config.system_instruction,
        "enable_thinking": config.enable_thinking,
        "gen_kwargs": config.gen_kwargs,
        "rolling_prefill": config.rolling_prefill,
        "rolling_chunk": config.rolling_chunk,
        "prefill_chunk": config.prefill_chunk,
        "haystack": _file_hash(config.haystack),
        "text": _file_hash(config.text),
        "continuation": config.continuation,
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


def make_task(name: str, include_path: Sequence[Path] = ()) -> Task | TaskGroup:
    """A task of the suite, or a task or group of lm-eval.

    Raises :class:`TaskError` for an unknown name, with the nearest ones.
    """
    return get_task(name, fallback=HarnessTasks(include_path=include_path))


def _tasks_of(asked: Sequence[Task | TaskGroup]) -> list[tuple[Task, str | None]]:
    """The tasks to measure, each once, and the group that one was asked for through.

    Raises :class:`TaskError` for a group whose tasks cannot be found.
    """
    tasks: dict[str, tuple[Task, str | None]] = {}
    direct = {item.name for item in asked}

    def add(item: Task | TaskGroup, group: str | None) -> None:
        if isinstance(item, Task):
            tasks.setdefault(item.name, (item, None if item.name in direct else group))
            return
        for member in item.members:
            add(member, item.name)

    for item in asked:
        add(item, None)
    return list(tasks.values())


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
    asked = [make_task(name, [Path(folder) for folder in config.include_path or ()]) for name in config.tasks]
    tasks = _tasks_of(asked)
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
        begun = folder.previous or {"started": started, "command": records.command_line(), "continued": []}
        again = [{"started": started, "command": records.command_line()}] if folder.previous else []
        record = {
            "started": begun["started"],
            "finished": None,
            "command": begun["command"],
            "continued": [*begun.get("continued", []), *again],
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
            "tasks": dict(begun.get("tasks", {})),
            "failures": outcome.failures,
            **records.environment(),
        }
        folder.write_record(record)
        for name, model in loaded.items():
            engine = Engine(
                model.model, model.tokenizer, cells, batch_size=config.batch, prefill_chunk=config.prefill_chunk
            )
            engine.warm_up()
            results: dict[str, TaskResults] = {}
            for task, part_of in tasks:
                try:
                    documents = list(task.load(_settings(config, model, task)))
                    folder.claim_data(task.name, task.data_hash())
                    record["tasks"][task.name] = {
                        "documents": len(documents),
                        "truncated": sum(document.truncated for document in documents),
                        "data_sha256": task.data_hash() or None,
                    }
                    folder.write_record(record)
                    _measure(name, task, documents, cells, engine, folder, console, outcome)
                    found = _found(name, task, documents, folder)
                    results[task.name] = TaskResults(task, documents, cells, found)
                except (TaskError, UserError) as error:
                    if isinstance(error, TaskError) and error.usage:
                        raise
                    outcome.failures.append({"model": name, "task": task.name, "error": str(error)})
                    console.print(f"[red]{escape(task.name)}: {escape(str(error))}[/red]", highlight=False)
                    continue
                outcome.rows.extend(rows(name, results[task.name], cells, part_of))
                write_predictions(path, task, documents, cells, found, model=name if len(loaded) > 1 else None)
                folder.write_results(outcome.rows)
                folder.write_record(record)
            for group in asked:
                if isinstance(group, TaskGroup):
                    outcome.rows.extend(group_rows(name, group, results, cells))
        folder.write_results(outcome.rows)
        folder.write_record({**record, "finished": records.now()})
    return outcome


def _found(
    model: str, task: Task, documents: Sequence[Document], folder: records.RunFolder
) -> dict[tuple[str, str], dict[str, Any]]:
    """The folder's samples of the documents as they are asked now, by document id and cell key."""
    wanted = {document.id: _prompt_hash(document) for document in documents}
    return {
        (sample["document"], sample["cell"]): sample
        for sample in folder.samples.values()
        if sample["model"] == model
        and sample["task"] == task.name
        and wanted.get(sample["document"]) == sample["prompt_sha256"]
    }


def _measure(
    model: str,
    task: Task,
    documents: list[Document],
    cells: list[Cell],
    engine: Engine,
    folder: records.RunFolder,
    console: Console,
    outcome: Outcome,
) -> None:
    """Answer what is not answered yet; note in ``outcome`` what was measured and what failed."""
    left: dict[str, list[Cell]] = {}
    for document in documents:
        prompt_hash = _prompt_hash(document)
        open_cells = [
            cell for cell in cells if (model, task.name, document.id, prompt_hash, cell.key) not in folder.samples
        ]
        if open_cells:
            left[document.id] = open_cells
    total = len(documents) * len(cells)
    done = total - sum(map(len, left.values()))
    if done:
        found = f"{task.name}: {done} of {total} answers are in {folder.path} already"
        console.print(found, markup=False, highlight=False, soft_wrap=True)
    failures: list[dict[str, str]] = []
    with ProgressReporter(console, f"{model} {task.name}", total, done) as progress:
        work = [(document, left[document.id]) for document in documents if document.id in left]
        for document, answered in engine.answer_batch(work):
            if isinstance(answered, Failure):
                where = {"model": model, "task": task.name, "cell": answered.cell.key, "document": document.id}
                failures.append({**where, "error": answered.error})
            else:
                folder.append(to_sample(model, task, document, _prompt_hash(document), answered))
                outcome.measured += 1
            progress.advance()
    for line in failure_lines(failures):
        console.print(f"[red]{escape(line)}[/red]", highlight=False)
    outcome.failures += failures


def failure_lines(failures: Iterable[Mapping[str, str]]) -> list[str]:
    """What failed, for a person: a line per task, and per cell of a task with its first error."""
    groups: dict[tuple[str, str, str | None], list[Mapping[str, str]]] = {}
    for failure in failures:
        groups.setdefault((failure["model"], failure["task"], failure.get("cell")), []).append(failure)
    lines = []
    for (model, task, cell), mine in groups.items():
        first = mine[0]
        if cell is None:
            lines.append(f"{task} ({model}): {first['error']}")
        else:
            more = f" and {len(mine) - 1} more documents" if len(mine) > 1 else ""
            lines.append(f"{task} ({model}), {cell}, {first['document']}{more}: {first['error']}")
    return lines
