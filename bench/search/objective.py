"""What a trial is worth: the divergence from the full cache, the score of tasks, or both.

Tasks with a score of their own are answered by the :class:`~bench.engine.engine.Engine`, which computes a prompt once
for a round of trials that are drawn together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from arkv import ConfigError
from bench.engine.engine import Engine, Failure
from bench.engine.jobs import FAILURES, in_a_line
from bench.errors import UserError, said_in_one_line
from bench.methods.cell import Cell
from bench.models.loading import LoadedModel
from bench.search.config import FIDELITY, TuneConfig
from bench.search.documents import Split
from bench.search.fidelity import FidelityBench
from tasks.base import Answer, Compare, Document

KL, SCORE = "kl", "score"
"""The objectives: KL divergence is made small, the score of tasks large (or small, where lower is better)."""


class Objective:
    """What a search makes small or large: the KL divergence, the score of tasks, or both.

    Args:
        config: settings.
        model: the model.
        splits: the documents.

    Raises:
        UserError: tasks whose scores cannot be averaged, since lower is better for some of them only.
    """

    def __init__(self, config: TuneConfig, model: LoadedModel, splits: Sequence[Split]) -> None:
        self.config, self.model, self.splits = config, model, list(splits)
        self.fidelity = FidelityBench(
            model.model,
            queries=config.recorded_queries,
            chunk=config.run.chunk,
            keep_bytes=config.run.keep_gib * 2**30,
            prefill_chunk=config.run.prefill_chunk,
        )
        self.scored = [item for item in self.splits if item.task.name != FIDELITY]
        rising = {item.task.metrics[0].higher_is_better for item in self.scored}
        if len(rising) > 1:
            names = ", ".join(item.task.name for item in self.scored)
            raise UserError(f"--tasks: lower is better for some of {names} only, so their mean says nothing")
        self.directions: dict[str, str] = {}
        if len(self.scored) < len(self.splits):
            self.directions[KL] = "minimize"
        if self.scored:
            self.directions[SCORE] = "maximize" if rising == {True} else "minimize"

    def values(self, found: Sequence[Mapping[str, Any]]) -> list[dict[str, float] | str]:
        """Of each set of settings the objectives, means over tasks and budgets; or what is wrong with it."""
        results: list[dict[str, float] | str] = []
        for settings in found:
            try:
                self.config.cells(settings)
            except (ConfigError, UserError) as error:
                results.append(str(error))
            else:
                results.append({})
        sound = [place for place, result in enumerate(results) if isinstance(result, dict)]
        if KL in self.directions:
            for place in sound:
                results[place] = self._kl(found[place])
        if self.scored:
            scores = self._scores([found[place] for place in sound])
            for place, score in zip(sound, scores, strict=True):
                result = results[place]
                if isinstance(score, str):
                    results[place] = score
                elif isinstance(result, dict):
                    result[SCORE] = score
        return results

    def _kl(self, found: Mapping[str, Any]) -> dict[str, float] | str:
        cells = self.config.cells(found)
        try:
            with in_a_line():
                return {
                    KL: fmean(
                        kl
                        for item in self.splits
                        if item.task.name == FIDELITY
                        for document in item.tuning
                        if isinstance(document.request, Compare)
                        for kl in self.fidelity.divergences(document.request, cells)
                    )
                }
        except FAILURES as error:
            # A budget in bytes can prove too small only once the prompt is there, and memory can end.
            return said_in_one_line(error)

    def _scores(self, found: Sequence[Mapping[str, Any]]) -> list[float | str]:
        """Mean of the tasks' first metrics of each set of settings, all answered from the same prefills."""
        cells = [self.config.cells(item) for item in found]
        unique = list({cell.key: cell for mine in cells for cell in mine}.values())
        engine = self.engine(unique)
        scores: dict[str, list[float]] = {cell.key: [] for cell in unique}
        errors: dict[str, str] = {}
        for item in self.scored:
            answers, failed = answer_all(engine, item.tuning, unique)
            errors |= failed
            for key, mine in answers.items():
                scores[key].append(item.task.evaluate(item.tuning, mine).values[item.task.metrics[0].name])
        return [
            next((errors[cell.key] for cell in mine if cell.key in errors), None)
            or fmean(score for cell in mine for score in scores[cell.key])
            for mine in cells
        ]

    def engine(self, cells: Sequence[Cell]) -> Engine:
        """An engine for these cells."""
        run = self.config.run
        return Engine(
            self.model.model,
            self.model.tokenizer,
            cells,
            batch_size=run.documents_at_once,
            prefill_chunk=run.prefill_chunk,
        )


def answer_all(
    engine: Engine, documents: Sequence[Document], cells: Sequence[Cell], progress: Callable[[], None] | None = None
) -> tuple[dict[str, dict[str, Answer]], dict[str, str]]:
    """Answers by cell key and document id of the cells that answered every document, and the errors of the others."""
    answers: dict[str, dict[str, Answer]] = {cell.key: {} for cell in cells}
    errors: dict[str, str] = {}
    for document in documents:
        for answered in engine.answer(document, cells):
            if isinstance(answered, Failure):
                errors.setdefault(answered.cell.key, f"{document.id}: {answered.error}")
            else:
                answers[answered.cell.key][document.id] = answered.answer
        if progress is not None:
            progress()
    return {key: mine for key, mine in answers.items() if key not in errors}, errors
