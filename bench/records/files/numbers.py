"""How single values are written: scores, intervals, shares, bytes."""

from __future__ import annotations

import math


def _decimals(value: float, digits: int, sign: str = "") -> str:
    """What rounds to zero has no minus."""
    text = f"{value:{sign}.{digits}f}"
    return f"{0.0:{sign}.{digits}f}" if float(text) == 0 else text


def number_text(value: float | None, digits: int) -> str:
    """With so many decimals; empty for what is unknown."""
    return "" if value is None else _decimals(value, digits)


def score_text(value: float | None, digits: int = 3, sign: str = "") -> str:
    """So many decimals; more for a small number, which else would lose its second digit, fewer for percentages."""
    if value is None:
        return ""
    if value and abs(value) < 10.0 ** (1 - digits):
        digits = min(1 - math.floor(math.log10(abs(value))), 6)
    elif abs(value) >= 10:
        digits -= 2
    return _decimals(value, digits, sign)


def interval_text(low: float | None, high: float | None) -> str:
    """Both ends with the decimals that the larger one needs."""
    if low is None or high is None:
        return ""
    digits = len(score_text(max(abs(low), abs(high)), 2).partition(".")[2])
    return f"[{_decimals(low, digits)}, {_decimals(high, digits)}]"


def seconds_text(milliseconds: float | None) -> str:
    """A time to the first token, in seconds: two decimals, more where these would leave one digit."""
    if milliseconds is None:
        return ""
    return score_text(milliseconds / 1000, 2) if milliseconds < 1000 else number_text(milliseconds / 1000, 2)


def milliseconds_text(value: float | None) -> str:
    """A time per token, in milliseconds."""
    return number_text(value, 1)


def percent_text(value: float | None, sign: str = "") -> str:
    """A share in percent."""
    return "" if value is None else f"{_decimals(100 * value, 1, sign)} %"


def bytes_text(value: float | None) -> str:
    """Bytes with their unit, in powers of 1,000."""
    if value is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")
