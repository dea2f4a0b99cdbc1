"""From samples to one row per model, task, metric and cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from bench.comparison import add_statistics
from bench.engine import Measurement
from bench.methods import FULL, Cell
from tasks.base import Document, Generated, Task


def to_sample(model: str, task: Task, document: Document, prompt_hash: str, measured: Measurement) -> dict[str, Any]:
    """One line of ``samples.jsonl``."""
    cell = measured.cell
    scores = task.score(document, measured.answer)
    seen = measured.tokens_original + measured.tokens_quantized + measured.tokens_evicted
    return {
        "model": model,
        "task": task.name,
        "document": document.id,
        "prompt_sha256": prompt_hash,
        "cell": cell.key,
        "method": cell.method,
        "quant_format": cell.quant_format,
        "budget_unit": cell.budget_unit,
        "cache_size": cell.cache_size,
        "cache_ratio": cell.cache_ratio,
        "window_size": cell.window_size,
        "score": scores[task.metrics[0].name],
        "scores": scores,
        "text": measured.answer.text,
        "token_ids": list(measured.answer.token_ids),
        "reference": document.reference,
        "info": dict(document.info),
        "truncated": document.truncated,
        "prompt_tokens": measured.prompt_tokens,
        "generated_tokens": measured.generated_tokens,
        "tokens_seen": round(seen),
        "tokens_original": measured.tokens_original,
        "tokens_quantized": measured.tokens_quantized,
        "tokens_evicted": measured.tokens_evicted,
        "kv_bytes": measured.kv_bytes,
        "kv_bytes_peak": measured.kv_bytes_peak,
        "full_kv_bytes": measured.full_kv_bytes,
        "prefill_s": measured.prefill_s,
        "compress_s": measured.compress_s,
        "ttft_ms": measured.ttft_ms,
        "decode_s": measured.decode_s,
        "tpot_ms": measured.tpot_ms,
        "decode_tokens_per_s": measured.decode_tokens_per_s,
        "peak_memory_bytes": measured.peak_memory_bytes,
        "oq_ratios": measured.oq_ratios,
    }


def _median(samples: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [sample[name] for sample in samples if sample[name] is not None]
    return median(values) if values else None


def rows(
    model: str,
    task: Task,
    documents: Sequence[Document],
    cells: Sequence[Cell],
    samples: Mapping[tuple[str, str], Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Rows of ``results.csv`` for one model and task.

    Args:
        samples: by document id and cell key. Scores are compared with ``full`` on the same documents only.
    """
    table = []
    for cell in cells:
        mine = {
            document.id: samples[document.id, cell.key] for document in documents if (document.id, cell.key) in samples
        }
        if not mine:
            continue
        answers = {name: Generated(text=s["text"], token_ids=tuple(s["token_ids"])) for name, s in mine.items()}
        evaluation = task.evaluate(documents, answers)
        baseline = {name: samples[name, FULL] for name in mine if (name, FULL) in samples}
        full_values: Mapping[str, float] = {}
        if len(baseline) == len(mine):
            full_values = task.evaluate(
                documents,
                {name: Generated(text=s["text"], token_ids=tuple(s["token_ids"])) for name, s in baseline.items()},
            ).values
        taken = list(mine.values())
        seen = sum(sample["tokens_seen"] for sample in taken)
        decode_s = sum(sample["decode_s"] for sample in taken)
        decoded = sum(max(sample["generated_tokens"] - 1, 0) for sample in taken)
        peaks = [sample["peak_memory_bytes"] for sample in taken if sample["peak_memory_bytes"] is not None]
        for metric in task.metrics:
            if metric.name not in evaluation.values:
                continue
            score, full = evaluation.values[metric.name], full_values.get(metric.name)
            table.append(
                {
                    "model": model,
                    "task": task.name,
                    "metric": metric.name,
                    "method": cell.method,
                    "quant_format": cell.quant_format,
                    "budget_unit": cell.budget_unit,
                    "cache_size": cell.cache_size,
                    "cache_ratio": cell.cache_ratio,
                    "window_size": cell.window_size,
                    "n": len(taken),
                    "score": score,
                    "score_full": full,
                    "retention": score / full if full else None,
                    "kv_bytes_mean": fmean(sample["kv_bytes"] for sample in taken),
                    "kv_bytes_peak": max(sample["kv_bytes_peak"] for sample in taken),
                    "kv_share": sum(s["kv_bytes"] for s in taken) / sum(s["full_kv_bytes"] for s in taken),
                    "original_share": sum(s["tokens_original"] for s in taken) / seen,
                    "quantized_share": sum(s["tokens_quantized"] for s in taken) / seen,
                    "evicted_share": sum(s["tokens_evicted"] for s in taken) / seen,
                    "compressed_documents": sum(s["tokens_quantized"] + s["tokens_evicted"] > 0 for s in taken),
                    "prefill_s": _median(taken, "prefill_s"),
                    "compress_s": _median(taken, "compress_s"),
                    "ttft_ms": _median(taken, "ttft_ms"),
                    "decode_tokens_per_s": decoded / decode_s if decoded else None,
                    "tpot_ms": 1000.0 * decode_s / decoded if decoded else None,
                    "peak_memory_bytes": max(peaks) if peaks else None,
                    "prompt_tokens": fmean(sample["prompt_tokens"] for sample in taken),
                    "generated_tokens": fmean(sample["generated_tokens"] for sample in taken),
                    "truncated_documents": sum(sample["truncated"] for sample in taken),
                    "higher_is_better": metric.higher_is_better,
                    "cell": cell.key,
                }
            )
    wanted = {document.id for document in documents}
    add_statistics(table, [sample for (document, _), sample in samples.items() if document in wanted])
    return table
