"""``arkv-bench speed``: what each cache costs in time and bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from bench.settings.options import FRESH, given, takes
from bench.settings.speed import SpeedConfig

if TYPE_CHECKING:
    from rich.console import Console

    from bench.methods.cell import Cell
    from bench.runs.timings import Timings


@takes(SpeedConfig)
def speed(fresh: FRESH = False, **typed: Any) -> None:
    """Time prefill, compression and decoding over context lengths and batch sizes, beside the stock full cache, a full
    cache read by the suite's own kernel, and a stock cache that holds only C tokens (ceiling).

    Budgets are those of run: 1/4 and 1/8 of the bytes, unless others are given.

    [bold]arkv-bench speed --context-lengths 2048,7900[/bold]
    [bold]arkv-bench speed --batch-sizes 1,4,16 --cache-ratio 0.25 --kv-memory 1GB[/bold]
    """
    from pydoc_data.topics import topics

    from rich.console import Console

    from bench.commands.first_look import first_look
    from bench.errors import UserError
    from bench.models.imports import import_lightly

    config = SpeedConfig(**given(SpeedConfig, typed))
    if len(config.model) != 1:
        raise UserError(f"--model={','.join(config.model)}: give one", exit_code=2)
    first_look(config)
    import_lightly()
    import torch

    from bench.costs.bandwidth import measured_bandwidth
    from bench.costs.plan import parse_bytes
    from bench.costs.speed import SpeedBench
    from bench.models.loading import describe_config, load
    from bench.progress import ProgressReporter
    from bench.runs.kinds import TIMINGS, claim
    from bench.runs.timings import Timings

    lengths, new_tokens = config.context_lengths, config.new_tokens
    kv_memory = [parse_bytes(text, "--kv-memory") for text in config.kv_memory]
    if config.outdir is not None:
        claim(config.outdir, TIMINGS)
    cells = _cells(config)
    console = Console()
    _, described = describe_config(config.model[0])
    context = getattr(described.get_text_config(), "max_position_embeddings", None)
    if context is not None and max(lengths) + new_tokens > context:
        raise UserError(
            f"--context-lengths={max(lengths)}: with {new_tokens} new tokens more than the model's context of "
            f"{context}",
            exit_code=2,
        )
    loaded = load(config.model[0], device=config.device, dtype=config.dtype)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    prompt_ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    shared = config.shared_prefill
    bench = SpeedBench(
        *(loaded.model, cells, prompt_ids, new_tokens),
        batch_sizes=config.batch_sizes,
        kv_memory=kv_memory,
        shared_prefill=shared,
    )
    facts = {"name": loaded.name, "fingerprint": loaded.fingerprint, "dtype": loaded.dtype}
    settings = {"new_tokens": new_tokens, "shared_prefill": shared, "device": str(loaded.device)}
    try:
        with Timings(config.outdir, facts, settings, fresh=fresh) as timings:
            # The first forward pays for what is set up once.
            list(SpeedBench(loaded.model, cells, prompt_ids, 2).measure(min(*lengths, 256), 0))
            total = config.repetitions * len(lengths)
            with ProgressReporter(console, "speed", total, unit="repetitions") as progress:
                for repetition in range(config.repetitions):
                    bandwidth = measured_bandwidth(loaded.model.device)
                    for length in lengths:
                        for item in bench.measure(length, repetition, timings.done(repetition), bandwidth):
                            timings.add(item)
                        progress.advance(f"context {length}")
            timings.finish(bench.refused)
    except KeyboardInterrupt:
        kept = f"; what was timed is in {config.outdir}: the same command continues" if config.outdir else ""
        raise UserError(f"stopped{kept}", exit_code=130) from None
    threads = _counted(torch.get_num_threads(), "thread")
    where = f"{loaded.device}, {threads}" if loaded.device == "cpu" else loaded.device
    times = _counted(config.repetitions, "repetition")
    title = f"{loaded.name}, {loaded.dtype}, {where}: medians of {times}"
    _show(timings, title, bench.refused, console)
    if timings.failures:
        raise typer.Exit(1)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _cells(config: SpeedConfig) -> list[Cell]:
    """The grid. Raises :class:`UserError` for a budget that new tokens fill by themselves."""
    from bench.errors import UserError
    from bench.methods.grid import grid
    from bench.methods.plugins import Plugins

    plugins = Plugins(config.plugin or ())
    methods = plugins.needed_methods(list(config.timed_methods))
    settings = config.method_settings
    cells = grid(methods, config.budgets, config.window_size, config.quant_format, settings, plugins.methods)
    least = config.new_tokens
    small = [cell.cache_size for cell in cells if cell.cache_size is not None and cell.cache_size <= least]
    if small:
        raise UserError(f"--cache-size={small[0]}: give more than --new-tokens={least}", exit_code=2)
    return cells


def _show(timings: Timings, title: str, refused: str, console: Console) -> None:
    """The tables, and what could not be timed."""
    from bench.judge.speed import growths, summarize
    from bench.report.speed import GROWTH_LEGEND, LEGEND, growth_table, speed_table

    rows = summarize(timings.rows)
    if rows:
        console.print(speed_table(rows, title, console.width))
        for line in LEGEND:
            console.print(line, markup=False, highlight=False)
    if grown := growths(rows):
        console.print(growth_table(grown, console.width))
        console.print(GROWTH_LEGEND, markup=False, highlight=False)
    if refused:
        console.print(f"No fused full cache: {refused}", markup=False, highlight=False)
    for failure in timings.failures:
        console.print(f"not timed: {failure.line}", markup=False, highlight=False, style="red")
