"""``arkv-bench speed``: what each cache costs in time and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _option(help_: str) -> Any:
    return typer.Option(help=help_)


def speed(
    model: Annotated[str, _option("Model, see list models.")] = "smollm2-135m",
    context_lengths: Annotated[str, _option("Prompt lengths in tokens.")] = "2048",
    quant_type: Annotated[str, _option("Methods beside the stock full cache and the ceiling.")] = "origin,quant,mix",
    cache_size: Annotated[str, _option("Budgets: tokens per layer.")] = "1024",
    budget_unit: Annotated[str, _option("tokens or bytes.")] = "tokens",
    quant_format: Annotated[str, _option("Formats of quantized tokens.")] = "int8",
    window_size: Annotated[str, _option("Newest tokens that stay at model precision.")] = "32",
    new_tokens: Annotated[int, typer.Option(min=2, help="Decoding steps per measurement.")] = 32,
    repetitions: Annotated[int, typer.Option(min=1, help="Measurements of every cell, all cells in turn.")] = 3,
    device: Annotated[str, _option("auto, cpu, cuda, mps.")] = "auto",
    dtype: Annotated[str, _option("auto, float32, bfloat16, float16.")] = "auto",
    outdir: Annotated[
        Path | None, typer.Option(help="Write speed.csv and record.json there.", show_default=False)
    ] = None,
) -> None:
    """Time prefill, compression and decoding over context lengths, beside the stock full cache and a stock cache that
    holds only C tokens (ceiling).

    [bold]arkv-bench speed --context-lengths 2048,7900 --cache-size 1024[/bold]
    """
    from rich.console import Console

    from bench.costs.speed import SpeedBench, summarize, to_csv
    from bench.errors import UserError
    from bench.methods.grid import grid
    from bench.methods.plugins import Plugins
    from bench.models.loading import load
    from bench.progress import ProgressReporter
    from bench.report.speed import LEGEND, speed_table
    from bench.runs import folder as records
    from bench.runs.kinds import TIMINGS, claim
    from bench.settings.run import parse_value

    if outdir is not None:
        claim(outdir, TIMINGS)
    lengths = parse_value("lengths", context_lengths)
    plugins = Plugins()
    cells = grid(
        plugins.needed_methods([name for name in parse_value("quant_type", quant_type) if name != "full"]),
        [{"cache_size": size} for size in parse_value("cache_size", cache_size)],
        parse_value("window_size", window_size),
        parse_value("quant_format", quant_format),
        {"budget_unit": budget_unit},
        plugins.methods,
    )
    small = [cell.cache_size for cell in cells if cell.cache_size is not None and cell.cache_size <= new_tokens]
    if small:
        raise UserError(f"--cache-size={small[0]}: give more than --new-tokens={new_tokens}", exit_code=2)
    console = Console()
    loaded = load(model, device=device, dtype=dtype)
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
    total = repetitions * len(lengths)
    # The first forward pays for what is set up once.
    list(SpeedBench(loaded.model, cells, prompt_ids, 2).measure(min(*lengths, 256), 0))
    with ProgressReporter(console, "speed", total, unit="repetitions") as progress:
        for repetition in range(repetitions):
            for length in lengths:
                timings += list(bench.measure(length, repetition))
                progress.advance(f"context {length}")
    title = f"{loaded.name}, {loaded.dtype}, {loaded.device}: medians of {repetitions} repetitions"
    console.print(speed_table(summarize(timings), title, console.width))
    for line in LEGEND:
        console.print(line, markup=False, highlight=False)
    if outdir is not None:
        import json

        outdir.mkdir(parents=True, exist_ok=True)
        records.write_atomic(outdir / "speed.csv", to_csv(timings))
        record = {
            "command": records.command_line(),
            "finished": records.now(),
            "model": {"name": loaded.name, "fingerprint": loaded.fingerprint, "dtype": loaded.dtype},
            **records.environment(),
        }
        records.write_atomic(outdir / "record.json", json.dumps(record, indent=2) + "\n")
        console.print(f"wrote {outdir / 'speed.csv'}", markup=False, highlight=False)
