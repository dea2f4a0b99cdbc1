"""docs/results.md: the demo, fidelity, tuning, and what else was measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from bench.judge.verdict import ALPHA
from bench.names import FULL, FUSED
from bench.records.files.csv_ import read_cells
from bench.records.files.markdown import markdown_table
from bench.records.files.numbers import seconds_text
from bench.records.finished import read_runs
from bench.records.row import Row
from bench.records.timing import read_timings
from bench.report.columns import adjusted
from scripts.figures_in_docs.common import (
    RESULTS,
    check_said,
    count_right,
    in_words,
    known,
    least_budget,
    listed,
    method_said,
    paragraph,
    percent,
    rows_at,
    rows_of,
    settings_of,
    the_row,
    threads_of,
)


def figure() -> str:
    """The figure on top, with what it shows."""
    rows = drawn()
    ratio = least_budget(rows)
    found = {row.method: count_right(row) for row in rows_at(rows, ratio)}
    n = rows[0].n
    said = {
        count: [name for name in found if found[name] == count] for count in sorted({*found.values()}, reverse=True)
    }
    parts = [f"{' and '.join(names)} {'all' if count == n else in_words(count)}" for count, names in said.items()]
    alt = f"Passkeys found against true KV bytes, {in_words(n)} asked for, at {percent(ratio, 0)} of the bytes"
    alt = f"{alt}: {', '.join(parts)}"
    caption = paragraph(
        f"*{in_words(n).capitalize()} passkeys in prompts of {_length(rows):,} tokens, asked for after compression, "
        "SmolLM2-135M-Instruct, with 95 % intervals; `results/demo` has the record.*"
    )
    return f"![{alt}](../results/demo/needle.png)\n\n{caption}"


def drawn() -> list[Row]:
    """What the figure on top shows."""
    return rows_of("demo", "exact_match")


def _length(rows: Sequence[Row]) -> int:
    """What was asked for, to the nearest hundred: prompts are a little shorter."""
    return 100 * round(known(rows[0].prompt_tokens, "tokens of the demo's prompts") / 100)


def demo() -> str:
    """The table of the preset demo, and what follows from it."""
    rows = drawn()
    headers = ["budget (bytes)", "method", "exact match", "95 % interval", "bytes held"]
    headers += ["Original / Quantized / Evicted", "TTFT s", "ms per token"]
    (run,) = read_runs([RESULTS / "demo"])
    per_token: dict[str, list[float]] = {}
    for sample in run.samples.values():
        if sample.tpot_ms is not None:
            per_token.setdefault(sample.cell, []).append(sample.tpot_ms)
    ordered = sorted(rows, key=lambda row: 1.0 if row.cache_ratio is None else row.cache_ratio, reverse=True)
    lines = [_demo_line(row, per_token.get(row.cell, [])) for row in ordered]
    said = paragraph(
        f"""SmolLM2-135M-Instruct (bfloat16, CPU, {threads_of("demo")}; its weights are those of a Q4_1 file,
        dequantized), {in_words(rows[0].n)} passkey prompts of {_length(rows):,} tokens, asked after compression, at
        equal true bytes; held are the true bytes in the end, of the context's; times are medians over the prompts:"""
    )
    table = markdown_table(headers, lines, right=[0, *range(2, len(headers))])
    return "\n".join([said, "", *table, "", paragraph(_of_demo(rows))])


def _demo_line(row: Row, times: Sequence[float]) -> list[str]:
    """A line of the demo's table. ``times`` are ms per token, of each prompt."""
    is_full = row.method == FULL
    known_bytes = f"{row.kv_bytes_mean / 1e6:.1f} MB" if row.kv_bytes_mean is not None else ""
    shares = [row.original_share, row.quantized_share, row.evicted_share]
    said = [f"{100 * share:.0f}" for share in shares if share is not None]
    return [
        "" if is_full else percent(row.cache_ratio, 1).replace(".0 ", " "),
        method_said(row),
        f"{row.score:.2f}",
        f"{row.score_low:.2f} to {row.score_high:.2f}",
        known_bytes if is_full else percent(row.kv_share_of_prompt),
        f"{' / '.join(said)} %" if len(said) == len(shares) else "",
        seconds_text(row.ttft_ms),
        f"{median(times):.0f}" if times else "",
    ]


def _of_demo(rows: Sequence[Row]) -> str:
    """What the demo shows, beside the prompts that ask before compression."""
    n, asked_before, ratio = rows[0].n, rows_of("needle", "exact_match"), least_budget(rows)
    half = max(row.cache_ratio for row in rows if row.cache_ratio is not None)
    mix, origin = (the_row(asked_before, name, 0.25) for name in ("mix", "origin"))
    least, most, newest = the_row(rows, "mix", ratio), the_row(rows, "origin", half), the_row(rows, "window", half)
    told = [method_said(row) for row in rows_at(rows, ratio) if (p := adjusted(row)) is not None and p < ALPHA]
    apart = all(row.p_to_best is not None and row.p_to_best < ALPHA for row in rows if row.method == "origin")
    check_said("eviction without knowing the question loses the number", most.score < the_row(rows, FULL).score)
    check_said("eviction that has seen the question loses less", origin.score > most.score)
    return f"""Eviction without knowing the question loses the number: with {percent(most.cache_ratio, 0)} of the
        bytes `origin` finds {count_right(most)} of {n}, and `window` those that are near the end
        ({count_right(newest)}). With {percent(ratio, 0)}, spent on quantized tokens, `mix` finds {count_right(least)}.
        So many prompts tell {listed(told)} from the full cache at {percent(ratio, 0)}, and `origin`
        {"from the best method at each budget" if apart else "from the best method at some budgets only"}
        (`results/demo`). Where methods have seen the question, as a part of the prompt, eviction loses less: of {mix.n}
        such prompts, `mix` answers {count_right(mix)} with a quarter of the bytes, `origin` {count_right(origin)}
        (`results/needle`)."""


TEXTS = {"news": "fidelity/multi_news", "article paragraphs": "fidelity/musique"}


def fidelity() -> str:
    """Divergence of each method on two texts, each row at the bytes that it took."""
    found: dict[tuple[str, float | None], dict[str, Row]] = {}
    for text, folder in TEXTS.items():
        for row in rows_of(folder, "kl"):
            if row.method != FULL:
                found.setdefault((row.method, row.cache_ratio), {})[text] = row
    taken = {
        key: fmean(known(row.kv_share_of_prompt, f"bytes of {row.method}") for row in rows.values())
        for key, rows in found.items()
    }
    lines = []
    for key in sorted(found, key=lambda key: -round(taken[key], 3)):
        scores = [found[key][text].score if text in found[key] else None for text in TEXTS]
        measured = [score for score in scores if score is not None]
        mean = f"{fmean(measured):.3f}" if len(measured) == len(TEXTS) else ""
        lines.append([percent(taken[key]), key[0], *("" if s is None else f"{s:.3f}" for s in scores), mean])
    some = rows_of(TEXTS["news"], "kl")[0]
    (decoded,) = {settings_of(folder)["continuation"] for folder in TEXTS.values()}
    return "\n".join(
        [
            paragraph(
                f"""How far each method's next-token distributions are from the full cache's, over {decoded} tokens
                decoded behind {some.prompt_tokens:,.0f} (`--tasks fidelity`, mean KL divergence of {some.n} prompts of
                each text, `results/fidelity`). Presses of kvpress were given a quarter and an eighth as the others
                were; they evict at prefill only, so what is read on comes on top, and each row stands at what it
                took:"""
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
    check_said("some others come out better than `mix` in the tuning", min(better) > 0)
    equal, published = both('mix:layer_budgets="equal"'), both('mix:importance="mean_var"')
    short, int8 = both("mix:query_span=1"), both('mix:quant_format="int8"')
    return paragraph(
        f"""An empty cell was not measured. All of these methods on the default text, with the needle, the bytes and the
        intervals, stand in `results/peers`. Prompts differ a lot, and means hang on a few of them; the tables have the
        intervals. Defaults were chosen on other texts, the default text among them, to follow a text that goes on as it
        was; `results/tuning` varies each alone (the same as a run: `--preset tuning`). In a quarter and an eighth of
        the bytes their KL is {both("mix")} there; with equal bytes for all layers {equal}, with the published
        importance {published}, without the longer span of queries {short}, with `int8` {int8}. Some others come out
        better on those {in_words(prompts)} prompts, by up to {better[0]:.4f} and {better[1]:.3f}."""
    )


def more() -> str:
    """A question at the end, LongBench, speed."""
    # The span was asked for by name there, and the default stands beside it.
    spanned = max(rows_at(rows_of("needle-query-span-1", "exact_match"), 0.125), key=count_right)
    news, code = rows_of("retention/multi_news", "rouge"), rows_of("retention/lcc", "code_sim")

    def kept(rows: Sequence[Row], method: str) -> str:
        return f"{100 * the_row(rows, method, 0.25).score / the_row(rows, FULL).score:.0f} %"

    p_values = [adjusted(the_row(rows, "mix", 0.25)) for rows in (news, code)]
    told = sum(p is not None and p < ALPHA for p in p_values)
    where = ("on neither", "on one of them", "on both")[told]

    return "\n\n".join(
        [
            paragraph(
                f"""For a question at the end of a prompt, `--query-span 1` lets only the newest tokens decide what is
                kept: then `mix` finds {count_right(spanned)} of {spanned.n} passkeys in an eighth of the bytes
                (`results/needle-query-span-1`)."""
            ),
            paragraph(
                f"""On LongBench rows that fit 4,000 tokens uncut, at a quarter of the bytes, `mix` keeps
                {kept(news, "mix")} of the full cache's score on {news[0].n} news summaries (`origin`
                {kept(news, "origin")}) and {kept(code, "mix")} on {code[0].n} code completions (`origin`
                {kept(code, "origin")}); `mix` is told from the full cache {where} (`results/retention`). So few rows
                hang on single tokens: with one thread instead of two, sums are rounded otherwise, and even the full
                cache's answers change. `results/longbench` is all 21 datasets, two rows of each, run to the end:
                scores of so few rows say nothing."""
            ),
            paragraph(_speed()),
        ]
    )


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
    kernels, its_own = many[FULL, None] / fused, fused / many["mix", 0.25]
    check_said("most of what `mix` gains on the stock cache is the kernel's", kernels > its_own)
    prefill, compress = (of("batch1", 7900, column) for column in ("prefill_s", "compress_s"))
    taken = 100 * compress["mix", 0.25] / prefill[FULL, None]
    return f"""A step of 16 sequences behind 4,000 tokens takes {said(many)}: with a quarter of the bytes `mix` has
        {its_own:.1f} times the tokens per second of the full cache in the same kernel, with an eighth
        {fused / many["mix", 0.125]:.1f} times, and most of what it gains on the stock cache is the kernel's. A single
        sequence behind 7,900: {said(one)}. Compression takes {taken:.1f} % of a prefill of so many tokens
        (`results/speed`, SmolLM2-135M in bfloat16 and `k4v3`, two cores, medians of five)."""
