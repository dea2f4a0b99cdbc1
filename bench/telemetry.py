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
        for device in _cuda_devices(self.device):
            torch.cuda.synchronize(device)
        if self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def __enter__(self) -> Stopwatch:
        self._start = self._now()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds += self._now() - self._start


def _cuda_devices(device: torch.device) -> list[int]:
    """The GPUs that this process uses: more than one where a model is spread over them; none where ``device`` is not
    one."""
    if device.type != "cuda":
        return []
    return [index for index in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(index)]


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of peak device memory."""
    for index in _cuda_devices(device):
        torch.cuda.reset_peak_memory_stats(index)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak device memory since the last reset, weights included, of several GPUs the sum of each one's; None where the
    device does not count it (CPU)."""
    if device.type != "cuda":
        return None
    return sum(torch.cuda.max_memory_allocated(index) for index in _cuda_devices(device))
