"""What the gate found, as lines and as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bench.gate.findings import BETTER, FAILING, MISSING, NEW, OK, SKIPPED, WORSE, Finding, Report
from bench.records.files.markdown import in_markdown, markdown_table
from bench.records.files.text import printable


def summary(report: Report) -> str:
    """The verdict in one line."""
    counts = Counter(finding.outcome for finding in report.findings)
    said = ", ".join(
        f"{counts[outcome]} {outcome}" for outcome in (WORSE, MISSING, OK, BETTER, SKIPPED, NEW) if counts[outcome]
    )
    return f"{'FAILED' if report.failed else 'passed'}: {said}"


def lines(report: Report) -> list[str]:
    """One line per finding, columns below each other, then the notes."""
    several = len({finding.model for finding in report.findings}) > 1
    cells = [
        [
            finding.outcome.upper() if finding.outcome in FAILING else finding.outcome,
            *([finding.model] if several else []),
            finding.cell,
            finding.what,
            f"{finding.baseline} -> {finding.run}" if finding.run else "",
            "; ".join(filter(None, (finding.change, finding.note))),
        ]
        for finding in report.findings
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [printable(line) for line in (*table, *[f"note: {note}" for note in report.notes])]


def to_markdown(report: Report) -> str:
    """The summary of a CI job: what failed first, all else folded away."""
    header = ["", "method", "what", "baseline", "run", "change [95 %]", ""]

    def table(findings: Sequence[Finding]) -> list[str]:
        rows = [
            [item.outcome, item.cell, item.what, item.baseline, item.run, item.change, item.note] for item in findings
        ]
        return [*markdown_table(header, rows), ""]

    failing = [finding for finding in report.findings if finding.outcome in FAILING]
    others = [finding for finding in report.findings if finding.outcome not in FAILING]
    text = [f"### arkv-bench check {in_markdown(summary(report))}", ""]
    if failing:
        text += table(failing)
    if others:
        text += [f"<details><summary>{len(others)} more</summary>", "", *table(others), "</details>", ""]
    return "\n".join([*text, *[f"- {in_markdown(note)}" for note in report.notes], ""])
