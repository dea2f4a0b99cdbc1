"""Sampled answers: several to each document, seeded, and what they come to.

Each answer is a document of its own for whatever answers, keeps and compares documents: the first with the document's
own id, the later ones with ``~2``, ``~3``, ... behind it. All have one source, the document, so that intervals are over
documents; and one prompt, so that they share its prefill and compression.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

from bench.records.sample import SOURCE, Measured, own_id, repeated_as
from bench.settings.run import RunConfig
from tasks.base import Document, Generate, Metric, Sampling, Task, TaskError


def repeated(config: RunConfig, task: Task, documents: Sequence[Document]) -> list[Document]:
    """The documents as ``--temperature`` and ``--repeats`` ask for them; those whose answers are not generated as they
    are. Raises :class:`TaskError` where ids of the task's own look like those of repeats."""
    if config.temperature is None:
        return list(documents)
    found = [
        _sampled(config, config.temperature, document, repeat)
        for document in documents
        for repeat in range(1, (config.repeats if isinstance(document.request, Generate) else 1) + 1)
    ]
    taken = {document.id for document in documents}
    if clash := next((item.id for item in found if (item.repeat or 1) > 1 and item.id in taken), None):
        raise TaskError(f"{task.name}: it has a document {clash!r}, which is the name of a repeat: give --repeats 1")
    return found


def _sampled(config: RunConfig, temperature: float, document: Document, repeat: int) -> Document:
    request = document.request
    if not isinstance(request, Generate):
        return document
    said = f"{config.seed}\n{document.id}\n{repeat}"
    # As many bits as JSON keeps in any reader.
    seed = int.from_bytes(hashlib.sha256(said.encode()).digest()[:6], "big")
    sampling = Sampling(temperature=temperature, top_p=config.top_p, seed=seed)
    return dataclasses.replace(
        document,
        id=repeated_as(document.id, repeat),
        request=dataclasses.replace(request, sampling=sampling),
        info={SOURCE: document.id, **document.info},
        repeat=repeat,
    )


def not_sampled(config: RunConfig, documents: Iterable[Document]) -> str:
    """What becomes of ``--temperature`` where answers are not generated; empty where they are."""
    if config.temperature is None or any(document.repeat is not None for document in documents):
        return ""
    return f"--temperature {config.temperature:g}: the task generates no answers, and is asked once, as it is"


def questions(documents: Iterable[Document]) -> int:
    """How many documents there are, whatever their repeats."""
    return len({own_id(document.id, document.repeat) for document in documents})


def complete(samples: Iterable[Measured]) -> list[Measured]:
    """Those of documents of which every repeat was answered."""
    found: dict[str, list[Measured]] = {}
    for sample in samples:
        found.setdefault(sample.own_id, []).append(sample)
    most = max(map(len, found.values()), default=0)
    return [sample for mine in found.values() if len(mine) == most for sample in mine]


def pass_metric(metric: Metric, repeats: int) -> Metric:
    """What says in how many documents any of so many answers is right."""
    return dataclasses.replace(metric, name=f"{metric.name} pass@{repeats}")


def best_of_repeats(samples: Iterable[Measured], metrics: Iterable[Metric], repeats: int) -> list[Measured]:
    """A sample for each document, whose scores are by :func:`pass_metric` the best ones of its repeats."""
    found: dict[str, list[Measured]] = {}
    for sample in samples:
        found.setdefault(sample.own_id, []).append(sample)
    best = []
    for name, mine in found.items():
        one = copy.copy(mine[0])
        one.document = name
        one.scores = {
            pass_metric(metric, repeats).name: pick(known)
            for metric in metrics
            if metric.binary and (known := [s for item in mine if (s := item.scores.get(metric.name)) is not None])
            for pick in (max if metric.higher_is_better else min,)
        }
        best.append(one)
    return best
