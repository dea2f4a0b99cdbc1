"""What the gate may tolerate, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass

from bench.errors import UserError

OK, WORSE, BETTER, MISSING, NEW, SKIPPED = "ok", "worse", "better", "missing", "new", "skipped"
FAILING = (WORSE, MISSING)

SAME_MACHINE, OTHER_MACHINE = 0.03, 0.25
"""Tolerances of speed. On other hardware the ratio of two methods is another one."""
LEAST_TOLERANCE = 1e-3
"""Of a score or divergence, whatever its size: what another order of additions makes of bfloat16."""


LOST_ELSEWHERE = 0.05
"""Share of the right answers that may be lost where sums are rounded in another way (other hardware, versions or
precision). Between an Intel and an AMD machine none of 59 was (bfloat16, the default model): so a rate much above 5 %
is unlikely. On the same terms greedy decoding gives the same answer twice: there it is none."""


DIVERGENCE, DIVERGENCE_ELSEWHERE = 0.05, 0.5
"""Shares of a divergence that pass on the baseline's terms, and where sums are rounded in another way: a small one,
above all a percentile over tokens, is of the size of rounding. Between processors with and without products in bfloat16
one grew by more than a twentieth with the same code."""


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """How much worse passes although it is beyond noise."""

    score: float = 0.02
    """Share of the baseline's score, where more is better."""
    divergence: float | None = None
    """Share of the baseline's KL divergence, perplexity or other metric where less is better; None:
    :data:`DIVERGENCE` on the terms of the baseline, else :data:`DIVERGENCE_ELSEWHERE`."""
    lost: float | None = None
    """Share of the answers that were right in the baseline and may be wrong now, rounded up to whole answers; None:
    none on the terms of the baseline, else :data:`LOST_ELSEWHERE`."""
    kv_bytes: float = 0.01
    """Share of the baseline's bytes."""
    speed: float | None = None
    """Share of the baseline's tokens/s over those of ``full``; None: by whether the machine is the baseline's."""
    judge_speed: bool = True

    def __post_init__(self) -> None:
        for name in ("score", "divergence", "lost", "kv_bytes", "speed"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise UserError(f"tolerance of {name}: {value} is no share of 0 or more, below 1", exit_code=2)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the gate: what was compared, and what came out."""

    outcome: str
    """One of :data:`OK`, :data:`WORSE`, :data:`BETTER`, :data:`MISSING`, :data:`NEW`, and :data:`SKIPPED` where nothing
    can be said."""
    model: str
    what: str
    """Task and metric, task and bytes, or speed."""
    cell: str
    """The method with its budget."""
    baseline: str = ""
    run: str = ""
    change: str = ""
    """With its interval and the tolerance."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the gate found."""

    findings: list[Finding]
    notes: list[str]
    """What else is different between the run and the baseline."""

    @property
    def failed(self) -> bool:
        """Whether anything became worse or is missing."""
        return any(finding.outcome in FAILING for finding in self.findings)
