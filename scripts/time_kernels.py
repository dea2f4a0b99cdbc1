#!/usr/bin/env python
"""Milliseconds of one layer's decode attention: the kernel (Triton on a GPU, C on a CPU) over Quantized tokens and
over Original ones alone (``none``), its PyTorch twin, and stock attention (SDPA) over a full cache of as many tokens;
and what share of the memory's bandwidth is how fast it reads keys and values.

    scripts/time_kernels.py --context-lengths 1024,8192 --formats int8,k4v3 --outdir runs/kernels
    scripts/time_kernels.py --device cpu --layers 6 --batch 16 --kv-heads 3 --group 3 --head-dim 64 \\
      --context-lengths 4000 --formats k4v3 --original-share 0.0125

Every cell is timed once per repetition, all cells in turn, and each time is itself the median of many calls: on a GPU
with a cold L2 cache, on a CPU of the layers one after the other, which ``--layers`` makes more than its caches hold.
Writes ``kernels.csv`` and ``record.json``.
"""

from __future__ import annotations

import argparse
import functools
import time
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
from arkv.kernels.cpu.building import library
from arkv.pools import Part, Plane, Pool
from arkv.store import Store
from bench.costs.bandwidth import measured_bandwidth
from bench.records.files.csv_ import csv_text
from bench.records.files.json_ import json_text
from bench.records.files.text import write_atomic
from bench.runs import folder as records

COLUMNS = ["attention", "quant_format", "context_length", "kv_bytes", "max_error", "repetition", "ms", "gb_per_second"]
CPU_CALLS = 5
"""Calls whose median is one time."""


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
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--layers", type=int, default=1, help="with caches of their own, timed one after the other")
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


def filled_store(options: argparse.Namespace, quant_format: str | None, tokens: int) -> Store:
    """Layers that hold ``tokens`` tokens each; ``quant_format`` None: all Original."""
    rows = options.batch * options.kv_heads
    dtype = getattr(torch, options.dtype)
    original = tokens if quant_format is None else max(round(options.original_share * tokens), WINDOW)
    counts = [original] if quant_format is None else [original, tokens - original]
    parts = []
    for _ in range(options.layers):
        pools = [
            random_pool(
                rows, count, torch.randn(rows * count, options.head_dim, dtype=dtype, device=options.device), name
            )
            for count, name in zip(counts, (None, quant_format), strict=False)
        ]
        parts.append(Part(pools, [torch.full((rows,), count, device=options.device) for count in counts]))
    return Store(parts, [tokens] * rows, [0] * rows, [[count] * (rows * options.layers) for count in counts])


def bytes_read(store: Store) -> int:
    """Of keys and values, by one step of all layers."""
    planes = [plane for pool in store.pools for plane in (pool.key, pool.value)]
    return storage_bytes([tensor for plane in planes for tensor in plane[:4] if tensor is not None])


class Cell:
    """One thing to time: a call for every layer, and what its rows say beside the time."""

    def __init__(self, calls: Sequence[Callable[[], Any]], attention: str, read: int, **columns: Any) -> None:
        self.calls, self.read = calls, read
        self.columns = {"attention": attention, "quant_format": None, "max_error": None, **columns}

    def ms(self, device: str) -> float:
        """Milliseconds of a layer."""
        if device == "cuda":
            from triton.testing import do_bench

            return float(do_bench(self, return_mode="median")) / len(self.calls)
        found = []
        for _ in range(CPU_CALLS):
            start = time.perf_counter()
            self()
            found.append(time.perf_counter() - start)
        return 1e3 * median(found) / len(self.calls)

    def __call__(self) -> None:
        for call in self.calls:
            call()


def cells_of(options: argparse.Namespace, context_length: int) -> list[Cell]:
    """What is timed at one length; the kernel's output is compared with its twin's on the way."""
    dtype = getattr(torch, options.dtype)
    shape = (options.batch, options.kv_heads, context_length, options.head_dim)
    full = [torch.randn(2, *shape, dtype=dtype, device=options.device) for _ in range(options.layers)]
    heads = options.kv_heads * options.group
    query = torch.randn(options.batch, heads, 1, options.head_dim, dtype=dtype, device=options.device)
    scaling = options.head_dim**-0.5
    stock = [
        functools.partial(scaled_dot_product_attention, query, *both, scale=scaling, enable_gqa=True) for both in full
    ]
    cells = [Cell(stock, "sdpa", storage_bytes(full), kv_bytes=storage_bytes(full))]
    for quant_format in (None, *options.formats):
        store = filled_store(options, quant_format, context_length)
        importance = [torch.empty_like(pool.score) for pool in store.pools]
        settings = (0, WINDOW, scaling, 0.0, None, importance)
        names = [] if quant_format is None else [quant_format]
        kernels, readable = [], []
        for layer, both in enumerate(full):
            new = (query, both[0][:, :, :1], both[1][:, :, :1], store.rows, layer * store.layer_rows)
            kernels.append(
                functools.partial(torch.ops.arkv.attend, *new, store.tensors(), names, *settings, widths=store.widths)
            )
            readable.append(functools.partial(twin.attend, *new, store.pools, *settings))
        columns = {"quant_format": quant_format or "none", "kv_bytes": storage_bytes(store)}
        error = (kernels[0]() - readable[0]()).abs().max().item()
        read = bytes_read(store)
        cells += [Cell(kernels, "kernel", read, max_error=error, **columns), Cell(readable, "twin", read, **columns)]
    for cell in cells:
        cell.columns["context_length"] = context_length
    return cells


def summary(rows: Sequence[dict[str, Any]], bandwidth: float) -> Table:
    """Median, smallest and largest of each cell's repetitions, and its share of ``bandwidth`` (bytes a second)."""
    table = Table("attention", "format", "context", "KV MB", "ms", "min", "max", "GB/s", "share", "error")
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["context_length"], row["attention"], row["quant_format"]), []).append(row)
    for (context_length, attention, quant_format), repeated in cells.items():
        times = [row["ms"] for row in repeated]
        error, rate = repeated[0]["max_error"], median(row["gb_per_second"] for row in repeated)
        table.add_row(
            *(attention, quant_format or "", str(context_length), f"{repeated[0]['kv_bytes'] / 1e6:.1f}"),
            *(f"{ms:.4f}" for ms in (median(times), min(times), max(times))),
            *(f"{rate:.2f}", f"{1e9 * rate / bandwidth:.0%}", "" if error is None else f"{error:.1e}"),
        )
    return table


def write(outdir: Path, rows: Sequence[dict[str, Any]], options: argparse.Namespace, bandwidth: float) -> None:
    """``kernels.csv`` and ``record.json``."""
    outdir.mkdir(parents=True, exist_ok=True)
    write_atomic(outdir / "kernels.csv", csv_text(COLUMNS, rows, digits=None))
    settings = {**vars(options), "outdir": outdir.name}
    record = {"settings": settings, "memory_bandwidth": bandwidth, "finished": records.now(), **records.environment()}
    write_atomic(outdir / "record.json", json_text(record))


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("time_kernels.py: no CUDA device")
    if options.device == "cpu" and library() is None:
        raise SystemExit("time_kernels.py: no CPU kernels: they need a C compiler")
    dtype = getattr(torch, options.dtype)
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
    for name in options.formats:
        try:
            FORMATS[name].check(options.head_dim, options.head_dim)
        except ValueError as error:
            raise SystemExit(f"time_kernels.py: {error}") from None
        if options.device == "cuda" and not gpu.supported(
            device, dtype, options.head_dim, options.head_dim, options.group
        ):
            raise SystemExit(
                f"time_kernels.py: the kernel does not serve {name} in {options.dtype} with head dim "
                f"{options.head_dim} and {options.group} query heads per KV head on {torch.cuda.get_device_name()}: "
                f"it needs Triton, compute capability 8.0, a head dim of at most {gpu.MAX_HEAD_DIM} and at most "
                f"{gpu.MAX_GROUP} query heads"
            )
    bandwidth = measured_bandwidth(device)
    rows = []
    for context_length in options.context_lengths:
        cells = cells_of(options, context_length)
        for repetition in range(options.repetitions):
            for cell in cells:
                ms = cell.ms(options.device)
                rate = cell.read / options.layers / ms / 1e6
                rows.append({**cell.columns, "repetition": repetition, "ms": ms, "gb_per_second": rate})
    Console().print(summary(rows, bandwidth))
    write(options.outdir, rows, options, bandwidth)


if __name__ == "__main__":
    main()
