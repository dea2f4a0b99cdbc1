"""The comparison of one quantity: how much worse it may be, and what came out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from bench.gate.findings import BETTER, OK, SKIPPED, WORSE, Finding
from bench.judge.stats import UNBOUNDED, Interval, difference_interval, pseudomedian
from bench.names import LEAST_DOCUMENTS
from bench.records.files.numbers import bytes_text, percent_text, score_text
from bench.records.row import Row
from bench.records.sample import Measured

Document = tuple[str, str]
"""Task and id of a document."""


def judge(
    run: Sequence[float],
    baseline: Sequence[float],
    tolerance: float,
    *,
    higher_is_better: bool,
    binary: bool | None = None,
    bounds: tuple[float, float] = UNBOUNDED,
) -> tuple[str, float, Interval | None]:
    """The outcome, the mean change and its interval, None for too few documents.

    Args:
        run: one value per document.
        baseline: of the same documents.
        tolerance: how much worse passes, in the values' unit.
        binary: as for :func:`bench.judge.stats.difference_interval`, as are the bounds.
    """
    changes = [new - old for new, old in zip(run, baseline, strict=True)]
    mean = fmean(changes)
    interval = None
    if len(changes) >= LEAST_DOCUMENTS:
        # No interval where every document changed by the same: then there is nothing to be unsure of.
        interval = difference_interval(run, baseline, binary=binary, bounds=bounds) or Interval(mean, mean)
    ends = interval or Interval(min(changes), max(changes))
    return _outcome(ends, tolerance, higher_is_better=higher_is_better), mean, interval


def _outcome(ends: Interval, tolerance: float, *, higher_is_better: bool) -> str:
    low, high = ends if higher_is_better else (-ends.high, -ends.low)
    return WORSE if high < -tolerance else BETTER if low > tolerance else OK


def _step_ms(sample: Measured) -> float | None:
    """Milliseconds per token that was generated, or read to be scored."""
    if sample.tpot_ms is not None:
        return sample.tpot_ms
    tokens = sample.scored_tokens
    return 1000.0 * sample.decode_s / tokens if tokens and sample.decode_s else None


def _change_text(change: float, interval: Interval | None, tolerance: float, text: Callable[[float], str]) -> str:
    ends = "" if interval is None else f" [{text(interval.low)}, {text(interval.high)}]"
    return f"{text(change)}{ends}, tolerance {text(tolerance).lstrip('+')}"


def score_finding(
    what: str,
    named: Mapping[str, Any],
    values: Sequence[tuple[float, float]],
    tolerance: float,
    row: Row,
) -> Finding:
    """The change of a score, by the statistics that the baseline's row says the score has."""
    run, baseline = [new for new, _ in values], [old for _, old in values]
    low = -math.inf if row.metric_low is None else row.metric_low
    high = math.inf if row.metric_high is None else row.metric_high
    # Scores that happened to be right or wrong there need not be now.
    binary = False if row.binary is False else None
    outcome, change, interval = judge(
        run, baseline, tolerance, higher_is_better=row.higher_is_better, binary=binary, bounds=(low, high)
    )
    return Finding(
        outcome=outcome,
        what=what,
        **named,
        baseline=score_text(fmean(baseline)),
        run=score_text(fmean(run)),
        change=_change_text(change, interval, tolerance, lambda value: score_text(value, sign="+")),
        note="" if interval is not None else f"n={len(values)}: no interval",
    )


def best_of(scores: Iterable[float]) -> float | None:
    """The score of a right answer, 1 or 100, where every answer is right or wrong; None where it is not so, or no
    answer is right."""
    found = set(scores)
    return next((best for best in (1.0, 100.0) if best in found and found <= {0.0, best}), None)


def lost_finding(
    what: str,
    named: Mapping[str, Any],
    answers: Mapping[Document, tuple[float, float]],
    share: float,
) -> tuple[Finding, list[Document]]:
    """Answers that were right in the baseline and are wrong now, and which these are.

    The same prompt, decoded greedily, gives the same answer: what is lost was changed, and no interval excuses it.

    Args:
        answers: score now and before, 0 where wrong, or where there is none now.
        share: of the right answers that may be lost, rounded up.
    """
    right = [document for document, (_, old) in answers.items() if old]
    lost = [document for document in right if not answers[document][0]]
    found = sum(bool(new) and not old for new, old in answers.values())
    allowed = math.ceil(share * len(right))
    finding = Finding(
        outcome=WORSE if len(lost) > allowed else OK,
        what=what,
        **named,
        baseline=f"{len(right)} of {len(answers)}",
        run=f"{sum(bool(new) for new, _ in answers.values())} of {len(answers)}",
        change=f"{len(lost)} lost, {found} found, tolerance {allowed} lost",
    )
    return finding, lost


def bytes_finding(
    what: str,
    named: Mapping[str, Any],
    now: Mapping[Document, Measured],
    before: Mapping[Document, Measured],
    documents: Sequence[Document],
    tolerance: float,
) -> Finding:
    """The rise of the bytes, or that of their share of a full cache, whichever is smaller.

    An answer of another length changes one of the two: the bytes of a cache that grows, the share of one that does not.
    """
    old = [float(before[document].kv_bytes) for document in documents]
    new = []
    for document in documents:
        full = before[document].full_kv_bytes / now[document].full_kv_bytes
        new.append(now[document].kv_bytes * min(1.0, full))
    level = fmean(old)
    outcome, change, interval = judge(new, old, tolerance * level, higher_is_better=False)
    return Finding(
        outcome=outcome,
        what=what,
        **named,
        baseline=bytes_text(level),
        run=bytes_text(fmean(now[document].kv_bytes for document in documents)),
        change=_change_text(change, interval, tolerance * level, lambda value: percent_text(value / level, sign="+")),
        note="" if interval is not None else f"n={len(documents)}: no interval",
    )


def speed_finding(
    model: str,
    label: str,
    run: Sequence[tuple[Document, Measured, Measured]],
    baseline: Sequence[tuple[Document, Measured, Measured]],
    tolerance: float,
) -> Finding:
    """Tokens/s over those of ``full`` on the same document, over all tasks.

    Args:
        label: of the cell.
        run: documents with the sample of ``full`` and that of the cell.
        baseline: likewise.
    """
    named: dict[str, Any] = {"model": model, "cell": label, "what": "tokens/s over full's"}

    def ratios(side: Sequence[tuple[Document, Measured, Measured]]) -> dict[Document, float]:
        steps = {document: (_step_ms(full), _step_ms(sample)) for document, full, sample in side}
        return {document: math.log(a / b) for document, (a, b) in steps.items() if a and b}

    now, before = ratios(run), ratios(baseline)
    documents = [document for document in before if document in now]
    changes = [now[document] - before[document] for document in documents]
    change, interval = pseudomedian(changes) if changes else (0.0, None)
    if interval is None:
        note = f"{len(documents)} documents with times of it and of full: too few to judge speed"
        return Finding(outcome=SKIPPED, **named, note=note)
    limit = -math.log1p(-tolerance)
    # The change at which the interval, as wide as it is, would lie beyond the tolerance.
    failing = -math.expm1(-limit - (interval.high - change))
    return Finding(
        outcome=_outcome(interval, limit, higher_is_better=True),
        **named,
        baseline=f"{math.exp(median(before[document] for document in documents)):.2f}",
        run=f"{math.exp(median(now[document] for document in documents)):.2f}",
        change=_change_text(
            math.expm1(change),
            Interval(math.expm1(interval.low), math.expm1(interval.high)),
            tolerance,
            lambda value: percent_text(value, sign="+"),
        ),
        note=f"a drop of {percent_text(failing)} would fail",
    )
