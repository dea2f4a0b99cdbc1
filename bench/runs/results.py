"""From samples to one row per model, task or group of tasks, metric and cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from bench.engine.engine import Measurement
from bench.judge.comparison import add_statistics
from bench.methods.grid import Cell
from bench.names import FULL
from bench.runs.documents import evaluation_of, group_evaluation, group_metrics, scores_of
from tasks.base import (
    Answer,
    Compared,
    Document,
    Evaluation,
    Generated,
    LogLikelihoods,
    Metric,
    Scored,
    Task,
    TaskGroup,
)

Sample = Mapping[str, Any]


def to_sample(model: str, task: Task, document: Document, prompt_hash: str, measured: Measurement) -> dict[str, Any]:
    """One line of ``samples.jsonl``."""
    cell = measured.cell
    answer = measured.answer
    generated = answer if isinstance(answer, Generated) else None
    scored = answer.scored if isinstance(answer, LogLikelihoods) else None
    compared = answer if isinstance(answer, Compared) else None
    scores = {n: value if math.isfinite(value) else None for n, value in scores_of(task, document, answer).items()}
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
        "text": None if generated is None else generated.text,
        "token_ids": None if generated is None else list(generated.token_ids),
        "log_likelihoods": None if scored is None else [list(item) for item in scored],
        "compared": None if compared is None else asdict(compared),
        "reference": document.reference,
        "info": dict(document.info),
        "truncated": document.truncated,
        "prompt_tokens": measured.prompt_tokens,
        "generated_tokens": measured.generated_tokens,
        "scored_tokens": measured.scored_tokens,
        "prefills": measured.prefills,
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


def to_answer(sample: Sample) -> Answer:
    """The answer that a line of ``samples.jsonl`` holds."""
    if sample.get("compared") is not None:
        return Compared(**{name: tuple(values) for name, values in sample["compared"].items()})
    if sample["text"] is None:
        return LogLikelihoods(scored=tuple(Scored(*item) for item in sample["log_likelihoods"]))
    return Generated(text=sample["text"], token_ids=tuple(sample["token_ids"]))


def _median(samples: Sequence[Sample], name: str) -> float | None:
    values = [sample[name] for sample in samples if sample[name] is not None]
    return median(values) if values else None


def _prompt_bytes(sample: Sample) -> float:
    """Bytes of the full cache of the prompt alone, which a budget as a share of the prompt is meant of."""
    full: float = sample["full_kv_bytes"]
    if sample["token_ids"] is None and sample["compared"] is None:
        # Choices and texts are read from the compressed context: nothing has been added to it.
        return full
    return full * sample["prompt_tokens"] / sample["tokens_seen"]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


class TaskResults:
    """What the cells of a grid made of one task.

    Args:
        samples: by document id and cell key. Scores are compared with ``full`` on the same documents only.
    """

    def __init__(
        self,
        task: Task,
        documents: Sequence[Document],
        cells: Sequence[Cell],
        samples: Mapping[tuple[str, str], Sample],
    ) -> None:
        self.task = task
        self.samples: dict[str, dict[str, Sample]] = {
            cell.key: {
                document.id: samples[document.id, cell.key]
                for document in documents
                if (document.id, cell.key) in samples
            }
            for cell in cells
        }
        """By cell key and document id; a cell may have none."""
        self.evaluations: dict[str, Evaluation] = {
            key: evaluation_of(task, documents, {name: to_answer(sample) for name, sample in taken.items()})
            for key, taken in self.samples.items()
            if taken
        }
        """Of each cell that has samples."""
        self._documents = documents
        # A cell that a stopped run left incomplete is compared on its own documents.
        self._full_values = {
            key: self._full(taken) for key, taken in self.samples.items() if taken and FULL in self.samples
        }

    def _full(self, taken: Mapping[str, Sample]) -> Evaluation | None:
        """What ``full`` scored on the documents of ``taken``; None where it lacks one."""
        full = self.samples[FULL]
        if not full.keys() >= taken.keys():
            return None
        if full.keys() == taken.keys():
            return self.evaluations[FULL]
        return evaluation_of(self.task, self._documents, {name: to_answer(full[name]) for name in taken})

    def all_samples(self) -> list[Sample]:
        """Those of all cells."""
        return [sample for taken in self.samples.values() for sample in taken.values()]

    def full(self, cell: Cell) -> Evaluation | None:
        """What ``full`` scored on the cell's documents; None where it was not measured on them."""
        return self._full_values.get(cell.key)


def rows(model: str, results: TaskResults, cells: Sequence[Cell], part_of: str | None = None) -> list[dict[str, Any]]:
    """Rows of ``results.csv`` for one model and task; ``part_of`` is the group that it was asked for through."""
    task = results.task
    table = []
    for cell in cells:
        taken = list(results.samples[cell.key].values())
        if taken:
            full = results.full(cell)
            table += _cell_rows(model, task.name, task.metrics, cell, taken, results.evaluations[cell.key], full)
    add_statistics(table, results.all_samples(), task.metrics)
    return [{**row, "part_of": part_of} for row in table]


def group_rows(
    model: str,
    group: TaskGroup,
    results: Mapping[str, TaskResults],
    cells: Sequence[Cell],
    part_of: str | None = None,
) -> list[dict[str, Any]]:
    """Rows of a group of tasks and of the groups in it, outermost first.

    Args:
        results: by task name. A group has no row where the results of one of its tasks are missing.
    """
    table = []
    names = [task.name for task in group.tasks()]
    for cell in cells if results.keys() >= set(names) else ():
        mine = {name: results[name].samples[cell.key] for name in names}
        if not all(mine.values()):
            continue
        counts = {name: len(samples) for name, samples in mine.items()}
        evaluation = group_evaluation(group, {name: results[name].evaluations[cell.key] for name in names}, counts)
        baseline = {name: found for name in names if (found := results[name].full(cell)) is not None}
        full = group_evaluation(group, baseline, counts) if len(baseline) == len(names) else None
        for metric in group_metrics(group):
            # Tasks of other metrics do not count for this one.
            having = [name for name in names if metric.name in results[name].evaluations[cell.key].values]
            taken = [sample for name in having for sample in mine[name].values()]
            table += _cell_rows(model, group.name, [metric], cell, taken, evaluation, full)
    if table:
        add_statistics(
            table, [sample for name in names for sample in results[name].all_samples()], group_metrics(group)
        )
    table = [{**row, "part_of": part_of} for row in table]
    for member in group.members:
        if isinstance(member, TaskGroup):
            table += group_rows(model, member, results, cells, group.name)
    return table


def _cell_rows(
    model: str,
    name: str,
    metrics: Sequence[Metric],
    cell: Cell,
    taken: Sequence[Sample],
    evaluation: Evaluation,
    full_evaluation: Evaluation | None,
) -> list[dict[str, Any]]:
    """A row per metric of one cell; ``taken`` are its samples."""
    seen = sum(sample["tokens_seen"] for sample in taken)
    decoded = sum(max(sample["generated_tokens"] - 1, 0) for sample in taken)
    # Only of what was generated; the reading of given texts is not decoding.
    decode_s = sum(sample["decode_s"] for sample in taken if sample["generated_tokens"])
    peaks = [sample["peak_memory_bytes"] for sample in taken if sample["peak_memory_bytes"] is not None]
    table = []
    for metric in metrics:
        if metric.name not in evaluation.values:
            continue
        score = evaluation.values[metric.name]
        full = full_evaluation.values.get(metric.name) if full_evaluation is not None else None
        table.append(
            {
                "model": model,
                "task": name,
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
                "kv_share": _ratio(sum(s["kv_bytes"] for s in taken), sum(s["full_kv_bytes"] for s in taken)),
                "kv_share_of_prompt": _ratio(sum(s["kv_bytes"] for s in taken), sum(map(_prompt_bytes, taken))),
                "original_share": _ratio(sum(s["tokens_original"] for s in taken), seen),
                "quantized_share": _ratio(sum(s["tokens_quantized"] for s in taken), seen),
                "evicted_share": _ratio(sum(s["tokens_evicted"] for s in taken), seen),
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
    return table
