"""What is kept of a sample in memory says the same as the sample."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest

from bench.records.packed import packed
from bench.records.sample import LARGEST, Measured, NotFinite, make_sample
from tests.bench.lines import line, sample

WHOLE: dict[str, Any] = {
    "quant_format": "fp8",
    "budget_unit": "tokens",
    "cache_size": 64,
    "cache_ratio": 0.5,
    "window_size": 8,
    "scores": {"exact_match": 0.0, "f1": None},
    "score": 0.1,
    "truncated": True,
    "compress_s": 0.25,
    "peak_memory_bytes": LARGEST,
    "question": "after",
    "context_tokens": 0,
    "question_s": 0.0,
    "answers": 2,
    "ragged_kv_bytes": 3,
    "repeat": 2,
    "start": 1,
    "info": {"source": 7},
}


@pytest.mark.parametrize("more", [{}, WHOLE, {"score": None, "scores": {}, "ttft_ms": None, "tokens_original": 3}])
def test_every_attribute_is_that_of_the_sample(more: dict[str, Any]) -> None:
    whole = sample("d1~2", **more)
    small = packed(whole, 12, {})
    whole.place = 12
    for item in fields(Measured):
        kept, was = getattr(small, item.name), getattr(whole, item.name)
        assert (kept, type(kept)) == (was, type(was)), item.name
    assert (small.key, small.own_id) == (whole.key, whole.own_id)


def test_what_a_copy_is_told_stays_its_own() -> None:
    known: dict[Any, Any] = {}
    small, other = packed(sample("a"), 0, known), packed(sample("b"), 0, known)
    changed = copy.copy(small)
    changed.cell, changed.document, changed.scores = "run: full", "c", {"acc": None, "f1": 0.5}
    assert (changed.cell, changed.document, changed.scores) == ("run: full", "c", {"acc": None, "f1": 0.5})
    assert changed.kv_bytes == small.kv_bytes
    for item, name in ((small, "a"), (other, "b")):
        assert (item.cell, item.document, item.scores) == ("full", name, {"exact_match": 1.0})
    assert len(known) == 1


def test_a_count_fits_into_its_bytes() -> None:
    with pytest.raises(NotFinite, match=r"kv_bytes: .*9223372036854775807"):
        make_sample(**line(kv_bytes=LARGEST + 1))
