"""``arkv-bench tune``: settings of a method, searched with Optuna and judged on documents of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from bench.search.config import TuneConfig
    from bench.search.study import Study
    from bench.search.verdict import Verdict

SEARCH, DATA, OUTPUT = "The search", "Models and data", "Output"


def _option(help_: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_, rich_help_panel=panel, **more)


def tune(
    tasks: Annotated[
        str,
        _option(
            "What trials are measured by: fidelity (KL divergence to the full cache), tasks with a score (their mean), "
            "or both, such as fidelity,needle: then the Pareto front is searched.",
            SEARCH,
        ),
    ] = "fidelity",
    n_trials: Annotated[int, _option("Trials of the study, those of an earlier run included.", SEARCH)] = 30,
    quant_type: Annotated[str, _option("The method whose settings are searched.", SEARCH)] = "mix",
    cache_size: Annotated[
        str | None, _option("Budgets: tokens held per layer; a trial is the mean over them. Default: 512.", SEARCH)
    ] = None,
    cache_ratio: Annotated[str | None, _option("Budgets as a share of each prompt: 0.25,0.125.", SEARCH)] = None,
    budget_unit: Annotated[str, _option("tokens or bytes.", SEARCH)] = "tokens",
    quant_format: Annotated[str | None, _option("Format of quantized tokens. Default: by budget unit.", SEARCH)] = None,
    window_size: Annotated[int, _option("Newest tokens at model precision, unless it is searched.", SEARCH)] = 32,
    params: Annotated[
        str | None,
        _option(
            "Settings that are searched: tau1, tau2, tau3, gamma, window_size, original_share, importance, query_span, "
            "pool_width, max_pool_width, decode_rate. Default: in tokens the first four, in bytes those that matter "
            "there.",
            SEARCH,
        ),
    ] = None,
    limit: Annotated[int, _option("Tuning documents of each task.", SEARCH)] = 8,
    held_out: Annotated[int, _option("Other documents of each task, which the report is about.", SEARCH)] = 16,
    chunk: Annotated[
        int | None,
        _option("fidelity: tokens of a continuation that are read at once; 1 is decoding. Default: all.", SEARCH),
    ] = None,
    batch: Annotated[
        int, _option("Tasks with a score: trials that are drawn together and share the prefills.", SEARCH)
    ] = 5,
    keep_gib: Annotated[
        float, _option("fidelity: GiB for prefills that all trials share; the others are computed each time.", SEARCH)
    ] = 4.0,
    model: Annotated[str, _option("Model, see list models.", DATA)] = "smollm2-135m",
    lengths: Annotated[str, _option("needle, fidelity: prompt lengths in tokens.", DATA)] = "2048",
    continuation: Annotated[int, _option("fidelity: tokens compared behind a prompt.", DATA)] = 64,
    text: Annotated[
        str | None, _option("fidelity: a text file, JSON lines, or sentences. Default: Python's reference texts.", DATA)
    ] = None,
    text_field: Annotated[str, _option("fidelity: field with the text in JSON lines.", DATA)] = "text",
    haystack: Annotated[str | None, _option("needle: text file to hide the number in.", DATA)] = None,
    data_dir: Annotated[str | None, _option("Folder with local rows instead of a download.", DATA)] = None,
    prefill_chunk: Annotated[int | None, _option("Tokens of a prompt read in one forward. Default: all.", DATA)] = None,
    max_length: Annotated[int | None, _option("Longest prompt plus answer. Default: the context.", DATA)] = None,
    device: Annotated[str, _option("auto, cpu, cuda, cuda:1, mps.", DATA)] = "auto",
    dtype: Annotated[str, _option("auto (bfloat16), float32, bfloat16, float16.", DATA)] = "auto",
    seed: Annotated[int, _option("Of the split and of what trials draw.", SEARCH)] = 0,
    outdir: Annotated[
        Path | None,
        _option("Folder of the study, or of one to be continued. Default: runs/TIME-tune.", OUTPUT, show_default=False),
    ] = None,
    fresh: Annotated[bool, _option("Forget an earlier study in the folder.", OUTPUT, "--fresh")] = False,
) -> None:
    """Search for settings of a method; writes a preset for run and says what it is worth on held-out documents.

    All trials share the prefills. The first trial has the method's own settings.

    [bold]arkv-bench tune --cache-size 512[/bold]
    [bold]arkv-bench tune --tasks fidelity,needle --cache-ratio 0.25 --budget-unit bytes --outdir runs/tuned[/bold]
    [bold]arkv-bench run --preset runs/tuned/preset.yaml --tasks longbench[/bold]
    """
    given = locals()
    own = ("n_trials", "params", "held_out", "chunk", "batch", "keep_gib", "fresh")
    from bench.runs.kinds import SEARCH, claim, new_folder
    from bench.settings.run import parse_value, resolve

    run, _ = resolve({name: value for name, value in given.items() if name not in own}, None)

    from bench.search.config import TuneConfig

    config = TuneConfig(
        run=run,
        params=None if params is None else tuple(parse_value("quant_type", params)),
        n_trials=n_trials,
        held_out=held_out,
        chunk=chunk,
        batch=batch,
        keep_gib=keep_gib,
    )
    if run.outdir is not None:
        claim(run.outdir, SEARCH)
    _tune(config, run.outdir or new_folder("tune"), fresh=fresh)


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
    config.configs({})
    console = Console()
    console.print(f"Loading {escape(config.run.model[0])} ...", highlight=False)
    run = config.run
    model = load(run.model[0], dtype=run.dtype, device=run.device)
    objective = Objective(config, model, load_splits(config, model))
    settings = fingerprint(config, model, objective.splits)
    with Study(folder, settings, objective.directions, seed=run.seed, fresh=fresh) as study:
        try:
            if done := len(study.trials):
                _say(console, f"{done} of {config.n_trials} trials are in {folder} already")
            with ProgressReporter(console, "tune", max(config.n_trials, done), done, unit="trials") as progress:
                search(study, objective, progress.advance)
            chosen = study.chosen()
            write_trials(study, config.searched)
            documents = sum(len(item.held_out) for item in objective.splits)
            with ProgressReporter(console, "held-out", documents, unit="documents") as progress:
                verdicts = judge(objective, chosen.params, progress.advance)
        except KeyboardInterrupt:
            message = f"stopped after {len(study.trials)} of {config.n_trials} trials: the same command with --outdir "
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
            prompts = f"{len(objective.fidelity.not_kept)} prompts did not fit --keep-gib={config.keep_gib:g}"
            _say(console, f"{prompts}: they were computed for every trial")
        _say(console, f"wrote {preset}: arkv-bench run --preset {preset}")


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
    base = config.base(0)
    for name in config.searched:
        table.add_row(name, _shown(getattr(base, name)), _shown(chosen.params.get(name, getattr(base, name))))
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
