"""``arkv-bench tune``: settings of a method, searched with Optuna and judged on documents of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import UserError
from bench.settings.options import FRESH, given, takes
from bench.settings.tune import TuneSettings

if TYPE_CHECKING:
    from rich.console import Console

    from bench.search.config import TuneConfig
    from bench.search.study import Study
    from bench.search.verdict import Verdict


@takes(TuneSettings)
def tune(fresh: FRESH = False, **typed: Any) -> None:
    """Search for settings of a method; writes a preset for run and says what it is worth on held-out documents.

    All trials share the prefills. The first trial has the method's own settings. Budgets are those of run: 1/4 and 1/8
    of the bytes, unless others are given.

    [bold]arkv-bench tune[/bold]
    [bold]arkv-bench tune --tasks fidelity,needle --cache-ratio 0.25 --outdir runs/tuned[/bold]
    [bold]arkv-bench run --preset runs/tuned/preset.yaml --tasks longbench[/bold]
    """
    settings = TuneSettings(**given(TuneSettings, typed))
    from bench.commands.first_look import first_look
    from bench.models.imports import import_lightly

    first_look(settings)
    import_lightly()
    from bench.methods.plugins import Plugins
    from bench.runs.kinds import SEARCH, claim, new_folder
    from bench.search.config import TuneConfig

    plugins = Plugins(settings.plugin or ())
    methods = plugins.needed_methods(settings.methods)
    config = TuneConfig(run=settings.changed(methods=tuple(methods)), own=plugins.methods)
    if settings.outdir is not None:
        claim(settings.outdir, SEARCH)
    _tune(config, settings.outdir or new_folder("tune"), fresh=fresh)


def _tune(config: TuneConfig, folder: Path, *, fresh: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    from bench.models.loading import load
    from bench.progress import ProgressReporter
    from bench.search.documents import load_splits
    from bench.search.objective import Objective
    from bench.search.output import write_held_out, write_preset, write_record, write_trials
    from bench.search.study import Study, fingerprint, import_optuna, search
    from bench.search.verdict import judge

    import_optuna()
    config.cells({})
    console = Console()
    console.print(f"Loading {escape(config.run.model[0])} ...", highlight=False)
    run = config.run
    model = load(run.model[0], dtype=run.dtype, device=run.device)
    objective = Objective(config, model, load_splits(config, model))
    settings = fingerprint(config, model, objective.splits)
    with Study(folder, settings, objective.directions, seed=run.seed, fresh=fresh) as study:
        try:
            if done := len(study.trials):
                _say(console, f"{done} of {config.run.n_trials} trials are in {folder} already")
            with ProgressReporter(console, "tune", max(config.run.n_trials, done), done, unit="trials") as progress:
                search(study, objective, progress.advance)
            chosen = study.chosen()
            write_trials(study, config.searched)
            documents = sum(len(item.held_out) for item in objective.splits)
            with ProgressReporter(console, "held-out", documents, unit="documents") as progress:
                verdicts = judge(objective, chosen.params, progress.advance)
        except KeyboardInterrupt:
            message = (
                f"stopped after {len(study.trials)} of {config.run.n_trials} trials: the same command with --outdir "
            )
            raise UserError(f"{message}{folder} continues", exit_code=130) from None
        write_held_out(folder, verdicts)
        write_record(config, model, study, verdicts, objective)
        tuned_on = " and ".join(f"{len(item.tuning)} documents of {item.task.name}" for item in objective.splits)
        summary = [sentence(config, verdict) for verdict in verdicts]
        description = f"{config.method} tuned on {tuned_on}, {len(study.trials)} trials. {' '.join(summary)}"
        preset = write_preset(config, chosen.params, description, folder)
        _print(console, config, study, verdicts, with_front=len(objective.directions) > 1)
        for line in summary:
            _say(console, line)
        if objective.fidelity.not_kept:
            prompts = f"{len(objective.fidelity.not_kept)} prompts did not fit --keep-gib={config.run.keep_gib:g}"
            _say(console, f"{prompts}: they were computed for every trial")
        _say(console, _ending(config, study))
        plugins = "".join(f" --plugin {file}" for file in run.plugin or ())
        _say(console, f"wrote {preset}: arkv-bench run --preset {preset}{plugins}")


def _ending(config: TuneConfig, study: Study) -> str:
    """The best trial, or that nothing was better than the method's own settings."""
    from bench.search.study import said

    chosen, own = study.chosen(), study.complete[0]
    values = said({name: study.value(chosen, name) for name in study.directions})
    if any(own.params[name] != config.own_value(name) for name in own.params):  # they are beyond what is searched
        return f"The best of {len(study.complete)} trials is {chosen.number}: {values} on the tuning documents."
    if chosen.values == own.values:
        return f"No trial was better than the method's own settings: {values} on the tuning documents."
    before = said({name: study.value(own, name) for name in study.directions})
    return (
        f"The best of {len(study.complete)} trials is {chosen.number}: {values} on the tuning documents, instead of "
        f"{before} with the method's own settings."
    )


def sentence(config: TuneConfig, verdict: Verdict) -> str:
    """What the search is worth at one budget, for a person."""
    from statistics import fmean

    found = verdict.comparison
    interval = "" if found.interval is None else f" [{found.interval.low:+.4f}, {found.interval.high:+.4f}]"
    words = verdict.words or "not compared"
    if found.difference == 0 and verdict.own == verdict.tuned:
        words = "the same on every document"
    return (
        f"{verdict.task}, {verdict.metric}, {verdict.budget}: {fmean(verdict.tuned):.4f} instead of "
        f"{fmean(verdict.own):.4f} with the method's own settings on {found.n} held-out documents, difference "
        f"{found.difference:+.4f}{interval}: {words}."
    )


def _print(console: Console, config: TuneConfig, study: Study, verdicts: list[Verdict], *, with_front: bool) -> None:
    from rich import box
    from rich.table import Table

    chosen, own = study.chosen(), study.complete[0]
    table = Table(title="Settings found", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for header in ("setting", "own", "found"):
        table.add_column(header, justify="left" if header == "setting" else "right")
    for name in config.searched:
        mine = config.own_value(name)
        table.add_row(name, _shown(mine), _shown(chosen.params.get(name, mine)))
    for name in study.directions:
        table.add_row(f"{name}, tuning", _shown(study.value(own, name)), _shown(study.value(chosen, name)))
    console.print(table)
    if with_front:
        front = Table(title="Pareto front", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        for header in ("trial", *study.directions):
            front.add_column(header, justify="right")
        for trial in study.front():
            values = [_shown(study.value(trial, name)) for name in study.directions]
            front.add_row(str(trial.number), *values, style="bold" if trial.number == chosen.number else None)
        console.print(front)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
