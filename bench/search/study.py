"""The study: trials by Optuna, kept in a folder, continued where they ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import UserError
from bench.models.loading import LoadedModel
from bench.names import install_extra
from bench.runs import folder as records
from bench.runs.locked import LockedFolder
from bench.search.config import FIDELITY, TuneConfig
from bench.search.documents import Split
from bench.search.objective import KL, SCORE, Objective
from bench.search.parameters import OF_MEAN_MAX, PARAMETERS, Parameter

if TYPE_CHECKING:
    import optuna

STUDY, RECORD, TRIALS, HELD_OUT, PRESET = "study.jsonl", "tune.json", "trials.csv", "heldout.csv", "preset.yaml"
"""What a search leaves in its folder."""
OLDER_STUDY = "study.db"
"""The study where there was a data base in the place of the journal."""
ERROR = "error"
"""Attribute of a trial whose settings make no sense together; one that was interrupted has none."""


class Study(LockedFolder):
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
        super().__init__(folder, "search")
        self.folder, self.directions, self.seed, self.fresh = folder, dict(directions), seed, fresh
        self.settings = json.loads(json.dumps(settings))
        self._study: optuna.Study

    def _open(self, folder: Path) -> None:
        optuna = import_optuna()
        from optuna.storages import journal

        file, lock_file = folder / STUDY, folder / f"{STUDY}.lock"
        if self.fresh:
            for name in (STUDY, OLDER_STUDY, RECORD, TRIALS, HELD_OUT, PRESET):
                (folder / name).unlink(missing_ok=True)
        elif (folder / OLDER_STUDY).exists():
            raise UserError(
                f"{folder / OLDER_STUDY} is a study of an older arkv-bench, which cannot be continued; "
                "give another --outdir, or --fresh to replace it"
            )
        broken = UserError(f"{file} is not a study of arkv-bench tune; give another --outdir, or --fresh to replace it")
        lock_file.unlink(missing_ok=True)  # of a search that was killed: this one holds the folder's own lock
        if not _cut_unfinished_line(file):
            raise broken
        try:
            backend = journal.JournalFileBackend(str(file), journal.JournalFileOpenLock(str(file)))
            named: dict[str, Any] = {"study_name": "tune", "storage": journal.JournalStorage(backend)}
            if file.stat().st_size:  # to create a study that is there would write into another one's journal
                study = optuna.load_study(**named)
            else:
                study = optuna.create_study(**named, directions=list(self.directions.values()))
            if not study.trials and "settings" not in study.user_attrs:
                study.set_user_attr("settings", self.settings)
            known = study.user_attrs.get("settings")
            stale = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING])
            if known == self.settings:
                for trial in stale:
                    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        except OSError as error:
            raise UserError(f"{file} cannot be used: {error.strerror}") from error
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            # Optuna takes every line for one of its own.
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

    def ask(self, names: Sequence[str], space: Mapping[str, Parameter] = PARAMETERS) -> optuna.Trial:
        """A new trial with values for all of ``names``; those that depend on a choice only where they matter."""
        trial = self._study.ask()
        for name in names:
            importance = trial.params.get("importance") if space is PARAMETERS else None
            if importance is not None and name in (OF_MEAN_MAX if importance == "mean_var" else ("gamma",)):
                continue
            space[name].suggest(trial, name)
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


def _cut_unfinished_line(journal: Path) -> bool:
    """Remove the end of a journal whose writer was killed within a line; False where that is no line of a journal."""
    try:
        content = journal.read_bytes()
        rest = content[content.rfind(b"\n") + 1 :]
        if rest.startswith(b"{"):
            with journal.open("r+b") as file:
                file.truncate(len(content) - len(rest))
            return True
        return not rest
    except FileNotFoundError:
        return True
    except OSError as error:
        raise UserError(f"{journal} cannot be used: {error.strerror}") from error


def import_optuna() -> Any:
    """Optuna, silenced. Raises :class:`UserError` where it is not installed."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError(f"tune needs Optuna: {install_extra('tune')}") from None
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
        **({"version": config.own[config.method].version} if config.method in config.own else {}),
        "budgets": run.budgets,
        "budget_unit": run.budget_unit,
        "window_size": list(run.window_size),
        "quant_format": None if run.quant_format is None else list(run.quant_format),
        "method_settings": run.method_settings,
        "params": list(config.searched),
        "documents": {item.task.name: item.digest() for item in splits},
        "chunk": config.run.chunk if any(item.task.name == FIDELITY for item in splits) else None,
        "prefill_chunk": run.prefill_chunk,
        "seed": run.seed,
    }


def search(study: Study, objective: Objective, advance: Callable[[str], None]) -> None:
    """Run the trials that the study still lacks.

    Args:
        advance: called after each trial with what it gave.
    """
    config = objective.config
    space = config.space
    own = {name: config.own_value(name) for name in config.searched}
    if all(space[name].holds(value) for name, value in own.items()):
        study.enqueue(own)
    size = config.run.batch if objective.scored else 1
    while (left := config.run.n_trials - len(study.trials)) > 0:
        trials = [study.ask(config.searched, space) for _ in range(min(size, left))]
        begin = time.perf_counter()
        results = objective.values([trial.params for trial in trials])
        seconds = (time.perf_counter() - begin) / len(trials)
        for trial, result in zip(trials, results, strict=True):
            study.tell(trial, result, seconds)
            advance(result if isinstance(result, str) else said(result))


def said(values: Mapping[str, float]) -> str:
    """Objectives for a person."""
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
