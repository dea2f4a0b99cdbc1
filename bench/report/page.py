"""One self-contained HTML page about one or more runs: the answer in words, tables, figures, failures, the records."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bench.costs.speed import Timing, summarize
from bench.engine.inspect import read_maps
from bench.errors import UserError
from bench.judge.comparison import by_budget, not_exercised
from bench.names import FULL, SPEED, budget_text
from bench.report import averages
from bench.report.figures import (
    Figure,
    curve_figure,
    file_name,
    oq_figure,
    score_figure,
    share_figure,
    speed_figure,
    states_figure,
    time_figure,
)
from bench.report.speed import COLUMNS as SPEED_COLUMNS
from bench.report.speed import LEGEND as SPEED_LEGEND
from bench.report.speed import read_timings
from bench.report.tables import (
    EVERYTHING,
    LEGEND,
    STACKED,
    STATES,
    TPOT,
    TTFT,
    Column,
    Row,
    compare,
    detectable,
    headline,
    printable,
    read_results,
)
from bench.runs.folder import DATA, RECORD, RESULTS, SAMPLES, read_record, read_samples

BUDGET, METHOD, SCORE, DIFFERENCE, _P, SHARE, *_OTHERS = STACKED
AGAINST_FULL = next(column for column in EVERYTHING if column.header == "against full")
FIGURED = 40
"""Comparisons that get figures: more would make the page too large for a phone, and nobody looks at more."""
SHARED = 12
"""Comparisons that get a figure of time and memory shares, for the same reason."""
MAPS = 6
"""States maps that are drawn: each takes some 60 kB."""
READ = ("model", "task", "document", "prompt_sha256", "cell", "truncated", "oq_ratios")
"""What the page takes from a sample."""
LISTED = 50
"""Cut documents that are named one by one."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a folder of ``run``, ``speed`` or ``inspect`` holds; what it lacks is None or empty."""

    name: str
    rows: list[Row] = field(default_factory=list)
    record: Mapping[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    maps: list[dict[str, Any]] = field(default_factory=list)
    """States maps, see :func:`bench.engine.inspect.read_maps`."""

    @property
    def is_run(self) -> bool:
        """The folder is one of ``arkv-bench run``, begun at least."""
        return bool(self.rows or self.samples)

    def fingerprint(self, name: str, key: str) -> Any:
        """A part of the record's fingerprint; None where it is unknown."""
        return ((self.record or {}).get("fingerprint", {}).get(name) or {}).get(key)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in the order given, each with a name of its own.

    Raises:
        UserError: a folder with nothing to report, or a damaged file in it.
    """
    names = [path.resolve().name for path in paths]
    runs: list[Run] = []
    for path, name in zip(paths, names, strict=True):
        unique = name if names.count(name) == 1 else str(path)
        if any(run.name == printable(unique) for run in runs):
            continue
        timings = read_timings(path / SPEED) if (path / SPEED).is_file() else []
        maps = read_maps(path)
        samples = _samples(path / SAMPLES)
        # A run that was killed early has no results yet; folders of other commands never have.
        has_results = (path / RESULTS).is_file() or not (samples or timings or maps)
        runs.append(
            Run(
                name=printable(unique),
                rows=read_results(path) if has_results else [],
                record=_record(path, is_speed=bool(timings)),
                samples=samples,
                timings=timings,
                maps=maps,
            )
        )
    return runs


def _record(path: Path, *, is_speed: bool) -> Mapping[str, Any] | None:
    file = path / RECORD
    if not file.is_file():
        return None
    if not is_speed:
        return read_record(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{file} is not the record of arkv-bench speed")
    return content


def _samples(file: Path) -> list[dict[str, Any]]:
    samples = read_samples(file)
    for sample in samples:
        missing = [name for name in READ if not isinstance(sample, dict) or name not in sample]
        if missing:
            raise UserError(f"{file}: a sample has no {missing[0]!r}; the run's own command measures what is missing")
    return samples


# --- Which runs may be compared ---


def difference(first: Run, second: Run, model: str, task: str) -> str | None:
    """Why scores of the two on a model's task must not be compared; None where nothing speaks against it."""
    for what, part, key in (("fingerprint of the model", "models", model), ("hash of the data", DATA, task)):
        mine, other = first.fingerprint(part, key), second.fingerprint(part, key)
        if mine and other and mine != other:
            return f"another {what} ({mine[:12]}… and {other[:12]}…)"
    if not first.samples or not second.samples:
        return None
    mine, other = _prompts(first, model, task), _prompts(second, model, task)
    if not mine or not other:
        return None
    if mine.keys() != other.keys():
        return f"other documents ({len(mine)} and {len(other)}, {len(mine.keys() & other.keys())} in both)"
    changed = sum(mine[document] != other[document] for document in mine)
    return f"other prompts for {changed} of {len(mine)} documents" if changed else None


def _prompts(run: Run, model: str, task: str) -> dict[str, str]:
    return {
        sample["document"]: sample["prompt_sha256"]
        for sample in run.samples
        if sample["model"] == model and sample["task"] == task
    }


def comparable(runs: Sequence[Run], model: str, task: str) -> tuple[list[list[Run]], list[str]]:
    """The runs with rows of a model's task, in sets that may be compared, and a sentence for each that may not."""
    having = [run for run in runs if any((row["model"], row["task"]) == (model, task) for row in run.rows)]
    sets: list[list[Run]] = []
    warnings = []
    for run in having:
        reasons = [(together[0], difference(together[0], run, model, task)) for together in sets]
        place = next((number for number, (_, reason) in enumerate(reasons) if reason is None), None)
        if place is not None:
            sets[place].append(run)
            continue
        sets.append([run])
        warnings += [
            f"{other.name} and {run.name} must not be compared on {task}, {model}: {reason}."
            for other, reason in reasons
        ]
    return sets, warnings


# --- The answer in words ---


def _named(row: Row) -> str:
    return " ".join(filter(None, (row["method"], row["quant_format"])))


def _scored(row: Row) -> str:
    return SCORE.cell(row).replace("\n", " ")


def _list(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} and {unique[-1]}"


def _against(row: Row) -> str:
    said = AGAINST_FULL.cell(row)
    if not said:
        return "not compared with full"
    shown = DIFFERENCE.cell(row).replace("\n", " ")
    return f"{said} from full ({shown})" if said.startswith("not ") else f"{said.replace(',', ' than full,')} ({shown})"


def budget_sentences(rows: Sequence[Row]) -> list[str]:
    """A sentence per budget: who is best, with the interval, and who cannot be told from it.

    Args:
        rows: of one run, model, task and metric.
    """
    sentences = []
    for group in by_budget(rows):
        if group[0]["method"] == FULL:
            continue
        budget = budget_text(*(group[0][name] for name in ("budget_unit", "cache_size", "cache_ratio")))
        where = f"At {budget}" if budget else "Of one size whatever the budget"
        playing = [row for row in group if not not_exercised(row)]
        if not playing:
            sentences.append(f"{where}, every prompt fits: nothing was compressed, so no method was put to the test.")
            continue
        sign = 1 if playing[0]["higher_is_better"] else -1
        best = max(playing, key=lambda row: sign * row["score"])
        tops = [row for row in playing if row["score"] == best["score"]]
        if len(playing) == 1:
            sentences.append(f"{where}, {_named(best)} scores {_scored(best)}: {_against(best)}.")
        elif any(row["leading"] for row in playing):
            equal = [_named(row) for row in playing if row["leading"] and row is not best]
            behind = [_named(row) for row in playing if not row["leading"]]
            also = f"not distinguishable from it: {_list(equal)}; " if equal else ""
            sentences.append(
                f"{where}, {_named(best)} is best with {_scored(best)}, {_against(best)}; "
                f"{also}behind: {_list(behind)}."
            )
        else:
            verb = "scores highest" if sign > 0 else "scores lowest (best)"
            names = _list([_named(row) for row in tops])
            if len(tops) > 1:
                verb = verb.replace("scores", "score")
            sentences.append(
                f"{where}, no method can be told from the best: {names} {verb} with {_scored(best)}, {_against(best)}."
            )
    return sentences


def answer(run: Run) -> str:
    """The paragraph on top: each task's first metric, budget by budget; a count of leaders where there are many."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in headline(run.rows):
        mine = groups.setdefault((row["model"], row["task"]), [])
        if not mine or row["metric"] == mine[0]["metric"]:
            mine.append(row)
    if not groups:
        return "No task has ended yet: there is nothing to compare."
    if len(groups) > 2:
        return " ".join(_counts(groups))
    sentences = []
    for (model, task), rows in groups.items():
        full = next((row for row in rows if row["method"] == FULL), None)
        what = f"{task} ({rows[0]['metric']}, {model}, n={max(row['n'] for row in rows)})"
        said = f"the full cache scores {_scored(full)}" if full else "the full cache was not measured"
        sentences += [f"On {what}, {said}.", *budget_sentences(rows)]
        sentences += [f"{text[0].upper()}{text[1:]}." for text in detectable(rows)]
    return " ".join(sentences)


def _counts(groups: Mapping[tuple[str, str], Sequence[Row]]) -> list[str]:
    """Over many tasks: how often each method leads a budget, and how often it is distinguishable from full."""
    budgets: dict[str, list[list[Row]]] = {}
    for rows in groups.values():
        for group in by_budget(rows):
            if group[0]["method"] != FULL:
                first = group[0]
                text = budget_text(first["budget_unit"], first["cache_size"], first["cache_ratio"])
                budgets.setdefault(text, []).append([row for row in group if not not_exercised(row)])
    sentences = [f"{len(groups)} comparisons of a model on a task, each by its first metric."]
    for budget, found in budgets.items():
        where = f"At {budget}" if budget else "Of one size whatever the budget"
        told = [group for group in found if any(row["leading"] for row in group)]
        leads = _tally([_named(row) for group in told for row in group if row["leading"]])
        worse = _tally([_named(row) for group in found for row in group if AGAINST_FULL.cell(row).startswith("worse")])
        empty = sum(not group for group in found)
        said = f"best, or not distinguishable from the best, {leads}; " if told else ""
        undecided = len(found) - len(told) - empty
        sentences.append(
            f"{where}: {said}no method can be told from the best in {undecided} of {len(found)}"
            + (f", nothing was compressed in {empty}" if empty else "")
            + f"; worse than full beyond doubt: {worse or 'none'}."
        )
    return sentences


def _tally(names: Sequence[str]) -> str:
    return ", ".join(f"{name} in {names.count(name)}" for name in dict.fromkeys(names))


# --- Sections ---


@dataclass(frozen=True)
class Cell:
    """A cell of a table on the page: lines, and what its column is sorted by."""

    lines: list[str]
    order: str | float | None


@dataclass(frozen=True)
class Line:
    """A row of a table on the page."""

    cells: list[Cell]
    leading: bool
    exercised: bool
    first: bool
    """Of its budget."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A comparison on the page."""

    title: str
    anchor: str
    headers: list[tuple[str, bool]]
    """With whether the column stands on the left."""
    lines: list[Line]
    notes: list[str]
    figures: list[Figure] = field(default_factory=list)


def _value(name: str) -> Callable[[Row], Any]:
    return lambda row: row[name]


ORDERED: tuple[tuple[Column, Callable[[Row], Any]], ...] = (
    (BUDGET, lambda row: row["cache_ratio"] if row["cache_ratio"] is not None else row["cache_size"]),
    (METHOD, lambda row: _named(row).casefold()),
    (SCORE, _value("score")),
    (DIFFERENCE, _value("difference")),
    (AGAINST_FULL, _value("p_holm")),
    (SHARE, _value("kv_bytes_mean")),
    (STATES, _value("original_share")),
    (TTFT, _value("ttft_ms")),
    (TPOT, _value("tpot_ms")),
)
"""The columns of the page, and by what each is sorted."""
RUN = Column("run", lambda row: row["run"], left=True)


def _sections(runs: Sequence[Run]) -> tuple[list[Section], list[str]]:
    """The comparisons, and why some of the runs must not be compared."""
    sections: list[Section] = []
    warnings: list[str] = []
    keys = dict.fromkeys((row["model"], row["task"]) for run in runs for row in headline(run.rows))
    for model, task in keys:
        sets, reasons = comparable(runs, model, task)
        warnings += reasons
        for together in sets:
            several = len(together) > 1
            rows = [
                {**row, "run": run.name if several else None}
                for run in together
                for row in run.rows
                if (row["model"], row["task"]) == (model, task)
            ]
            suffix = f", {together[0].name}" if len(sets) > 1 else ""
            samples = [
                sample
                for run in together
                for sample in run.samples
                if sample["model"] == model and sample["task"] == task
            ]
            sections += _of_task(rows, samples, suffix, several, len(sections))
    return sections, warnings


def _of_task(
    rows: Sequence[Row], samples: Sequence[Mapping[str, Any]], suffix: str, several: bool, done: int
) -> list[Section]:
    """One section per metric of a model's task; times and ratios stand with the first."""
    sections: list[Section] = []
    columns = [*ORDERED[:2], (RUN, _value("run")), *ORDERED[2:]] if several else list(ORDERED)
    columns = [item for item in columns if any(item[0].cell(row) for row in rows)]
    for comparison in compare(rows):
        mine = list(itertools.chain.from_iterable(comparison.groups))
        name = f"{done + len(sections) + 1:02d}-{file_name(mine[0]['task'], mine[0]['metric'])}"
        notes = list(comparison.notes)
        if several:
            notes.append("differences, p-values and bold are within each run; nothing is tested from run to run")
        figures: list[Figure | None] = []
        if done + len(sections) < FIGURED:
            figures.append(score_figure(name, mine))
            if not sections:
                figures.append(time_figure(f"{name}-time", mine))
                if done < SHARED:
                    figures.append(share_figure(f"{name}-shares", mine, samples))
                figures.append(oq_figure(f"{name}-oq", mine, samples))
                figures.append(curve_figure(f"{name}-curve", mine, samples))
        sections.append(
            Section(
                title=comparison.title + suffix,
                anchor=f"table-{name}",
                headers=[(column.header.replace("\n", " "), column.left) for column, _ in columns],
                lines=[
                    Line(
                        cells=[Cell(column.cell(row).split("\n"), order(row)) for column, order in columns],
                        leading=bool(row["leading"]),
                        exercised=not not_exercised(row),
                        first=place == 0,
                    )
                    for group in comparison.groups
                    for place, row in enumerate(group)
                ],
                notes=notes,
                figures=[figure for figure in figures if figure is not None],
            )
        )
    return sections


def _speed_sections(runs: Sequence[Run]) -> tuple[list[Section], list[str]]:
    """A section for each model and machine that was timed, and why timings must not be compared."""
    sets: dict[str, list[Run]] = {}
    for run in runs:
        if run.timings:
            record = run.record or {}
            where = {"model": record.get("model"), "hardware": record.get("hardware")}
            # Timings without a record may be of anything.
            sets.setdefault(json.dumps(where, sort_keys=True) if run.record else run.name, []).append(run)
    sections = []
    for number, together in enumerate(sets.values(), start=1):
        names = ", ".join(run.name for run in together)
        model = ((together[0].record or {}).get("model") or {}).get("name", "unknown model")
        rows = [row for run in together for row in summarize(run.timings)]
        rows.sort(key=lambda row: (row["context_length"], row["cache_size"] or 0))
        lengths = [row["context_length"] for row in rows]
        sections.append(
            Section(
                title=f"Speed over context lengths, {printable(str(model))} ({names})",
                anchor=f"speed-{number}",
                headers=[(header.replace("\n", " "), header in ("method", "format")) for header, _ in SPEED_COLUMNS],
                lines=[
                    Line(
                        cells=[Cell([cell(row)], cell(row)) for _, cell in SPEED_COLUMNS],
                        leading=False,
                        exercised=True,
                        first=place == 0 or lengths[place - 1] != lengths[place],
                    )
                    for place, row in enumerate(rows)
                ],
                notes=list(SPEED_LEGEND),
                figures=[speed_figure(f"speed-{number}", rows)],
            )
        )
    named = [_list([run.name for run in together]) for together in sets.values()]
    warnings = [
        f"Timings of {first} and {second} must not be compared: another model, precision or machine, or none known."
        for first, second in itertools.combinations(named, 2)
    ]
    return sections, warnings


def _map_figures(runs: Sequence[Run]) -> tuple[list[Figure], int]:
    """States maps, those with Quantized tokens first, and how many are not drawn."""
    found = [(run, item) for run in runs for item in run.maps]
    found.sort(key=lambda pair: not any(map(any, pair[1]["map"].quantized)))
    figures = []
    for number, (run, item) in enumerate(found[:MAPS], start=1):
        what = f"{item['task']}, document {item['document']}, {item['model']}: {item['label']}"
        title = printable(f"{what} ({run.name})" if len(runs) > 1 else what)
        figures.append(states_figure(f"states-{number}-{file_name(str(item['cell']))}", item["map"], title))
    return figures, len(found) - len(figures)


def _problems(run: Run) -> list[str]:
    """What is missing, failed or was cut in a run."""
    said: list[str] = []
    record = run.record
    if not run.is_run:
        return said if record is not None or not run.timings else [f"no {RECORD}: what was timed is unknown"]
    if not run.rows:
        counts = _tally([f"{sample['task']}, {sample['cell']}," for sample in run.samples])
        said.append(f"no {RESULTS}: no task has ended; {SAMPLES} holds {len(run.samples)} answers: {counts}")
    if record is None:
        said.append(f"no {RECORD}: what made these results is unknown, and so is whether they may be compared")
    elif not record.get("finished"):
        said.append("the run has not ended: these are the results so far")
    if not run.samples:
        said.append(f"no {SAMPLES}: no ratios by layer, and prompts cannot be compared with those of other runs")
    for failure in (record or {}).get("failures", []):
        what = ", ".join(failure[name] for name in ("task", "model") if name in failure)
        said.append(f"failed: {what or 'plugin ' + failure['plugin']}: {failure['error']}")
    cut: dict[tuple[str, str], dict[str, None]] = {}
    for sample in run.samples:
        if sample["truncated"]:
            cut.setdefault((sample["task"], sample["model"]), {})[sample["document"]] = None
    for (task, model), documents in cut.items():
        more = "" if len(documents) <= LISTED else f" and {len(documents) - LISTED} more"
        named = ", ".join(list(documents)[:LISTED])
        said.append(
            f"{task}, {model}: {len(documents)} prompts were longer than the context or --max-length and were cut: "
            f"{named}{more}"
        )
    return said


# --- The page ---


@dataclass(frozen=True)
class Page:
    """The page and the figures on it."""

    html: str
    figures: list[Figure]


def render(template: str, title: str, **values: Any) -> str:
    """A page of its own from one of the templates; every value passes through autoescape."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bench.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The page's own files need no escaping.
    style, script = (Markup(_source(environment, name)) for name in ("page.css", "page.js"))
    return environment.get_template(template).render(
        title=title,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def build(runs: Sequence[Run]) -> Page:
    """The page of one or more runs."""
    sections, warnings = _sections(runs)
    speed, reasons = _speed_sections(runs)
    maps, undrawn = _map_figures(runs)
    figures = [*(figure for section in [*sections, *speed] for figure in section.figures), *maps]
    html = render(
        "page.html.j2",
        ", ".join(run.name for run in runs),
        runs=runs,
        answers={run.name: answer(run) for run in runs if run.is_run},
        warnings=[*warnings, *reasons],
        sections=[*sections, *speed],
        maps=maps,
        undrawn=undrawn,
        unfigured=max(len(sections) - FIGURED, 0),
        averages=[table for run in runs for table in averages.run_averages(run.rows)],
        averages_legend=averages.LEGEND,
        drawn={figure.name: Markup(figure.inline_svg()) for figure in figures},
        problems={run.name: _problems(run) for run in runs if run.is_run or _problems(run)},
        records={run.name: json.dumps(run.record, indent=2, ensure_ascii=False) for run in runs if run.record},
        left_out=sum(len(run.rows) - len(headline(run.rows)) for run in runs),
        legend=LEGEND,
    )
    return Page(html=html, figures=figures)


def _source(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
