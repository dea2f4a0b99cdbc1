"""Divergence from the full cache over the position behind the prompt: does a method drift while it decodes?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

Sample = Mapping[str, Any]
OF_CELL = ("model", "task", "method", "quant_format", "budget_unit", "cache_size", "cache_ratio", "window_size", "cell")


def curve_rows(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """A row per model, task, cell and position: mean and 95th percentile of the KL divergence over the prompts.

    ``position`` counts the tokens read behind the prompt, from 1; ``n`` is how many prompts have that many. The
    percentile is the smallest value that at least 95 % of the prompts do not exceed: of fewer than 20, the largest.

    Args:
        samples: lines of ``samples.jsonl``; those without a comparison of distributions do not count.
    """
    groups: dict[tuple[str, ...], list[Sample]] = {}
    for sample in samples:
        if sample.get("compared") is not None:
            groups.setdefault((sample["model"], sample["task"], sample["cell"]), []).append(sample)
    rows = []
    for mine in groups.values():
        lists: list[Sequence[float]] = [sample["compared"]["kl"] for sample in mine]
        for position in range(max(map(len, lists))):
            found = sorted(kl[position] for kl in lists if len(kl) > position)
            rows.append(
                {
                    **{name: mine[0][name] for name in OF_CELL},
                    "position": position + 1,
                    "n": len(found),
                    "kl": fmean(found),
                    "kl_p95": found[math.ceil(0.95 * len(found)) - 1],
                }
            )
    return rows
