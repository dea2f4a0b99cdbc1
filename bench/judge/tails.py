"""Tails of the normal and of Student's distribution as ``scipy.stats`` has them, which takes half a second and 35 MB to
import, and is imported where nothing else serves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special


def normal_end(tail: float) -> float:
    """What a normal number exceeds with probability ``tail``."""
    return -float(special.ndtri(tail))


def student_end(tail: float, freedom: float) -> float:
    """What Student's t, with so many degrees of freedom, exceeds with probability ``tail``."""
    return -float(special.stdtrit(freedom, tail))


def student_tail(t: Any, freedom: float) -> Any:
    """The probability that Student's t exceeds ``t``, a number or an array."""
    return special.stdtr(freedom, -t)


def skewness_of(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of every row; NaN where its numbers are all the same."""
    from scipy import stats

    found: NDArray[np.float64] = stats.skew(numbers, axis=1)
    return found
