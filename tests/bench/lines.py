"""Lines of samples.jsonl, made up; and records, as they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.records.record import read_record
from bench.records.sample import Sample


def line(document: str = "d0", cell: str = "full", **more: Any) -> dict[str, Any]:
    """A whole line with an answer."""
    return {
        "model": "m",
        "task": "t",
        "document": document,
        "prompt_sha256": "",
        "cell": cell,
        "method": cell.partition("-")[0],
        "quant_format": None,
        "budget_unit": None,
        "cache_size": None,
        "cache_ratio": None,
        "window_size": None,
        "score": 1.0,
        "scores": {"exact_match": 1.0},
        "text": "an answer",
        "token_ids": [1, 2],
        "log_likelihoods": None,
        "compared": None,
        "reference": None,
        "info": {},
        "truncated": False,
        "prompt_tokens": 100,
        "generated_tokens": 2,
        "scored_tokens": 0,
        "prefills": 1,
        "tokens_seen": 101,
        "tokens_original": 101.0,
        "tokens_quantized": 0.0,
        "tokens_evicted": 0.0,
        "kv_bytes": 1000,
        "kv_bytes_peak": 1000,
        "full_kv_bytes": 1000,
        "prefill_s": 0.1,
        "compress_s": None,
        "ttft_ms": 100.0,
        "decode_s": 0.1,
        "tpot_ms": 100.0,
        "decode_tokens_per_s": 10.0,
        "peak_memory_bytes": None,
        "oq_ratios": [],
        **more,
    }


def sample(document: str = "d0", cell: str = "full", **more: Any) -> Sample:
    """The sample of such a line."""
    return Sample(**line(document, cell, **more))


def recorded(path: Path) -> dict[str, Any]:
    """What the record of a run holds."""
    return read_record(path).as_given()
