"""Tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_OBEYED = re.compile(r"[\\|*<`]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""What Markdown would take for markup; an underscore within a word is none."""


def in_markdown(text: str) -> str:
    """``text`` in a cell of a table, as it stands."""
    return _OBEYED.sub(r"\\\g<0>", text).replace("\n", " ")


def markdown_table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = (), bold: Iterable[int] = ()
) -> list[str]:
    """The lines of a table; headers and cells are shown as they stand.

    Args:
        right: columns that are aligned on the right.
        bold: rows that stand out.
    """
    on_the_right, standing_out = set(right), set(bold)
    lines = [_line(map(in_markdown, headers))]
    lines.append("|" + "".join("---:|" if place in on_the_right else "---|" for place in range(len(headers))))
    for place, row in enumerate(rows):
        cells = [in_markdown(cell) for cell in row]
        lines.append(_line(f"**{cell}**" if cell and place in standing_out else cell for cell in cells))
    return lines


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
