"""What a row says of the samples it is made of besides scores: bytes, states, times, lengths."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from statistics import fmean, median
from typing import Any

from bench.records.sample import Measured


def columns_of(taken: Sequence[Measured], starts: Container[int]) -> dict[str, Any]:
    """The columns of a row, by name.

    Args:
        starts: those whose times count.
    """
    seen = sum(sample.tokens_seen for sample in taken)
    kv_bytes = sum(sample.kv_bytes for sample in taken)
    clocked = [sample for sample in taken if (sample.start or 0) in starts]
    decoded = sum(max(sample.generated_tokens - (sample.answers or 1), 0) for sample in clocked)
    # Only of what was generated; the reading of given texts is not decoding.
    decode_s = sum(sample.decode_s for sample in clocked if sample.generated_tokens)
    return {
        "kv_bytes_mean": kv_bytes / len(taken),
        "kv_bytes_peak": max(sample.kv_bytes_peak for sample in taken),
        "kv_share": _ratio(kv_bytes, sum(sample.full_kv_bytes for sample in taken)),
        "ragged_share": _ragged_share(taken),
        "kv_share_of_prompt": _ratio(kv_bytes, sum(map(_prompt_bytes, taken))),
        "original_share": _ratio(sum(sample.tokens_original for sample in taken), seen),
        "quantized_share": _ratio(sum(sample.tokens_quantized for sample in taken), seen),
        "evicted_share": _ratio(sum(sample.tokens_evicted for sample in taken), seen),
        "compressed_documents": sum(sample.tokens_quantized + sample.tokens_evicted > 0 for sample in taken),
        "prefill_s": _median(sample.prefill_s for sample in clocked),
        "compress_s": _median(sample.compress_s for sample in clocked),
        "ttft_ms": _median(sample.ttft_ms for sample in clocked),
        "decode_tokens_per_s": _ratio(decoded, decode_s) if decoded else None,
        "tpot_ms": 1000.0 * decode_s / decoded if decoded else None,
        "peak_memory_bytes": max(filter(None, (sample.peak_memory_bytes for sample in clocked)), default=None),
        "timed_documents": len(clocked),
        "prompt_tokens": fmean(sample.prompt_tokens for sample in taken),
        "generated_tokens": fmean(sample.generated_tokens for sample in taken),
        "truncated_documents": sum(sample.truncated for sample in taken),
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _prompt_bytes(sample: Measured) -> float:
    """Bytes of the full cache of the prompt alone, which a budget as a share of the prompt is meant of."""
    # Choices and texts are read from the compressed context: nothing has been added to it.
    if sample.kind == "scored" or not sample.tokens_seen:
        return sample.full_kv_bytes
    context = sample.prompt_tokens if sample.context_tokens is None else sample.context_tokens
    return sample.full_kv_bytes * context / sample.tokens_seen


def _ragged_share(samples: Sequence[Measured]) -> float | None:
    known = [sample.ragged_kv_bytes for sample in samples if sample.ragged_kv_bytes is not None]
    return _ratio(sum(known), sum(sample.full_kv_bytes for sample in samples)) if len(known) == len(samples) else None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
