"""Clocks and memory counters. What cannot be measured is None, never an estimate."""

from __future__ import annotations

import time
from pathlib import Path
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


class Peak:
    """The most memory that was held since this was made: of a GPU what is allocated there, of a CPU what is resident of
    this process, where the system says it (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._counts = device.type == "cuda"
        if self._counts:
            reset_peak_memory(device)
        elif device.type == "cpu":
            self._counts = _reset_resident_peak()

    @property
    def nbytes(self) -> int | None:
        """None where it is not counted."""
        if not self._counts:
            return None
        return peak_memory_bytes(self.device) if self.device.type == "cuda" else _proc_bytes("self/status", "VmHWM")


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _proc_bytes(file: str, name: str) -> int | None:
    """A number of kilobytes from a file of ``/proc``, in bytes."""
    try:
        lines = Path("/proc", file).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith(f"{name}:")), None)
    return None if found is None else 1024 * int(found[1])


def free_memory_bytes(device: torch.device) -> int | None:
    """What can still be allocated: of a GPU by its driver and what torch keeps of it, of a CPU as Linux estimates it,
    within the limit of a container; None where nobody says it."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if device.type != "cpu":
        return None
    known = [_proc_bytes("meminfo", "MemAvailable"), _container_bytes()]
    return min((nbytes for nbytes in known if nbytes is not None), default=None)


def _container_bytes() -> int | None:
    """What the limit of a container (cgroup v2) leaves beside files that need not stay; None without one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        held = int((group / "memory.current").read_text(encoding="ascii"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return None
    return None if limit == "max" else int(limit) - held + int(counts.get("inactive_file", 0))
