"""The suite from Python: a run as a function call, and what a run has left as tables.

::

    from bench import evaluate, load_run

    results = evaluate("smollm2-135m", ["needle"], ["full", "mix"], [0.25], budget_unit="bytes", samples=4)
    results.to_pandas()[["method", "score", "kv_share"]]

Everything that goes wrong is a :class:`bench.errors.UserError` of one line, as on the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.errors import UserError
from bench.names import SAMPLES
from bench.runs.kinds import new_folder, newest_run
from tasks.base import Task, TaskError, TaskGroup

if TYPE_CHECKING:
    import pandas
    from rich.console import Console

    from bench.gate.findings import Report
    from bench.models.loading import LoadedModel
    from bench.records.record import Record
    from bench.records.row import Row
    from bench.records.sample import Sample

LOADED_ALREADY = ("dtype", "device", "device_map", "model_kwargs", "trust_remote_code")
"""Settings about the loading of a model, which mean nothing for one that is loaded."""
HTML_WIDTH = 130
"""Characters of a table in a notebook."""


class Results:
    """What a run has left in its folder.

    In a notebook it shows itself as the tables that ``arkv-bench report`` prints.
    """

    def __init__(self, path: Path, rows: Sequence[Row], record: Record) -> None:
        self.path = path
        """The run folder."""
        self.rows = list(rows)
        """One for each model, task, metric and method: the lines of ``results.csv``."""
        self.record = record
        """Settings, versions, hardware, models and tasks."""

    @property
    def failures(self) -> list[str]:
        """What could not be measured and why, a line each; empty where all went well."""
        from bench.runs.failures import failure_lines

        return failure_lines([failure.model_dump(exclude_none=True) for failure in self.record.failures])

    def samples(self) -> Iterator[Sample]:
        """Every answer with its scores, bytes and times, read one by one; :class:`UserError` for a damaged line."""
        from bench.records.samples import Samples

        found = Samples(self.path / SAMPLES)
        yield from found.whole(found.values())

    def to_pandas(self, what: Literal["rows", "samples"] = "rows") -> pandas.DataFrame:
        """The rows, or the samples with a column ``scores.METRIC`` for each metric, as a data frame."""
        import pandas

        if what == "rows":
            return pandas.DataFrame([row.model_dump(exclude={"run"}) for row in self.rows])
        if what != "samples":
            raise UserError(f"to_pandas({what!r}): give 'rows' or 'samples'", exit_code=2)
        from dataclasses import asdict

        lines = []
        for sample in self.samples():
            line = asdict(sample)
            scores = line.pop("scores")
            lines.append({**line, **{f"scores.{name}": value for name, value in scores.items()}})
        return pandas.DataFrame(lines).drop(columns=["kind", "place"], errors="ignore")

    def table(self, *others: Results, console: Console | None = None, details: bool = False) -> None:
        """Print the answer and the comparison of each task, as ``arkv-bench report`` does; with those of other runs
        behind it.

        Args:
            details: every table, with all metrics, p-values and notes.
        """
        from rich.console import Console

        from bench.records.finished import Run
        from bench.records.shown import headline, run_names
        from bench.report.terminal import print_runs

        shown = [self, *others]
        names = run_names([results.path for results in shown])
        runs = [
            Run(name=name, rows=results.rows, record=results.record) for name, results in zip(names, shown, strict=True)
        ]
        print_runs(runs, [headline(run.rows) for run in runs], console or Console(), details=details)

    def compare(self, baseline: Results | str | Path, **tolerances: Any) -> Report:
        """Hold the run against another one, as ``arkv-bench check`` does, and print what was found.

        Args:
            baseline: results, or a folder of a run or a baseline.
            tolerances: fields of :class:`bench.gate.findings.Tolerances`.

        Raises:
            UserError: the two must not be compared.
        """
        from rich.console import Console

        from bench.gate.comparing import check
        from bench.gate.findings import Tolerances
        from bench.gate.reading import read
        from bench.gate.writing import lines, summary

        folder = baseline.path if isinstance(baseline, Results) else Path(baseline)
        report = check(read(self.path), read(folder), Tolerances(**tolerances))
        console = Console()
        for line in (*lines(report), summary(report)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return report

    def __repr__(self) -> str:
        failed = f", {len(self.failures)} failures" if self.failures else ""
        return f"<Results of {self.path}: {len(self.rows)} rows{failed}>"

    def _repr_html_(self) -> str:
        import io

        from rich.console import Console

        console = Console(record=True, width=HTML_WIDTH, file=io.StringIO(), force_jupyter=False)
        self.table(console=console)
        for line in self.failures:
            console.print(f"failed: {line}", markup=False, highlight=False)
        pre = '<pre style="white-space: pre; overflow-x: auto; line-height: normal">{code}</pre>'
        return console.export_html(inline_styles=True, code_format=pre)


def load_run(path: str | Path | None = None) -> Results:
    """The results of a run folder; of the newest run under ``runs`` where none is named.

    Raises:
        UserError: no run folder, or a file of it is damaged.
    """
    from bench.records.record import read_record
    from bench.records.row import read_results

    folder = newest_run() if path is None else Path(path)
    return Results(folder, read_results(folder), read_record(folder))


def evaluate(
    model: str | tuple[Any, Any] | Sequence[str],
    tasks: str | Task | TaskGroup | Sequence[str | Task | TaskGroup],
    methods: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    budgets: float | Sequence[float] | None = None,
    *,
    budget_unit: str | None = None,
    outdir: str | Path | None = None,
    fresh: bool = False,
    preset: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Results:
    """Compare cache methods on tasks, as ``arkv-bench run`` does; a run that was stopped goes on with the same call.

    Args:
        model: what ``--model`` takes, or ``(model, tokenizer)`` of transformers, loaded already.
        tasks: names, or tasks of your own.
        methods: names, or variants as mappings, ``{"name": "mix-equal", "base": "mix", "layer_budgets": "equal"}``;
            ``full``, the baseline, is measured beside them unless ``full=False``.
        budgets: whole numbers are tokens held per layer, fractions shares of each prompt; None is a quarter and an
            eighth.
        budget_unit: what a budget counts: by itself, shares are of the bytes and whole numbers tokens.
        outdir: the run folder. Default: ``runs/TIME``.
        fresh: forget what an earlier run left in the folder.
        preset: settings by name or from a YAML file, under those given here.
        quiet: show no progress.
        settings: any other setting of ``arkv-bench run``, by its name with underscores.

    What fails on the way is in :attr:`Results.failures`, and the rest is measured.

    Raises:
        UserError: what was asked for makes no sense, or nothing could be measured.
    """
    from rich.console import Console

    from bench.records.record import read_record
    from bench.records.row import read_results
    from bench.runs.run import execute
    from bench.settings.presets import resolve

    given_model = _given(model, settings)
    own = [task for task in _listed(tasks) if not isinstance(task, str)]
    flags = {
        **settings,
        "tasks": [task if isinstance(task, str) else task.name for task in _listed(tasks)],
        "model": [given_model.name] if given_model is not None else model,
        "methods": _listed(methods),
        "budget_unit": budget_unit,
        **_budgets(budgets),
    }
    with _one_line(), _evaluating(given_model):
        config, origin = resolve(flags, preset)
        path = Path(outdir) if outdir is not None else new_folder()
        outcome = execute(
            config,
            path,
            Console(quiet=quiet),
            fresh=fresh,
            origin=origin,
            own_tasks=own,
            own_models=() if given_model is None else (given_model,),
        )
        return Results(path, read_results(path) if outcome.rows else [], read_record(path))


def _given(model: Any, settings: Mapping[str, Any]) -> LoadedModel | None:
    """The model and tokenizer that were given as objects. Raises :class:`UserError` where settings contradict them."""
    if isinstance(model, str) or not isinstance(model, tuple) or all(isinstance(item, str) for item in model):
        return None
    if len(model) != 2:
        raise UserError("model: give a name, or a transformers model and its tokenizer", exit_code=2)
    if meaningless := [name for name in LOADED_ALREADY if settings.get(name) is not None]:
        raise UserError(f"{meaningless[0]}: the model is loaded already; load it as it shall be", exit_code=2)
    if settings.get("executor", "local") != "local":
        raise UserError("executor: a model that is loaded already stays in this process", exit_code=2)
    from bench.models.given import given

    return given(*model)


def _evaluating(model: LoadedModel | None) -> AbstractContextManager[None]:
    if model is None:
        return nullcontext()
    from bench.models.given import evaluating

    return evaluating(model.model)


@contextmanager
def _one_line() -> Iterator[None]:
    """Errors of tasks and of the library that say what is wrong are errors of the user's too."""
    from arkv import ConfigError

    try:
        yield
    except TaskError as error:
        raise UserError(str(error), exit_code=2 if error.usage else 1) from error
    except ConfigError as error:
        raise UserError(str(error), exit_code=2) from error


def _listed(values: Any) -> list[Any]:
    """One value is a list of one."""
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _budgets(budgets: Any) -> dict[str, Any]:
    """Budgets as settings. Raises :class:`UserError` for shares among tokens."""
    if budgets is None:
        return {}
    values = _listed(budgets)
    whole = [isinstance(value, int) and not isinstance(value, bool) for value in values]
    shares = [isinstance(value, float) for value in values]
    if values and all(whole):
        return {"cache_size": values}
    if values and all(shares):
        return {"cache_ratio": values}
    raise UserError(f"budgets={budgets!r}: give whole numbers (tokens per layer) or fractions (of each prompt)", 2)
