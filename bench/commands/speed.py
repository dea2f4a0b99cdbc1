"""``arkv-bench speed``: what each cache costs in time and bytes."""

from __future__ import annotations

from typing import Any

from bench.settings.options import given, takes
from bench.settings.speed import SpeedConfig


@takes(SpeedConfig)
def speed(**typed: Any) -> None:
    """Time prefill, compression and decoding over context lengths, beside the stock full cache, a full cache read by
    the suite's own kernel, and a stock cache that holds only C tokens (ceiling).

    [bold]arkv-bench speed --context-lengths 2048,7900 --cache-size 1024[/bold]
    """
    from rich.console import Console

    from bench.costs.speed import SpeedBench
    from bench.errors import UserError
    from bench.methods.grid import grid
    from bench.methods.plugins import Plugins
    from bench.models.loading import load
    from bench.names import FULL, RECORD, SPEED
    from bench.progress import ProgressReporter
    from bench.records.timing import SpeedRecord, speed_record_text, summarize, timings_csv
    from bench.report.speed import LEGEND, speed_table
    from bench.runs import folder as records
    from bench.runs.kinds import TIMINGS, claim

    config = SpeedConfig(**given(SpeedConfig, typed))
    if len(config.model) != 1:
        raise UserError(f"--model={','.join(config.model)}: give one", exit_code=2)
    lengths, new_tokens, outdir = config.context_lengths, config.new_tokens, config.outdir
    if outdir is not None:
        claim(outdir, TIMINGS)
    plugins = Plugins(config.plugin or ())
    methods = plugins.needed_methods([method for method in config.methods if method != FULL])
    settings = config.method_settings
    cells = grid(methods, config.budgets, config.window_size, config.quant_format, settings, plugins.methods)
    small = [cell.cache_size for cell in cells if cell.cache_size is not None and cell.cache_size <= new_tokens]
    if small:
        raise UserError(f"--cache-size={small[0]}: give more than --new-tokens={new_tokens}", exit_code=2)
    console = Console()
    loaded = load(config.model[0], device=config.device, dtype=config.dtype)
    if loaded.context_length is not None and max(lengths) + new_tokens > loaded.context_length:
        raise UserError(
            f"--context-lengths={max(lengths)}: with {new_tokens} new tokens more than the model's context of "
            f"{loaded.context_length}",
            exit_code=2,
        )
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    prompt_ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bench = SpeedBench(loaded.model, cells, prompt_ids, new_tokens)
    timings = []
    total = config.repetitions * len(lengths)
    # The first forward pays for what is set up once.
    list(SpeedBench(loaded.model, cells, prompt_ids, 2).measure(min(*lengths, 256), 0))
    with ProgressReporter(console, "speed", total, unit="repetitions") as progress:
        for repetition in range(config.repetitions):
            for length in lengths:
                timings += list(bench.measure(length, repetition))
                progress.advance(f"context {length}")
    title = f"{loaded.name}, {loaded.dtype}, {loaded.device}: medians of {config.repetitions} repetitions"
    console.print(speed_table(summarize(timings), title, console.width))
    if bench.refused:
        console.print(f"No fused full cache: {bench.refused}", markup=False, highlight=False)
    for line in LEGEND:
        console.print(line, markup=False, highlight=False)
    if outdir is not None:
        from bench.commands.output import write

        facts = {"name": loaded.name, "fingerprint": loaded.fingerprint, "dtype": loaded.dtype}
        about = {"command": records.command_line(), "finished": records.now(), "model": facts}
        record = SpeedRecord.model_validate({**about, **records.environment()})
        write(outdir / RECORD, speed_record_text(record), quiet=True)
        write(outdir / SPEED, timings_csv(timings))
