"""Tables in LaTeX; they need the package booktabs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "…": r"\ldots{}",
        "×": r"$\times$",
        "Δ": r"$\Delta$",
        **{char: f"\\{char}" for char in "&%$#_{}"},
    }
)
"""What stands for characters that LaTeX would obey, or that not every font has."""


def in_latex(text: str) -> str:
    """``text`` in LaTeX, as it stands; a sign before a digit is a minus, not a hyphen."""
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", text.translate(ESCAPES))


def latex_table(
    caption: str,
    headers: Sequence[str],
    groups: Iterable[Iterable[tuple[Sequence[str], bool]]],
    *,
    left: Iterable[int],
    notes: Iterable[str] = (),
) -> list[str]:
    """The lines of a table with its caption.

    Args:
        groups: rows, each with whether it is bold; a rule stands before each group.
        left: columns that are aligned on the left.
        notes: sentences below the table.
    """
    on_the_left = set(left)
    alignment = "".join("l" if place in on_the_left else "r" for place in range(len(headers)))
    lines = [r"\begin{table}", r"\centering", r"\small", rf"\caption{{{in_latex(caption)}}}"]
    lines += [rf"\begin{{tabular}}{{@{{}}{alignment}@{{}}}}", r"\toprule", _line(map(in_latex, headers))]
    for group in groups:
        lines.append(r"\midrule")
        for row, bold in group:
            cells = [in_latex(cell) for cell in row]
            lines.append(_line(rf"\textbf{{{cell}}}" if bold and cell else cell for cell in cells))
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\smallskip\footnotesize {in_latex(note)}." for note in notes]
    return [*lines, r"\end{table}"]


def _line(cells: Iterable[str]) -> str:
    return f"{' & '.join(cells)} \\\\"
