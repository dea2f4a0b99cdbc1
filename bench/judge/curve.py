"""Divergence from the full cache over the position behind the prompt: does a method drift while it decodes?"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from statistics import fmean

from bench.records.curve import CurveRow
from bench.records.sample import Sample

OF_CELL = ("model", "task", "method", "quant_format", "budget_unit", "cache_size", "cache_ratio", "window_size", "cell")


def curve_rows(samples: Iterable[Sample]) -> list[CurveRow]:
    """A row per model, task, cell and position: mean and 95th percentile of the KL divergence over the prompts.

    ``position`` counts the tokens read behind the prompt, from 1; ``n`` is how many prompts have that many. The
    percentile is the smallest value that at least 95 % of the prompts do not exceed: of fewer than 20, the largest.

    Args:
        samples: those without a comparison of distributions do not count.
    """
    groups: dict[tuple[str, ...], tuple[dict[str, object], list[array[float]]]] = {}
    for sample in samples:
        if sample.compared is not None:
            key = (sample.model, sample.task, sample.cell)
            _, lists = groups.setdefault(key, ({name: getattr(sample, name) for name in OF_CELL}, []))
            lists.append(array("d", sample.compared.kl))
    rows = []
    for of_cell, lists in groups.values():
        for position in range(max(map(len, lists))):
            found = sorted(kl[position] for kl in lists if len(kl) > position)
            percentile = found[math.ceil(0.95 * len(found)) - 1]
            point = {"position": position + 1, "n": len(found), "kl": fmean(found), "kl_p95": percentile}
            rows.append(CurveRow.model_validate({**of_cell, **point}))
    return rows
