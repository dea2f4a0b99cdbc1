#!/usr/bin/env python
"""Milliseconds of one layer's decode attention on a GPU: the Triton kernel, its PyTorch twin, and stock attention
(SDPA) over a full cache of as many tokens.

    scripts/time_kernels.py --context-lengths 1024,8192 --formats int8,k4v3 --outdir runs/kernels

Every cell is timed once per repetition, all cells in turn, and each time is itself the median of many calls with a
cold L2 cache. Writes ``kernels.csv`` and ``record.json``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from arkv import FORMATS, CacheConfig, kernels, storage_bytes
from arkv.layer import TriStateLayer
from arkv.storage import QuantizedPool, Tokens
from bench import records

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


def random_tokens(options: argparse.Namespace, slots: int) -> Tokens:
    """Tokens [B, H, S] on the GPU."""
    shape = (options.batch, options.kv_heads, slots)
    key, value = torch.randn(2, *shape, options.head_dim, dtype=getattr(torch, options.dtype), device="cuda")
    position = torch.arange(slots, dtype=torch.int32, device="cuda").expand(shape).contiguous()
    return Tokens(key, value, position, torch.rand(shape, device="cuda"))


def filled_layer(options: argparse.Namespace, quant_format: str, tokens: int) -> TriStateLayer:
    """A layer that holds ``tokens`` tokens."""
    config = CacheConfig.for_method("mix", cache_size=tokens, quant_format=quant_format)
    number_format = config.number_format
    original = max(round(options.original_share * tokens), config.window_size)
    quantized = tokens - original
    layer = TriStateLayer(config)
    layer.tokens = random_tokens(options, original)
    layer.seen, layer.used = tokens, original
    low = random_tokens(options, quantized)
    layer.quantized = QuantizedPool(number_format, low, [low])
    layer.quantized.full = True
    return layer


class Cell:
    """One thing to time: a call, and what its rows say beside the time."""

    def __init__(self, call: Callable[[], Any], attention: str, **columns: Any) -> None:
        self.call = call
        self.columns = {"attention": attention, "quant_format": None, "max_error": None, **columns}


def cells_of(options: argparse.Namespace, context_length: int) -> list[Cell]:
    """What is timed at one length; the kernel's output is compared with its twin's on the way."""
    full = random_tokens(options, context_length)
    query = torch.randn(
        *(options.batch, options.kv_heads, options.group, options.head_dim), dtype=full.key.dtype, device="cuda"
    )
    scaling = options.head_dim**-0.5
    flat = query.flatten(1, 2).unsqueeze(2)

    def stock() -> torch.Tensor:
        return scaled_dot_product_attention(flat, full.key, full.value, scale=scaling, enable_gqa=True)

    cells = [Cell(stock, "sdpa", kv_bytes=storage_bytes([full.key, full.value]))]
    for quant_format in options.formats:
        layer = filled_layer(options, quant_format, context_length)
        held, stored = layer.held(), layer.quantized

        def kernel(held: Tokens = held, stored: QuantizedPool | None = stored) -> tuple[torch.Tensor, torch.Tensor]:
            return kernels.decode_attention(query, held, stored, scaling, False)

        def twin(layer: TriStateLayer = layer) -> tuple[torch.Tensor, torch.Tensor]:
            return layer._attend_folded(query, scaling)

        columns = {"quant_format": quant_format, "kv_bytes": storage_bytes([layer])}
        error = (kernel()[0] - twin()[0]).abs().max().item()
        cells += [Cell(kernel, "kernel", max_error=error, **columns), Cell(twin, "twin", **columns)]
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
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    records.write_atomic(outdir / "kernels.csv", buffer.getvalue())
    settings = {**vars(options), "outdir": outdir.name}
    record = {"settings": settings, "finished": records.now(), **records.environment()}
    records.write_atomic(outdir / "record.json", json.dumps(record, indent=2) + "\n")


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("time_kernels.py: no CUDA device")
    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, options.dtype)
    for name in options.formats:
        try:
            FORMATS[name].check(options.head_dim)
        except ValueError as error:
            raise SystemExit(f"time_kernels.py: {error}") from None
        if not kernels.supported(device, dtype, options.head_dim, options.group):
            raise SystemExit(
                f"time_kernels.py: the kernel does not serve {name} in {options.dtype} with head dim "
                f"{options.head_dim} and {options.group} query heads per KV head on {torch.cuda.get_device_name()}: "
                f"it needs Triton, compute capability 8.0, a head dim of at most {kernels.MAX_HEAD_DIM} and at most "
                f"{kernels.MAX_GROUP} query heads"
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
