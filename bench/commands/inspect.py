"""``arkv-bench inspect``: what a method did to one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.commands.output import say_newest, write
from bench.errors import UserError
from bench.settings.inspect import InspectConfig
from bench.settings.options import PRESET, given, takes

if TYPE_CHECKING:
    from bench.models.loading import LoadedModel
    from bench.settings.run import RunConfig
    from tasks.base import Document


FIRST = ("cache_size", "cache_ratio", "window_size", "quant_format")
"""Settings of which a run may have several, and a prompt has one."""
BUDGETS = {"cache_size", "cache_ratio"}
RUN_OF_PROMPT = Annotated[
    Path | None, typer.Argument(metavar="RUN", help="A run to take model, prompt and method of.", show_default=False)
]


@takes(InspectConfig)
def inspect(run: RUN_OF_PROMPT = None, preset: PRESET = None, **typed: Any) -> None:
    """Show what a method did to one prompt: statistics and budget of each layer, a map of the states, the words that
    were kept, and what decoding demoted and evicted.

    With a run, or without --text and --task, the model, the prompt and the method are those of that run: its first task
    and budget, mix or else its first method; what is typed wins.

    [bold]arkv-bench inspect runs/demo --doc 2[/bold]
    [bold]arkv-bench inspect --text README.md --cache-size 512[/bold]
    [bold]arkv-bench inspect --task needle --doc 3 --cache-ratio 0.125 --html look.html[/bold]
    """
    from bench.commands.first_look import check_paths
    from bench.settings.presets import resolve

    flags = given(InspectConfig, typed)
    if run is not None or not flags.keys() & {"prompt_file", "task"}:
        flags = _of_run(run, flags)
    config, origin = resolve(flags, preset, InspectConfig)
    check_paths(config)
    if (config.prompt_file is None) == (config.task is None):
        raise UserError("give --text FILE or --task NAME, one of them", exit_code=2)
    # A preset's folder is that of a run, and its tasks are those of one.
    outdir = config.outdir if origin["outdir"] == "flag" else None
    _inspect(config.changed(tasks=config.task or "needle", outdir=outdir))


def _of_run(run: Path | None, typed: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed, with the settings of a run, or of the newest one, for what was not.

    Raises:
        UserError: no run, or one with nothing to inspect.
    """
    from bench.names import FULL, own_name
    from bench.records.record import read_record
    from bench.runs.kinds import newest_run
    from bench.settings.fields import setting_of

    if run is None:
        try:
            run = newest_run()
        except UserError as error:
            raise UserError(f"give --text FILE or --task NAME, or a run to take a document of: {error}", 2) from None
        say_newest(run)
    record = read_record(run)
    taken: dict[str, Any] = {}
    for name, value in record.settings.items():
        field = InspectConfig.model_fields.get(name)
        if field is None or name == "tasks" or (typed.keys() & BUDGETS and name in BUDGETS):
            continue
        if setting_of(field).flag_only or setting_of(field).affects not in ("answer", "grid"):
            continue
        taken[name] = value[:1] if name in ("model", *FIRST) and isinstance(value, list) else value
    methods = [method for method in _listed(record.settings, "methods", "quant_type") if method != FULL]
    tasks = [*record.tasks, *_listed(record.settings, "tasks")]
    if not methods or not tasks:
        raise UserError(f"{run} has measured nothing but {FULL}: give --methods NAME --cache-size N", exit_code=2)
    taken["methods"] = ["mix"] if "mix" in methods else methods[:1]
    if "prompt_file" not in typed:
        taken["task"] = own_name(tasks[0])
    return {**taken, **typed}


def _listed(settings: Mapping[str, Any], *names: str) -> list[Any]:
    """The list under the first of the names that there is."""
    return next((list(settings[name]) for name in names if settings.get(name)), [])


def _inspect(run: InspectConfig) -> None:
    from rich.console import Console

    from bench.models.imports import import_lightly

    import_lightly()
    from bench.engine.inspect import inspect_prompt, prompt_of, states_map
    from bench.methods.grid import grid
    from bench.methods.plugins import Plugins
    from bench.models.loading import load
    from bench.names import FULL
    from bench.records.files.json_ import json_text, known_numbers
    from bench.records.states import MapRecord, write_maps
    from bench.report.inspection import print_inspection, to_html
    from bench.runs import folder as records
    from bench.runs.kinds import INSPECTION, claim

    text, outdir = run.prompt_file, run.outdir
    if outdir is not None:
        claim(outdir, INSPECTION)
    plugins = Plugins(run.plugin or ())
    methods = plugins.needed_methods([method for method in run.methods if method != FULL])
    cells = grid(methods, run.budgets, run.window_size, run.quant_format, run.method_settings, plugins.methods)
    if len(cells) != 1:
        asked = f"--methods={','.join(run.method_names)}"
        raise UserError(f"{asked}: give one method at one budget, such as mix", exit_code=2)
    (cell,) = cells
    loaded = load(run.model[0], device=run.device, dtype=run.dtype)
    continuation: tuple[int, ...] | None = None
    if text is not None:
        ids = _read(text, run.tokens, loaded, run.steps)
        source, document_id = text.name, text.name
    else:
        document = _document(run, loaded, run.doc)
        ids, continuation = prompt_of(document)
        source, document_id = f"{run.tasks[0]}, {document.id}", document.id
    if len(ids) < 2:
        raise UserError(f"{source}: a prompt of {len(ids)} tokens leaves nothing to compress")
    found = inspect_prompt(
        loaded.model,
        loaded.tokenizer,
        cell,
        ids,
        steps=run.steps,
        continuation=continuation,
        names={"model": loaded.name, "source": source, "label": cell.label},
        prefill_chunk=run.prefill_chunk,
    )
    console = Console()
    print_inspection(found, console)
    if run.html is not None:
        write(run.html, to_html(found))
    if outdir is not None:
        try:
            outdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--outdir {outdir}: cannot be made ({error.strerror})") from None
        where = {"model": loaded.name, "task": "text" if text is not None else run.tasks[0], "document": document_id}
        shown = {**where, "cell": cell.key, "label": cell.label}
        write_maps(outdir, [MapRecord(**shown, map=states_map(found.states, found.layers))])
        details = {
            **shown,
            "command": records.command_line(),
            "fingerprint": loaded.fingerprint,
            "prompt_tokens": found.prompt_tokens,
            "layers": [known_numbers(vars(item)) for item in found.statistics],
            "steps": [vars(step) for step in found.steps],
        }
        write(outdir / "inspect.json", json_text(details, indent=1))


def _read(path: Path, tokens: int | None, loaded: LoadedModel, steps: int) -> tuple[int, ...]:
    """Token ids of a text file.

    Raises:
        TaskError: it cannot be read.
        UserError: it does not fit the model.
    """
    from tasks.text import read_text

    ids = loaded.tokenizer(read_text(path), verbose=False)["input_ids"]
    room = None if loaded.context_length is None else loaded.context_length - steps
    if tokens is None and room is not None and len(ids) > room:
        raise UserError(f"--text {path}: {len(ids)} tokens, more than the model's context: give --tokens {room}")
    if tokens is not None and room is not None and min(tokens, len(ids)) > room:
        raise UserError(f"--tokens={tokens}: with {steps} steps more than the model's context; give up to {room}", 2)
    return tuple(ids[:tokens])


def _document(run: RunConfig, loaded: LoadedModel, doc: str) -> Document:
    """The document of the task by number or id. Raises :class:`UserError` where there is none."""
    from bench.runs.asked import make_task, task_settings, tasks_of

    number = int(doc) if doc.isdecimal() else None
    tasks = tasks_of([make_task(name) for name in run.tasks])
    if len(tasks) != 1:
        names = ", ".join(task.name for task, _ in tasks[:5])
        raise UserError(f"--task={run.tasks[0]}: {len(tasks)} tasks; give one of {names}, ...", exit_code=2)
    ((task, _),) = tasks
    run = run.changed(limit=None if number is None else number + 1)
    documents = list(task.load(task_settings(run, loaded, task)))
    if number is not None:
        if number >= len(documents):
            # Of a generated task there are as many as are asked for.
            documents = list(task.load(task_settings(run.changed(samples=number + 1), loaded, task)))
        if number >= len(documents):
            raise UserError(f"--doc={doc}: {task.name} has documents 0 to {len(documents) - 1}", exit_code=2)
        return documents[number]
    for document in documents:
        if document.id == doc:
            return document
    from tasks.errors import nearest

    raise UserError(f"--doc={doc}: {nearest(doc, [document.id for document in documents])}", exit_code=2)
