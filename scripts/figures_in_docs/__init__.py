"""What README.md and pages under docs/ say in numbers, made of the records under results/: ``make docs`` writes it, a
test compares it."""

from __future__ import annotations

from collections.abc import Callable

from scripts.figures_in_docs import claims, evidence, exam, negative, reading, results

BEGIN, END = "<!-- Written by make docs: {} -->\n", "\n<!-- until here. -->"


def with_numbers(page: str, path: str) -> str:
    """A page with every block of numbers as the records have it.

    Args:
        path: of the page, one of :data:`PAGES`.

    Raises:
        SystemExit: a block has no place in it.
    """
    places = {name: _place_of(page, path, name) for name in PAGES[path]}
    for name, place in places.items():
        page = page.replace(place, BEGIN.format(name) + PAGES[path][name]() + END)
    return page


def _place_of(page: str, path: str, name: str) -> str:
    """A block with its marks, as it stands in the page."""
    _, begin, rest = page.partition(BEGIN.format(name))
    block, end, _ = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path} has no place for the numbers called {name}")
    return begin + block + end


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"exam figure": exam.exam_figure, "exam": exam.exam},
    "docs/results.md": {
        "claims": claims.claims,
        "exam": exam.exam_whole,
        "ruler": evidence.ruler,
        "longbench": evidence.longbench,
        "gsm8k": claims.gsm8k,
        "gsm8k replay": evidence.gsm8k_replay,
        "figure": results.figure,
        "demo": results.demo,
        "fidelity": results.fidelity,
        "tuning": results.tuning,
        "more": results.more,
    },
    "docs/reading.md": {"coverage": reading.coverage, "snapkv": reading.snapkv},
    "docs/negative.md": {"rereading": negative.rereading, "simulated": negative.simulated, "heads": negative.heads},
}
"""By page what stands between the marks of each name."""
