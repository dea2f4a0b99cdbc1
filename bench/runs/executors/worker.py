"""A worker on a Ray cluster: who it is, and what runs in its process."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench.engine.engine import Failure, Measurement
from bench.errors import UserError
from bench.methods.grid import Cell
from bench.models.inputs import identity
from bench.models.loading import describe
from bench.records.states import StatesMap
from bench.runs import folder as records
from bench.runs.executors.base import Answerer, Setup, Unit
from tasks.base import Document

VERSIONS = ("arkv-bench", "source", "torch", "transformers", "lm-eval")


def versions() -> dict[str, str]:
    """What driver and workers must have in common; ``source`` is a hash of the project's files."""
    packages = records.environment()["packages"]
    # A driver without a GPU may have another build of torch: 2.13.0+cpu.
    found = {name: str(packages.get(name)).partition("+")[0] for name in VERSIONS}
    return {**found, "source": records.source_sha256()[:12]}


class Introduction(NamedTuple):
    """Who a worker is."""

    node: str
    """Name of its machine."""
    pid: int
    versions: dict[str, str]
    hardware: dict[str, Any]


class Reply(NamedTuple):
    """What a worker makes of a unit."""

    results: list[tuple[str, Measurement | Failure]]
    """Document ids, and what each cell made of them."""
    loaded: dict[str, dict[str, str]]
    """Device, dtype and warm-up of every model that the worker has loaded, by name."""


class Worker:
    """What runs in the process of a worker."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._answerer: Answerer | None = None

    def introduce(self) -> Introduction:
        """Who this is; asked first, since another version may understand nothing else."""
        return Introduction(socket.gethostname(), os.getpid(), versions(), records.environment()["hardware"])

    def prepare(self, setup: Setup, fingerprints: Mapping[str, str]) -> str | None:
        """Look for the models. Returns what is wrong with them, or None."""
        self._answerer = Answerer(setup)
        for name, reference in setup.models.items():
            try:
                found = describe(reference, trust_remote_code=setup.trust_remote_code)
            except UserError as error:
                return str(error)
            if (mine := identity(found)) != fingerprints[name]:
                return (
                    f"{reference} holds another model there (fingerprint {mine[:12]}, here {fingerprints[name][:12]})"
                )
        return None

    def answer(self, unit: Unit) -> Reply:
        """Answer all of a unit."""
        assert self._answerer is not None
        results = [(answered.document.id, answered.result) for answered in self._answerer.answer(unit)]
        return Reply(results, self._answerer.loaded)

    def map_states(self, name: str, document: Document, cells: Sequence[Cell]) -> dict[str, StatesMap]:
        """What a model's tri-state cells make of a document's prompt, by key."""
        assert self._answerer is not None
        return self._answerer.map_states(name, document, cells)
