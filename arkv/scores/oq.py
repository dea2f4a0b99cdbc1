"""The OQ score of a layer: how much of its past should stay Original (ARKV, arXiv 2603.08727).

With ``P`` of :mod:`arkv.scores.attention`, per sample::

    entropy  = -sum P log P                      over query heads, window queries and keys
    variance = sum Var_q(P)                      over the window queries, summed over query heads and keys
    kurtosis = sum m4_q(P) / m2_q(P)^2           central moments over the window queries, summed likewise
    OQ       = entropy^(1/tau1) variance^(1/tau2) kurtosis^(1/tau3)
    r_l      = OQ_l / max_l OQ_l                 the OQ ratio of layer l
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def oq_score(layer: torch.Tensor, tau1: float, tau2: float, tau3: float) -> torch.Tensor:
    """OQ score of each sample, [B], from ``layer`` [B, 3]: entropy, variance, kurtosis.

    0 without an evictable region.
    """
    entropy, variance, kurtosis = layer.clamp_min(0).unbind(dim=-1)
    score: torch.Tensor = entropy ** (1 / tau1) * variance ** (1 / tau2) * kurtosis ** (1 / tau3)
    return score


def oq_ratios(scores: Sequence[float]) -> list[float]:
    """OQ ratio of each layer of one sample, ``r_l = OQ_l / max_l OQ_l``.

    Without any evictable region all scores are zero: nothing tells the layers apart, and all keep tokens Original.
    """
    top = max(scores)
    return [score / top for score in scores] if top > 0 else [1.0] * len(scores)
