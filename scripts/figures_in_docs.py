"""What README.md and pages under docs/ say in numbers, made of the records under results/: ``make docs`` writes it, a
test compares it."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, median

from bench.judge.verdict import ALPHA
from bench.names import FULL, FUSED, RECORD, own_name
from bench.records.files.csv_ import read_cells
from bench.records.files.markdown import markdown_table
from bench.records.row import Row, read_results
from bench.records.timing import read_timings
from bench.report.columns import adjusted

RESULTS = Path(__file__).resolve().parent.parent / "results"
WIDTH = 120
BEGIN, END = "<!-- Written by make docs: {} -->\n", "\n<!-- until here. -->"

WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def with_numbers(page: str, path: str) -> str:
    """A page with every block of numbers as the records have it.

    Args:
        path: of the page, one of :data:`PAGES`.

    Raises:
        SystemExit: a block has no place in it.
    """
    for name, block in PAGES[path].items():
        before, begin, rest = page.partition(BEGIN.format(name))
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise SystemExit(f"{path} has no place for the numbers called {name}")
        page = before + begin + block() + end + after
    return page


def _rows(folder: str, metric: str) -> list[Row]:
    return [row for row in read_results(RESULTS / folder) if row.metric == metric]


def _the(rows: Iterable[Row], method: str, ratio: float | None = None) -> Row:
    """The one row of a method and budget."""
    (found,) = [row for row in rows if row.method == method and row.cache_ratio == ratio]
    return found


def _count(row: Row) -> int:
    """Documents that were right."""
    return round(row.score * row.n)


def _word(number: int) -> str:
    return WORDS[number] if number < len(WORDS) else str(number)


def _percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def _paragraph(text: str) -> str:
    """In lines of the page's width, none broken within code or a link."""
    kept = re.sub(r"`[^`]*`", lambda found: found[0].replace(" ", "\0"), " ".join(text.split()))
    return textwrap.fill(kept, WIDTH, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def _method(row: Row) -> str:
    return " ".join(filter(None, (row.method, row.quant_format)))


def figure() -> str:
    """The figure on top, with what it shows."""
    rows = _rows("demo", "exact_match")
    ratio = _least(rows)
    found = {row.method: _count(row) for row in _at(rows, ratio)}
    n = rows[0].n
    said = {
        count: [name for name in found if found[name] == count] for count in sorted({*found.values()}, reverse=True)
    }
    parts = [f"{' and '.join(names)} {'all' if count == n else _word(count)}" for count, names in said.items()]
    alt = f"Passkeys found against true KV bytes, {_word(n)} asked for, at {_percent(ratio, 0)} of the bytes"
    alt = f"{alt}: {', '.join(parts)}"
    caption = _paragraph(
        f"*{_word(n).capitalize()} passkeys in prompts of {_length(rows):,} tokens, asked for after compression, "
        "SmolLM2-135M-Instruct, with 95 % intervals; `results/demo` has the record.*"
    )
    return f"![{alt}](../results/demo/needle.png)\n\n{caption}"


def _least(rows: Iterable[Row]) -> float:
    """The smallest budget."""
    return min(row.cache_ratio for row in rows if row.cache_ratio is not None)


def _length(rows: Sequence[Row]) -> int:
    """What was asked for, to the nearest hundred: prompts are a little shorter."""
    return 100 * round((rows[0].prompt_tokens or 0.0) / 100)


def demo() -> str:
    """The table of the preset demo, and what follows from it."""
    rows = _rows("demo", "exact_match")
    headers = ["budget (bytes)", "method", "exact match", "95 % interval", "KV of full"]
    headers += ["Original / Quantized / Evicted", "TTFT s", "ms per token"]
    lines = []
    for row in sorted(rows, key=lambda row: -(row.cache_ratio or 1.0)):
        full = row.method == FULL
        shares = (row.original_share, row.quantized_share, row.evicted_share)
        lines.append(
            [
                "" if full else _percent(row.cache_ratio, 1).replace(".0 ", " "),
                _method(row),
                f"{row.score:.2f}",
                f"{row.score_low:.2f} to {row.score_high:.2f}",
                f"{(row.kv_bytes_mean or 0.0) / 1e6:.1f} MB" if full else _percent(row.kv_share_of_prompt),
                f"{' / '.join(f'{100 * (share or 0.0):.0f}' for share in shares)} %",
                f"{(row.ttft_ms or 0.0) / 1000:.1f}",
                f"{row.tpot_ms:.0f}",
            ]
        )
    n, more, ratio = rows[0].n, _rows("needle", "exact_match"), _least(rows)
    mix, origin = _the(more, "mix", 0.25), _the(more, "origin", 0.25)
    half = max(row.cache_ratio or 0.0 for row in rows)
    least, most, newest = _the(rows, "mix", ratio), _the(rows, "origin", half), _the(rows, "window", half)
    told = [_method(row) for row in _at(rows, ratio) if (p := adjusted(row)) is not None and p < ALPHA]
    apart = all((row.p_to_best or 0.0) < ALPHA for row in rows if row.method == "origin")
    threads = json.loads((RESULTS / "demo" / RECORD).read_text(encoding="utf-8"))["hardware"]["torch_threads"]
    return "\n".join(
        [
            _paragraph(
                f"""SmolLM2-135M-Instruct (bfloat16, CPU, {_word(threads)} thread{"s" if threads > 1 else ""}; its
                weights are those of a Q4_1 file, dequantized), {_word(n)} passkey prompts of {_length(rows):,} tokens,
                asked after compression, at equal true bytes; KV of full is of the context's
                bytes:"""
            ),
            "",
            *markdown_table(headers, lines, right=[0, *range(2, len(headers))]),
            "",
            _paragraph(
                f"""Eviction without knowing the question loses the number: with {_percent(most.cache_ratio, 0)} of the
                bytes `origin` finds {_count(most)} of {n}, and `window` those that are near the end
                ({_count(newest)}). With {_percent(ratio, 0)}, spent on quantized tokens, `mix` finds {_count(least)}.
                So many prompts tell {_listed(told)} from the full cache at {_percent(ratio, 0)}, and `origin`
                {"from the best method at each budget" if apart else "from the best method at some budgets only"}
                (`results/demo`). Where methods have seen the question, as a part of
                the prompt, eviction loses less: of {mix.n} such prompts, `mix` answers {_count(mix)} with a quarter of
                the bytes, `origin` {_count(origin)} (`results/needle`)."""
            ),
        ]
    )


def _listed(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return " and ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]])) if quoted else "no row"


TEXTS = {"news": "fidelity/multi_news", "article paragraphs": "fidelity/musique"}


def fidelity() -> str:
    """Divergence of each method on two texts, each row at the bytes that it took."""
    found: dict[tuple[str, float | None], dict[str, Row]] = {}
    for text, folder in TEXTS.items():
        for row in _rows(folder, "kl"):
            if row.method != FULL:
                found.setdefault((row.method, row.cache_ratio), {})[text] = row
    taken = {key: fmean(row.kv_share_of_prompt or 0.0 for row in rows.values()) for key, rows in found.items()}
    lines = []
    for key in sorted(found, key=lambda key: -round(taken[key], 3)):
        scores = [found[key][text].score if text in found[key] else None for text in TEXTS]
        known = [score for score in scores if score is not None]
        mean = f"{fmean(known):.3f}" if len(known) == len(TEXTS) else ""
        lines.append([_percent(taken[key]), key[0], *("" if s is None else f"{s:.3f}" for s in scores), mean])
    some = _rows(TEXTS["news"], "kl")[0]
    return "\n".join(
        [
            _paragraph(
                f"""How far each method's next-token distributions are from the full cache's, over 64 tokens decoded
                behind {some.prompt_tokens:,.0f} (`--tasks fidelity`, mean KL divergence of {some.n} prompts of each
                text, `results/fidelity`). Presses of kvpress were given a quarter and an eighth as the others were;
                they evict at prefill only, so what is read on comes on top, and each row stands at what it took:"""
            ),
            "",
            *markdown_table(["bytes of the prompt's", "method", *TEXTS, "mean"], lines, right=[0, 2, 3, 4]),
        ]
    )


def tuning() -> str:
    """What defaults were chosen by."""
    kl: dict[tuple[str, str], list[float]] = {}
    file = RESULTS / "tuning" / "fidelity.csv"
    for _, cells in read_cells(file, ["variant", "cache_ratio", "kl"], "scripts of an older suite wrote it"):
        kl.setdefault((cells["variant"], cells["cache_ratio"]), []).append(float(cells["kl"]))
    prompts = len(kl["mix", "0.25"])

    def both(variant: str) -> str:
        return " and ".join(f"{fmean(kl[variant, ratio]):.{digits}f}" for ratio, digits in (("0.25", 4), ("0.125", 3)))

    better = [
        max(fmean(kl["mix", ratio]) - fmean(values) for (name, of), values in kl.items() if of == ratio)
        for ratio in ("0.25", "0.125")
    ]
    equal, published = both('mix:layer_budgets="equal"'), both('mix:importance="mean_var"')
    short, int8 = both("mix:query_span=1"), both('mix:quant_format="int8"')
    return _paragraph(
        f"""An empty cell was not measured. All of these methods on the default text, with the needle, the bytes and the
        intervals, stand in `results/peers`. Prompts differ a lot, and means hang on a few of them; the tables have the
        intervals. Defaults were chosen on other texts, the default text among them, to follow a text that goes on as it
        was; `results/tuning` varies each alone (the same as a run: `--preset tuning`). In a quarter and an eighth of
        the bytes their KL is {both("mix")} there; with equal bytes for all layers {equal}, with the published
        importance {published}, without the longer span of queries {short}, with `int8` {int8}. Some others come out
        better on those {_word(prompts)} prompts, by up to {better[0]:.4f} and {better[1]:.3f}."""
    )


def more() -> str:
    """A question at the end, LongBench, speed."""
    # The span was asked for by name there, and the default stands beside it.
    spanned = max(_at(_rows("needle-query-span-1", "exact_match"), 0.125), key=_count)
    news, code = _rows("retention/multi_news", "rouge"), _rows("retention/lcc", "code_sim")

    def kept(rows: Sequence[Row], method: str) -> str:
        return f"{100 * _the(rows, method, 0.25).score / _the(rows, FULL).score:.0f} %"

    p_values = [adjusted(_the(rows, "mix", 0.25)) for rows in (news, code)]
    told = sum(p is not None and p < ALPHA for p in p_values)
    where = ("on neither", "on one of them", "on both")[told]

    return "\n\n".join(
        [
            _paragraph(
                f"""For a question at the end of a prompt, `--query-span 1` lets only the newest tokens decide what is
                kept: then `mix` finds {_count(spanned)} of {spanned.n} passkeys in an eighth of the bytes
                (`results/needle-query-span-1`)."""
            ),
            _paragraph(
                f"""On LongBench rows that fit 4,000 tokens uncut, at a quarter of the bytes, `mix` keeps
                {kept(news, "mix")} of the full cache's score on {news[0].n} news summaries (`origin`
                {kept(news, "origin")}) and {kept(code, "mix")} on {code[0].n} code completions (`origin`
                {kept(code, "origin")}); `mix` is told from the full cache {where} (`results/retention`). So few rows
                hang on single tokens: with one thread instead of two, sums are rounded otherwise, and even the full
                cache's answers change. `results/longbench` is all 21 datasets, two rows of each, run to the end:
                scores of so few rows say nothing."""
            ),
            _paragraph(_speed()),
        ]
    )


def _at(rows: Iterable[Row], ratio: float) -> list[Row]:
    return [row for row in rows if row.cache_ratio == ratio]


def _speed() -> str:
    """Medians of what decoding and compression took."""

    def of(folder: str, length: int, column: str) -> dict[tuple[str, float | None], float]:
        found: dict[tuple[str, float | None], list[float]] = {}
        for timing in read_timings(RESULTS / "speed" / folder / "speed.csv"):
            value = getattr(timing, column)
            if timing.context_length == length and value is not None:
                found.setdefault((timing.method, timing.cache_ratio), []).append(value)
        return {row: median(values) for row, values in found.items()}

    def said(times: dict[tuple[str, float | None], float]) -> str:
        full, fused = times[FULL, None], times[FUSED, None]
        parts = [f"the stock full cache {full:,.0f} ms, the full cache read by the suite's own kernel {fused:.0f}"]
        parts += [
            f"`{method}` at {share} {times[method, ratio]:.0f}"
            for method in ("origin", "mix")
            for ratio, share in ((0.25, "a quarter"), (0.125, "an eighth"))
        ]
        return ", ".join(parts)

    many, one = of("batch16", 4000, "tpot_ms"), of("batch1", 7900, "tpot_ms")
    fused = many[FUSED, None]
    prefill, compress = (of("batch1", 7900, column) for column in ("prefill_s", "compress_s"))
    taken = 100 * compress["mix", 0.25] / prefill[FULL, None]
    return f"""A step of 16 sequences behind 4,000 tokens takes {said(many)}: with a quarter of the bytes `mix` has
        {fused / many["mix", 0.25]:.1f} times the tokens per second of the full cache in the same kernel, with an eighth
        {fused / many["mix", 0.125]:.1f} times, and most of what it gains on the stock cache is the kernel's. A single
        sequence behind 7,900: {said(one)}. Compression takes {taken:.1f} % of a prefill of so many tokens
        (`results/speed`, SmolLM2-135M in bfloat16 and `k4v3`, two cores, medians of five)."""


def coverage() -> str:
    """How often all intervals of simulated tables hold, and what is claimed to be detectable is found."""
    folder = RESULTS / "statistics"
    remedy = "scripts/coverage.py writes it anew"
    held: dict[tuple[str, str], dict[str, float]] = {}
    tables = set()
    for _, cells in read_cells(folder / "coverage.csv", ["scores", "documents", "rows", "held", "tables"], remedy):
        held.setdefault((cells["scores"], cells["rows"]), {})[cells["documents"]] = float(cells["held"])
        tables.add(int(cells["tables"]))
    counts = list(next(iter(held.values())))
    error = 100 * math.sqrt(0.95 * 0.05 / min(tables))
    headers = ["scores", "rows", *(f"n={count}" for count in counts)]
    lines = [[*key, *(f"{100 * found[count]:.1f}" for count in counts)] for key, found in held.items()]
    attained: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    told: dict[tuple[str, str], list[float]] = {}
    few = 0
    needed = ["full", "method", "documents", "rows", "design", "held", "told", "tables"]
    for _, cells in read_cells(folder / "attainable.csv", needed, remedy):
        truth = f"{float(cells['full']):.0%} and {float(cells['method']):.0%}" if cells["full"] else "drawn"
        column, few = (cells["documents"], cells["design"]), int(cells["tables"])
        attained.setdefault((truth.replace("%", " %"), cells["rows"]), {})[column] = float(cells["held"])
        if cells["full"] != cells["method"]:
            told.setdefault(column, []).append(float(cells["told"]))
    columns = list(next(iter(attained.values())))
    attainable = [[*key, *(f"{100 * found[column]:.1f}" for column in columns)] for key, found in attained.items()]
    lowest = [min(found[column] for found in attained.values()) for column in columns]
    attainable.append(["lowest of these", "", *(f"{100 * share:.1f}" for share in lowest)])
    attainable.append(["rows told from full", "", *(f"{100 * fmean(told[column]):.1f}" for column in columns)])
    others: dict[tuple[str, str, str], dict[str, float]] = {}
    for _, cells in read_cells(folder / "designs.csv", ["scores", "documents", "rows", "design", "held"], remedy):
        key = cells["scores"], cells["documents"], cells["rows"]
        others.setdefault(key, {})[cells["design"]] = float(cells["held"])
    ways = list(next(iter(others.values())))
    judged = [[*key, *(f"{100 * found[way]:.1f}" for way in ways)] for key, found in others.items()]
    power: dict[tuple[str, str, str], dict[str, str]] = {}
    for _, cells in read_cells(folder / "power.csv", ["scores", "documents", "rows", "direction", "power"], remedy):
        share = cells["power"] and f"{100 * float(cells['power']):.0f}"
        key = cells["scores"], cells["rows"], "rise" if cells["direction"] == "1" else "fall"
        power.setdefault(key, {})[cells["documents"]] = share
    powers = [[*key, *(found[count] or "none" for count in counts)] for key, found in power.items()]
    within = [value for found in held.values() for value in found.values()]
    return "\n".join(
        [
            _paragraph(
                f"""Percent of {min(tables):,} simulated tables in which *every* interval of a difference to `full`
                holds the true one, by what the scores are like, the rows of the table and the documents
                (`scripts/coverage.py`, `results/statistics`). Asked are 95; the error of each share is about
                {error:.0f}. The lowest is {100 * min(within):.1f}; where few documents say little, intervals are
                rather too wide:"""
            ),
            "",
            *markdown_table(headers, lines, right=range(1, len(headers))),
            "",
            _paragraph(
                f"""Of few right and wrong answers no interval holds in 95 % of the tables *whatever is true*, since
                few counts are possible. The same of {few} tables by what the full cache and the methods truly get
                right, with 8 and 20 documents, of four ways to judge them: *counted*, which tables use, mid-p of what
                was counted, at a level that turned signs give; the same at the level of a normal distribution with the
                rows' correlation; *score*, Tango's intervals at that level; and these with ends 0.9 as many standard
                errors away. *Drawn* are truths that differ from table to table, of the full cache from 50 to 100 %, of
                each method from a fifth to all of these: what is to be expected of tables whose truth is not known.
                The last line is the mean share of rows that are told from `full`, of truths in which they differ from
                it:"""
            ),
            "",
            *markdown_table(
                ["full and methods", "rows", *(f"n={n}, {design}" for n, design in columns)],
                attainable,
                right=range(1, len(columns) + 2),
            ),
            "",
            _paragraph(
                """Other scores of 8 documents, as they are judged, and by the bootstrap-t with Student's ends where
                these are further out, whatever the scores are like: at the level that resamples give, and at that of
                independent rows:"""
            ),
            "",
            *markdown_table(["scores", "n", "rows", *ways], judged, right=range(1, len(ways) + 3)),
            "",
            _paragraph(
                """Percent of simulated runs in which the smallest difference that a table states is found; asked are
                80. Right and wrong are of as many unrelated rows; of other scores the documents are typical of their
                shape: of single random samples it is found less often. None is stated of fewer than 30 documents with
                skewed scores:"""
            ),
            "",
            *markdown_table(["scores", "rows", "true", *headers[2:]], powers, right=[1, *range(3, len(headers) + 1)]),
        ]
    )


def snapkv() -> str:
    """What SnapKV finds, in the suite and in kvpress' own pipeline."""
    found: dict[str, list[tuple[float, str]]] = {}
    file = RESULTS / "snapkv" / "snapkv.csv"
    for _, cells in read_cells(file, ["variant", "right", "heads_with_number"], "scripts/snapkv.py writes it anew"):
        found.setdefault(cells["variant"], []).append((float(cells["right"]), cells["heads_with_number"]))
    lines = []
    for variant, answers in found.items():
        heads = [float(text) for _, text in answers if text]
        right = f"{sum(score for score, _ in answers):.0f} of {len(answers)}"
        lines.append([variant, right, _percent(fmean(heads), 0) if heads else ""])
    return "\n".join(markdown_table(["", "passkeys", "heads that hold the whole number"], lines, right=[1, 2]))


def simulated() -> str:
    """What variants of a compressed context keep, in the simulation."""
    found: dict[str, dict[float, dict[str, str]]] = {}
    names = ["variant", "ratio", "answers", "right", "nll", "kl", "held"]
    for _, cells in read_cells(RESULTS / "quality" / "simulated" / "simulated.csv", names, "scripts/simulate.py"):
        found.setdefault(cells["variant"], {})[float(cells["ratio"])] = cells
    record = json.loads((RESULTS / "quality" / "simulated" / RECORD).read_text(encoding="utf-8"))["settings"]
    whole = found.pop(FULL)[1.0]
    ratios = sorted(found["base"], reverse=True)
    lines = [
        [name, *(rows.get(ratio, {}).get(cell, "") for ratio in ratios for cell in ("right", "kl"))]
        for name, rows in found.items()
    ]
    heads = ["", *(head for ratio in ratios for head in (f"right at {_percent(ratio, 1)}", "KL"))]
    said = _paragraph(
        f"""{record["model"]}, {record["contexts"]} contexts of RULER's `niah_multikey_2` up to {record["length"]:,}
        tokens, {whole["answers"]} answers asked after compression, of which the full cache has {whole["right"]} right;
        shares of the full cache's bytes (`results/quality/simulated`):"""
    )
    table = markdown_table(heads, lines, right=range(1, len(heads)))
    return "\n".join([said, "", *table])


EXAM = "exam/qwen2.5-coder-0.5b-1024"
ASKED = {"ruler:niah_multikey_2": "one of many keyed numbers", "ruler:vt": "variables of one value"}
"""The tasks of the exam in a few words."""


def exam_figure() -> str:
    """The figure on top: the exam's score against true bytes."""
    rows = [row for row in _rows(EXAM, "string_match") if row.part_of]
    n, ratio = rows[0].n, _least(rows)
    (task,) = [row.task for row in rows if row.method == FULL and "niah" in row.task]
    found = [row for row in _within(rows, ratio) if row.task == task]
    said = ", ".join(f"{row.method} {row.score:.0f}" for row in sorted(found, key=lambda row: -row.score))
    alt = f"Score of {ASKED[own_name(task)]} against true KV bytes; in {ratio:.3g} of the bytes: {said}"
    caption = _paragraph(
        f"""*{ASKED[own_name(task)].capitalize()} in a text of up to {_asked_length(EXAM):,} tokens, asked for after
        compression: RULER's `{own_name(task).partition(":")[2]}`, {n} documents, {_model(EXAM)}, with 95 % intervals;
        `results/{EXAM}` has the record.*"""
    )
    return f"![{alt}](results/{EXAM}/score.png)\n\n{caption}"


def _model(folder: str) -> str:
    """The model of a run, and what it computed in."""
    record = json.loads((RESULTS / folder / RECORD).read_text(encoding="utf-8"))
    ((name, about),) = record["models"].items()
    return f"{name} ({about['dtype']}, CPU)"


def _asked_length(folder: str) -> int:
    """Tokens of the prompts of a run, as they were asked for."""
    record = json.loads((RESULTS / folder / RECORD).read_text(encoding="utf-8"))
    (length,) = record["settings"]["lengths"]
    return int(length)


def exam() -> str:
    """What each method keeps of the exam, with the question behind the compressed context."""
    rows = [row for row in _rows(EXAM, "string_match") if row.part_of]
    ratios = sorted({row.cache_ratio for row in rows if row.cache_ratio is not None}, reverse=True)
    tasks = list(dict.fromkeys(row.task for row in rows))
    cells = {(row.method, row.task, row.cache_ratio): row for row in rows}
    methods = list(dict.fromkeys(row.method for row in rows))
    heads = [
        "method",
        *(f"{own_name(task).partition(':')[2]}, {100 * ratio:g} %" for task in tasks for ratio in ratios),
    ]
    heads += [f"bytes held at {100 * ratios[-1]:g} %", "TTFT s"]
    lines = []
    for method in methods:
        # The full cache has no budget: its score stands at each.
        mine = [cells.get((method, task, None if method == FULL else ratio)) for task in tasks for ratio in ratios]
        there = [row for row in mine if row is not None]
        least = [row for row in there if row.cache_ratio in (None, ratios[-1])]
        held = _percent(fmean(row.kv_share_of_prompt or 0.0 for row in least))
        if ragged := [row.ragged_share for row in least if row.ragged_share is not None]:
            held += f" ({_percent(fmean(ragged))})"
        times = [row.ttft_ms / 1000 for row in there if row.ttft_ms is not None]
        lines.append([method, *map(_interval, mine), held, f"{fmean(times):.1f}" if times else ""])
    threads = json.loads((RESULTS / EXAM / RECORD).read_text(encoding="utf-8"))["starts"][0]["hardware"][
        "torch_threads"
    ]
    said = _paragraph(
        f"""RULER at {_asked_length(EXAM):,} tokens, the question read through what was left of the context,
        {_model(EXAM)}, {rows[0].n} documents of each task, score in percent with 95 % interval, by shares of the
        context's bytes. A press that masks tokens of single heads still stores them: a column has the bytes that were
        truly held in the end, of those of the context, and in brackets what they would be if every head were stored by
        itself. TTFT with {_word(threads)} thread{"s" if threads > 1 else ""}."""
    )
    return "\n".join(
        [said, "", *markdown_table(heads, lines, right=range(1, len(heads))), "", _paragraph(_best_of_exam(rows))]
    )


def _best_of_exam(rows: Sequence[Row]) -> str:
    """At the smallest budget, the best method and the next one of those that hold no more bytes than that."""
    ratio = _least(rows)
    said = []
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        best, second = sorted(_within(mine, ratio), key=lambda row: -row.score)[:2]
        full = next(row.score for row in mine if row.method == FULL)
        said.append(
            f"`{best.method}` scores {best.score:g} where the full cache has {full:g}, and the next best method "
            f"{second.score:g} ({ASKED[own_name(task)]})"
        )
        masked = [row for row in _at(mine, ratio) if row.ragged_share is not None and row.score >= best.score]
        said += [f"`{row.method}` has {row.score:g} at the {_percent(row.ragged_share)} in brackets" for row in masked]
    return f"Of methods that hold no more than {100 * ratio:g} % of the bytes, {'; '.join(said)}."


def _within(rows: Sequence[Row], ratio: float) -> list[Row]:
    """Those of a budget that hold no more than it says."""
    return [row for row in _at(rows, ratio) if (row.kv_share_of_prompt or 1.0) <= 1.05 * ratio]


def _interval(row: Row | None) -> str:
    if row is None:
        return ""
    known = row.score_low is not None and row.score_high is not None
    score = f"{round(row.score, 1):g}"
    return f"{score} [{row.score_low:.0f}, {row.score_high:.0f}]" if known else score


REREADING = "quality/rereading"


def rereading() -> str:
    """What mix-replay is made of, apart and together."""
    rows = [row for row in _rows(REREADING, "string_match") if row.part_of]
    ratios = sorted({row.cache_ratio for row in rows if row.cache_ratio is not None}, reverse=True)
    cells = {(row.method, row.task, row.cache_ratio): row for row in rows}
    tasks = list(dict.fromkeys(row.task for row in rows))
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        places = [(task, None if method == FULL else ratio) for task in tasks for ratio in ratios]
        lines.append([method, *(_interval(cells.get((method, *place))) for place in places)])
    heads = ["", *(f"{own_name(task).partition(':')[2]}, {100 * ratio:g} %" for task in tasks for ratio in ratios)]
    said = _paragraph(
        f"""{_model(REREADING)}, RULER of up to {_asked_length(REREADING):,} tokens asked after compression,
        {rows[0].n} documents of each task, score in percent with 95 % interval (`results/{REREADING}`):"""
    )
    return "\n".join([said, "", *markdown_table(heads, lines, right=range(1, len(heads)))])


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"exam figure": exam_figure, "exam": exam},
    "docs/results.md": {"figure": figure, "demo": demo, "fidelity": fidelity, "tuning": tuning, "more": more},
    "docs/reading.md": {"coverage": coverage, "snapkv": snapkv},
    "docs/negative.md": {"rereading": rereading, "simulated": simulated},
}
"""By page what stands between the marks of each name."""
