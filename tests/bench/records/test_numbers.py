"""How single values are written."""

from __future__ import annotations

from bench.records.files.numbers import interval_text, number_text, percent_text, score_text, seconds_text


def test_what_rounds_to_zero_has_no_minus() -> None:
    assert (score_text(-1e-12), score_text(-1e-12, sign="+"), score_text(-0.125, sign="+")) == (
        *("0.000000", "+0.000000", "-0.125"),
    )
    assert (percent_text(-1e-9), number_text(-0.001, 2), interval_text(-1e-9, 0.5)) == ("0.0 %", "0.00", "[0.00, 0.50]")


def test_a_time_to_the_first_token_is_in_seconds() -> None:
    assert list(map(seconds_text, (None, 0.0, 3.4, 34.0, 670.0, 12345.6))) == [
        "",
        "0.00",
        "0.0034",
        "0.034",
        "0.67",
        "12.35",
    ]
