"""``arkv-bench inspect``: what a method did to one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.commands.output import write
from bench.errors import UserError

if TYPE_CHECKING:
    from bench.models.loading import LoadedModel
    from bench.settings.run import RunConfig
    from tasks.base import Document

PROMPT, METHOD, MODEL, OUTPUT = "The prompt", "The method", "Model", "Output"


def _option(help_: str, panel: str, **more: Any) -> Any:
    return typer.Option(help=help_, rich_help_panel=panel, show_default=False, **more)


def inspect(
    text: Annotated[Path | None, _option("A text file as the prompt.", PROMPT)] = None,
    tokens: Annotated[int | None, _option("Only so many tokens of it, from its begin.", PROMPT, min=2)] = None,
    task: Annotated[str | None, _option("A document of a task instead, see list tasks.", PROMPT)] = None,
    doc: Annotated[str, _option("Which one: its number, from 0, or its id. Default: 0.", PROMPT)] = "0",
    lengths: Annotated[
        str | None, _option("needle, fidelity: prompt lengths in tokens. Default: 2000.", PROMPT)
    ] = None,
    data_dir: Annotated[str | None, _option("Folder with local rows of the task.", PROMPT)] = None,
    quant_type: Annotated[str | None, _option("window, origin, quant or mix. Default: mix.", METHOD)] = None,
    cache_size: Annotated[str | None, _option("Budget: tokens held per layer. Default: 512.", METHOD)] = None,
    cache_ratio: Annotated[str | None, _option("Budget as a share of the prompt instead.", METHOD)] = None,
    budget_unit: Annotated[str | None, _option("tokens or bytes. Default: tokens.", METHOD)] = None,
    window_size: Annotated[
        str | None, _option("Newest tokens that always stay at model precision. Default: 32.", METHOD)
    ] = None,
    quant_format: Annotated[str | None, _option("Format of quantized tokens. Default: by budget unit.", METHOD)] = None,
    preset: Annotated[
        str | None, _option("Settings of the method from a preset or YAML file; flags win.", METHOD)
    ] = None,
    steps: Annotated[int, _option("Decoding steps that are followed. Default: 16.", METHOD, min=0)] = 16,
    model: Annotated[str | None, _option("Model, see list models. Default: smollm2-135m.", MODEL)] = None,
    device: Annotated[str | None, _option("auto, cpu, cuda, mps.", MODEL)] = None,
    dtype: Annotated[str | None, _option("auto (bfloat16), float32, bfloat16, float16.", MODEL)] = None,
    seed: Annotated[int | None, _option("Seed of generated tasks. Default: 0.", PROMPT)] = None,
    html: Annotated[Path | None, _option("Write it as one page.", OUTPUT)] = None,
    outdir: Annotated[
        Path | None,
        _option("Write states.json there, which report --html draws, and inspect.json.", OUTPUT),
    ] = None,
) -> None:
    """Show what a method did to one prompt: statistics and budget of each layer, a map of the states, the words that
    were kept, and what decoding demoted and evicted.

    [bold]arkv-bench inspect --text README.md --cache-size 512[/bold]
    [bold]arkv-bench inspect --task needle --doc 3 --cache-ratio 0.125 --budget-unit bytes --html look.html[/bold]
    """
    if (text is None) == (task is None):
        raise UserError("give --text FILE or --task NAME, one of them", exit_code=2)
    names = ("model", "quant_type", "cache_size", "cache_ratio", "budget_unit", "window_size", "quant_format")
    given = locals()
    from bench.settings.run import resolve

    flags = {name: given[name] for name in (*names, "lengths", "data_dir", "device", "dtype", "seed")}
    flags |= {"tasks": task or "needle", "quant_type": quant_type or ("mix" if preset is None else None)}
    run, _ = resolve(flags, preset)
    _inspect(run, text, tokens, doc, steps, html, outdir)


def _inspect(
    run: RunConfig, text: Path | None, tokens: int | None, doc: str, steps: int, html: Path | None, outdir: Path | None
) -> None:
    import json

    from rich.console import Console

    from bench.engine.inspect import inspect_prompt, prompt_of, states_map, write_maps
    from bench.methods.grid import grid
    from bench.methods.plugins import Plugins
    from bench.models.loading import load
    from bench.names import FULL
    from bench.report.inspection import print_inspection, to_html
    from bench.runs import folder as records
    from bench.runs.kinds import INSPECTION, claim

    if outdir is not None:
        claim(outdir, INSPECTION)
    plugins = Plugins(run.plugin or ())
    methods = plugins.needed_methods([name for name in run.quant_type if name != FULL])
    cells = grid(methods, run.budgets, run.window_size, run.quant_format, run.method_settings, plugins.methods)
    if len(cells) != 1:
        asked = f"--quant-type={','.join(run.quant_type)}"
        raise UserError(f"{asked}: give one method at one budget, such as mix", exit_code=2)
    (cell,) = cells
    loaded = load(run.model[0], device=run.device, dtype=run.dtype)
    continuation: tuple[int, ...] | None = None
    if text is not None:
        ids = _read(text, tokens, loaded, steps)
        source, document_id = text.name, text.name
    else:
        document = _document(run, loaded, doc)
        ids, continuation = prompt_of(document)
        source, document_id = f"{run.tasks[0]}, {document.id}", document.id
    if len(ids) < 2:
        raise UserError(f"{source}: a prompt of {len(ids)} tokens leaves nothing to compress")
    found = inspect_prompt(
        loaded.model,
        loaded.tokenizer,
        cell,
        ids,
        steps=steps,
        continuation=continuation,
        names={"model": loaded.name, "source": source, "label": cell.label},
        prefill_chunk=run.prefill_chunk,
    )
    console = Console()
    print_inspection(found, console)
    if html is not None:
        write(html, to_html(found))
    if outdir is not None:
        try:
            outdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--outdir {outdir}: cannot be made ({error.strerror})") from None
        where = {"model": loaded.name, "task": "text" if text is not None else run.tasks[0], "document": document_id}
        shown = {**where, "cell": cell.key, "label": cell.label}
        write_maps(outdir, [{**shown, "map": states_map(found.states, found.layers)}])
        details = {
            **shown,
            "command": records.command_line(),
            "fingerprint": loaded.fingerprint,
            "prompt_tokens": found.prompt_tokens,
            "layers": [vars(item) for item in found.statistics],
            "steps": [vars(step) for step in found.steps],
        }
        write(outdir / "inspect.json", json.dumps(details, ensure_ascii=False, indent=1) + "\n")


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
    import dataclasses

    from bench.runs.run import make_task, task_settings, tasks_of

    number = int(doc) if doc.isdecimal() else None
    tasks = tasks_of([make_task(name) for name in run.tasks])
    if len(tasks) != 1:
        names = ", ".join(task.name for task, _ in tasks[:5])
        raise UserError(f"--task={run.tasks[0]}: {len(tasks)} tasks; give one of {names}, ...", exit_code=2)
    ((task, _),) = tasks
    samples = run.samples if number is None else max(run.samples, number + 1)
    run = dataclasses.replace(run, limit=None if number is None else number + 1, samples=samples)
    documents = list(task.load(task_settings(run, loaded, task)))
    if number is not None:
        if number >= len(documents):
            raise UserError(f"--doc={doc}: {task.name} has documents 0 to {len(documents) - 1}", exit_code=2)
        return documents[number]
    for document in documents:
        if document.id == doc:
            return document
    from tasks.base import nearest

    raise UserError(f"--doc={doc}: {nearest(doc, [document.id for document in documents])}", exit_code=2)
