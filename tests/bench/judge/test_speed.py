"""What is made of timings: ratios at one batch or memory, and lines over the context."""

from __future__ import annotations

from typing import Any

import pytest

from bench.judge.speed import Line, faster_from, growths, summarize
from bench.names import CEILING, FULL, FUSED
from bench.records.timing import Timing


def timing(method: str, tpot_ms: float, length: int = 1000, batch: int = 1, **more: Any) -> Timing:
    values: dict[str, Any] = {
        "method": method,
        "context_length": length,
        "prefill_s": 1.0,
        "ttft_ms": 1000.0,
        "tpot_ms": tpot_ms,
        "decode_tokens_per_s": 1000 * batch / tpot_ms,
        "kv_bytes": 100 * length * batch,
        "repetition": 0,
        "batch_size": batch,
        "cell": f"{method}-{more.get('cache_ratio')}",
        **more,
    }
    return Timing(**values)


def test_ratios_are_of_one_batch_or_memory() -> None:
    quarter = {"cache_ratio": 0.25}
    rows = summarize(
        [
            *(timing(FULL, 40, batch=1), timing(FULL, 100, batch=4), timing(FUSED, 50, batch=4)),
            *(timing(CEILING, 20, batch=4, **quarter), timing("mix", 25, batch=4, **quarter)),
            *(timing("mix", 30, batch=1, **quarter), timing(FULL, 200, batch=8, kv_memory=9)),
            timing("mix", 100, batch=32, kv_memory=9, **quarter),
        ]
    )
    found = {(row.method, row.batch_size): row for row in rows}
    mix = found["mix", 4]
    assert (mix.vs_full, mix.vs_fused, mix.vs_ceiling) == (4.0, 2.0, pytest.approx(0.8))
    assert found["mix", 1].vs_full == pytest.approx(4 / 3)
    assert found["mix", 1].vs_fused is None
    # Another batch each: what counts is the tokens of all.
    assert found["mix", 32].vs_full == 8.0
    assert (mix.user_tokens_per_s, mix.decode_tokens_per_s, mix.budget) == (40.0, 160.0, "25 %")


def test_the_share_of_the_bandwidth() -> None:
    (row,) = summarize([timing(FULL, 50, step_bytes=10**9, bandwidth=40e9)])
    assert row.bandwidth_share == pytest.approx(0.5)
    (row,) = summarize([timing(FULL, 50, step_bytes=10**9)])
    assert row.bandwidth_share is None


def test_cells_of_other_settings_are_other_rows() -> None:
    rows = summarize([timing("mix", 25, cell="mix-W8"), timing("mix", 35, cell="mix-W32")])
    assert [row.tpot_ms for row in rows] == [25.0, 35.0]


def test_time_over_the_context() -> None:
    lengths = (1000, 2000, 4000)
    found = {
        item.row.method: item
        for item in growths(
            summarize(
                [
                    *(timing(FULL, 30 + length / 100, length) for length in lengths),
                    *(timing(FUSED, 32 + length / 200, length) for length in lengths),
                    *(timing("mix", 38 + length / 500, length, cache_ratio=0.25, bandwidth=1e8) for length in lengths),
                    timing("once", 10, 1000),
                ]
            )
        )
    }
    assert found.keys() == {FULL, FUSED, "mix"}
    mix = found["mix"]
    assert (mix.lengths, mix.row.context_length) == (3, 4000)
    assert (mix.slope, mix.intercept) == (pytest.approx(0.002), pytest.approx(38))
    assert (mix.over_full, mix.over_fused) == ("from 1,000", "from 2,000")
    # 100 bytes of KV a token, 0.002 ms a token.
    assert mix.kv_bandwidth == pytest.approx(100 / 2e-6)
    assert mix.kv_bandwidth_share == pytest.approx(0.5)
    assert (found[FULL].over_full, found[FUSED].over_fused) == ("", "")


def test_a_cache_of_one_size_says_nothing_of_its_reading() -> None:
    (grown,) = growths(summarize([timing("mix", 20, length, kv_bytes=5000 + length) for length in (1000, 2000)]))
    assert grown.kv_bandwidth is None


@pytest.mark.parametrize(
    ("mine", "other", "said"),
    [
        ((1, 20), (2, 10), "from 10"),
        ((1, 5), (2, 10), "all"),
        ((2, 5), (1, 10), "up to 5"),
        ((2, 10), (1, 10), "never"),
        ((1, 5), (1, 10), "all"),
        ((1, 10), (1, 10), "never"),
    ],
)
def test_from_which_context_on_it_is_faster(mine: tuple[float, float], other: tuple[float, float], said: str) -> None:
    assert faster_from(Line(*mine), Line(*other)) == said


def test_without_another_there_is_nothing_to_say() -> None:
    assert faster_from(Line(1, 1), None) == ""
