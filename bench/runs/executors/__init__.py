"""Where units of work are answered: in this process, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from bench.methods.grid import Cell
from bench.models.inputs import identity
from bench.models.loading import DescribedModel
from bench.runs.executors.base import Answered, Executor, Setup, Unit
from bench.settings.run import RunConfig

__all__ = ["Answered", "Executor", "Setup", "Unit", "make_executor"]


def make_executor(
    config: RunConfig,
    models: Mapping[str, DescribedModel],
    cells: Sequence[Cell],
    console: Console,
    *,
    continues: bool = False,
) -> Executor:
    """The executor that ``config`` asks for.

    Args:
        continues: there are answers already, and perhaps nothing is left to do.

    Raises:
        UserError: what it needs is not installed.
    """
    setup = Setup.of(config, models, cells)
    if config.executor == "ray":
        from bench.runs.executors.ray import RayExecutor

        fingerprints = {name: identity(model) for name, model in models.items()}
        return RayExecutor(config, setup, fingerprints, console)
    from bench.runs.executors.local import LocalExecutor

    return LocalExecutor(setup, at_once=not continues)
