"""The claims of ARKV's paper, each with what was measured here and whether that bears it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

import numpy as np

from bench.judge.retention import ratio_interval
from bench.judge.verdict import ALPHA
from bench.names import FULL, FUSED
from bench.records.files.markdown import markdown_table
from bench.records.finished import read_runs
from bench.records.row import Row
from bench.records.timing import Timing, read_timings
from bench.report.columns import adjusted
from scripts.figures_in_docs.common import RESULTS, WORDS, model_of, paragraph, percent, rows_of, the_row

GSM8K, LONGBENCH, SHORT = "evidence/gsm8k", "evidence/longbench", ("evidence/mmlu", "evidence/commonsense")
KEPT = 0.97
"""Share of the full cache's score on LongBench that the paper claims at a quarter of the memory."""
EQUAL = 5.0
"""Points of 100 within which a score counts as equal."""
SLOWER = 1.05
"""Times the full cache's time per token up to which the loss of throughput counts as minimal."""
HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told"


def claims() -> str:
    """A row for each of the abstract's claims."""
    lines = [
        ["about 97 % of the full cache's score on LongBench with a quarter of the memory", *_longbench()],
        *(["as good as the full cache on tasks of short contexts", *_short(folder)] for folder in SHORT),
        ["far above uniform quantization on GSM8K", *_gsm8k()],
        ["minimal loss of throughput", *_throughput()],
    ]
    return "\n".join(markdown_table(["claim", "measured here", "verdict"], lines))


def gsm8k() -> str:
    """All rows of gsm8k."""
    rows = _of_gsm8k()
    lines = []
    for row in rows:
        apart = row.method != FULL and (p := adjusted(row)) is not None and p < ALPHA
        lines.append(
            [
                row.method,
                row.quant_format or "",
                _budget(row),
                percent(row.kv_share_of_prompt),
                _points(row),
                "" if row.method == FULL else _difference(row),
                ("" if row.method == FULL else "told from full" if apart else "tied with full"),
            ]
        )
    said = paragraph(
        f"""gsm8k with five examples, {model_of(GSM8K)}, {rows[0].n} questions, each read through what was left of the
        examples; strict match in percent with 95 % interval, bytes held in the end of the prompt's
        (`results/{GSM8K}`, preset `evidence-gsm8k`):"""
    )
    heads = ["method", "format", "budget", "bytes held", "score", "Δ vs full", "verdict"]
    return "\n".join([said, "", *markdown_table(heads, lines, right=(3, 4, 5))])


def _of_gsm8k() -> list[Row]:
    return rows_of(GSM8K, "exact_match,strict-match")


def _gsm8k() -> tuple[str, str]:
    """With the published budget and format, and in bytes."""
    rows = _of_gsm8k()
    published = {row.method: row for row in rows if row.method.endswith("-published")}
    mix, quant = published["mix-published"], published["quant-published"]
    apart = quant.best == mix.cell and (quant.p_to_best or 1.0) < ALPHA
    verdict = HOLDS if apart else FAILS if mix.score <= quant.score else UNKNOWN
    pairs = ", ".join(
        f"{_score(the_row(rows, 'mix', ratio))} and {_score(the_row(rows, 'quant', ratio))} in {percent(ratio)} of the "
        "bytes"
        for ratio in sorted({row.cache_ratio for row in rows if row.cache_ratio is not None}, reverse=True)
    )
    measured = (
        f"`mix` {_score(mix)}, `quant` {_score(quant)} with {mix.cache_size} tokens in fp8, as published; {pairs}; "
        f"`hf:quanto-int4` {_score(the_row(rows, 'hf:quanto-int4'))}; full {_score(the_row(rows, FULL))} "
        f"({_source(GSM8K, mix.n)})"
    )
    return measured, verdict


def _longbench() -> tuple[str, str]:
    """Retention of the mean over datasets, each of which counts the same, as LongBench's average does."""
    ((run),) = read_runs([RESULTS / LONGBENCH])
    headline = {row.task: row.metric for row in reversed(run.rows)}
    cells = {row.method: row.cell for row in run.rows}
    scores: dict[str, dict[tuple[str, str], float]] = {}
    for sample in run.samples.values():
        score = sample.scores[headline[sample.task]]
        assert score is not None
        scores.setdefault(sample.cell, {})[sample.task, sample.document] = score
    full = scores[cells[FULL]]
    sizes = Counter(task for task, _ in full)
    weights = np.array([len(full) / len(sizes) / sizes[task] for task, _ in full])
    baseline = weights * np.array(list(full.values()))
    kept = {}
    for method in ("mix", "quant", "origin", "window"):
        mine = weights * np.array([scores[cells[method]][document] for document in full])
        kept[method] = (float(mine.mean() / baseline.mean()), ratio_interval(mine, baseline))
    share, interval = kept["mix"]
    assert interval is not None
    others = ", ".join(f"`{method}` {percent(value, 0)}" for method, (value, _) in kept.items() if method != "mix")
    verdict = HOLDS if interval[0] >= KEPT else FAILS if interval[1] < KEPT else UNKNOWN
    measured = (
        f"`mix` keeps {percent(share, 0)} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}] at a quarter of the "
        f"bytes, {others} ({_source(LONGBENCH, len(full))} of {WORDS[len(sizes)]} datasets)"
    )
    return measured, verdict


def _short(folder: str) -> tuple[str, str]:
    """The smallest budget that was measured."""
    rows = [row for row in rows_of(folder, "acc") if row.part_of is None]
    mix = min((row for row in rows if row.method == "mix"), key=lambda row: row.cache_ratio or 1.0)
    low, high = mix.difference_low, mix.difference_high
    assert low is not None
    assert high is not None
    verdict = FAILS if high < 0 else f"{HOLDS} to within {EQUAL:g} points" if 100 * low >= -EQUAL else UNKNOWN
    measured = (
        f"`mix` {_score(mix)} in {percent(mix.cache_ratio)} of the bytes, full {_score(the_row(rows, FULL))}, "
        f"difference {_difference(mix)} ({folder.partition('/')[2]}, {_source(folder, mix.n)})"
    )
    return measured, verdict


def _throughput() -> tuple[str, str]:
    """Against both full caches, of a batch and of one sequence."""
    said, worst = [], 0.0
    for folder, length, of in (("batch16", 4000, "16 sequences"), ("batch1", 7900, "one sequence")):
        timings = [item for item in read_timings(RESULTS / "speed" / folder / "speed.csv") if _at(item, length)]
        mix = _ms([item for item in timings if item.method == "mix" and item.cache_ratio == 0.25])
        fused, stock = (_ms([item for item in timings if item.method == name]) for name in (FUSED, FULL))
        worst = max(worst, mix / fused)
        said.append(
            f"{of} behind {length:,} tokens: {mix:.0f} ms a token in a quarter of the bytes, the full cache in the "
            f"same kernel {fused:.0f}, stock {stock:.0f}"
        )
    measured = f"{'; '.join(said)} (smollm2-135m on a CPU, medians; no GPU was seen)"
    return measured, HOLDS if worst <= SLOWER else FAILS


def _at(timing: Timing, length: int) -> bool:
    return timing.context_length == length and timing.tpot_ms is not None


def _ms(timings: Sequence[Timing]) -> float:
    return median(item.tpot_ms for item in timings if item.tpot_ms is not None)


def _scale(row: Row) -> float:
    """Points of 100 that a score of 1 is."""
    return 100.0 if row.metric_high == 1.0 else 1.0


def _score(row: Row) -> str:
    return f"{_scale(row) * row.score:.0f} %"


def _points(row: Row) -> str:
    ends = [row.score_low, row.score_high]
    said = ", ".join(f"{_scale(row) * end:.0f}" for end in ends if end is not None)
    return f"{_scale(row) * row.score:.1f} [{said}]"


def _difference(row: Row) -> str:
    values = [row.difference, row.difference_low, row.difference_high]
    middle, low, high = (f"{_scale(row) * value:+.1f}" if value is not None else "" for value in values)
    return f"{middle} [{low}, {high}]"


def _budget(row: Row) -> str:
    if row.cache_ratio is not None:
        return f"{percent(row.cache_ratio)} of the bytes"
    return f"{row.cache_size} tokens" if row.cache_size is not None else ""


def _source(folder: str, documents: int) -> str:
    return f"`results/{folder}`, {model_of(folder).partition(' ')[0]}, {documents} documents"
