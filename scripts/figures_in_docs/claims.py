"""The claims of ARKV's paper, each with what was measured here and whether that bears it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from bench.judge.stats import difference_interval
from bench.judge.verdict import ALPHA
from bench.names import FULL, FUSED
from bench.records.files.markdown import markdown_table
from bench.records.finished import read_runs
from bench.records.row import Row
from bench.records.timing import Timing, read_timings
from bench.report.columns import adjusted
from scripts.figures_in_docs.common import (
    RESULTS,
    check_said,
    in_words,
    known,
    model_of,
    paragraph,
    percent,
    record_of,
    rows_of,
    the_row,
)
from scripts.figures_in_docs.evidence import LONGBENCH, STRICT, LongBench, kept

GSM8K, SHORT = "evidence/gsm8k", "evidence/commonsense"
KEPT = 0.97
"""Share of the full cache's score on LongBench that the paper claims at a quarter of the memory."""
FLEXIBLE = "exact_match,flexible-extract"
FAR = 10.0
"""Points of 100 that count as far above."""
PUBLISHED = 512
"""Tokens of the published budget."""
EQUAL = 5.0
"""Points of 100 within which a score counts as equal."""
SLOWER = 1.05
"""Times the full cache's time per token up to which the loss of throughput counts as minimal."""
HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told"


def claims() -> str:
    """A row for each of the abstract's claims."""
    lines = [
        ["about 97 % of the full cache's score on LongBench with a quarter of the memory", *_longbench()],
        ["as good as the full cache on tasks of short contexts", *_short()],
        ["far above uniform quantization on GSM8K", *_gsm8k()],
        ["minimal loss of throughput", *_throughput()],
    ]
    return "\n".join(markdown_table(["claim", "measured here", "verdict"], lines))


def gsm8k() -> str:
    """All rows of gsm8k."""
    rows = rows_of(GSM8K, STRICT)
    flexible = {row.cell: row for row in rows_of(GSM8K, FLEXIBLE)}
    lines = []
    for row in rows:
        apart = row.method != FULL and (p := adjusted(row)) is not None and p < ALPHA
        beside = ["", ""] if row.method == FULL else [_difference(row), f"{'told from' if apart else 'tied with'} full"]
        about = [row.method, row.quant_format or "", _budget(row), percent(row.kv_share_of_prompt)]
        lines.append([*about, _points(row), _points(flexible[row.cell]), *beside])
    said = paragraph(
        f"""gsm8k with five examples, {model_of(GSM8K)}, {rows[0].n} questions. Only the examples are compressed, before
        the question is read. Strict match in percent with 95 % interval, and so flexible, which takes the last number
        of an answer, however it is put; Δ and verdict are of strict match, bytes held in the end of the prompt's
        (`results/{GSM8K}`, preset `evidence-gsm8k`):"""
    )
    heads = ["method", "format", "budget", "bytes held", "strict match", "flexible", "Δ vs full", "verdict"]
    below = paragraph(f"{_format_lost(rows, flexible)} {_little_told(rows)}")
    return "\n".join([said, "", *markdown_table(heads, lines, right=(3, 4, 5, 6)), "", below])


def _format_lost(rows: Sequence[Row], flexible: Mapping[str, Row]) -> str:
    """What methods that only evict lose of the form of an answer rather than of its number."""
    full = the_row(rows, FULL)
    lost = []
    for name in ("window", "origin"):
        row = the_row(rows, name, 0.25)
        strict, number = (
            _scale(row) * (mine.score - of.score)
            for mine, of in ((row, full), (flexible[row.cell], flexible[full.cell]))
        )
        check_said(f"`{name}` loses the form of answers rather than their numbers", strict < number <= 0)
        lost.append(f"{-strict:.1f} and {-number:.1f} with `{name}`")
    return (
        f"At a quarter of the bytes strict match and flexible lose {', '.join(lost)}, in points: part of what methods "
        "that only evict lose is the form of the answer, not its number."
    )


def _little_told(rows: Sequence[Row]) -> str:
    """How much could be lost unseen."""
    full = the_row(rows, FULL)
    lows = [row.difference_low for row in rows if (p := adjusted(row)) is not None and p >= ALPHA]
    worst = min(low for low in lows if low is not None)
    share = min(-worst / full.score, 1.0)
    return (
        f"The full cache itself is right in {_points(full)} %, and intervals of rows that are tied with it go down to "
        f"{_scale(full) * worst:+.1f} points: {percent(share, 0)} of its right answers could be lost unseen."
    )


def _gsm8k() -> tuple[str, str]:
    """With the published budget and format, against the same with all tokens in one format."""
    rows = rows_of(GSM8K, STRICT)
    mix, quant = (the_row(rows, f"{name}-published") for name in ("mix", "quant"))
    scores: dict[str, dict[str, float]] = {}
    (run,) = read_runs([RESULTS / GSM8K])
    for sample in run.samples.values():
        score = known(sample.scores[STRICT], f"score of {sample.document} in {GSM8K}")
        scores.setdefault(sample.cell, {})[sample.document] = score
    documents = list(scores[mix.cell])
    pair = ([scores[row.cell][document] for document in documents] for row in (mix, quant))
    interval = known(difference_interval(*pair, bounds=(0.0, 1.0)), "interval of mix against quant on gsm8k")
    low, high = (100 * end for end in interval)
    verdict = HOLDS if low > 0 and high >= FAR else FAILS if high < FAR else UNKNOWN
    uniform = the_row(rows, "hf:quanto-int4")
    measured = (
        f"mix {_score(mix)}, quant {_score(quant)} with {mix.cache_size} tokens in fp8, as published: difference "
        f"[{low:+.0f}, {high:+.0f}] points; full {_score(the_row(rows, FULL))}, hf:quanto-int4 {_score(uniform)} at "
        f"{percent(uniform.kv_share_of_prompt, 0)} of the bytes, mix {_score(the_row(rows, 'mix', 0.25))} at a "
        f"quarter ({_source(GSM8K, mix.n)})"
    )
    return measured, verdict


def _longbench() -> tuple[str, str]:
    """What is kept where each dataset weighs the same, and where each document does."""
    found = LongBench()
    shares = [found.kept("mix", by_document=way) for way in (False, True)]
    verdicts = {HOLDS if low >= KEPT else FAILS if high < KEPT else UNKNOWN for _, low, high in shares}
    others = ", ".join(f"{name} {kept(*found.kept(name))}" for name in ("quant", "origin", "window"))
    measured = (
        f"mix keeps {kept(*shares[0])} of the mean of {in_words(len(found.sizes))} datasets ({others}), and "
        f"{kept(*shares[1])} where each document weighs the same ({_source(LONGBENCH, sum(found.sizes.values()))})"
    )
    return measured, verdicts.pop() if len(verdicts) == 1 else UNKNOWN


def _short() -> tuple[str, str]:
    """Whole prompts, each budget by itself."""
    rows = rows_of(SHORT, "acc,none")
    said, verdicts = [], []
    mixes = {known(row.cache_ratio, "budget of mix"): row for row in rows if row.method == "mix"}
    for ratio, mix in sorted(mixes.items(), reverse=True):
        low, high = (known(end, f"interval of mix in {SHORT}") for end in (mix.difference_low, mix.difference_high))
        share = f"{100 * ratio:g} %"
        said.append(f"mix {_score(mix)} in {share} of the bytes, {_difference(mix)} points")
        verdict = FAILS if high < 0 else f"{HOLDS} to within {EQUAL:g} points" if 100 * low >= -EQUAL else UNKNOWN
        verdicts.append(f"{verdict} at {share}")
    full = the_row(rows, FULL)
    tokens = known(full.prompt_tokens, f"tokens of the prompts in {SHORT}")
    whole = f"the published {PUBLISHED} tokens hold such prompts whole"
    check_said(whole, tokens < PUBLISHED)
    measured = (
        f"commonsense_qa, prompts of {tokens:.0f} tokens compressed whole: {', '.join(said)}; full {_score(full)} "
        f"({_source(SHORT, full.n)}); {whole}"
    )
    return measured, ", ".join(verdicts)


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
    record = record_of("speed/batch1")
    device = record["terms"]["device"].upper()
    check_said("no GPU was seen", device == "CPU")
    measured = f"{'; '.join(said)} ({record['model']['name']} on a {device}, medians; no GPU was seen)"
    return measured, HOLDS if worst <= SLOWER else FAILS


def _at(timing: Timing, length: int) -> bool:
    return timing.context_length == length and timing.tpot_ms is not None


def _ms(timings: Sequence[Timing]) -> float:
    return median(item.tpot_ms for item in timings if item.tpot_ms is not None)


def _scale(row: Row) -> float:
    """Points of 100 that a score of 1 is."""
    return 100.0 if row.metric_high == 1.0 else 1.0


def _score(row: Row) -> str:
    return f"{round(_scale(row) * row.score, 1):g} %"


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
        return f"{100 * row.cache_ratio:g} % of the bytes"
    return f"{row.cache_size} tokens" if row.cache_size is not None else ""


def _source(folder: str, documents: int) -> str:
    return f"results/{folder}, {model_of(folder).partition(' ')[0]}, {documents} documents"
