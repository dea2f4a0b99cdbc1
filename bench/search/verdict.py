"""What a search is worth: the held-out documents with the settings found, against the method's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.errors import UserError
from bench.judge.family import Comparison, compare
from bench.judge.verdict import verdict
from bench.methods.grid import full_cell
from bench.names import FULL
from bench.search.objective import Objective, answer_all


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One metric at one budget on the held-out documents: the method's own settings, and those that were found."""

    task: str
    metric: str
    higher_is_better: bool
    budget: str
    documents: list[str]
    full: list[float]
    own: list[float]
    tuned: list[float]
    comparison: Comparison

    @property
    def words(self) -> str:
        """``better, p 0.01``, or ``tied``."""
        return verdict(self.comparison.difference, self.comparison.p_adjusted, higher_is_better=self.higher_is_better)


def judge(objective: Objective, found: Mapping[str, Any], progress: Callable[[], None]) -> list[Verdict]:
    """Decode the held-out documents with the method's own settings and with those found, and compare them pairwise.

    Args:
        progress: called after each document.

    Raises:
        UserError: a document could not be answered.
    """
    config = objective.config
    own, tuned = config.cells({}), config.cells(found)
    cells = list({cell.key: cell for cell in [full_cell(), *own, *tuned]}.values())
    engine = objective.engine(cells)
    verdicts = []
    for item in objective.splits:
        answers, errors = answer_all(engine, item.held_out, cells, progress)
        for error in errors.values():
            raise UserError(f"{item.task.name}, held-out document {error}")
        metric = item.task.metrics[0]
        values = {
            key: [item.task.score(document, mine[document.id])[metric.name] for document in item.held_out]
            for key, mine in answers.items()
        }
        for place, (before, after) in enumerate(zip(own, tuned, strict=True)):
            verdicts.append(
                Verdict(
                    task=item.task.name,
                    metric=metric.name,
                    higher_is_better=metric.higher_is_better,
                    budget=config.budget_text(place),
                    documents=[document.id for document in item.held_out],
                    full=values[FULL],
                    own=values[before.key],
                    tuned=values[after.key],
                    comparison=compare(
                        values[after.key],
                        values[before.key],
                        comparisons=len(objective.splits) * len(own),
                        bounds=(metric.low, metric.high),
                        seed=config.run.seed,
                    ),
                )
            )
    return verdicts
