"""From samples to one row per model, task or group of tasks, metric and cell."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from bench.errors import UserError
from bench.judge.comparison import add_statistics
from bench.names import FULL
from bench.records.measured import columns_of
from bench.records.row import Row
from bench.records.sample import Measured, Place, Sample, make_sample
from bench.records.samples import Samples
from bench.records.starts import timed
from bench.runs.documents import evaluation_of, group_evaluation, group_metrics, scores_of
from bench.runs.repeats import best_of_repeats, complete, pass_metric
from tasks.base import (
    Compared,
    Document,
    Evaluation,
    Generate,
    Generated,
    LogLikelihood,
    LogLikelihoods,
    Metric,
    Request,
    Task,
    TaskError,
    TaskGroup,
)

if TYPE_CHECKING:
    from bench.engine.measurement import Measurement
    from bench.runs.kept import AnyCell


CHOSEN = "acc"
"""What the names of metrics begin with that count the choices that were right: acc, acc_norm, acc_mutual_info."""


def to_sample(
    model: str,
    task: Task,
    document: Document,
    prompt_hash: str,
    measured: Measurement,
    start: int | None = None,
    token_texts: tuple[str, ...] | None = None,
) -> Sample:
    """One line of ``samples.jsonl``.

    Args:
        start: which of the record's starts it is measured in.
        token_texts: of what was generated, token by token.

    Raises:
        NotFinite: the answer holds numbers that are not finite.
    """
    cell = measured.cell
    answer = measured.answer
    generated = answer if isinstance(answer, Generated) else None
    scores = {n: value if math.isfinite(value) else None for n, value in scores_of(task, document, answer).items()}
    return make_sample(
        model=model,
        task=task.name,
        document=document.id,
        prompt_sha256=prompt_hash,
        cell=cell.key,
        method=cell.method,
        quant_format=cell.quant_format,
        budget_unit=cell.budget_unit,
        cache_size=cell.cache_size,
        cache_ratio=cell.cache_ratio,
        window_size=cell.window_size,
        score=scores[task.metrics[0].name],
        scores=scores,
        text=None if generated is None else generated.text,
        token_ids=None if generated is None else generated.token_ids,
        token_texts=token_texts,
        turns=(generated and generated.turns) or None,
        answers=measured.answers,
        log_likelihoods=answer.scored if isinstance(answer, LogLikelihoods) else None,
        compared=answer if isinstance(answer, Compared) else None,
        reference=document.reference,
        info=dict(document.info),
        truncated=document.truncated,
        question=_place(task, document.request),
        prompt_tokens=measured.prompt_tokens,
        context_tokens=measured.context_tokens,
        question_s=measured.question_s,
        generated_tokens=measured.generated_tokens,
        scored_tokens=measured.scored_tokens,
        prefills=measured.prefills,
        tokens_seen=round(measured.tokens_original + measured.tokens_quantized + measured.tokens_evicted),
        tokens_original=measured.tokens_original,
        tokens_quantized=measured.tokens_quantized,
        tokens_evicted=measured.tokens_evicted,
        kv_bytes=measured.kv_bytes,
        kv_bytes_peak=measured.kv_bytes_peak,
        full_kv_bytes=measured.full_kv_bytes,
        ragged_kv_bytes=measured.ragged_kv_bytes,
        prefill_s=measured.prefill_s,
        compress_s=measured.compress_s,
        ttft_ms=measured.ttft_ms,
        decode_s=measured.decode_s,
        tpot_ms=measured.tpot_ms,
        decode_tokens_per_s=measured.decode_tokens_per_s,
        peak_memory_bytes=measured.peak_memory_bytes,
        oq_ratios=measured.oq_ratios,
        repeat=document.repeat,
        start=start,
    )


def _place(task: Task, request: Request) -> Place | None:
    """Where a document's question stands; None for one that asks nothing."""
    if isinstance(request, Generate):
        is_after = bool(request.question_ids)
    elif isinstance(request, LogLikelihood):
        is_after = all(item.question_ids for item in request.continuations)
    else:
        return None
    if is_after:
        return "after"
    return "before" if task.has_parts else "inside"


def _places(samples: Iterable[Measured]) -> Literal["after", "before", "inside", "mixed"] | None:
    """Where the questions of samples stood, as far as it is written down."""
    found = {sample.question for sample in samples if sample.question is not None}
    return None if not found else found.pop() if len(found) == 1 else "mixed"


class TaskResults:
    """What the cells of a grid made of one task.

    Answers are read from the run's file one cell at a time, and not kept.

    Args:
        samples: by cell key and document id, in the order of the documents; a cell may have none. Scores are compared
            with ``full`` on the same documents only.
        stored: where their answers are read from.
    """

    def __init__(
        self,
        task: Task,
        documents: Sequence[Document],
        cells: Sequence[AnyCell],
        samples: Mapping[str, Mapping[str, Measured]],
        stored: Samples,
    ) -> None:
        self.task = task
        self.samples = samples

        def evaluate(taken: Iterable[Measured]) -> Evaluation:
            return evaluation_of(task, documents, {item.document: item.answer for item in stored.whole(taken)})

        labels = {cell.key: cell.label for cell in cells}
        self.evaluations: dict[str, Evaluation] = {}
        """Of each cell that has samples and can be evaluated."""
        self.failures: dict[str, TaskError | UserError] = {}
        """Why a cell cannot be evaluated, by its key."""
        for key, taken in self.samples.items():
            if taken:
                try:
                    self.evaluations[key] = _checked(task, labels[key], taken, evaluate(taken.values()))
                except (TaskError, UserError) as error:
                    self.failures[key] = error
        self.chances = {document.id: chance for document in documents if (chance := _chance(document)) is not None}
        """What guessing scores, of the documents whose answers are choices."""
        self._full_values: dict[str, Evaluation | None] = {}
        whole = self.samples.get(FULL, {})
        for key, taken in self.samples.items():
            if key not in self.evaluations or FULL not in self.evaluations:
                continue
            if whole.keys() == taken.keys():
                self._full_values[key] = self.evaluations[FULL]
            elif whole.keys() > taken.keys():
                # A cell that a stopped run left incomplete is compared on its own documents.
                self._full_values[key] = evaluate(whole[document] for document in taken)

    def all_samples(self) -> list[Measured]:
        """Those of all cells."""
        return [sample for taken in self.samples.values() for sample in taken.values()]

    def full(self, cell: AnyCell) -> Evaluation | None:
        """What ``full`` scored on the cell's documents; None where it was not measured on them."""
        return self._full_values.get(cell.key)


def _chance(document: Document) -> float | None:
    """What guessing scores; None where the answer is no choice."""
    if not isinstance(document.request, LogLikelihood) or len(document.request.continuations) < 2:
        return None
    return 1.0 / len(document.request.continuations)


NAMED = 5
"""Documents whose score is no number that are named one by one."""


def _checked(task: Task, label: str, taken: Mapping[str, Measured], evaluation: Evaluation) -> Evaluation:
    """Raises :class:`TaskError` where a score over the documents is no number; those whose own is none are named."""
    for metric in task.metrics:
        score = evaluation.values.get(metric.name, 0.0)
        if math.isfinite(score):
            continue
        lacking = [name for name, sample in taken.items() if sample.scores.get(metric.name, 0.0) is None]
        named = ", ".join(lacking[:NAMED]) + (", ..." if len(lacking) > NAMED else "")
        by = f": {len(lacking)} of them have none of their own: {named}" if lacking else ""
        raise TaskError(f"{task.name}: {metric.name} of {label} over {len(taken)} documents is {score}, no number{by}")
    return evaluation


def rows(
    model: str,
    results: TaskResults,
    cells: Sequence[AnyCell],
    part_of: str | None = None,
    terms: Sequence[str] = (),
) -> list[Row]:
    """Rows of ``results.csv`` for one model and task.

    Args:
        part_of: the group that it was asked for through.
        terms: what times depend on, of each of the run's starts: times are of samples under the same.
    """
    task = results.task
    starts = timed((item.start or 0 for item in results.all_samples()), terms)
    table: list[Row] = []
    for cell in cells:
        taken = list(results.samples[cell.key].values())
        mine = results.evaluations.get(cell.key)
        if mine is not None:
            full = results.full(cell)
            chances = [results.chances.get(sample.document) for sample in taken]
            table += _cell_rows(model, task.name, part_of, task.metrics, cell, taken, chances, starts, mine, full)
    add_statistics(table, results.all_samples(), task.metrics)
    return table + _pass_rows(model, results, cells, part_of, starts)


def _pass_rows(
    model: str, results: TaskResults, cells: Sequence[AnyCell], part_of: str | None, starts: Container[int]
) -> list[Row]:
    """Rows of pass@k, of the metrics that know right and wrong, where each document was answered several times."""
    taken = {cell.key: complete(results.samples[cell.key].values()) for cell in cells}
    repeats = max((sample.repeat or 1 for samples in taken.values() for sample in samples), default=1)
    metrics = {metric.name: pass_metric(metric, repeats) for metric in results.task.metrics if metric.binary}
    if repeats == 1 or not metrics:
        return []
    best = {key: best_of_repeats(samples, results.task.metrics, repeats) for key, samples in taken.items()}
    table: list[Row] = []
    for cell in cells:
        if not (mine := best[cell.key]):
            continue
        whole = {sample.own_id: sample for sample in best.get(FULL, ())}
        full = [whole[sample.own_id] for sample in mine if sample.own_id in whole]
        scored = (_mean_of(mine), _mean_of(full) if len(full) == len(mine) else None)
        for name, metric in metrics.items():
            # The metric of one length is of its documents.
            answers = [sample for sample in taken[cell.key] if sample.scores.get(name) is not None]
            table += _cell_rows(model, results.task.name, part_of, [metric], cell, answers, [None], starts, *scored)
    add_statistics(table, [sample for samples in best.values() for sample in samples], list(metrics.values()))
    return table


def _mean_of(samples: Sequence[Measured]) -> Evaluation:
    """Means of scores, each over the documents that have it."""
    known: dict[str, list[float]] = {}
    for sample in samples:
        for name, score in sample.scores.items():
            if score is not None:
                known.setdefault(name, []).append(score)
    return Evaluation(values={name: fmean(scores) for name, scores in known.items()})


def group_rows(
    model: str,
    group: TaskGroup,
    results: Mapping[str, TaskResults],
    cells: Sequence[AnyCell],
    part_of: str | None = None,
    terms: Sequence[str] = (),
) -> list[Row]:
    """Rows of a group of tasks and of the groups in it, outermost first.

    Args:
        results: by task name. A group has no row where the results of one of its tasks are missing.
        terms: as for :func:`rows`.
    """
    table: list[Row] = []
    names = [task.name for task in group.tasks()]
    together = [sample for name in names if name in results for sample in results[name].all_samples()]
    starts = timed((item.start or 0 for item in together), terms)
    for cell in cells if results.keys() >= set(names) else ():
        mine = {name: results[name].samples[cell.key] for name in names}
        if not all(cell.key in results[name].evaluations for name in names):
            continue
        counts = {name: len(samples) for name, samples in mine.items()}
        evaluation = group_evaluation(group, {name: results[name].evaluations[cell.key] for name in names}, counts)
        baseline = {name: found for name in names if (found := results[name].full(cell)) is not None}
        full = group_evaluation(group, baseline, counts) if len(baseline) == len(names) else None
        for metric in group_metrics(group):
            # Tasks of other metrics do not count for this one.
            having = [name for name in names if metric.name in results[name].evaluations[cell.key].values]
            taken = [sample for name in having for sample in mine[name].values()]
            chances = [results[sample.task].chances.get(sample.document) for sample in taken]
            table += _cell_rows(model, group.name, part_of, [metric], cell, taken, chances, starts, evaluation, full)
    if table:
        add_statistics(table, together, group_metrics(group))
    for member in group.members:
        if isinstance(member, TaskGroup):
            table += group_rows(model, member, results, cells, group.name, terms)
    return table


def _cell_rows(
    model: str,
    name: str,
    part_of: str | None,
    metrics: Sequence[Metric],
    cell: AnyCell,
    taken: Sequence[Measured],
    chances: Sequence[float | None],
    starts: Container[int],
    evaluation: Evaluation,
    full_evaluation: Evaluation | None,
) -> list[Row]:
    """A row per metric of one cell; ``taken`` are its samples, with what guessing scores on each, and ``starts`` those
    whose times count. A metric that only some documents have, such as that of one length, has a row of these.

    Raises:
        TaskError: a score over the documents is no number.
    """
    known = [chance for chance in chances if chance is not None]
    guessed = fmean(known) if known and len(known) == len(chances) else None
    whole = columns_of(taken, starts)
    table = []
    for metric in metrics:
        if metric.name not in evaluation.values:
            continue
        score = evaluation.values[metric.name]
        if not math.isfinite(score):
            raise TaskError(f"{name}: {metric.name} of {cell.label} over {len(taken)} documents is {score}, no number")
        full = full_evaluation.values.get(metric.name) if full_evaluation is not None else None
        # Of a score over all documents together, such as a perplexity, none has a part.
        mine = [sample for sample in taken if metric.name in sample.scores] or taken
        table.append(
            Row(
                model=model,
                task=name,
                metric=metric.name,
                question=_places(mine),
                method=cell.method,
                quant_format=cell.quant_format,
                budget_unit=cell.budget_unit,
                cache_size=cell.cache_size,
                cache_ratio=cell.cache_ratio,
                window_size=cell.window_size,
                n=len({(sample.task, sample.own_id) for sample in mine}),
                repeats=max((sample.repeat for sample in mine if sample.repeat is not None), default=None),
                score=score,
                chance=guessed if metric.name.startswith(CHOSEN) else None,
                score_full=full,
                retention=score / full if full else None,
                **(whole if len(mine) == len(taken) else columns_of(mine, starts)),
                higher_is_better=metric.higher_is_better,
                cell=cell.key,
                part_of=part_of,
            )
        )
    return table
