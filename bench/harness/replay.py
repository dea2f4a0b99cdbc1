"""Scoring by replay: lm-eval evaluates a stand-in model that looks each stored answer up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.base import Answer, Evaluation, Generated, LogLikelihoods, Request, Rolling


def to_responses(request: Request, answer: Answer) -> list[Any]:
    """An answer as lm-eval's models give it: one response for each instance of the document, in their order."""
    if isinstance(answer, Generated):
        return [answer.text]
    assert isinstance(answer, LogLikelihoods)
    if isinstance(request, Rolling):
        return [sum(window.log_likelihood for window in answer.scored)]
    return [tuple(scored) for scored in answer.scored]


def replay(responses: Sequence[Sequence[Any]]) -> Any:
    """An lm-eval model that answers from a store: ``responses[document]`` has one for each instance, in their order."""
    from lm_eval.api.model import LM

    class Replay(LM):
        def generate_until(self, requests: list[Any]) -> list[Any]:
            # An instance comes as often as the task repeats it, and its number within the document need not be unique.
            places: dict[int, dict[int, int]] = {}
            answers = []
            for request in requests:
                seen = places.setdefault(request.doc_id, {})
                answers.append(responses[request.doc_id][seen.setdefault(id(request), len(seen))])
            return answers

        loglikelihood = generate_until
        loglikelihood_rolling = generate_until

    return Replay()


def selection(rows: Sequence[int], *, name: str | None = None) -> dict[str, Any]:
    """lm-eval's ``limit`` where ``rows`` are the first ones, else its ``samples``, which costs a pass over all rows.

    ``name`` wraps the rows for an evaluation, which takes them by task.
    """
    if list(rows) == list(range(len(rows))):
        return {"limit": len(rows)}
    return {"samples": list(rows) if name is None else {name: list(rows)}}


def to_evaluation(results: Mapping[str, Any]) -> Evaluation:
    """From lm-eval's ``{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}``."""
    values, stderr = {}, {}
    for key, value in results.items():
        metric, comma, ensemble = key.partition(",")
        if not comma or not isinstance(value, float | int):
            continue
        if metric.endswith("_stderr"):
            stderr[f"{metric.removesuffix('_stderr')},{ensemble}"] = float(value)
        else:
            values[key] = float(value)
    return Evaluation(values=values, stderr=stderr)


def to_results(evaluation: Evaluation) -> dict[str, Any]:
    """The inverse of :func:`_to_evaluation`."""
    results: dict[str, Any] = dict(evaluation.values)
    for key in evaluation.values:
        metric, _, ensemble = key.partition(",")
        results[f"{metric}_stderr,{ensemble}"] = evaluation.stderr.get(key, "N/A")
    return results
