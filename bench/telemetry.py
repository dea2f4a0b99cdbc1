"""Clocks and memory counters. What cannot be measured is None, never an estimate."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Seconds of a ``with`` block, with the device's queued work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def __enter__(self) -> Stopwatch:
        self._start = self._now()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds += self._now() - self._start


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of peak device memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak device memory since the last reset, weights included; None where the device does not count it (CPU)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
