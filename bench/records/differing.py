"""Everything that two runs do not share: what their answers and times may differ by, beside what was changed."""

from __future__ import annotations

from typing import Any, NamedTuple

from bench.records.record import ModelRecord, Record


class Term(NamedTuple):
    """Something that is one thing in a run and another in a second one; None where a record does not say."""

    name: str
    first: Any
    second: Any


def differing(first: Record, second: Record) -> list[Term]:
    """Precision, device, hardware, threads, versions and commit, where they differ."""
    terms = []
    for model in sorted(first.models.keys() & second.models.keys()):
        ours, others = first.models[model], second.models[model]
        terms += [
            Term(f"{what} of {model}", getattr(ours, what), getattr(others, what)) for what in ("dtype", "device")
        ]
    for mine, theirs in ((first.hardware, second.hardware), (first.packages, second.packages)):
        terms += [Term(name, mine.get(name), theirs.get(name)) for name in sorted({*mine, *theirs})]
    terms += [Term(name, getattr(first, name), getattr(second, name)) for name in ("python", "platform")]
    terms.append(Term("batch_size", first.settings.get("batch_size"), second.settings.get("batch_size")))
    terms.append(Term("commit", _commit(first), _commit(second)))
    return [term for term in terms if term.first != term.second]


def _commit(record: Record) -> str | None:
    if record.commit is None:
        return None
    return record.commit[:12] + (" with changes" if record.dirty else "")


ROUNDING_HARDWARE = ("cpu", "instructions", "cpu_kernel", "gpus")
"""What of the hardware decides how sums are rounded; a record that does not name the instructions is of others.
Cores and threads are not among it: with one and two threads the default model's logits were the same to the bit."""
ROUNDING_PACKAGES = ("torch", "transformers", "lm-eval", "kvpress", "optimum-quanto", "hqq")
"""What computes answers and scores beside the project itself, whose changes are what is looked for."""


def rounding(first: Record, second: Record) -> list[Term]:
    """The terms under which the same code need not give the same answers: another class of hardware, another version
    of a library, another precision. Unknown hardware is another one; a library that one of the two lacks is none."""
    found = []
    for model in sorted(first.models.keys() & second.models.keys()):
        ours, others = first.models[model], second.models[model]
        found += [Term(f"{what} of {model}", *_kinds(what, ours, others)) for what in ("dtype", "device")]
    if not first.hardware or not second.hardware:
        found.append(Term("hardware", first.hardware or None, second.hardware or None))
    else:
        found += [Term(name, first.hardware.get(name), second.hardware.get(name)) for name in ROUNDING_HARDWARE]
    found += [
        Term(name, first.packages[name], second.packages[name])
        for name in ROUNDING_PACKAGES
        if name in first.packages and name in second.packages
    ]
    return [term for term in found if term.first != term.second]


def _kinds(what: str, ours: ModelRecord, others: ModelRecord) -> tuple[str, str]:
    """``cuda:0`` and ``cuda:1`` are one kind of device."""
    first, second = (str(getattr(record, what)).partition(":")[0] for record in (ours, others))
    return first, second
