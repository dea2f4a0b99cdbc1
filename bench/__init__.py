"""The suite: from Python by :func:`evaluate` and :func:`load_run`, from a shell by ``arkv-bench``.

Nothing is imported before it is asked for: ``import bench`` loads neither torch nor pandas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.api import Results, evaluate, load_run

__all__ = ["Results", "evaluate", "load_run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bench' has no attribute {name!r}")
    from bench import api

    return getattr(api, name)
