"""The CPU kernels, compiled when a model is loaded: never within what is timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def prepare_kernels(device: torch.device) -> None:
    """Have the kernels ready for a model on ``device``.

    Where they cannot be compiled, a line of :mod:`arkv.kernels.cpu.building` says why, and torch's operations serve.
    """
    from arkv.kernels.cpu import building

    if device.type == "cpu":
        announce_compiling()
        building.library()


def announce_compiling() -> None:
    """Say that the kernels are about to be compiled, where they are not there yet."""
    from rich.console import Console

    from arkv.kernels.cpu import building

    if not building.is_built():
        line = "Compiling the CPU kernels, once for this machine: a quarter of a minute ..."
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
