"""Which starts of a run may share a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def terms(start: Mapping[str, Any]) -> str:
    """Everything of a start that times depend on: two starts of the same terms may share a time."""
    return json.dumps([start.get(name) for name in ("hardware", "batch_size", "executor")], sort_keys=True)


def timed(samples: Iterable[int], starts: Sequence[str]) -> frozenset[int]:
    """The starts whose times a table shows: those of the terms that most samples were measured under, of several the
    newest.

    Args:
        samples: of each sample the start.
        starts: the terms of each start.
    """
    counts = Counter(samples)
    by_terms: dict[str, list[int]] = {}
    for start in counts:
        by_terms.setdefault(starts[start] if start < len(starts) else "", []).append(start)
    if not by_terms:
        return frozenset()
    return frozenset(max(by_terms.values(), key=lambda mine: (sum(counts[start] for start in mine), max(mine))))
