"""docs/negative.md: what was tried beside the methods there are."""

from __future__ import annotations

from bench.names import FULL, own_name
from bench.records.files.csv_ import read_cells
from bench.records.files.markdown import markdown_table
from bench.records.row import Row
from scripts.figures_in_docs.common import (
    RESULTS,
    length_asked,
    model_of,
    paragraph,
    percent,
    rows_of,
    settings_of,
    the_row,
    with_interval,
)

REREADING, HEADS = "quality/rereading", "quality/heads"


def rereading() -> str:
    """What mix-replay is made of, apart and together."""
    rows = [row for row in rows_of(REREADING, "string_match") if row.part_of]
    ratios = sorted({row.cache_ratio for row in rows if row.cache_ratio is not None}, reverse=True)
    cells = {(row.method, row.task, row.cache_ratio): row for row in rows}
    tasks = list(dict.fromkeys(row.task for row in rows))
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        places = [(task, None if method == FULL else ratio) for task in tasks for ratio in ratios]
        lines.append([method, *(with_interval(cells.get((method, *place))) for place in places)])
    heads = ["", *(f"{own_name(task).partition(':')[2]}, {100 * ratio:g} %" for task in tasks for ratio in ratios)]
    said = paragraph(
        f"""{model_of(REREADING)}, RULER of up to {length_asked(REREADING):,} tokens asked after compression,
        {rows[0].n} documents of each task, score in percent with 95 % interval (`results/{REREADING}`):"""
    )
    return "\n".join([said, "", *markdown_table(heads, lines, right=range(1, len(heads)))])


def heads() -> str:
    """Heads of a layer that compete and fewer newest tokens, against even heads and 32."""
    lines, ratios, documents = [], [], []
    folders = [f"{HEADS}/{name}" for name in ("gov_report", "qasper", "qwen2.5-coder-0.5b")]
    (decoded,) = {settings_of(folder)["continuation"] for folder in folders}
    for folder in folders:
        rows = [row for row in rows_of(folder, "kl") if row.method in ("mix", "mix-even")]
        ratios = sorted({row.cache_ratio for row in rows if row.cache_ratio is not None}, reverse=True)
        text = "gov_report" if folder.endswith("0.5b") else folder.rpartition("/")[2]
        line = [f"{model_of(folder)}, {text}, {length_asked(folder):,} tokens"]
        for ratio in ratios:
            mix, even = (the_row(rows, name, ratio) for name in ("mix", "mix-even"))
            line += [f"{mix.score:.2g}", f"{even.score:.2g}", _tied(mix, even)]
        lines.append(line)
        documents.append(rows[0].n)
    heads = ["", *(head for ratio in ratios for head in (f"mix, {100 * ratio:g} %", "even", ""))]
    said = paragraph(
        f"""KL to the full cache over the next {decoded} tokens of {", ".join(map(str, documents))} texts, lower is
        better (`results/{HEADS}`):"""
    )
    return "\n".join([said, "", *markdown_table(heads, lines, right=range(1, len(heads)))])


def _tied(one: Row, other: Row) -> str:
    """Whether one of two is told from the other, which is the best of their budget or not."""
    worse = other if one.to_best is None else one
    return "tied" if worse.leading else "told apart"


def simulated() -> str:
    """What variants of a compressed context keep, in the simulation."""
    found: dict[str, dict[float, dict[str, str]]] = {}
    names = ["variant", "ratio", "answers", "right", "nll", "kl", "held"]
    for _, cells in read_cells(RESULTS / "quality" / "simulated" / "simulated.csv", names, "scripts/simulate.py"):
        found.setdefault(cells["variant"], {})[float(cells["ratio"])] = cells
    settings = settings_of("quality/simulated")
    whole = found.pop(FULL)[1.0]
    ratios = sorted(found["base"], reverse=True)
    lines = [
        [name, *(rows.get(ratio, {}).get(cell, "") for ratio in ratios for cell in ("right", "kl"))]
        for name, rows in found.items()
    ]
    heads = ["", *(head for ratio in ratios for head in (f"right at {percent(ratio, 1)}", "KL"))]
    said = paragraph(
        f"""{settings["model"]}, {settings["contexts"]} contexts of RULER's `niah_multikey_2` up to
        {settings["length"]:,} tokens, {whole["answers"]} answers asked after
        compression, of which the full cache has {whole["right"]} right;
        shares of the full cache's bytes (`results/quality/simulated`):"""
    )
    table = markdown_table(heads, lines, right=range(1, len(heads)))
    return "\n".join([said, "", *table])
