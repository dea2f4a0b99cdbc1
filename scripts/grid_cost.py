#!/usr/bin/env python
"""What a grid of methods and budgets costs, beside a run of its own for each of its cells.

    scripts/grid_cost.py --context-length 2048 --new-tokens 8 --prompts 4 --outdir runs/grid-cost

For every prompt the whole grid is answered once from one prefill, then every cell by itself, all in one process and in
turn: first the grid, then the cells, the other way round for every other prompt. Seconds are those of the engine:
prefill, compression and decoding. Loading, statistics and files are left out, which a grid shares too.

``full`` has no budget and is one cell of the grid. A user without the grid might run it at every budget: the ratio with
it counted so often is given too, and the other one, which is stricter, is the result. Writes ``grid_cost.csv`` and
``record.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.engine.engine import Engine, Failure
from bench.errors import UserError
from bench.methods.grid import Cell, grid
from bench.models.loading import LoadedModel, load
from bench.names import FULL
from bench.records.files.csv_ import csv_text
from bench.records.files.json_ import json_text
from bench.records.files.text import write_atomic
from bench.runs import folder as records
from bench.settings.run import RunConfig
from bench.telemetry import Stopwatch
from tasks.base import Compare, Document, Generate, TaskSettings
from tasks.fidelity import FidelityTask

GRID = "grid"
COLUMNS = ["prompt", "runs", "cell", "method", "cache_ratio", "engine_s", "prefill_s", "compress_s", "decode_s"]
"""``runs`` is ``grid`` or ``single``. ``engine_s`` is a clock around the engine; the others are its own, which for the
grid are given cell by cell in lines without ``engine_s``: they share one prefill."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", "--quant-type", default="full,window,origin,quant,mix")
    parser.add_argument("--cache-ratio", default="0.5,0.25,0.125")
    parser.add_argument("--budget-unit", choices=["tokens", "bytes"], default="bytes")
    parser.add_argument("--window-size", type=int, default=32)
    parser.add_argument("--context-length", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--outdir", type=Path, default=Path("runs/grid-cost"))
    return parser.parse_args(arguments)


def prompts(model: LoadedModel, length: int, count: int, new_tokens: int) -> list[Document]:
    """Prompts spread evenly over the English reference texts of Python, each to be continued greedily."""
    settings = TaskSettings(
        tokenizer=model.tokenizer,
        max_length=model.context_length or length + new_tokens,
        options={"lengths": (length,), "samples": count, "continuation": new_tokens},
    )
    documents = []
    for document in FidelityTask().load(settings):
        assert isinstance(document.request, Compare)
        request = Generate(prompt_ids=document.request.context_ids, max_new_tokens=new_tokens)
        documents.append(Document(id=document.id, request=request))
    return documents


def timed(engine: Engine, document: Document, runs: str) -> Iterator[dict[str, Any]]:
    """Rows of one answer of a document by all cells of an engine. Raises :class:`UserError` where one fails."""
    clock = Stopwatch(engine.device)
    with clock:
        answered = list(engine.answer(document, engine.cells))
    for failure in answered:
        if isinstance(failure, Failure):
            raise UserError(f"{failure.cell.label}: {failure.error}")
    if runs == GRID:
        yield {"prompt": document.id, "runs": GRID, "engine_s": clock.seconds}
    for measured in answered:
        assert not isinstance(measured, Failure)
        yield {
            "prompt": document.id,
            "runs": runs,
            "cell": measured.cell.key,
            "method": measured.cell.method,
            "cache_ratio": measured.cell.cache_ratio,
            "engine_s": None if runs == GRID else clock.seconds,
            "prefill_s": measured.prefill_s,
            "compress_s": measured.compress_s,
            "decode_s": measured.decode_s,
        }


def measure(model: LoadedModel, cells: Sequence[Cell], documents: Sequence[Document]) -> list[dict[str, Any]]:
    """The grid and its cells one by one, for every prompt."""
    whole = Engine(model.model, model.tokenizer, cells)
    engines = [(GRID, whole), *(("single", Engine(model.model, model.tokenizer, [cell])) for cell in cells)]
    for _, engine in engines:
        # An answer that ends early would be cheaper.
        engine.end_ids = set()
        engine.warm_up()
    rows: list[dict[str, Any]] = []
    for number, document in enumerate(documents):
        for runs, engine in engines if number % 2 == 0 else reversed(engines):
            rows += timed(engine, document, runs)
    return rows


def summarize(rows: Sequence[dict[str, Any]], budgets: int) -> dict[str, float]:
    """Seconds of the grid and of the single runs, summed over the prompts, and their ratios.

    Args:
        budgets: how many times a user without the grid would have run ``full``.
    """
    taken = [row for row in rows if row["engine_s"] is not None]
    whole = sum(row["engine_s"] for row in taken if row["runs"] == GRID)
    single = sum(row["engine_s"] for row in taken if row["runs"] == "single")
    again = sum((budgets - 1) * row["engine_s"] for row in taken if row["runs"] == "single" and row["method"] == FULL)
    return {
        "grid_s": whole,
        "single_s": single,
        "ratio": whole / single,
        "ratio_with_full_at_every_budget": whole / (single + again),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        ratios = RunConfig.parse("cache_ratio", options.cache_ratio)
        methods = RunConfig.parse("methods", options.methods)
        budgets = [{"cache_ratio": ratio} for ratio in ratios]
        cells = grid(methods, budgets, [options.window_size], None, {"budget_unit": options.budget_unit})
        model = load(options.model, device=options.device, dtype=options.dtype)
        documents = prompts(model, options.context_length, options.prompts, options.new_tokens)
        rows = measure(model, cells, documents)
    except (UserError, ValueError) as error:
        raise SystemExit(f"grid_cost.py: {error}") from None
    found = summarize(rows, len(budgets))
    Console().print(
        f"{len(cells)} cells, {len(documents)} prompts: the grid {found['grid_s']:.2f} s, single runs "
        f"{found['single_s']:.2f} s, ratio {found['ratio']:.3f} "
        f"({found['ratio_with_full_at_every_budget']:.3f} with full at every budget)",
        highlight=False,
        soft_wrap=True,
    )
    options.outdir.mkdir(parents=True, exist_ok=True)
    write_atomic(options.outdir / "grid_cost.csv", csv_text(COLUMNS, rows, digits=None))
    record = {
        "settings": {**vars(options), "outdir": options.outdir.name},
        "cells": {cell.key: cell.label for cell in cells},
        "result": found,
        "finished": records.now(),
        "model": {"name": model.name, "fingerprint": model.fingerprint, "dtype": model.dtype, "device": model.device},
        **records.environment(),
    }
    write_atomic(options.outdir / "record.json", json_text(record))


if __name__ == "__main__":
    main()
