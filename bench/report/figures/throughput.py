"""What a budget buys: tokens per second of each user against those of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.judge.speed import SpeedRow
from bench.records.files.numbers import bytes_text
from bench.report.figures.canvas import FOREGROUND, HEIGHT, WIDTH, Figure, drawing, legend, looks_of
from bench.report.figures.times import speed_series


def throughput_figures(name: str, rows: Sequence[SpeedRow]) -> list[Figure]:
    """One for each context at which batches of several sizes were decoded.

    Args:
        rows: those of :func:`bench.judge.speed.summarize`, of one model and machine.
    """
    looks = looks_of((speed_series(row), row.method) for row in rows)
    figures = []
    for length in sorted({row.context_length for row in rows}):
        mine = [row for row in rows if row.context_length == length]
        if len({row.batch_size for row in mine}) > 1:
            figures.append(_figure(f"{name}-throughput-{length}", length, mine, looks))
    return figures


def _figure(name: str, length: int, rows: Sequence[SpeedRow], looks: dict[str, dict[str, Any]]) -> Figure:
    fixed = [row for row in rows if row.kv_memory is not None]
    with drawing(WIDTH, HEIGHT) as canvas:
        axes = canvas.subplots()
        for label, look in looks.items():
            points = sorted(
                (row.batch_size, row.user_tokens_per_s, row.decode_tokens_per_s)
                for row in rows
                if speed_series(row) == label
            )
            if points:
                _, users, alls = zip(*points, strict=True)
                axes.plot(users, alls, linewidth=1, label=label, **look)
        ringed = ([row.user_tokens_per_s for row in fixed], [row.decode_tokens_per_s for row in fixed])
        axes.plot(*ringed, linestyle="", marker="o", markersize=13, fillstyle="none", color=FOREGROUND)
        axes.set_xlabel("tokens per s of each sequence")
        axes.set_ylabel("tokens per s of all")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        legend(canvas, axes)
    caption = (
        f"Behind {length:,} tokens: one curve per method, a point for each batch size, the smallest on the right. "
        "Up and to the right is better."
    )
    if fixed:
        memories = ", ".join(dict.fromkeys(bytes_text(row.kv_memory) for row in fixed))
        caption += f" Ringed: the largest batch whose caches fit in {memories}."
    return Figure(name=name, caption=caption, canvas=canvas)
