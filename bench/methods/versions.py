"""Versions of the libraries that methods of others need."""

from __future__ import annotations

from importlib import metadata

from bench.errors import UserError
from bench.methods.names import DISTRIBUTIONS, EXTRA


def installed_version(method: str, library: str) -> str:
    """Version of what ``method`` needs. Raises :class:`UserError`, which names the extra, where it is not installed."""
    try:
        return metadata.version(DISTRIBUTIONS[library])
    except metadata.PackageNotFoundError:
        raise UserError(f"{method}: {DISTRIBUTIONS[library]} is not installed: {EXTRA}", exit_code=2) from None
