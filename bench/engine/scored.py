"""Log-likelihoods of given tokens, from the log-probabilities that the model gives.

Letters: ``t`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tasks.base import Scored


def score(log_probabilities: torch.Tensor, targets: Sequence[int]) -> Scored:
    """Of ``targets``, predicted by the first rows of ``log_probabilities`` [t, V]."""
    rows = log_probabilities[: len(targets)]
    wanted = torch.tensor(targets, device=rows.device)
    picked = rows.gather(-1, wanted[:, None])
    return Scored(float(picked.sum()), bool((rows.argmax(dim=-1) == wanted).all()))


def total(parts: Sequence[Scored]) -> Scored:
    """Of parts that follow one another."""
    return Scored(sum(part.log_likelihood for part in parts), all(part.is_greedy for part in parts))
