"""What a search leaves in its folder: trials, held-out documents, a preset for ``run``, a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from bench.methods.variants import BASE, NAME
from bench.models.loading import LoadedModel
from bench.names import FULL
from bench.records.files.csv_ import csv_text
from bench.records.files.json_ import json_text
from bench.records.files.text import write_atomic
from bench.runs import folder as records
from bench.search.config import TuneConfig
from bench.search.objective import Objective
from bench.search.study import ERROR, HELD_OUT, PRESET, RECORD, TRIALS, Study
from bench.search.verdict import Verdict


def write_trials(study: Study, names: Sequence[str]) -> None:
    """``trials.csv``: a line per trial."""
    columns = ["trial", *study.directions, *names, "seconds", ERROR]
    lines = []
    for trial in study.trials:
        values = {} if trial.values is None else dict(zip(study.directions, trial.values, strict=True))
        lines.append({"trial": trial.number, **values, **trial.params, **trial.user_attrs})
    write_atomic(study.folder / TRIALS, csv_text(columns, lines, digits=None))


def write_held_out(folder: Path, verdicts: Sequence[Verdict]) -> None:
    """``heldout.csv``: a line per document and budget."""
    lines = [
        {"task": verdict.task, "metric": verdict.metric, "budget": verdict.budget, "document": document}
        | {"full": full, "own": own, "tuned": tuned}
        for verdict in verdicts
        for document, full, own, tuned in zip(verdict.documents, verdict.full, verdict.own, verdict.tuned, strict=True)
    ]
    columns = ["task", "metric", "budget", "document", "full", "own", "tuned"]
    write_atomic(folder / HELD_OUT, csv_text(columns, lines, digits=None))


def write_preset(config: TuneConfig, found: Mapping[str, Any], description: str, folder: Path) -> Path:
    """``preset.yaml``: model, method, budgets and the settings found, for ``arkv-bench run --preset``."""
    run = config.run
    own = config.method in config.own
    tuned: Any = {NAME: f"{config.method}-tuned", BASE: config.method, **found} if own else config.method
    content: dict[str, Any] = {
        "description": description,
        "model": run.model[0],
        "methods": [FULL, tuned],
        "budget-unit": run.budget_unit,
        **({"cache-ratio": list(run.cache_ratio)} if run.cache_ratio else {"cache-size": list(run.cache_size)}),
        **({"window-size": run.window_size[0]} if run.window_size else {}),
        **({} if run.quant_format is None else {"quant-format": list(run.quant_format)}),
    }
    settings = {**run.method_settings, **({} if own else found)}
    content |= {name.replace("_", "-"): value for name, value in settings.items() if name != "budget_unit"}
    path = folder / PRESET
    write_atomic(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000))
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
        "settings": config.run.to_json(),
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
                **{name: getattr(verdict, name) for name in ("task", "metric", "budget", "words")},
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
    write_atomic(study.folder / RECORD, json_text(record))
