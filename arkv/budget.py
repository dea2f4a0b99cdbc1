"""From OQ scores and a budget to slots per layer.

Letters: ``L`` layers, ``B`` batch, ``C`` cache size, ``W`` window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from arkv.config import CacheConfig


class Slots(NamedTuple):
    """Slots of one layer and sample beside the window, per KV head."""

    original: int
    quantized: int


def oq_ratios(scores: Sequence[float]) -> list[float]:
    """OQ ratio of each layer of one sample, ``r_l = OQ_l / max_l OQ_l``.

    Without any evictable region all scores are zero: nothing tells the layers apart, and all keep their tokens Original.
    """
    top = max(scores)
    return [score / top for score in scores] if top > 0 else [1.0] * len(scores)


def token_slots(config: CacheConfig, scores: Sequence[float]) -> list[Slots]:
    """Token budgets: each layer holds ``C - W`` past tokens, of which ``round(r_l (C - W))`` stay Original.

    Args:
        scores: OQ score of each layer of one sample; layers not computed yet are left out. More layers can only
            lower an Original budget, so what was quantized before stays so.
    """
    past = config.past_size
    if config.original_share is None:
        shares = oq_ratios(scores)
    else:
        shares = [config.original_share] * len(scores)
    originals = [round(share * past) for share in shares]
    return [Slots(original, past - original) for original in originals]
