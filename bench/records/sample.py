"""A line of ``samples.jsonl``: what one cell answered to one document, and what that cost."""

from __future__ import annotations

import json
from dataclasses import asdict, field, fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bench.records.files.validation import said
from tasks.base import Answer, Compared, Generated, LogLikelihoods, Scored

Key = tuple[str, str, str, str, str]
"""Model, task, document, hash of what was asked, cell: what a sample answers."""
Kind = Literal["generated", "scored", "compared", "none"]
Place = Literal["after", "before", "inside"]
"""Where a question stood: behind the compressed context; by choice before compression, inside the prompt; or inside it
because its task tells no question from a context."""

LARGEST = 2**63 - 1
"""Of whole numbers, so that each of them can be held in 8 bytes."""
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Amount = Annotated[float, Field(ge=0)]

SOURCE = "source"
"""Where ``info`` says what a document is made of."""
REMEDY = "remove the line to have it measured again"
_CONFIG = ConfigDict(allow_inf_nan=False)


def repeated_as(document: str, repeat: int) -> str:
    """The id of a document's sampled answer: its own for the first one."""
    return document if repeat == 1 else f"{document}~{repeat}"


def own_id(document: str, repeat: int | None) -> str:
    """The id that a document of one repeat has within its task."""
    return document if repeat is None or repeat == 1 else document.removesuffix(f"~{repeat}")


class NotFinite(ValueError):
    """A sample with NaN or infinity in it, which JSON does not know, or with a value that makes no sense."""


@dataclass(kw_only=True, slots=True, config=_CONFIG)
class Measured:
    """What a run keeps of a sample in memory, :mod:`packed <bench.records.packed>`: everything but the answer itself,
    which is read from the file.

    Quantities are explained where they are measured, in :class:`bench.engine.engine.Measurement`.
    """

    model: str
    task: str
    document: str
    prompt_sha256: str
    """Of everything that was asked, shortened."""
    cell: str
    method: str
    quant_format: str | None
    budget_unit: str | None
    cache_size: int | None
    cache_ratio: float | None
    window_size: int | None
    score: float | None
    """By the task's first metric; None for a score that one document cannot have."""
    scores: dict[str, float | None]
    truncated: bool
    prompt_tokens: Count
    generated_tokens: Count
    scored_tokens: Count
    prefills: Count
    tokens_seen: Count
    tokens_original: Amount
    tokens_quantized: Amount
    tokens_evicted: Amount
    kv_bytes: Count
    kv_bytes_peak: Count
    full_kv_bytes: Count
    prefill_s: Amount
    compress_s: Amount | None
    ttft_ms: Amount | None
    decode_s: Amount
    tpot_ms: Amount | None
    decode_tokens_per_s: Amount | None
    peak_memory_bytes: Count | None
    question: Place | None = None
    """Where the question stood; None where there is none, and before it was written down: inside the prompt."""
    context_tokens: Count | None = None
    """Tokens that were compressed; None before it was written down: all of the prompt's."""
    question_s: Amount | None = None
    answers: Count | None = None
    """Generated in turn, of which each one's first token belongs to its question; None before it was written down: one.
    """
    ragged_kv_bytes: Count | None = None
    """Of methods that mask tokens of single heads; None of all others, and in files written before it was known."""
    repeat: Annotated[int, Field(ge=1)] | None = None
    """Which of a document's sampled answers it is; None of one that is not sampled."""
    start: int | None = None
    """Which of the record's starts it was measured in; None before format 2."""
    kind: Kind = field(init=False, default="none")
    """Of the answer; a baseline has none. Not a part of the line."""
    source: str | None = field(init=False, default=None)
    """What the document is made of, as its ``info`` says under ``source``: documents of one source are not independent.
    Not a part of the line."""
    place: int = field(init=False, default=-1, repr=False, compare=False)
    """Byte of the file that the line begins at; -1 where it is in none. Not a part of the line."""

    @property
    def key(self) -> Key:
        """What it answers."""
        return self.model, self.task, self.document, self.prompt_sha256, self.cell

    @property
    def own_id(self) -> str:
        """The document's id within its task, the same for all its repeats."""
        return own_id(self.document, self.repeat)


@dataclass(kw_only=True, slots=True, config=_CONFIG)
class Sample(Measured):
    """The whole line."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    """Of what was generated, as is ``text``."""
    token_texts: tuple[str, ...] | None = None
    """What each of these tokens adds to everything that was generated; None before format 3."""
    turns: tuple[str, ...] | None = None
    """Of ``text`` the answers one by one, where there were several questions in turn."""
    log_likelihoods: tuple[Scored, ...] | None = None
    """Of the continuations or windows that were scored."""
    compared: Compared | None = None
    """With the full cache, token by token."""
    reference: Any = None
    info: dict[str, Any] = field(default_factory=dict)
    """Of the document, as its task made it."""
    oq_ratios: list[float] = field(default_factory=list)
    """Per compressible layer, where the method uses them."""

    def __post_init__(self) -> None:
        if (self.text is None) != (self.token_ids is None):
            raise ValueError("text and token_ids belong together")
        if self.token_texts is not None and len(self.token_texts) != len(self.token_ids or ()):
            raise ValueError("token_texts has a text for each of token_ids")
        if (source := self.info.get(SOURCE)) is not None:
            self.source = str(source)
        if self.text is not None:
            self.kind = "generated"
        elif self.compared is not None:
            self.kind = "compared"
        elif self.log_likelihoods is not None:
            self.kind = "scored"

    @property
    def answer(self) -> Answer:
        """The answer. Raises :class:`ValueError` for a line of a baseline, which holds none."""
        if self.text is not None and self.token_ids is not None:
            return Generated(text=self.text, token_ids=self.token_ids, turns=self.turns or ())
        if self.compared is not None:
            return self.compared
        if self.log_likelihoods is not None:
            return LogLikelihoods(scored=self.log_likelihoods)
        raise ValueError("a sample without an answer")


def _has_answer(sample: Sample) -> Sample:
    if sample.kind == "none":
        raise ValueError("holds no answer")
    return sample


LINE = tuple(item.name for item in fields(Sample) if item.init)
"""The fields of a line, in their order."""
SAMPLE: TypeAdapter[Sample] = TypeAdapter(Sample)
ANSWERED: TypeAdapter[Sample] = TypeAdapter(Annotated[Sample, AfterValidator(_has_answer)])
"""Reads a line, and one that must hold an answer."""


def make_sample(**values: Any) -> Sample:
    """A sample of what has been measured. Raises :class:`NotFinite`."""
    try:
        return Sample(**values)
    except ValidationError as error:
        name, problem = said(error)
        if any(item["type"] == "finite_number" for item in error.errors(include_url=False)):
            raise NotFinite("the answer holds numbers that are not finite") from None
        raise NotFinite(f"{name}: {problem}") from None


def sample_line(sample: Sample, digits: int | None = None) -> str:
    """The line of a sample, without its end.

    Args:
        digits: significant ones of every float; None writes what reads back as the same number.

    Raises:
        ValueError, TypeError: it holds what JSON cannot, such as a number that is not finite.
    """
    content = {name: getattr(sample, name) for name in LINE}
    content["compared"] = None if sample.compared is None else asdict(sample.compared)
    return json.dumps(_rounded(content, digits), ensure_ascii=False, allow_nan=False)


def _rounded(value: Any, digits: int | None) -> Any:
    if digits is None:
        return value
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    return [_rounded(item, digits) for item in value] if isinstance(value, list) else value


def source_of(sample: Measured) -> tuple[str, str]:
    """What tells documents that are not independent: the same for those of one source."""
    return sample.task, sample.document if sample.source is None else f"source {sample.source}"
