"""What a run is asked for: its models, its grid, its tasks and their documents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bench.errors import UserError, show_traceback
from bench.harness.tasks import HarnessTasks
from bench.judge.power import documents_needed, too_few
from bench.methods.grid import Cell, grid
from bench.methods.own_tasks import own_task
from bench.methods.plugins import TASKS, Plugins
from bench.methods.questions import behind
from bench.models.loading import DescribedModel, LoadedModel, describe
from bench.names import FULL, LEAST_DOCUMENTS
from bench.runs.documents import load_documents
from bench.runs.failures import failure_lines
from bench.runs.repeats import repeated
from bench.runs.told import check_questions, needing, with_questions
from bench.settings.mappings import read_mapping
from bench.settings.run import RunConfig
from tasks.base import Document, Generate, Task, TaskError, TaskGroup, TaskSettings
from tasks.generation import counting
from tasks.registry import TASKS as BUILT_IN_TASKS
from tasks.registry import TaskSources, get_task, split_spec

_ENDS = {"until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "max_length"}
"""Settings in ``--gen-kwargs`` that say where an answer ends: for lm-eval's tasks only."""


def task_settings(config: RunConfig, model: DescribedModel, task: Task) -> TaskSettings:
    """What a task of the run builds its documents from. Raises :class:`UserError` for a model of unknown length."""
    longest = model.context_length
    if config.max_length is not None:
        longest = min(config.max_length, longest) if longest is not None else config.max_length
    if longest is None:
        raise UserError(f"model {model.name} does not say how long its context is: give --max-length")
    return TaskSettings(
        tokenizer=model.tokenizer,
        max_length=longest,
        model_type=model.config.model_type,
        context_length=model.context_length,
        seed=config.seed,
        limit=config.limit,
        sampling_ratio=config.sampling_ratio,
        data_dir=config.data_dir,
        options={name: getattr(config, name) for name in task.option_names if getattr(config, name, None) is not None},
    )


def models_of(
    config: RunConfig, own_models: Sequence[LoadedModel], console: Console
) -> tuple[dict[str, DescribedModel], list[dict[str, str]]]:
    """The models of a run by name, and what failed of those that cannot be read while others can.

    Args:
        own_models: models given as objects, which ``config`` names.

    Raises:
        UserError: none can be read, a name is unknown, or two of them have one name.
    """
    models: dict[str, DescribedModel] = {model.name: model for model in own_models}
    unread = []
    for reference in config.model:
        if reference in models:
            continue
        console.print(f"Loading {escape(reference)} ...", highlight=False)
        # On a cluster, workers fetch the weights that this process has no use for.
        weights = config.executor == "local"
        try:
            model = describe(reference, trust_remote_code=config.trust_remote_code, weights=weights)
        except UserError as error:
            # One of several that cannot be read fails alone; a name that nobody knows is a slip.
            if error.exit_code == 2 or (reference == config.model[-1] and not models):
                raise
            show_traceback(error)
            console.print(f"[red]{escape(str(error))}[/red]", highlight=False)
            unread.append({"model": reference, "error": str(error), "reason": str(error)})
            continue
        if model.name in models:
            raise UserError(f"--model: {reference!r} has the name of another one, {model.name!r}; rename its folder")
        models[model.name] = model
    return models, unread


def make_task(name: str, include_path: Sequence[Path] = ()) -> Task | TaskGroup:
    """A task of the suite, of an installed plugin, or a task or group of lm-eval.

    Raises :class:`TaskError` for an unknown name, with the nearest ones.
    """
    others = HarnessTasks(include_path=include_path)
    return get_task(name, fallback=TaskSources(Plugins(others=others), others))


def plugins_of(config: RunConfig, own: Sequence[Task | TaskGroup] = ()) -> tuple[Plugins, HarnessTasks]:
    """What plugins and tasks given as objects bring, and what lm-eval does.

    Raises:
        UserError, TaskError: a file is missing, or a task has a name that it cannot have.
    """
    folders = [Path(folder) for folder in config.include_path or ()]
    others = HarnessTasks(include_path=folders, num_fewshot=config.num_fewshot)
    return Plugins(config.plugin or (), others, own), others


def cells_of(config: RunConfig, plugins: Plugins) -> list[Cell]:
    """The grid alone. Raises :class:`UserError`, :class:`arkv.ConfigError`."""
    methods = plugins.usable_methods(config.measured_methods)
    budgets, formats = config.budgets, config.quant_format
    return grid(methods, budgets, config.window_size, formats, config.method_settings, plugins.methods)


def asked_for(
    config: RunConfig, plugins: Plugins, others: HarnessTasks
) -> tuple[list[Cell], list[Task | TaskGroup], list[dict[str, str]]]:
    """The grid, the tasks, and what failed: plugins with what they may have had, and tasks that cannot be found.

    Raises:
        UserError, arkv.ConfigError, TaskError: what was asked for makes no sense, or nothing of it is left.
    """
    cells = cells_of(config, plugins)
    sources = TaskSources(plugins, others)
    plugins.refuse_taken(TASKS, [split_spec(name)[0] for name in config.tasks], BUILT_IN_TASKS.__contains__)
    asked = []
    errors: dict[str, TaskError] = {}
    for name in config.tasks:
        try:
            items = asked_in(config.question, get_task(name, fallback=sources))
            tasks_of(items)
        except TaskError as error:
            if error.usage and plugins.failures:
                plugins.lose(str(error))
            else:
                errors[name] = error
        else:
            asked += items
    failures = [*plugins.failures, *({"task": name, "error": str(error)} for name, error in errors.items())]
    wanted = any(cell.method != FULL or FULL in config.methods for cell in cells)
    if asked and wanted:
        check_questions(cells, [task for task, _ in tasks_of(asked)])
        return cells, asked, failures
    if plugins.failures:
        raise UserError("; ".join(failure_lines(failures)))
    raise TaskError("; ".join(map(str, errors.values())), usage=any(error.usage for error in errors.values()))


def asked_in(question: str, item: Task | TaskGroup) -> list[Task | TaskGroup]:
    """A task or group in the ways that ``--question`` asks for; once, as it is, where nothing of it has parts.

    Raises :class:`TaskError` for a group whose tasks cannot be found.
    """
    after = None if question == "before" else behind(item)
    if after is None:
        return [item]
    return [item, after] if question == "both" else [after]


def tasks_of(asked: Sequence[Task | TaskGroup]) -> list[tuple[Task, str | None]]:
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


def planned(config: RunConfig) -> tuple[list[Cell], list[Task], list[dict[str, str]]]:
    """The grid of a run, what it would measure, and what cannot be found. Raises as :func:`execute`."""
    cells, asked, failures = asked_for(config, *plugins_of(config))
    return cells, [task for task, _ in tasks_of(asked)], failures


def doubts(config: RunConfig, task: Task, documents: int, methods: Sequence[str]) -> str:
    """Why so many documents of a task cannot tell its rows apart, and what gives enough; empty where they can.

    Of scores that are not right or wrong nothing is known before they are measured but that few give no interval.

    Args:
        methods: of the grid's cells, one each.
    """
    rows = sum(method != FULL for method in methods)
    if documents < LEAST_DOCUMENTS:
        doubt = f"{documents} documents give no interval and no verdict; {LEAST_DOCUMENTS} give intervals"
        return doubt + _option(config, task, documents, LEAST_DOCUMENTS)
    if not task.metrics or not task.metrics[0].binary:
        return ""
    if not (doubt := too_few(documents, rows)):
        return ""
    needed = documents_needed(rows)
    assert needed is not None  # or they would not be too few
    return doubt + _option(config, task, documents, needed)


def _option(config: RunConfig, task: Task, documents: int, needed: int) -> str:
    """What asks for so many documents; empty where the task has no more."""
    options = own_task(task).Options
    fields = {} if options is None else options.model_fields
    found = []
    if config.limit is not None and documents >= config.limit:
        found.append(f"--limit {needed}")
    if {"samples", "lengths"} <= fields.keys():
        samples, lengths = (getattr(config, name) or fields[name].default for name in ("samples", "lengths"))
        # As many of them as now are drawn from, and fit; without the limit all of them do.
        of_each = needed / len(lengths) if found else samples * needed / documents
        if of_each > samples:
            found.append(f"--samples {math.ceil(of_each)}")
    return f": {' '.join(found)}" if found else ""


def documents_of(config: RunConfig, model: DescribedModel, task: Task, cells: Sequence[Cell]) -> list[Document]:
    """The documents of a task for a model, with what a method of ``cells`` has to know of them.

    Raises :class:`TaskError`, :class:`UserError`.
    """
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    settings = task_settings(config, model, task)
    documents = load_documents(task, settings, vocabulary)
    if method := needing(cells):
        try:
            divided = load_documents(task, dataclasses.replace(settings, question="after"), vocabulary)
            documents = with_questions(documents, divided)
        except TaskError as error:
            raise TaskError(
                f"{task.name}: where its questions begin cannot be told, which {method} has to know: leave one of the "
                "two out"
            ) from error
    return repeated(config, task, _with_given(config, task, documents))


def _with_given(config: RunConfig, task: Task, documents: list[Document]) -> list[Document]:
    """The documents with what ``--gen-kwargs`` gives. Raises :class:`TaskError`."""
    if config.gen_kwargs is None or "gen_kwargs" in task.option_names:
        return documents
    given = read_mapping("--gen-kwargs", config.gen_kwargs)
    try:
        settings = counting({name: value for name, value in given.items() if name not in _ENDS})
    except ValueError as error:
        raise TaskError(f"{task.name}: {error}") from None
    return [_with_settings(document, settings) for document in documents]


def _with_settings(document: Document, settings: Mapping[str, Any]) -> Document:
    """The document with generation settings, which the task's own win over."""
    request = document.request
    if not isinstance(request, Generate) or not settings:
        return document
    changed = dataclasses.replace(request, generation={**settings, **request.generation})
    return dataclasses.replace(document, request=changed)
