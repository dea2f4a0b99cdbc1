"""The columns of a comparison: on one line, stacked for 80 columns, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.judge.verdict import ALPHA, p_text, verdict
from bench.methods.names import IN_A_WORD, limits_of
from bench.names import FULL, with_format
from bench.records.files.numbers import (
    bytes_text,
    interval_text,
    milliseconds_text,
    percent_text,
    score_text,
    seconds_text,
)
from bench.records.row import Row

TOLERANCE = 0.02
"""Relative distance from the bytes asked for up to which a row stands at them."""


def budget_cell(row: Row) -> str:
    """A budget as it was asked for: a share of the prompt, or tokens per layer."""
    if row.cache_ratio is not None:
        return f"{100 * row.cache_ratio:g} %"
    return "" if row.cache_size is None else str(row.cache_size)


def _states(row: Row) -> str:
    shares = (row.original_share, row.quantized_share, row.evicted_share)
    return "" if None in shares else "/".join(f"{100 * (share or 0):.0f}" for share in shares)


def _share(row: Row) -> str:
    ragged = "" if row.ragged_share is None else f" ({percent_text(row.ragged_share)})"
    return percent_text(row.kv_share) + ("*" if off_budget(row) else "") + ragged


def _bytes(row: Row) -> str:
    """With why they are not those that were asked for, where the method's kind tells it."""
    why = IN_A_WORD.get(limits_of(row.method), "") if off_budget(row) else ""
    return ", ".join(filter(None, (bytes_text(row.kv_bytes_mean), why)))


def off_budget(row: Row) -> bool:
    """The bytes are more than 2 % away from the share of bytes that was asked for."""
    if row.budget_unit != "bytes" or not row.cache_ratio or not row.kv_share_of_prompt or row.not_exercised:
        return False
    return bool(abs(row.kv_share_of_prompt / row.cache_ratio - 1) > TOLERANCE)


def _against_full(row: Row) -> str:
    if row.not_exercised:
        return "not exercised"
    if row.difference is None:
        return _against_best(row)
    return untold(row) or verdict(row.difference, adjusted(row), higher_is_better=row.higher_is_better)


def untold(row: Row) -> str:
    """Why no number of documents shows a difference to ``full``; empty where they can."""
    if row.cannot_tell is None or row.metric_low is None or row.metric_high is None:
        return ""
    worst, best = row.metric_low, row.metric_high
    if not row.higher_is_better:
        worst, best = best, worst
    what = {
        "floor": f"the least is {score_text(worst)}",
        "chance": f"chance is {score_text(row.metric_low + (row.metric_high - row.metric_low) * (row.chance or 0.0))}",
        "ceiling": f"the most is {score_text(best)}",
    }
    return f"cannot tell: full scores {score_text(row.score_full)}, {what[row.cannot_tell]}"


def adjusted(row: Row) -> float | None:
    """The p-value that a row's verdict follows from. Older files have Holm's."""
    return row.p_holm if is_older(row) else row.p_adjusted


def is_older(row: Row) -> bool:
    """The row is of an older file, whose intervals of differences are of each row alone."""
    return row.p_adjusted is None and row.p_holm is not None


def _against_best(row: Row) -> str:
    """Of a divergence, which is not compared with ``full``: how many times that of the best at the same budget."""
    if row.to_best is None or row.p_to_best is None:
        return ""
    if row.p_to_best >= ALPHA:
        return "like the best"
    return f"{row.to_best:.2g} x the best, p {p_text(row.p_to_best)}"


@dataclass(frozen=True)
class Column:
    """A column of the table that a person reads. Headers and cells may have two lines."""

    header: str
    cell: Callable[[Row], str]
    left: bool = False
    needed: bool = False
    """Never left out for want of width."""


def _briefly(row: Row) -> str:
    """Without the p-value, and without why nothing can be told."""
    return _against_full(row).replace(":", ",").partition(",")[0]


def _two_lines(above: str, below: str) -> str:
    return f"{above}\n{below}" if below else above


def _method(row: Row) -> str:
    """A peer's name stands before the library it comes from."""
    library, _, name = row.method.rpartition(":")
    return _two_lines(name, "not exercised" if row.not_exercised else library or row.quant_format or "")


def _score(row: Row) -> str:
    return _two_lines(score_text(row.score), interval_text(row.score_low, row.score_high))


def _difference_interval(row: Row) -> str:
    return "" if is_older(row) else interval_text(row.difference_low, row.difference_high)


def _difference(row: Row) -> str:
    return _two_lines(score_text(row.difference, sign="+"), _difference_interval(row))


def _kept(row: Row) -> str:
    is_own = row.method == FULL or row.not_exercised
    return "" if is_own or row.retention is None else f"{100 * row.retention:.0f} %"


def _retention(row: Row) -> str:
    kept = _kept(row)
    if not kept or row.retention_low is None or row.retention_high is None:
        return kept
    return f"{kept} [{100 * row.retention_low:.0f}, {100 * row.retention_high:.0f}]"


def no_retention(rows: Sequence[Row]) -> str:
    """Why no row has a share of ``full``'s score; empty where one has, and where nobody would look for it."""
    full = next((row for row in rows if row.method == FULL), None)
    if full is None or full.of_full is not None or not full.higher_is_better or full.retention is not None:
        return ""
    if full.metric_low:
        return f"no retention: the score begins at {score_text(full.metric_low)}, so that shares of it say nothing"
    if full.chance is None:
        return f"no retention: full itself scores {score_text(full.score)}, next to nothing that could be kept"
    return f"no retention: full itself scores {score_text(full.score)}, next to what guessing does"


RUN = Column("run", lambda row: row.run or "", left=True, needed=True)
"""Stands where rows of several runs do."""
BUDGET = Column("budget", budget_cell, needed=True)
AGAINST_FULL = Column("against full", _against_full, left=True)
RETENTION = Column("score kept", _retention)
"""Stands where a row has one, see :func:`for_rows`; likewise the next two."""
STATES = Column("O/Q/E %", _states)
TTFT = Column("TTFT s", lambda row: seconds_text(row.ttft_ms))
TPOT = Column("TPOT ms", lambda row: milliseconds_text(row.tpot_ms))

EVERYTHING = (
    BUDGET,
    Column("method", lambda row: row.method, left=True),
    Column("format", lambda row: row.quant_format or ""),
    Column("score", lambda row: score_text(row.score)),
    Column("95 % interval", lambda row: interval_text(row.score_low, row.score_high)),
    Column("Δ vs full", lambda row: score_text(row.difference, sign="+")),
    Column("95 % interval", _difference_interval),
    AGAINST_FULL,
    RETENTION,
    Column("KV bytes", _bytes),
    Column("KV of full", _share),
    STATES,
    TTFT,
    TPOT,
)
"""One line per row, for Markdown and wide terminals."""

KEPT = Column("score kept", _kept)
NARROWER = tuple(KEPT if column is RETENTION else column for column in EVERYTHING)
"""One line per row, without the interval of retention."""

METHOD = Column("method", _method, left=True, needed=True)
SCORE = Column("score", _score, needed=True)
P = Column("p", lambda row: "" if (p := adjusted(row)) is None else p_text(p))
P_RETENTION = Column("p\nkept", lambda row: _two_lines(P.cell(row), _kept(row)))
"""In the place of the p alone: 80 columns have no room for the interval of retention."""
DIFFERENCE = Column("Δ vs full", _difference, needed=True)
SHARE = Column("KV\nof full", lambda row: _two_lines(_share(row), _bytes(row)), needed=True)

STACKED = (
    BUDGET,
    METHOD,
    SCORE,
    DIFFERENCE,
    P_RETENTION,
    SHARE,
    STATES,
    Column("TTFT s\nTPOT ms", lambda row: _two_lines(TTFT.cell(row), TPOT.cell(row))),
)
"""The same within 80 columns: intervals below their numbers, the format below the method, p in the place of words."""

SHORT = (
    BUDGET,
    Column("method", lambda row: with_format(row.method, row.quant_format), left=True, needed=True),
    Column("score", lambda row: score_text(row.score), needed=True),
    Column("95 % interval", lambda row: interval_text(row.score_low, row.score_high)),
    Column("against full", _briefly, left=True, needed=True),
    Column("KV of full", _share, needed=True),
    TTFT,
    TPOT,
)
"""One line per row within 80 columns: what a first look needs."""
SHORTER = tuple(column for column in SHORT if column.header != "95 % interval")
"""Where names are long."""

LEGEND = (
    "[ , ]: 95 % interval over documents. Δ vs full: paired difference to the full cache on the same documents; its "
    f"interval and p hold for all rows together, and with 0 in the one, or from {ALPHA:.2f} on in the other, the two "
    "are tied: so many documents do not tell which is better, or whether either is.",
    "score kept (retention): score over that of full on the same documents, with a 95 % interval of each row alone; "
    "empty where that says nothing of what was kept.",
    "KV of full: all bytes that the cache stores in the end, scales, positions and scores of tokens included, over the "
    "keys and values that a full one stores then, question and answer included (a budget is a share of the prompt's "
    "alone); in brackets what it would be if a method that only masks tokens of single heads stored each head by "
    "itself. O/Q/E: tokens that ended Original, Quantized, Evicted.",
    "TTFT: prefill, compression and the first token; TPOT: every later token; full is a stock cache, and how much of a "
    "gain on it is the kernel's, arkv-bench speed tells.",
)
"""What the columns mean; what the times are of stands behind it."""
SHORT_LEGEND = (
    "against full: the difference to the full cache on the same documents; tied: so many documents show none.",
    "KV of full: all bytes that the cache holds in the end, of those that a full one holds then.",
    "TTFT: seconds to the first token, prefill and compression included; TPOT: milliseconds per later token.",
)
"""What the columns of :data:`SHORT` mean."""


def for_rows(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """The columns that these rows fill: the run where they are of several, retention where any has one."""
    shown = list(columns)
    if not any(map(_kept, rows)):
        shown = [P if column is P_RETENTION else column for column in columns if column not in (RETENTION, KEPT)]
    return [RUN, *shown] if any(row.run for row in rows) else shown
