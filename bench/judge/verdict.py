"""What a table may say of a difference, in words."""

from __future__ import annotations

LEVEL = 0.95
"""Confidence of every interval."""
ALPHA = 1.0 - LEVEL
"""Adjusted p-values below this say which of two is better; others leave them tied."""
POWER = 0.8
"""Chance of being found that the smallest detectable difference has."""


def verdict(difference: float, p_adjusted: float | None, *, higher_is_better: bool = True) -> str:
    """The direction of a difference only together with the adjusted p, and only below :data:`ALPHA`."""
    if p_adjusted is None:
        return ""
    if p_adjusted >= ALPHA or difference == 0:
        return "tied"
    return f"{'better' if (difference > 0) == higher_is_better else 'worse'}, p {p_text(p_adjusted)}"


def p_text(p: float) -> str:
    """``0.031``, or ``<0.001``."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"
