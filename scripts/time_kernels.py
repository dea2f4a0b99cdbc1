#!/usr/bin/env python
"""Milliseconds of one layer's decode attention on a GPU: the Triton kernel, its PyTorch twin, and stock attention
(SDPA) over a full cache of as many tokens.

    scripts/time_kernels.py --context-lengths 1024,8192 --formats int8,k4v3 --outdir runs/kernels

Every cell is timed once per repetition, all cells in turn, and each time is itself the median of many calls with a
cold L2 cache. Writes ``kernels.csv`` and ``record.json``.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from arkv import FORMATS, storage_bytes
from arkv.formats.base import CENTER_DTYPE
from arkv.kernels import gpu, twin
from arkv.pools import Part, Plane, Pool
from arkv.store import Store
from bench.records.files.csv_ import csv_text
from bench.records.files.json_ import json_text
from bench.records.files.text import write_atomic
from bench.runs import folder as records

COLUMNS = ["attention", "quant_format", "context_length", "kv_bytes", "max_error", "repetition", "ms"]


def integers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def formats(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(FORMATS)}")
    return names


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context-lengths", type=integers, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--formats", type=formats, default=list(FORMATS))
    parser.add_argument("--original-share", type=float, default=0.125, help="of the tokens; the others are Quantized")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads per KV head")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--outdir", type=Path, default=Path("runs/kernels"))
    return parser.parse_args(arguments)


WINDOW = 32


def random_pool(rows: int, slots: int, numbers: torch.Tensor, quant_format: str | None) -> Pool:
    """Tokens of ``rows`` rows with ``slots`` slots each; keys and values are ``numbers`` [rows * slots, D]."""
    device = numbers.device
    position = torch.arange(slots, dtype=torch.int32, device=device).repeat(rows)
    planes = []
    for name in ("key", "value"):
        layout = None if quant_format is None else getattr(FORMATS[quant_format], name)
        if layout is None:
            planes.append(Plane(numbers))
            continue
        center = torch.zeros(rows, numbers.shape[1], dtype=CENTER_DTYPE, device=device) if layout.centered else None
        planes.append(Plane(*layout.encode(numbers), center, layout))
    return Pool(torch.rand(rows * slots, device=device), position, *planes)


def filled_store(options: argparse.Namespace, quant_format: str, tokens: int) -> Store:
    """One layer that holds ``tokens`` tokens."""
    rows = options.batch * options.kv_heads
    original = max(round(options.original_share * tokens), WINDOW)
    counts = [original, tokens - original]
    dtype = getattr(torch, options.dtype)
    pools = [
        random_pool(rows, count, torch.randn(rows * count, options.head_dim, dtype=dtype, device="cuda"), name)
        for count, name in zip(counts, (None, quant_format), strict=True)
    ]
    each = [torch.full((rows,), count, device="cuda") for count in counts]
    return Store([Part(pools, each)], [tokens] * rows, [0] * rows, [[count] * rows for count in counts])


class Cell:
    """One thing to time: a call, and what its rows say beside the time."""

    def __init__(self, call: Callable[[], Any], attention: str, **columns: Any) -> None:
        self.call = call
        self.columns = {"attention": attention, "quant_format": None, "max_error": None, **columns}


def cells_of(options: argparse.Namespace, context_length: int) -> list[Cell]:
    """What is timed at one length; the kernel's output is compared with its twin's on the way."""
    dtype = getattr(torch, options.dtype)
    shape = (options.batch, options.kv_heads, context_length, options.head_dim)
    key, value = torch.randn(2, *shape, dtype=dtype, device="cuda")
    heads = options.kv_heads * options.group
    query = torch.randn(options.batch, heads, 1, options.head_dim, dtype=dtype, device="cuda")
    scaling = options.head_dim**-0.5

    def stock() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)

    cells = [Cell(stock, "sdpa", kv_bytes=storage_bytes([key, value]))]
    for quant_format in options.formats:
        store = filled_store(options, quant_format, context_length)
        importance = [torch.empty_like(pool.score) for pool in store.pools]
        new = (query, key[:, :, :1], value[:, :, :1], store.rows, 0, store.pools)
        settings = (0, WINDOW, scaling, 0.0, None, importance)
        kernel = functools.partial(gpu.attend, *new, *settings, widths=store.widths)
        readable = functools.partial(twin.attend, *new, *settings)
        columns = {"quant_format": quant_format, "kv_bytes": storage_bytes(store)}
        error = (kernel() - readable()).abs().max().item()
        cells += [Cell(kernel, "kernel", max_error=error, **columns), Cell(readable, "twin", **columns)]
    for cell in cells:
        cell.columns["context_length"] = context_length
    return cells


def summary(rows: Sequence[dict[str, Any]]) -> Table:
    """Median, smallest and largest of each cell's repetitions."""
    table = Table("attention", "format", "context", "KV MB", "ms", "min", "max", "error")
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["context_length"], row["attention"], row["quant_format"]), []).append(row)
    for (context_length, attention, quant_format), repeated in cells.items():
        times = [row["ms"] for row in repeated]
        error = repeated[0]["max_error"]
        table.add_row(
            *(attention, quant_format or "", str(context_length), f"{repeated[0]['kv_bytes'] / 1e6:.1f}"),
            *(f"{ms:.4f}" for ms in (median(times), min(times), max(times))),
            "" if error is None else f"{error:.1e}",
        )
    return table


def write(outdir: Path, rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """``kernels.csv`` and ``record.json``."""
    outdir.mkdir(parents=True, exist_ok=True)
    write_atomic(outdir / "kernels.csv", csv_text(COLUMNS, rows, digits=None))
    settings = {**vars(options), "outdir": outdir.name}
    record = {"settings": settings, "finished": records.now(), **records.environment()}
    write_atomic(outdir / "record.json", json_text(record))


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("time_kernels.py: no CUDA device")
    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, options.dtype)
    for name in options.formats:
        try:
            FORMATS[name].check(options.head_dim, options.head_dim)
        except ValueError as error:
            raise SystemExit(f"time_kernels.py: {error}") from None
        if not gpu.supported(device, dtype, options.head_dim, options.head_dim, options.group):
            raise SystemExit(
                f"time_kernels.py: the kernel does not serve {name} in {options.dtype} with head dim "
                f"{options.head_dim} and {options.group} query heads per KV head on {torch.cuda.get_device_name()}: "
                f"it needs Triton, compute capability 8.0, a head dim of at most {gpu.MAX_HEAD_DIM} and at most "
                f"{gpu.MAX_GROUP} query heads"
            )
    from triton.testing import do_bench

    rows = []
    for context_length in options.context_lengths:
        cells = cells_of(options, context_length)
        for repetition in range(options.repetitions):
            for cell in cells:
                ms = do_bench(cell.call, return_mode="median")
                rows.append({**cell.columns, "repetition": repetition, "ms": ms})
    Console().print(summary(rows))
    write(options.outdir, rows, options)


if __name__ == "__main__":
    main()
