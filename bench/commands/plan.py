"""``arkv-bench plan``: what a run would take, before it is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from bench.settings.options import PRESET, given, takes
from bench.settings.plan import PlanConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from bench.costs.capacity import Capacity
    from bench.costs.plan import Calibration, ModelPlan
    from bench.methods.grid import Cell


@takes(PlanConfig)
def plan(preset: PRESET = None, **typed: Any) -> None:
    """What a grid would take on a cluster: documents, prefills, KV bytes, whether the models fit, time.

    Takes the settings of arkv-bench run; models need a config and a tokenizer, no weights, and no GPU.

    [bold]arkv-bench plan --preset paper-longbench --gpus 8 --gpu-memory 80GB[/bold]

    With --capacity it says what memory buys: how many tokens and sequences fit with each method, and how fast they
    could be decoded.

    [bold]arkv-bench plan --capacity h100,24GB --model org/name --cache-ratio 0.25[/bold]
    """
    from rich.console import Console

    from bench.commands.first_look import first_look
    from bench.errors import UserError
    from bench.models.imports import import_lightly
    from bench.settings.presets import resolve

    config, _ = resolve(given(PlanConfig, typed), preset, PlanConfig)
    if not config.capacity:
        if config.run is not None or config.bandwidth is not None:
            raise UserError("--run and --bandwidth go with --capacity", exit_code=2)
        first_look(config)
    import_lightly()
    from bench.costs.plan import Load, ModelPlan, fit, model_size, parse_bytes
    from bench.models.loading import describe
    from bench.runs.asked import documents_of, doubts, planned
    from bench.runs.failures import failure_lines, without_name
    from tasks.base import TaskError

    if config.capacity:
        _capacity(config, Console())
        return
    memory = parse_bytes(config.gpu_memory, "--gpu-memory")
    gpus, share = config.gpus, config.worker_gpus
    if share > gpus:
        raise UserError(f"--gpus-per-worker={share:g}: give more than 0, and no more than --gpus={gpus}", exit_code=2)
    workers = int(gpus // share) if share >= 1 else gpus * int(1 / share + 1e-9)
    cells, tasks, lost = planned(config)
    console = Console()
    described = []
    said: dict[str, None] = {}
    for reference in config.model:
        model = describe(reference, trust_remote_code=config.trust_remote_code, weights=False)
        size = model_size(model, config.dtype)
        loads, failures = [], {}
        for task in tasks:
            try:
                documents = documents_of(config, model, task, cells)
            except (TaskError, UserError) as error:
                if isinstance(error, TaskError) and error.usage:
                    raise
                failures[task.name] = without_name(task.name, str(error))
                continue
            loads.append(Load.of(task.name, documents))
            if doubt := doubts(config, task, len(documents), [cell.method for cell in cells]):
                said[f"{task.name}: {doubt}"] = None
        described.append((model.name, size, loads, failures))
    if not any(loads for _, _, loads, _ in described):
        refused = [f"{name}: {task}: {said}" for name, _, _, failed in described for task, said in failed.items()]
        raise UserError("; ".join([*refused, *failure_lines(lost)]))
    calibration = _calibration(config.calibration_model, config, cells, console) if config.calibrate else None
    plans = []
    for name, size, loads, failures in described:
        seconds = None
        if calibration is not None:
            seconds = sum(calibration.seconds(load, cells, size.parameters) for load in loads) / config.speedup
        needs = fit(size, loads, config, int(memory * share))
        plans.append(ModelPlan(name=name, size=size, loads=tuple(loads), failures=failures, fit=needs, seconds=seconds))
    for item in plans:
        _show(item, cells, workers, console)
    _show_time(plans, calibration, workers, config.speedup, console)
    for doubt in said:
        console.print(doubt, markup=False, highlight=False, style="yellow", soft_wrap=True)
    for line in failure_lines(lost):
        console.print(line, markup=False, highlight=False, style="red")
    if lost or any(item.failures for item in plans):
        raise typer.Exit(1)


def _capacity(config: PlanConfig, console: Console) -> None:
    """One table for each model, memory and length."""
    from bench.costs.capacity import capacity, memory_of, scores_kept
    from bench.costs.plan import USABLE, config_size
    from bench.models.loading import describe_config
    from bench.names import RESULTS
    from bench.records.row import read_results
    from bench.runs.asked import cells_of, plugins_of

    memories = [memory_of(text, config.bandwidth) for text in config.capacity]
    cells = cells_of(config, plugins_of(config)[0])
    kept = None if config.run is None else scores_kept(read_results(config.run / RESULTS), cells)
    for reference in config.model:
        name, described = describe_config(reference, trust_remote_code=config.trust_remote_code)
        size = config_size(described, name, config.dtype)
        for memory in memories:
            for tokens in config.context_lengths:
                rows = capacity(size, cells, memory, tokens, config.prefill_chunk)
                title = f"{name} on {memory.name}, sequences of {tokens:,} tokens"
                _show_capacity(title, rows, kept, console)
                if size.context is not None and tokens > size.context:
                    console.print(f"{name} has a context of {size.context:,} tokens only.", style="yellow")
            rate = f"{memory.bandwidth / 1e9:,.0f} GB/s ({memory.source})" if memory.bandwidth else "unknown"
            console.print(
                f"{memory.name}: {_bytes(memory.nbytes)}, of which {USABLE:.0%} count; weights take "
                f"{_bytes(size.weights_bytes)}; the prefill of one sequence is kept room for. Bandwidth: {rate}.",
                highlight=False,
                markup=False,
            )
    console.print(
        "budget: a share of every sequence, or tokens of a layer (their worth in bytes with --budget-unit bytes). "
        "KV/token: bytes of a sequence over its tokens, after compression. pool: tokens of such sequences that fit. "
        "longest: one sequence alone. at once: sequences side by side. KV/step: bytes of all of them, read for a token "
        "of each. tokens/s: of all together, if reading weights and KV bytes once were all that a step takes: an upper "
        "bound from the bandwidth, never measured here.",
        highlight=False,
        markup=False,
    )
    if twice := dict.fromkeys(cell.method for cell in cells if cell.impl.reads_twice):
        verb = "reads" if len(twice) == 1 else "read"
        console.print(
            f"{', '.join(twice)} {verb} each prompt twice: room for all of its keys and values meanwhile is kept, and "
            "the first token comes after the time of two prefills or more, which tokens/s leaves out.",
            highlight=False,
            markup=False,
        )


def _show_capacity(title: str, rows: Sequence[Capacity], kept: Any, console: Console) -> None:
    from rich.text import Text

    scores = list(kept or {})
    # Without a bandwidth there is nothing to say of a rate.
    rated = any(row.tokens_per_s is not None for row in rows)
    heads = ("budget", "method", "KV/token", "pool", "longest", "at once", "KV/step", *(["tokens/s"] if rated else []))
    table = _table(title, (*heads, *(f"{task} {metric}" for task, metric in scores)), left="method")
    for row in rows:
        known = [kept[score].get(row.cell.key) for score in scores]
        table.add_row(
            *(_budget(row.cell), Text(f"{row.cell.method} {row.cell.quant_format or ''}".strip())),
            *(_bytes(None if row.bytes_per_token is None else round(row.bytes_per_token)), _count(row.pool_tokens)),
            *(_count(row.longest), _count(row.sequences), _bytes(row.step_bytes)),
            *(["" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}"] if rated else []),
            *("" if item is None or item.score is None else f"{item.score:.3g}" for item in known),
        )
    console.print(table)
    if nothing := [row for row in rows if row.sequences == 0]:
        fits = ", ".join(f"{row.cell.label} up to {row.longest:,} tokens" for row in nothing)
        console.print(f"Not one sequence fits: {fits}.", markup=False, highlight=False, style="yellow")


def _table(title: str, heads: Sequence[str], *, left: str) -> Table:
    """A table that cuts no number in 80 columns: names fold instead."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0
    )
    for head in heads:
        # Heads of scores are names of tasks, which are long.
        folds = head == left or " " in head
        table.add_column(Text(head), justify="left" if head == left else "right", no_wrap=not folds, overflow="fold")
    return table


def _budget(cell: Cell) -> str:
    """Short: a share of a sequence, or tokens of a layer."""
    if cell.cache_ratio is not None:
        return f"{100 * cell.cache_ratio:g} %"
    return "" if cell.cache_size is None else f"{cell.cache_size:,}"


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _calibration(reference: str, config: Any, cells: list[Cell], console: Console) -> Calibration:
    from bench.costs.plan import calibrate
    from bench.engine.engine import Engine
    from bench.models.loading import load

    console.print(f"Timing {reference} on this machine ...", markup=False, highlight=False)
    loaded = load(reference, dtype=config.dtype, device=config.device)
    engine = Engine(loaded.model, loaded.tokenizer, cells, prefill_chunk=config.prefill_chunk)
    engine.warm_up()
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return calibrate(engine, loaded.name, parameters, loaded.config.get_text_config().vocab_size)


def _bytes(count: int | None) -> str:
    """``1.5 GB``; empty where it is unknown."""
    if count is None:
        return ""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _show(plan: ModelPlan, cells: list[Cell], workers: int, console: Console) -> None:
    from bench.costs.plan import USABLE, cells_table

    heads = ("task", "documents", "prefills", "mean tokens", "longest", "steps per method")
    tasks = _table(f"{plan.name}: {plan.size.parameters / 1e9:.3g} B parameters", heads, left="task")
    for load in plan.loads:
        numbers = (load.documents, load.prefills, load.mean_context, load.longest, load.steps)
        tasks.add_row(load.task, *(f"{number:,}" for number in numbers))
    console.print(tasks)
    for name, error in plan.failures.items():
        console.print(f"{name}: {error}", markup=False, highlight=False, style="red")
    if rows := cells_table(plan, cells):
        title = "KV bytes of a prompt after compression, at most"
        table = _table(title, ("method", "mean prompt", "longest prompt"), left="method")
        for label, mean, most in rows:
            table.add_row(label, _bytes(mean), _bytes(most))
        console.print(table)
    need = plan.fit
    console.print(
        f"{plan.name} {'fits' if need.fits else 'DOES NOT FIT'}: {_bytes(need.weights)} of weights, "
        f"{_bytes(need.caches)} for the prefill of the longest prompt and a copy, {_bytes(need.activations)} for a "
        f"forward: {_bytes(need.needed)} of {_bytes(need.available)} ({USABLE:.0%} of a worker's GPUs).",
        markup=False,
        highlight=False,
    )
    if not need.fits:
        console.print(
            "More GPUs for a worker (--gpus-per-worker 2 --device-map auto), --prefill-chunk, a smaller --batch-size "
            "or --max-length make room.",
            highlight=False,
        )


def _show_time(
    plans: list[ModelPlan], calibration: Calibration | None, workers: int, speedup: float, console: Console
) -> None:
    from bench.progress import duration

    documents = sum(load.documents for plan in plans for load in plan.loads)
    prefills = sum(load.prefills for plan in plans for load in plan.loads)
    on = "1 worker" if workers == 1 else f"{workers} workers"
    console.print(f"In all: {documents:,} documents, {prefills:,} prefills, {on}.", highlight=False)
    if calibration is None:
        return
    total = sum(plan.seconds or 0.0 for plan in plans)
    for plan in plans:
        console.print(f"  {plan.name}: {duration((plan.seconds or 0.0) / workers)}", markup=False, highlight=False)
    from bench.costs.plan import CALIBRATION_LENGTHS, CALIBRATION_STEPS

    lengths = " and ".join(f"{length:,}" for length in CALIBRATION_LENGTHS)
    beside = "" if workers == 1 else f", {duration(total)} on one"
    faster = f", a worker taken as {speedup:g} times as fast as this machine" if speedup != 1 else ""
    console.print(
        f"About {duration(total / workers)} on {on}{beside}. How: prompts of {lengths} "
        f"tokens and {CALIBRATION_STEPS} decoding steps were timed here for every method, with {calibration.model} "
        f"({calibration.parameters / 1e9:.3g} B parameters) on {calibration.device}; prefill is taken as a N + b N^2, "
        f"compression as linear in N, a decoding step as of one length, and all of them as proportional to the number "
        f"of parameters{faster}. Answers are counted at their greatest length; loading models is not counted. For "
        "another model or kind of machine this is an order of magnitude.",
        markup=False,
        highlight=False,
    )
