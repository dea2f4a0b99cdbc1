"""What a task is: documents, a request for each, and the score of an answer.

A task knows tokens, prompts and metrics. It knows nothing of caches or of how an answer is computed, so every
cache method is asked exactly the same thing.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from tasks.errors import TaskError as TaskError

if TYPE_CHECKING:
    from tasks.options import TaskOptions


Place = Literal["after", "before"]
"""Where a question stands: read through the compressed cache of its context, or a part of what is compressed."""


def missing_rows(data_dir: Path | None) -> str:
    """The reason of every task whose rows are not there."""
    if data_dir is None:
        return "their rows cannot be fetched from the hub: without a connection, give --data-dir"
    return f"no rows in --data-dir {data_dir}"


def draw(count: int, sampling_ratio: float, seed: int | str) -> list[int]:
    """Indices of the documents that ``sampling_ratio`` keeps of ``count``, ascending; the same for a seed."""
    if sampling_ratio == 1:
        return list(range(count))
    return sorted(random.Random(str(seed)).sample(range(count), max(1, round(sampling_ratio * count))))


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Everything a task may use to build its documents."""

    tokenizer: Any
    """A transformers tokenizer."""
    max_length: int
    """Longest prompt plus answer in tokens: the model's context, or the user's smaller limit."""
    model_type: str | None = None
    """The model's architecture as transformers calls it, such as ``llama``."""
    context_length: int | None = None
    """The model's context in tokens, where its config says it."""
    seed: int = 0
    limit: int | None = None
    """Use at most this many documents."""
    sampling_ratio: float = 1.0
    """Use this share of the documents, drawn with ``seed`` before ``limit`` is applied."""
    data_dir: Path | None = None
    """Local rows that stand in for a download."""
    question: Place = "before"
    """What a task that :attr:`Task.has_parts` makes of its prompts: context and question, or one prompt with both."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of one task, such as ``lengths`` of needle: those of its ``option_names``. None is the default."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise TaskError(f"limit must be at least 1, not {self.limit}", usage=True)
        if not 0 < self.sampling_ratio <= 1:
            raise TaskError(f"sampling_ratio must lie in (0, 1], not {self.sampling_ratio}", usage=True)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Tokens are drawn, not the most likely ones taken: as ``generate(do_sample=True)`` of transformers does."""

    temperature: float
    """What logits are divided by."""
    top_p: float | None = None
    """Drawn from the fewest tokens that have so much probability together; None is as the model's own settings have it.
    """
    seed: int
    """Of the draws of this answer."""


_IDS: dict[int, int] = {}


def _shared(ids: Sequence[int]) -> tuple[int, ...]:
    """The same tokens. Prompts share one object for each id, a fifth of the memory of ids of their own."""
    return tuple([_IDS.setdefault(token, token) if type(token) is int else token for token in ids])


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """Continuation of ``prompt_ids``, greedy or sampled, until a stop string, an end-of-sequence token or
    ``max_new_tokens``.

    With ``question_ids``, ``prompt_ids`` are a context: it alone is prefilled and compressed, the question is read
    through what is left of it, and the answer follows. Documents with equal contexts share prefill and compression.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    question_ids: tuple[int, ...] = ()
    """Tokens that are read behind the compressed context; none where the question is a part of the prompt."""
    question_tokens: int = 0
    """How many of the last tokens of the prompt are its question, where a method has to know; 0 is not told."""
    turns: tuple[tuple[int, ...], ...] = ()
    """Later questions: each is read behind the answer to the one before, through the same cache."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end the answer like the end-of-sequence token. Where there are any, the first token is none of them
    nor that one: an answer has at least one token, as with ``min_new_tokens=1`` in transformers."""
    think_end: str | None = None
    """What ends the model's thinking: the answer, and the search for stop strings, begin behind it."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Generation settings of transformers, laid over the model's own: see :mod:`tasks.generation`."""
    sampling: Sampling | None = None
    """None is greedy."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", _shared(self.prompt_ids))

    @property
    def input_ids(self) -> tuple[int, ...]:
        """All that is read before the first answer."""
        return self.prompt_ids + self.question_ids

    @property
    def prompt_tokens(self) -> int:
        """Length of all that is read but answers."""
        return len(self.prompt_ids) + len(self.question_ids) + sum(map(len, self.turns))


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A text to be scored behind a context, as token ids; neither is empty.

    With ``question_ids``, the context alone is compressed: the question is read through what is left of it.
    """

    context_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    question_ids: tuple[int, ...] = ()
    question_tokens: int = 0
    """As in :class:`Generate`, of the context."""

    def __post_init__(self) -> None:
        if not self.context_ids or not self.token_ids:
            raise ValueError("a context and its continuation have at least one token each")


@dataclass(frozen=True, kw_only=True)
class LogLikelihood:
    """Log-likelihoods of continuations, such as the choices of a question.

    Continuations with equal contexts are scored from one prefill. Without a question it ends before the last token of
    the context: that token is read behind it, so that even a continuation of one token is predicted from the cache.
    """

    continuations: tuple[Continuation, ...]

    @property
    def prompt_tokens(self) -> int:
        """Length of the longest context with its question."""
        return max(len(item.context_ids) + len(item.question_ids) for item in self.continuations)


@dataclass(frozen=True, kw_only=True)
class Rolling:
    """Log-likelihood of a whole text, in windows that each score their own part of it.

    The first tokens of a window are a prompt: they are prefilled, and scored as they are, before anything is
    compressed. The others are read through the cache.
    """

    windows: tuple[Continuation, ...]
    prefill_share: float = 0.5
    """Share of a window's tokens that are its prompt, in [0, 1)."""
    chunk: int = 32
    """Tokens read at once behind the prompt. 1 is decoding: the cache is compressed after every token. The tokens of a
    chunk see each other whatever the budget, as those of the newest tokens' window always do."""

    def __post_init__(self) -> None:
        if not 0 <= self.prefill_share < 1:
            raise ValueError(f"the prompt's share of a window lies in [0, 1), not {self.prefill_share}")
        if self.chunk < 1:
            raise ValueError(f"a chunk has at least one token, not {self.chunk}")

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the text."""
        return sum(len(window.token_ids) for window in self.windows)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """How far the next-token distributions are from those of the full cache, over a given continuation.

    The context is prefilled without its last token and compressed; that token and the continuation are then read token
    by token, so that what a method does while decoding takes part.
    """

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    per_layer: bool = False
    """Compare the output of every layer's attention too."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the context."""
        return len(self.context_ids)


Request = Generate | LogLikelihood | Rolling | Compare


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One question: its request, and what the score needs."""

    id: str
    """Unique and stable within the task for given settings."""
    request: Request
    reference: Any = None
    truncated: bool = False
    """The prompt was cut to fit the model."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Facts worth keeping beside the answer (depth of a needle, subject of a question); must be JSON."""
    repeat: int | None = None
    """Which one of a question's sampled answers this asks for, from 1; None where answers are not sampled."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The answer to :class:`Generate`."""

    text: str
    """Decoded without special tokens and cut at the first stop string; without the model's thinking."""
    token_ids: tuple[int, ...] = ()
    """Everything that was generated."""
    turns: tuple[str, ...] = ()
    """The answers one by one where there were several questions; ``text`` has them on a line each."""


class Scored(NamedTuple):
    """A continuation's log-likelihood, in nats, and whether greedy decoding would have written it."""

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True, kw_only=True)
class LogLikelihoods:
    """The answer to :class:`LogLikelihood` or :class:`Rolling`: one for each continuation or window, in order."""

    scored: tuple[Scored, ...]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The answer to :class:`Compare`: one number for each token of the continuation, or for each layer."""

    kl: tuple[float, ...]
    """KL divergence, full || method, over the whole vocabulary, in nats."""
    agrees: tuple[bool, ...]
    """Both find the same token most likely."""
    delta_nll: tuple[float, ...]
    """How much larger the negative log-likelihood of the token is than with the full cache, in nats."""
    attention_error: tuple[float, ...] = ()
    """If asked for, of each layer: the distance of its attention's output from that with the full cache, over the norm
    of the latter, mean over the tokens. What earlier layers have passed on is a part of it."""


Answer = Generated | LogLikelihoods | Compared


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A score as it stands in a table."""

    name: str
    higher_is_better: bool = True
    low: float = -math.inf
    """No score can be smaller."""
    high: float = math.inf
    """No score can be larger."""
    binary: bool | None = None
    """Whether the score of a document is one of ``low`` and ``high``, as right and wrong are; False where it is so by
    chance only; None is unknown: what the scores are. Scores between the two are always taken as what they are."""
    of_full: float | None = None
    """What the full cache scores by definition, where the score is a distance from it; it is then not tested against
    ``full``. With a ``low`` of 0 as well, methods are compared by ratios."""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"{self.name}: a score lies between low and high, not {self.low} and {self.high}")
        if self.binary and not math.isfinite(self.high - self.low):
            raise ValueError(f"{self.name}: a binary score is low or high, which must be given")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Aggregated scores of one task for one method: ``values[metric]``, and ``stderr`` where the task defines one."""

    values: Mapping[str, float]
    stderr: Mapping[str, float] = field(default_factory=dict)


class TaskGroup(ABC):
    """Tasks that are asked for under one name and have a score together, beside each one's own."""

    name: str
    members: tuple[Task | TaskGroup, ...]

    def tasks(self) -> list[Task]:
        """The tasks of the group and of the groups in it, each once."""
        found: dict[str, Task] = {}
        for member in self.members:
            for task in member.tasks() if isinstance(member, TaskGroup) else [member]:
                found.setdefault(task.name, task)
        return list(found.values())

    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """What :meth:`evaluate` gives, the headline first; known when the tasks have been loaded."""

    @abstractmethod
    def evaluate(self, members: Mapping[str, Evaluation], counts: Mapping[str, int]) -> Evaluation:
        """Aggregate the evaluations of the tasks of the group, by name, over ``counts[name]`` documents each."""


class Task(ABC):
    """A set of documents and their metric.

    Subclasses give ``name``, ``metrics`` (the first is the headline), :meth:`load` and :meth:`score`.
    """

    name: str
    metrics: tuple[Metric, ...]
    Options: ClassVar[type[TaskOptions] | None] = None
    """The model that the task checks ``TaskSettings.options`` with, if it has one."""
    has_parts: bool = False
    """Whether prompts are a context and a question behind it, which ``TaskSettings.question`` tells apart."""
    notes: tuple[str, ...] = ()
    """What a person should know of the documents, a line each; known after :meth:`load`."""
    option_names: tuple[str, ...] = ()
    """What ``TaskSettings.options`` may hold for this task: the fields of ``Options``, where there is that."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "option_names" not in vars(cls) and cls.Options is not None:
            cls.option_names = tuple(cls.Options.model_fields)

    @abstractmethod
    def load(self, settings: TaskSettings) -> Sequence[Document]:
        """Build the documents. The same settings give the same documents. Raises :class:`TaskError`."""

    @abstractmethod
    def score(self, document: Document, answer: Answer) -> dict[str, float]:
        """Every metric of one answer."""

    def evaluate(self, documents: Sequence[Document], answers: Mapping[str, Answer]) -> Evaluation:
        """Aggregate over the answered documents: the mean, unless the task's official rule is another one."""
        answered = [document for document in documents if document.id in answers]
        scores = [self.score(document, answers[document.id]) for document in answered]
        names = [metric.name for metric in self.metrics]
        return Evaluation(values={n: sum(s[n] for s in scores) / len(scores) for n in names} if scores else {})

    def data_hash(self) -> str:
        """SHA-256 over the documents' source, known after :meth:`load`; empty when generated from the seed alone."""
        return ""

    def definition_hash(self) -> str:
        """SHA-256 over what defines prompts and scores beside the project's code, known after :meth:`load`; empty where
        nothing does."""
        return ""
