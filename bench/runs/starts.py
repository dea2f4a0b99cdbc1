"""The starts of a run: what each ran on, and which of them may share a time.

A run that is continued must give the answers that it would have given in one go: what can change an answer is a part of
its fingerprint, and refused. What can only change times, such as other hardware, threads or batches, makes another
*start* of the same run: the record lists them, each sample names its own, and no time is taken over several that
differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from bench.methods.grid import Cell
from bench.models.inputs import input_hashes
from bench.models.loading import DescribedModel
from bench.runs import folder as records
from bench.runs.kept import choice_of
from bench.runs.order import order_text
from bench.settings.run import RunConfig

ANSWERING = ("arkv/", "tasks/", "bench/engine/", "bench/methods/", "bench/models/", "bench/harness/", "bench/extend.py")
"""The project's own source that makes prompts, answers and scores; the rest is about what becomes of them."""
VERSIONS = ("arkv-bench", "torch", "transformers", "tokenizers", "lm-eval")
"""Packages that every answer goes through."""
ENVIRONMENT = ("python", "platform", "packages", "hardware", "commit", "dirty")
"""What a record says of the newest start beside its list of them."""
LIBRARIES = {"kvpress:": ("kvpress",), "hf:": ("optimum-quanto", "hqq")}
"""Packages that only some methods need, by how the names of these begin."""


def code_sha256() -> str:
    """Of the source that answers are made by: a commit that leaves it alone changes none."""
    return records.source_sha256(ANSWERING)


def library_versions(cells: Iterable[Cell]) -> dict[str, str]:
    """Versions of the libraries whose methods are asked for."""
    asked = {cell.method for cell in cells}
    needed = [
        name for begin, names in LIBRARIES.items() if any(item.startswith(begin) for item in asked) for name in names
    ]
    found = {}
    for name in needed:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def made_by(models: Mapping[str, DescribedModel], cells: Iterable[Cell]) -> dict[str, Any]:
    """What answers are made by, as far as no setting says it: a part of the fingerprint."""
    return {
        records.CODE: code_sha256(),
        records.INPUTS: {
            f"{name}/{file}": sha256
            for name, model in models.items()
            for file, sha256 in input_hashes(model.folder).items()
        },
        records.LIBRARIES: library_versions(cells),
    }


def loaded_as(facts: Mapping[str, str]) -> str:
    """Precision and kind of device of a loaded model, for a person: answers in another one differ."""
    return f"{facts['dtype']} on {facts['device'].partition(':')[0]}"


def loaded_before(name: str, previous: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is known of a model once it is loaded, as the run that is continued had it."""
    known = (previous or {}).get("models", {}).get(name, {})
    facts = {"dtype": known.get("dtype"), "device": known.get("device")}
    return facts | {key: known[key] for key in ("warm_up", "one_by_one") if key in known}


def new_start(config: RunConfig, started: str) -> dict[str, Any]:
    """What the record keeps of a start: when, how and on what."""
    return {
        "started": started,
        "finished": None,
        "command": records.command_line(),
        **records.environment(),
        "source_sha256": records.source_sha256(),
        "batch_size": config.batch_size,
        "executor": config.executor,
        "cell_order": order_text(config.documents_at_once),
        "choice": choice_of(config),
    }


def earlier_starts(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The starts that a record lists; of an older one, that its run had one."""
    if "starts" in record:
        return list(record["starts"])
    return [{name: record.get(name) for name in ("started", "finished", "command", *ENVIRONMENT)}]
