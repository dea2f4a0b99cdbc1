"""What ``arkv-bench inspect`` shows: tables, a states map and the text, in the terminal and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.engine.inspect import Inspection, Word, states_map, words
from bench.records.files.text import printable
from bench.report.figures.layers import states_figure, steps_figure
from bench.report.page import render

SHADES = 10
"""Steps from a word that no head holds to one that all hold."""
MARKS = "·▒█"
"""Evicted, Quantized, Original on a map in the terminal."""
COLOURS = ("bright_black", "dark_orange3", "dodger_blue2")
"""Of the same."""
SHOWN_WORDS = 1200
"""More words are shown in part in the terminal."""
LEFT = ("token", "demoted most", "evicted most")
BROKEN = 10
"""Columns that a cell of these has at least in the terminal: it goes on below."""

Lines = tuple[str, list[str], list[list[str]], list[str]]
"""Title, headers, cells and notes of a table."""


@dataclass(frozen=True)
class Shaded:
    """A word as it is shown, behind the white space that it begins with."""

    space: str
    text: str
    shade: int
    kept: int
    original: int

    @property
    def mostly_original(self) -> bool:
        """Most heads that hold it hold it as Original."""
        return 2 * self.original > self.kept


def shade(word: Word, heads: int) -> int:
    """0 where no head holds the word, else 1 to :data:`SHADES`."""
    return -(-SHADES * word.kept // heads)


def shaded(found: Inspection) -> list[Shaded]:
    """The words of the prompt with their shades."""
    heads = found.states.shape[0] * found.states.shape[1]
    return [
        Shaded(
            space=word.text[: len(word.text) - len(word.text.lstrip())],
            text=word.text.lstrip(),
            shade=shade(word, heads),
            kept=word.kept,
            original=word.original,
        )
        for word in words(found)
    ]


def _number(value: float) -> str:
    return f"{value:.4g}"


def layer_table(found: Inspection) -> Lines:
    """Statistics, budget and states of each layer."""
    counts = [(found.states == code).sum(dim=-1).float().mean(dim=-1).tolist() for code in (2, 1, 0)]
    states = ["Original", "Quantized", "Evicted"]
    meaning = "Original, Quantized, Evicted: tokens of the prompt after compression, means over KV heads"
    if not found.statistics:
        lines = [
            [str(layer), *(f"{column[place]:.1f}" for column in counts)] for place, layer in enumerate(found.layers)
        ]
        return "Layers", ["layer", *states], lines, [meaning]
    headers = [
        *["layer", "entropy", "variance", "kurtosis", "OQ score", "OQ ratio"],
        *["budget", "slots O", "slots Q", *states],
    ]
    lines = [
        [
            str(item.layer),
            *map(_number, (item.entropy, item.variance, item.kurtosis, item.oq_score)),
            f"{item.oq_ratio:.3f}",
            *map(str, (item.budget, item.original_slots, item.quantized_slots)),
            *(f"{column[place]:.1f}" for column in counts),
        ]
        for place, item in enumerate(found.statistics)
    ]
    notes = [
        f"entropy, variance, kurtosis: of the attention of the last {found.window_size} prompt tokens over the others; "
        "OQ ratio: a layer's OQ score over the largest" + ("" if found.uses_oq else "; this method does not use it"),
        f"budget: tokens per KV head at model precision; slots O and Q: what it became beside the window; {meaning}",
    ]
    return "Layers", headers, lines, notes


def step_table(found: Inspection) -> Lines | None:
    """Counts and changes of each decoding step, means over layers and heads; None without steps."""
    if not found.steps:
        return None

    def named(places: Sequence[tuple[int, int]]) -> str:
        return ", ".join(f"{_visible(found.pieces[place])} @{place} x{count}" for place, count in places)

    headers = [
        "step",
        "token",
        "Original",
        "Quantized",
        "Evicted",
        "demoted",
        "evicted",
        "demoted most",
        "evicted most",
    ]
    lines = [
        [
            str(number),
            _visible(step.token),
            *(f"{fmean(part):.1f}" for part in (step.original, step.quantized, step.evicted)),
            *(f"{fmean(part):.2f}" for part in (step.demoted, step.lost)),
            named(step.most_demoted),
            named(step.most_lost),
        ]
        for number, step in enumerate(found.steps, start=1)
    ]
    notes = [
        "means over layers and KV heads after the step; demoted: became Quantized; evicted: became Evicted; "
        "most: token @position xheads"
    ]
    return "Decoding steps", headers, lines, notes


def change_table(found: Inspection) -> Lines | None:
    """What decoding changed in each layer, over all steps; None without steps."""
    if not found.steps:
        return None
    first, last = found.steps[0], found.steps[-1]
    headers = ["layer"]
    headers += [f"{state}, step {step}" for state in ("Original", "Quantized") for step in (1, len(found.steps))]
    headers += ["demoted", "evicted"]
    lines = []
    for place, layer in enumerate(found.layers):
        counts = (first.original, last.original, first.quantized, last.quantized)
        demoted, lost = changes(found)
        lines.append(
            [str(layer), *(f"{part[place]:.1f}" for part in counts), f"{demoted[place]:.1f}", f"{lost[place]:.1f}"]
        )
    return "Decoding, by layer", headers, lines, ["tokens per KV head; demoted and evicted: over all steps"]


def changes(found: Inspection) -> list[list[float]]:
    """Tokens that became Quantized and Evicted over all steps, [2][L], means over heads."""
    return [
        [sum(column) for column in zip(*part, strict=True)]
        for part in ([step.demoted for step in found.steps], [step.lost for step in found.steps])
    ]


def _visible(text: str) -> str:
    return printable(repr(text)[1:-1]) or "''"


# --- The page ---


def to_html(found: Inspection) -> str:
    """One self-contained page."""
    heads = found.states.shape[0] * found.states.shape[1]
    before = states_map(found.states, found.layers)
    figures: list[Any] = [states_figure("prompt", before, "the prompt after compression", window=found.window_size)]
    if found.steps:
        after = states_map(found.final_states, found.layers)
        what = f"all tokens after {len(found.steps)} decoding steps"
        figures.append(states_figure("decoded", after, what, window=found.window_size))
        if (drawn := steps_figure("steps", found.layers, changes(found))) is not None:
            figures.append(drawn)
    tables = [table for table in (layer_table(found), change_table(found), step_table(found)) if table is not None]
    return render(
        "inspect.html.j2",
        f"{found.label}, {found.source}",
        found=found,
        heads=heads,
        words=shaded(found),
        tables=tables,
        left=LEFT,
        figures=figures,
        drawn={figure.name: Markup(figure.inline_svg()) for figure in figures},
    )


# --- The terminal ---


def print_inspection(found: Inspection, console: Console) -> None:
    """Tables, map and text."""
    console.print(Text(f"{found.label}; {found.model}; {found.source}", style="bold"), soft_wrap=True)
    if not found.compressed:
        console.print("The budget holds the whole prompt: nothing was compressed.", style="bold")
    _print_table(layer_table(found), console)
    _print_map(found, console)
    _print_words(found, console)
    if (table := step_table(found)) is not None:
        _print_table(table, console)


def _print_table(table: Lines, console: Console) -> None:
    title, headers, lines, notes = table
    for number, places in enumerate(_fitting(headers, lines, console.width)):
        shown = Table(
            title=None if number else title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
        )
        for place in places:
            left = headers[place] in LEFT
            shown.add_column(
                Text(headers[place]), justify="left" if left else "right", no_wrap=not left, overflow="fold"
            )
        for line in lines:
            shown.add_row(*(Text(line[place]) for place in places))
        if number:
            console.print()
        console.print(shown)
    for note in notes:
        console.print(note, markup=False, highlight=False, style="dim")
    console.print()


def _fitting(headers: Sequence[str], lines: Sequence[Sequence[str]], room: int) -> list[list[int]]:
    """The columns in as many parts as have room, each with the first one: a number that is cut says nothing."""
    # With the padding, and the space between two columns.
    widths = [max(map(cell_len, column)) + 2 for column in zip(headers, *lines, strict=True)]
    # These are broken instead.
    widths = [min(width, BROKEN) if header in LEFT else width for header, width in zip(headers, widths, strict=True)]
    parts: list[list[int]] = [[0]]
    for place in range(1, len(headers)):
        if len(parts[-1]) > 1 and sum(widths[item] for item in parts[-1]) + widths[place] > room:
            parts.append([0])
        parts[-1].append(place)
    return parts


def _print_map(found: Inspection, console: Console) -> None:
    states = states_map(found.states, found.layers, bins=max(min(console.width - 6, 120), 10))
    console.print(Text("States of the prompt: layers down, positions across", style="italic"))
    for layer, original, quantized in zip(states.layers, states.original, states.quantized, strict=True):
        line = Text(f"{layer:>4} ")
        for high, low in zip(original, quantized, strict=True):
            shares = (1 - high - low, low, high)
            code = shares.index(max(shares))
            line.append(MARKS[code], style=COLOURS[code])
        console.print(line, soft_wrap=True)
    legend = f"{MARKS[2]} Original, {MARKS[1]} Quantized, {MARKS[0]} Evicted: the state in most heads of a layer"
    console.print(legend, markup=False, highlight=False, style="dim")
    console.print()


def _print_words(found: Inspection, console: Console) -> None:
    """The text with shades; without colours the shade of a word stands behind it as a digit."""
    heads = found.states.shape[0] * found.states.shape[1]
    everything = shaded(found)
    console.print(Text(f"Words by the share of {heads} heads that hold them", style="italic"))
    half = SHOWN_WORDS // 2
    skipped = range(half, len(everything) - half)
    line = Text()
    for place, word in enumerate(everything):
        if place in skipped:
            if place == half:
                line.append(f"\n[... {len(skipped)} words; --html shows all ...]\n", style="bold")
            continue
        level = word.shade
        style = f"black on rgb({250 - 20 * level},{250 - 9 * level},250)" if level else "dim"
        line.append("".join(char if char in "\n\t" else printable(char) for char in word.space))
        line.append(printable(word.text), style=f"{style} underline" if word.mostly_original else style)
        if word.text and console.color_system is None:
            line.append(f"/{level}")
    console.print(line, soft_wrap=False)
    marks = (
        "underlined: mostly Original; dim: held by none" if console.color_system else "/0: held by none, /10: by all"
    )
    console.print(f"{marks}. Words of several tokens count where all are held.", style="dim", highlight=False)
    console.print()
