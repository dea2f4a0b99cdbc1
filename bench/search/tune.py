"""Search for settings of a cache method: each prompt is computed once, then every trial compresses its own copy.

Documents are divided before the search: trials see the tuning documents only, and what the search is worth is measured
on the held-out ones, against the method's own settings on the same documents.

Fidelity is the KL divergence to the full cache over a continuation, read in chunks: recorded prefills and the full
cache's distributions are kept for all trials, as far as the memory granted holds them, and computed anew for each trial
beyond that. Tasks with a score of their own are answered by the :class:`~bench.engine.engine.Engine`, which computes a
prompt once for a round of trials that are drawn together.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import yaml

from arkv import METHODS, CacheConfig, ConfigError, PrefillCache, TriStateCache, attach
from bench.engine.engine import FAILURES, Engine, Failure
from bench.errors import UserError
from bench.judge import stats
from bench.methods.grid import FULL, Cell, budget_text, grid
from bench.models.loading import LoadedModel
from bench.runs import folder as records
from bench.runs.run import make_task, task_settings, tasks_of
from bench.settings.run import RunConfig
from tasks.base import Answer, Compare, Document, Task, TaskSettings, nearest

if TYPE_CHECKING:
    import optuna

STUDY, RECORD, TRIALS, HELD_OUT, PRESET = "study.db", "tune.json", "trials.csv", "heldout.csv", "preset.yaml"
"""What a search leaves in its folder."""
FIDELITY = "fidelity"
KL, SCORE = "kl", "score"
"""The objectives: KL divergence is made small, the score of tasks large (or small, where lower is better)."""
ERROR = "error"
"""Attribute of a trial whose settings make no sense together; one that was interrupted has none."""


# --- What can be searched ---


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """The range of one setting of :class:`~arkv.CacheConfig`."""

    low: float = 0.0
    high: float = 0.0
    step: int | None = None
    """Of whole numbers."""
    log: bool = False
    choices: tuple[str, ...] = ()
    """In the place of a range."""

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """A value for the trial."""
        if self.choices:
            return trial.suggest_categorical(name, self.choices)
        if self.step is not None:
            return trial.suggest_int(name, int(self.low), int(self.high), step=self.step)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether the search can come to ``value``."""
        if self.choices or self.step is None:
            return value in self.choices if self.choices else self.low <= value <= self.high
        return value in range(int(self.low), int(self.high) + 1, self.step)


PARAMETERS: dict[str, Parameter] = {
    "tau1": Parameter(low=0.1, high=10.0),
    "tau2": Parameter(low=0.1, high=10.0),
    "tau3": Parameter(low=0.1, high=10.0),
    "gamma": Parameter(low=0.0, high=400.0),
    "window_size": Parameter(low=8, high=128, step=8),
    "original_share": Parameter(low=0.0, high=0.3),
    "importance": Parameter(choices=("mean_var", "mean_max")),
    "query_span": Parameter(low=32, high=256, step=32),
    "pool_width": Parameter(low=1, high=15, step=2),
    "max_pool_width": Parameter(low=1, high=31, step=2),
    "decode_rate": Parameter(low=1 / 256, high=1 / 4, log=True),
}
"""What can be searched, and within which range."""
OF_MEAN_MAX = ("query_span", "max_pool_width")
"""Settings of the importance ``mean_max`` only."""
DEFAULTS = {
    "tokens": ("tau1", "tau2", "tau3", "gamma"),
    "bytes": ("tau1", "tau2", "tau3", "window_size", "original_share", "query_span", "pool_width", "max_pool_width"),
}
"""By budget unit: what is searched unless it is said. In tokens those of the published search."""


def idle(name: str, base: CacheConfig, searched: Sequence[str], decodes: bool) -> str | None:
    """Why setting ``name`` changes nothing in a search; None where it does.

    Args:
        base: the method's own settings.
        searched: all settings of the search.
        decodes: answers are decoded token by token, not read in one chunk.
    """
    if name in ("tau1", "tau2", "tau3") and not base.uses_oq:
        return "the method has no OQ score"
    if name not in ("tau1", "tau2", "tau3", "window_size") and base.ranking == "recency":
        return "the method ranks tokens by age"
    if name == "original_share" and (base.original_share is None or base.original_share in (0.0, 1.0)):
        return "the method or its OQ ratios say what stays Original"
    if name in ("gamma", *OF_MEAN_MAX) and "importance" not in searched:
        wanted = "mean_var" if name == "gamma" else "mean_max"
        return None if base.importance == wanted else f"importance is {base.importance}"
    if name == "decode_rate" and base.decode_importance != "mean":
        return "every decoding step replaces the scores in budgets of tokens"
    if name == "decode_rate" and not decodes:
        return "the continuation is read in one chunk: give a smaller --chunk"
    return None


# --- Settings ---


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Everything that ``arkv-bench tune`` can be told."""

    run: RunConfig
    """Model, one method, budgets, tasks and their options; ``limit`` is the number of tuning documents of a task."""
    params: tuple[str, ...] | None = None
    n_trials: int = 30
    """Of the whole study, those of an earlier run included."""
    held_out: int = 16
    """Documents of each task that the report is about."""
    chunk: int | None = None
    """Tokens of a continuation that are read at once; None for all, 1 for decoding."""
    batch: int = 5
    """Trials that are drawn together where a task is answered by the engine."""
    keep_gib: float = 4.0
    """Memory for recorded prefills."""

    def __post_init__(self) -> None:
        for name, low in (("n_trials", 1), ("held_out", stats.LEAST_DOCUMENTS), ("batch", 1), ("chunk", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name.replace('_', '-')}={value}: give {low} or more", exit_code=2)
        if not self.keep_gib >= 0:
            raise UserError(f"--keep-gib={self.keep_gib}: give 0 or more", exit_code=2)
        if len(self.run.quant_type) != 1 or self.run.quant_type[0] not in METHODS:
            given = ",".join(self.run.quant_type)
            raise UserError(f"--quant-type={given}: give one of {', '.join(METHODS)}", exit_code=2)
        for name, least in (("model", 1), ("window_size", 0)):
            if not least <= len(getattr(self.run, name)) <= 1:
                given = ",".join(map(str, getattr(self.run, name)))
                raise UserError(f"--{name.replace('_', '-')}={given}: a search has one", exit_code=2)
        for name in self.params or ():
            if name not in PARAMETERS:
                raise UserError(f"--params={name}: {nearest(name, PARAMETERS)}", exit_code=2)
            if reason := idle(name, self.base(0), self.params or (), self.decodes):
                raise UserError(f"--params={name} changes nothing here: {reason}", exit_code=2)
        if not self.searched:
            raise UserError("--params: nothing can be searched here; name some of them", exit_code=2)

    @property
    def method(self) -> str:
        """The method whose settings are searched."""
        return self.run.quant_type[0]

    @property
    def decodes(self) -> bool:
        """Whether anything is read in more than one forward behind its prompt."""
        return self.run.tasks != (FIDELITY,) or (self.chunk is not None and self.chunk < self.run.continuation)

    @property
    def searched(self) -> tuple[str, ...]:
        """The settings that are searched, the choices among them first: others may depend on them."""
        given = self.params or DEFAULTS[self.run.budget_unit]
        names = [name for name in given if idle(name, self.base(0), given, self.decodes) is None]
        return tuple(sorted(names, key=lambda name: not PARAMETERS[name].choices))

    def base(self, budget: int) -> CacheConfig:
        """The method's own settings at a budget of the list."""
        return self.config(budget, {})

    def config(self, budget: int, found: Mapping[str, Any]) -> CacheConfig:
        """The cache at a budget of the list with the settings that a trial has found.

        Raises:
            arkv.ConfigError: they make no sense together.
        """
        (cell,) = grid(
            [self.method],
            [self.run.budgets[budget]],
            [found["window_size"]] if "window_size" in found else self.run.window_size,
            self.run.quant_format,
            {**self.run.method_settings, **{name: value for name, value in found.items() if name != "window_size"}},
        )
        assert cell.config is not None
        return cell.config

    def configs(self, found: Mapping[str, Any]) -> list[CacheConfig]:
        """One cache for every budget."""
        return [self.config(budget, found) for budget in range(len(self.run.budgets))]

    @property
    def recorded_queries(self) -> int:
        """Newest queries of a prompt that any trial takes scores from."""
        base = self.base(0)
        widest = [int(PARAMETERS[name].high) for name in ("window_size", "query_span") if name in self.searched]
        # A trial may choose the importance that the method's own span belongs to.
        return max([base.window_size, base.query_span or 0, *widest])

    def budget_text(self, budget: int) -> str:
        """A budget of the list for a person."""
        settings = {"cache_size": None, "cache_ratio": None, **self.run.budgets[budget]}
        return budget_text(self.run.budget_unit, **settings)


# --- Documents ---


@dataclass(frozen=True, kw_only=True)
class Split:
    """The documents of one task: those that trials see, and those that the report is about."""

    task: Task
    tuning: list[Document]
    held_out: list[Document]

    def digest(self) -> dict[str, str]:
        """What identifies it."""
        asked = {
            name: hashlib.sha256(repr([(item.id, item.request) for item in documents]).encode()).hexdigest()
            for name, documents in (("tuning", self.tuning), ("held_out", self.held_out))
        }
        return {"data": self.task.data_hash(), **asked}


def split(config: TuneConfig, task: Task, settings: Callable[[RunConfig], TaskSettings]) -> Split:
    """Load a task and divide its documents by the seed; no held-out prompt shares a token of text with a tuning one.

    Args:
        settings: what the task is to be loaded with.

    Raises:
        UserError: too few documents.
        tasks.base.TaskError: the task cannot be loaded.
    """
    run = config.run
    assert run.limit is not None
    wanted = run.limit + config.held_out
    if "samples" in task.option_names:
        # Neighbours in a text may overlap: enough to leave some out.
        each = -(-wanted // len(run.lengths)) * (2 if task.name == FIDELITY else 1)
        run = dataclasses.replace(run, limit=None, samples=each)
    else:
        run = dataclasses.replace(run, limit=wanted)
    documents = list(task.load(settings(run)))
    random.Random(f"{run.seed} {task.name}").shuffle(documents)
    tuning = documents[: config.run.limit]
    held_out = [item for item in documents[len(tuning) :] if not any(overlap(item, other) for other in tuning)]
    if len(held_out) < stats.LEAST_DOCUMENTS:
        raise UserError(
            f"{task.name}: of {len(documents)} documents {len(tuning)} are for tuning, and {len(held_out)} others "
            "share no text with those: too few to report on; give a smaller --limit or more documents"
        )
    return Split(task=task, tuning=tuning, held_out=held_out[: config.held_out])


def overlap(first: Document, second: Document) -> bool:
    """Whether two prompts that are cut from one text, with what follows them, share any of it."""
    places = []
    for item in (first, second):
        if not isinstance(item.request, Compare) or "start" not in item.info:
            return False
        begin = int(item.info["start"])
        places.append(range(begin, begin + len(item.request.context_ids) + len(item.request.continuation_ids)))
    return places[0].start < places[1].stop and places[1].start < places[0].stop


# --- What a trial is worth ---


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """A context that was computed once, and what the full cache makes of its continuation."""

    prefill: PrefillCache
    inputs: torch.Tensor
    """Token ids that are read behind it, [1, T]."""
    reference: torch.Tensor
    """Log-probabilities of the full cache, [T, V]."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.prefill.nbytes() + self.reference.nbytes


class FidelityBench:
    """KL divergence of caches to the full cache over given continuations.

    Args:
        model: a transformers causal language model in eval mode.
        queries: the most that any cache takes scores from.
        chunk: tokens that are read at once; None for the whole continuation.
        keep_bytes: memory for recorded contexts; one that no longer fits is computed anew each time.
        prefill_chunk: tokens of a prompt that are read in one forward; None for all.
    """

    def __init__(
        self,
        model: Any,
        *,
        queries: int,
        chunk: int | None = None,
        keep_bytes: float = float("inf"),
        prefill_chunk: int | None = None,
    ) -> None:
        self.model = model
        self.queries = queries
        self.chunk = chunk
        self.keep_bytes = keep_bytes
        self.prefill_chunk = prefill_chunk
        self.not_kept: set[tuple[int, ...]] = set()
        """Contexts and continuations that did not fit."""
        self._kept: dict[tuple[int, ...], _Recorded] = {}

    @torch.inference_mode()
    def divergences(self, request: Compare, configs: Sequence[CacheConfig]) -> list[float]:
        """Mean KL divergence over the continuation, in nats, of each cache."""
        recorded = self._record(request)
        found = []
        for config in configs:
            cache = TriStateCache.from_prefill(recorded.prefill, config)
            with attach(self.model):
                mine = self._read(cache, recorded.inputs)
            full = recorded.reference
            found.append(float((full.exp() * (full - mine)).sum(dim=-1).mean()))
        return found

    def _record(self, request: Compare) -> _Recorded:
        key = request.context_ids + request.continuation_ids
        if key in self._kept:
            return self._kept[key]
        context = torch.tensor([request.context_ids[:-1]], device=self.model.device)
        inputs = torch.tensor([request.context_ids[-1:] + request.continuation_ids[:-1]], device=self.model.device)
        prefill = PrefillCache(self.model, self.queries)
        with attach(self.model):
            for part in context.split(self.prefill_chunk or context.shape[1], dim=1):
                self.model(part, past_key_values=prefill, logits_to_keep=1)
        recorded = _Recorded(prefill=prefill, inputs=inputs, reference=self._read(prefill.to_dynamic(), inputs))
        if sum(item.nbytes for item in self._kept.values()) + recorded.nbytes <= self.keep_bytes:
            self._kept[key] = recorded
        else:
            self.not_kept.add(key)
        return recorded

    def _read(self, cache: Any, inputs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [T, V] of what follows each of ``inputs`` [1, T]."""
        parts = inputs.split(self.chunk or inputs.shape[1], dim=1)
        rows = [self.model(part, past_key_values=cache).logits[0].float().log_softmax(dim=-1) for part in parts]
        return torch.cat(rows)


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
            chunk=config.chunk,
            keep_bytes=config.keep_gib * 2**30,
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
                self.config.configs(settings)
            except ConfigError as error:
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
        configs = self.config.configs(found)
        try:
            return {
                KL: fmean(
                    kl
                    for item in self.splits
                    if item.task.name == FIDELITY
                    for document in item.tuning
                    if isinstance(document.request, Compare)
                    for kl in self.fidelity.divergences(document.request, configs)
                )
            }
        except FAILURES as error:
            # A budget in bytes can prove too small only once the prompt is there, and memory can end.
            return " ".join(str(error).split())

    def _scores(self, found: Sequence[Mapping[str, Any]]) -> list[float | str]:
        """Mean of the tasks' first metrics of each set of settings, all answered from the same prefills."""
        cells = [[Cell(self.config.method, config) for config in self.config.configs(item)] for item in found]
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
            self.model.model, self.model.tokenizer, cells, batch_size=run.batch, prefill_chunk=run.prefill_chunk
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


# --- The study ---


class Study:
    """An Optuna study in a folder, open for one search at a time; a context manager that holds the folder's lock.

    Args:
        folder: made if absent.
        settings: everything that makes the values of two trials comparable; a study of other settings is refused.
        directions: of the objectives.
        fresh: forget an earlier study in the folder.

    Raises:
        UserError: the folder cannot be used, or holds a study of other settings.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], directions: Mapping[str, str], *, seed: int, fresh: bool
    ) -> None:
        self.folder, self.directions, self.seed, self.fresh = folder, dict(directions), seed, fresh
        self.settings = json.loads(json.dumps(settings))
        self._study: optuna.Study

    def __enter__(self) -> Study:
        self._lock = records.lock_folder(self.folder, "search")
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _open(self) -> None:
        optuna = import_optuna()
        from sqlalchemy.exc import SQLAlchemyError

        file = self.folder / STUDY
        if self.fresh:
            for name in (STUDY, RECORD, TRIALS, HELD_OUT, PRESET):
                (self.folder / name).unlink(missing_ok=True)
        broken = UserError(f"{file} is not a study of arkv-bench tune; give another --outdir, or --fresh to replace it")
        is_new = not file.exists()
        try:
            study = optuna.create_study(
                storage=f"sqlite:///{file.resolve()}",
                study_name="tune",
                load_if_exists=True,
                directions=list(self.directions.values()),
            )
            known = study.user_attrs.get("settings")
            if is_new:
                study.set_user_attr("settings", self.settings)
                known = self.settings
            stale = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING])
            if known == self.settings:
                for trial in stale:
                    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        except (SQLAlchemyError, RuntimeError, ValueError) as error:
            raise broken from error
        if not isinstance(known, dict):
            raise broken
        if different := sorted(key for key in {*known, *self.settings} if known.get(key) != self.settings.get(key)):
            raise UserError(
                f"{file} is a study of other settings ({', '.join(different)}); "
                "give another --outdir, or --fresh to start it anew"
            )
        # A sampler that begins anew must not draw what the same seed drew before.
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.trials))
        self._study = study

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """Those that have ended: with values, or with settings that made no sense."""
        return [trial for trial in self._study.trials if trial.values is not None or ERROR in trial.user_attrs]

    @property
    def complete(self) -> list[optuna.trial.FrozenTrial]:
        """Those with values."""
        return [trial for trial in self._study.trials if trial.values is not None]

    def enqueue(self, settings: Mapping[str, Any]) -> None:
        """Try these first."""
        self._study.enqueue_trial(dict(settings), skip_if_exists=True)

    def ask(self, names: Sequence[str]) -> optuna.Trial:
        """A new trial with values for all of ``names``; those that depend on a choice only where they matter."""
        trial = self._study.ask()
        for name in names:
            importance = trial.params.get("importance")
            if importance is not None and name in (OF_MEAN_MAX if importance == "mean_var" else ("gamma",)):
                continue
            PARAMETERS[name].suggest(trial, name)
        return trial

    def tell(self, trial: optuna.Trial, result: Mapping[str, float] | str, seconds: float) -> None:
        """Note what the trial gave: its objectives, or what is wrong with its settings."""
        trial.set_user_attr("seconds", round(seconds, 3))
        if isinstance(result, str):
            trial.set_user_attr(ERROR, result)
            self._study.tell(trial, state=import_optuna().trial.TrialState.FAIL)
        else:
            self._study.tell(trial, [result[name] for name in self.directions])

    def value(self, trial: optuna.trial.FrozenTrial, name: str) -> float:
        """One objective of a trial that has values."""
        return float(trial.values[list(self.directions).index(name)])

    def front(self) -> list[optuna.trial.FrozenTrial]:
        """The trials that no other beats in every objective; with one objective, the best."""
        best = self._study.best_trials if len(self.directions) > 1 else [self._study.best_trial]
        unique = {json.dumps(trial.params, sort_keys=True): trial for trial in best}
        return sorted(unique.values(), key=lambda trial: trial.values)

    def chosen(self) -> optuna.trial.FrozenTrial:
        """The best trial; of a Pareto front the one with the smallest divergence whose score is at least that of the
        method's own settings, which are the first trial. Raises :class:`UserError` where no trial has values."""
        if not self.complete:
            raise UserError(f"no trial has worked: {self.trials[0].user_attrs[ERROR]}")
        front = self.front()
        if len(front) == 1 or len(self.directions) == 1:
            return front[0]
        sign = 1 if self.directions[SCORE] == "maximize" else -1
        own = self.complete[0]
        good = [trial for trial in front if sign * (self.value(trial, SCORE) - self.value(own, SCORE)) >= 0]
        return min(good or front, key=lambda trial: self.value(trial, KL))


def import_optuna() -> Any:
    """Optuna, silenced. Raises :class:`UserError` where it is not installed."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError("tune needs Optuna: pip install 'arkv-bench[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def fingerprint(config: TuneConfig, model: LoadedModel, splits: Sequence[Split]) -> dict[str, Any]:
    """Everything that makes the values of two trials comparable."""
    packages = records.environment()["packages"]
    run = config.run
    return {
        "model": {"name": model.name, "fingerprint": model.fingerprint, "dtype": model.dtype, "device": model.device},
        "versions": {name: packages.get(name) for name in ("arkv-bench", "torch", "transformers")},
        "quant_type": config.method,
        "budgets": run.budgets,
        "budget_unit": run.budget_unit,
        "window_size": list(run.window_size),
        "quant_format": None if run.quant_format is None else list(run.quant_format),
        "method_settings": run.method_settings,
        "params": list(config.searched),
        "documents": {item.task.name: item.digest() for item in splits},
        "chunk": config.chunk if any(item.task.name == FIDELITY for item in splits) else None,
        "prefill_chunk": run.prefill_chunk,
        "seed": run.seed,
    }


def load_splits(config: TuneConfig, model: LoadedModel) -> list[Split]:
    """The documents of every task. Raises :class:`UserError` or :class:`~tasks.base.TaskError`."""
    asked = [make_task(name, [Path(folder) for folder in config.run.include_path or ()]) for name in config.run.tasks]
    return [split(config, task, lambda run, task=task: task_settings(run, model, task)) for task, _ in tasks_of(asked)]  # type: ignore[misc]


def search(study: Study, objective: Objective, advance: Callable[[str], None]) -> None:
    """Run the trials that the study still lacks.

    Args:
        advance: called after each trial with what it gave.
    """
    config = objective.config
    base = config.base(0)
    own = {name: getattr(base, name) for name in config.searched}
    if all(PARAMETERS[name].holds(value) for name, value in own.items()):
        study.enqueue(own)
    size = config.batch if objective.scored else 1
    while (left := config.n_trials - len(study.trials)) > 0:
        trials = [study.ask(config.searched) for _ in range(min(size, left))]
        begin = time.perf_counter()
        results = objective.values([trial.params for trial in trials])
        seconds = (time.perf_counter() - begin) / len(trials)
        for trial, result in zip(trials, results, strict=True):
            study.tell(trial, result, seconds)
            advance(result if isinstance(result, str) else said(result))


def said(values: Mapping[str, float]) -> str:
    """Objectives for a person."""
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


# --- What it is worth ---


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
    comparison: stats.Comparison
    p_holm: float | None = None

    @property
    def words(self) -> str:
        """``better, p 0.01``, or ``not distinguishable``."""
        return stats.verdict(self.comparison.difference, self.p_holm, higher_is_better=self.higher_is_better)


def judge(objective: Objective, found: Mapping[str, Any], progress: Callable[[], None]) -> list[Verdict]:
    """Decode the held-out documents with the method's own settings and with those found, and compare them pairwise.

    Args:
        progress: called after each document.

    Raises:
        UserError: a document could not be answered.
    """
    config = objective.config
    own, tuned = ([Cell(config.method, item) for item in config.configs(settings)] for settings in ({}, found))
    cells = list({cell.key: cell for cell in [Cell(FULL), *own, *tuned]}.values())
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
                    comparison=stats.compare(values[after.key], values[before.key], seed=config.run.seed),
                )
            )
    tested = [verdict.comparison.p_value for verdict in verdicts if verdict.comparison.p_value is not None]
    adjusted = iter(stats.holm(tested))
    return [
        dataclasses.replace(verdict, p_holm=None if verdict.comparison.p_value is None else next(adjusted))
        for verdict in verdicts
    ]


# --- What it leaves ---


def write_trials(study: Study, names: Sequence[str]) -> None:
    """``trials.csv``: a line per trial."""
    columns = ["trial", *study.directions, *names, "seconds", ERROR]
    lines = []
    for trial in study.trials:
        values = {} if trial.values is None else dict(zip(study.directions, trial.values, strict=True))
        lines.append({"trial": trial.number, **values, **trial.params, **trial.user_attrs})
    records.write_atomic(study.folder / TRIALS, _csv(columns, lines))


def write_held_out(folder: Path, verdicts: Sequence[Verdict]) -> None:
    """``heldout.csv``: a line per document and budget."""
    lines = [
        {"task": verdict.task, "metric": verdict.metric, "budget": verdict.budget, "document": document}
        | {"full": full, "own": own, "tuned": tuned}
        for verdict in verdicts
        for document, full, own, tuned in zip(verdict.documents, verdict.full, verdict.own, verdict.tuned, strict=True)
    ]
    records.write_atomic(
        folder / HELD_OUT, _csv(["task", "metric", "budget", "document", "full", "own", "tuned"], lines)
    )


def _csv(columns: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n", restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def write_preset(config: TuneConfig, found: Mapping[str, Any], description: str, folder: Path) -> Path:
    """``preset.yaml``: model, method, budgets and the settings found, for ``arkv-bench run --preset``."""
    run = config.run
    content: dict[str, Any] = {
        "description": description,
        "model": run.model[0],
        "quant-type": [FULL, config.method],
        "budget-unit": run.budget_unit,
        **({"cache-ratio": list(run.cache_ratio)} if run.cache_ratio else {"cache-size": list(run.cache_size)}),
        **({"window-size": run.window_size[0]} if run.window_size else {}),
        **({} if run.quant_format is None else {"quant-format": list(run.quant_format)}),
    }
    settings = {**run.method_settings, **found}
    content |= {name.replace("_", "-"): value for name, value in settings.items() if name != "budget_unit"}
    path = folder / PRESET
    records.write_atomic(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000))
    return path


def write_record(
    config: TuneConfig, model: LoadedModel, study: Study, verdicts: Sequence[Verdict], objective: Objective
) -> None:
    """``tune.json``: settings, the split, the trial chosen, the front, and what it is worth."""
    chosen = study.chosen()

    def shown(trial: Any) -> dict[str, Any]:
        return {"trial": trial.number, **dict(zip(study.directions, trial.values, strict=True)), "params": trial.params}

    record = {
        "command": records.command_line(),
        "finished": records.now(),
        "settings": {
            **{key: value for key, value in dataclasses.asdict(config).items() if key != "run"},
            "run": config.run.to_json(),
        },
        "study": study.settings,
        "split": {
            item.task.name: {
                "tuning": [document.id for document in item.tuning],
                "held_out": [document.id for document in item.held_out],
            }
            for item in objective.splits
        },
        "directions": study.directions,
        "trials": len(study.trials),
        "first": shown(study.complete[0]),
        "chosen": shown(chosen),
        "front": [shown(trial) for trial in study.front()],
        "held_out": [
            {
                **{name: getattr(verdict, name) for name in ("task", "metric", "budget", "p_holm", "words")},
                "n": len(verdict.documents),
                "full": fmean(verdict.full),
                "own": fmean(verdict.own),
                "tuned": fmean(verdict.tuned),
                **dataclasses.asdict(verdict.comparison),
            }
            for verdict in verdicts
        ],
        "model": {"name": model.name, "source": model.source, "fingerprint": model.fingerprint, "dtype": model.dtype},
        **records.environment(),
    }
    records.write_atomic(study.folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
