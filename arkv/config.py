"""Every setting of the tri-state cache, checked in one place."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from arkv.formats import FORMATS, Format


class ConfigError(ValueError):
    """A setting makes no sense: names the setting, its value and a value that would work."""


class NotCompressible(ConfigError):
    """No compressed cache serves the model; transformers' own full cache does."""


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


SPARSE = {"sparse": True}
"""Metadata of a setting that is not written down where it has its default, so that records of before it still hold."""


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """The settings that a scorer sees; :class:`CacheConfig` says what each is. Of those that do not count for a scorer
    the default stands here, so that equal ones give equal scores, and are the key under which scores are shared."""

    window_size: int
    n_sink: int
    importance: str
    value_norm: bool
    uses_oq: bool
    attention: str
    tau1: float = 1.0
    tau2: float = 1.0
    tau3: float = 1.0
    gamma: float = 0.0
    pool_width: int = 1
    max_pool_width: int = 1
    query_span: int | None = None
    query_stride: int = 1
    span_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Settings of one tri-state cache. The defaults are those published for ARKV (arXiv 2603.08727).

    The methods ``window``, ``origin``, ``quant``, ``mix`` and ``mix-replay`` are settings of the same mechanism: see
    :data:`METHODS` and :meth:`for_method`.
    """

    cache_size: int | None = None
    """C: tokens held per layer and KV head, the window included; in byte units, the tokens at model precision whose
    bytes a layer has."""

    cache_ratio: float | None = None
    """In the place of ``cache_size``: C as a share of each prompt, the same for every method. Never less than the
    window, the sinks and one more token (in byte units, one group of Quantized tokens) need. The prompt is what the
    first forward reads: one that is read in chunks goes through a :class:`~arkv.PrefillCache`."""

    budget_unit: Literal["tokens", "bytes"] = "tokens"
    """What C counts: tokens, of which a Quantized one costs as much as an Original one (published), or bytes, all
    metadata included, so that what quantization saves buys more tokens."""

    layer_budgets: Literal["equal", "oq"] = "equal"
    """Byte units: every layer has the same bytes, or more bytes the higher its OQ score is
    among those of the layers before it."""

    head_budgets: Literal["equal", "layer", "all"] = dataclasses.field(default="equal", metadata=SPARSE)
    """Byte units: every KV head of a layer has the same bytes; or the tokens of all heads of a layer compete for the
    layer's (AdaKV, arXiv 2407.11550); or those of all layers and heads compete (KVzip, arXiv 2505.23416)."""

    sure_share: float = dataclasses.field(default=0.1, metadata=SPARSE)
    """Share of the past budget that every KV head is sure of where heads compete."""

    stream_norm: bool = dataclasses.field(default=False, metadata=SPARSE)
    """Where the tokens of all layers compete, the scores of a layer are divided by the norm of its hidden states: what
    attention adds counts less, the larger what it is added to (after KVzip's normalized score, arXiv 2505.23416)."""

    window_size: int = 32
    """W: the newest tokens, always Original; also the queries that the prefill statistics are taken from."""

    n_recent: int | None = dataclasses.field(default=None, metadata=SPARSE)
    """Newest tokens that are always Original, where it is not W; the statistics are of W queries all the same."""

    n_sink: int = 0
    """The first tokens of a sequence that always stay Original (attention sinks, StreamingLLM, arXiv 2309.17453)."""

    ranking: Literal["heavy_hitter", "recency"] = "heavy_hitter"
    """What decides which tokens outside the window stay: attention received, or age."""

    original_share: float | None = None
    """Share of the past budget, in tokens or in bytes, that stays Original. None: each layer's OQ ratio (token units
    only, ARKV)."""

    quant_format: str = "fp8"
    """Number format of Quantized tokens, one of :data:`arkv.formats.FORMATS`."""

    tau1: float = 7.774380648611771
    """Temperature of the entropy in the OQ score."""

    tau2: float = 5.407015096778621
    """Temperature of the variance in the OQ score."""

    tau3: float = 5.527702582901318
    """Temperature of the kurtosis in the OQ score."""

    importance: str = "mean_var"
    """Heavy-hitter score of a token at prefill, one of :data:`arkv.scores.SCORERS`: mean plus ``gamma`` times variance
    of the attention that it gets from the window's queries (published), or mean plus largest attention, both brought to
    the same size, or the largest that it gets while the prompt is read a second time (:func:`arkv.replay`)."""

    gamma: float = 263.8108280337562
    """``mean_var``: weight of the variance over the window's queries."""

    query_span: int | None = None
    """``mean_max``: importance that every ``query_stride``-th of so many newest queries gives is added to that from the
    window's queries. None: nothing is."""

    query_stride: int = 2
    """Of ``query_span`` queries, one in so many counts."""

    span_weight: float = 0.3
    """Weight of what they add, once it has been brought to the same size. More of it follows text that goes on as it
    was, less of it a question at the end of a prompt."""

    value_norm: bool = False
    """Weight the scores of a prompt, or of a further block of tokens, by the norms of the tokens' values."""

    pool_width: int = 5
    """Width of the average pooling of heavy-hitter scores over neighbouring tokens; odd, 1 is none."""

    max_pool_width: int = 15
    """``mean_max``: width of the maximum pooling of the largest attention; odd, 1 is none."""

    decode_importance: Literal["latest", "mean", "largest"] = "latest"
    """How a decoding step updates the scores: replaced by the attention just computed (published), a running average,
    or the largest attention so far, which fades."""

    decode_rate: float = 1 / 32
    """``mean``: weight of the newest step in the running average. ``largest``: share that a score loses with every
    step."""

    attention: Literal["fused", "reconstruct"] = "fused"
    """Prompts are scored and steps done by a kernel where there is one (:mod:`arkv.kernels`), or in any case by the
    readable twin in torch's operations, which puts the Quantized tokens back together first."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field.name, str(field.type))
        if (self.cache_size is None) == (self.cache_ratio is None):
            raise ConfigError(
                f"cache_size={self.cache_size} and cache_ratio={self.cache_ratio}: give one of them, "
                "for example cache_size=512 or cache_ratio=0.25"
            )
        if self.cache_ratio is not None and not 0.0 < self.cache_ratio <= 1.0:
            raise ConfigError(f"cache_ratio={self.cache_ratio}: use a share above 0 and up to 1, for example 0.25")
        if not isinstance(self.window_size, int) or self.window_size < 1:
            raise ConfigError(f"window_size={self.window_size!r}: give at least 1 token, for example 32")
        if self.n_recent is not None and self.n_recent < 1:
            raise ConfigError(f"n_recent={self.n_recent}: give at least 1 token, for example 8")
        if self.n_sink < 0:
            raise ConfigError(f"n_sink={self.n_sink}: give 0 tokens or more, for example 4")
        if self.cache_size is not None:
            if not isinstance(self.cache_size, int) or self.cache_size < 2:
                raise ConfigError(f"cache_size={self.cache_size!r}: give at least 2 tokens, for example 512")
            if self.recent >= self.cache_size:
                name = "window_size" if self.n_recent is None else "n_recent"
                raise ConfigError(
                    f"{self.recent_setting} is not smaller than cache_size={self.cache_size}: "
                    f"use {name} <= {self.cache_size - 1} or cache_size >= {self.recent + 1}"
                )
            if self.n_sink > self.cache_size - self.recent:
                raise ConfigError(
                    f"n_sink={self.n_sink}: a cache of {self.cache_size} tokens with a window of {self.recent} "
                    f"has room for at most {self.cache_size - self.recent}"
                )
        if self.original_share is not None and not 0.0 <= self.original_share <= 1.0:
            raise ConfigError(f"original_share={self.original_share}: use a number from 0 to 1, or None for OQ ratios")
        if self.quant_format not in FORMATS:
            raise ConfigError(f"quant_format={self.quant_format!r}: {_nearest(self.quant_format, FORMATS)}")
        # Scorers are written in terms of this class.
        from arkv.scores import SCORERS

        for name, allowed in {**_CHOICES, "importance": tuple(SCORERS)}.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: {_nearest(str(getattr(self, name)), allowed)}")
        if self.budget_unit == "bytes" and self.quantizes and self.original_share is None:
            raise ConfigError(
                "original_share=None: OQ ratios split tokens; in byte units give the share of the bytes that stays "
                "Original, for example 0.05"
            )
        if self.head_budgets != "equal":
            if self.budget_unit != "bytes" or self.ranking != "heavy_hitter":
                raise ConfigError(
                    f"head_budgets={self.head_budgets!r} is for budget_unit='bytes' and ranking='heavy_hitter': "
                    "use head_budgets='equal'"
                )
            if not 0.0 <= self.sure_share <= 1.0:
                raise ConfigError(f"sure_share={self.sure_share}: use a number from 0 to 1, for example 0.1")
        if self.stream_norm and not (self.head_budgets == "all" and self.importance == "replay"):
            raise ConfigError(
                "stream_norm=True is for head_budgets='all' and importance='replay', which sees the hidden states: "
                "use stream_norm=False"
            )
        for name in ("tau1", "tau2", "tau3"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: use a number above 0, for example 5.0")
        if not self.gamma >= 0:
            raise ConfigError(f"gamma={self.gamma}: use a number from 0, for example 200.0")
        if not 0.0 < self.decode_rate <= 1.0:
            raise ConfigError(f"decode_rate={self.decode_rate}: use a weight above 0 and up to 1, for example 0.03")
        if not self.span_weight >= 0:
            raise ConfigError(f"span_weight={self.span_weight}: use a number from 0, for example 0.3")
        for name in ("query_span", "query_stride"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least 1, for example 4")
        for name in ("pool_width", "max_pool_width"):
            if getattr(self, name) < 1 or getattr(self, name) % 2 == 0:
                raise ConfigError(f"{name}={getattr(self, name)}: use an odd number, for example 5")

    def _check_type(self, name: str, annotation: str) -> None:
        """Raises :class:`ConfigError` for a value of another type, such as the text ``"4"`` for a number."""
        value = getattr(self, name)
        if value is None and "None" in annotation:
            return
        if annotation.startswith("int"):
            right, wanted = type(value) is int, "a whole number"
        elif annotation.startswith("float"):
            right = type(value) in (int, float) and not math.isinf(value)
            wanted = "a number"
        elif annotation.startswith("bool"):
            right, wanted = type(value) is bool, "True or False"
        else:
            right, wanted = type(value) is str, "a name"
        if not right:
            example = {"cache_size": 512, "cache_ratio": 0.25}.get(name, type(self).__dataclass_fields__[name].default)
            raise ConfigError(f"{name}={value!r}: use {wanted}, for example {example}")

    def tokens_worth(self, tokens: int) -> int:
        """C for a prompt of ``tokens`` tokens."""
        if self.cache_ratio is None:
            assert self.cache_size is not None
            return self.cache_size
        # 0.29 * 100 is 28.999999999999996.
        return int(self.cache_ratio * tokens + 1e-9)

    @property
    def recent(self) -> int:
        """Newest tokens that are always Original."""
        return self.window_size if self.n_recent is None else self.n_recent

    @property
    def recent_setting(self) -> str:
        """The setting that says so, with its value."""
        return f"window_size={self.window_size}" if self.n_recent is None else f"n_recent={self.n_recent}"

    @property
    def quantizes(self) -> bool:
        """Whether any token can become Quantized."""
        return self.original_share != 1.0

    @property
    def recorded_queries(self) -> int:
        """Newest queries of a prompt that the scores are taken from."""
        # Scorers are written in terms of this class.
        from arkv.scores import recorded_queries

        return recorded_queries(self)

    @property
    def scoring(self) -> ScoreSettings | None:
        """All that the scores of a prompt depend on: methods and budgets for which it is equal share them.

        None: nothing is computed for them.
        """
        if self.ranking == "recency":
            return None
        # Scorers are written in terms of these classes.
        from arkv.scores import SCORERS

        names = {"window_size", "n_sink", "importance", "value_norm", "uses_oq", "attention"}
        names |= {"tau1", "tau2", "tau3"} if self.uses_oq else set()
        names |= set(SCORERS[self.importance].settings)
        return ScoreSettings(**{name: getattr(self, name) for name in sorted(names)})

    @property
    def number_format(self) -> Format:
        """The format of Quantized tokens."""
        return FORMATS[self.quant_format]

    @property
    def uses_oq(self) -> bool:
        """Whether the layers' OQ ratios decide anything."""
        by_layer = self.budget_unit == "bytes" and self.layer_budgets == "oq" and self.head_budgets != "all"
        return self.original_share is None or by_layer

    @classmethod
    def for_method(cls, method: str, **settings: Any) -> CacheConfig:
        """The settings of a method by name, the published ones unless overridden.

        >>> CacheConfig.for_method("mix", cache_size=512).original_share is None
        True
        """
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}: {_nearest(str(method), METHODS)}")
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in fields:
                raise ConfigError(f"unknown setting {name!r}: {_nearest(name, fields)}")
        in_bytes = settings.get("budget_unit") == "bytes"
        defaults = {**BYTE_DEFAULTS, **BYTE_METHODS[method]} if in_bytes else METHODS[method]
        if "n_recent" in defaults and isinstance(settings.get("window_size"), int):
            # Who asks for a small window wants few tokens Original.
            defaults = {**defaults, "n_recent": min(defaults["n_recent"], settings["window_size"])}
        return cls(**{**defaults, **settings})


_CHOICES: dict[str, tuple[str, ...]] = {
    "budget_unit": ("tokens", "bytes"),
    "layer_budgets": ("equal", "oq"),
    "head_budgets": ("equal", "layer", "all"),
    "ranking": ("heavy_hitter", "recency"),
    "decode_importance": ("latest", "mean", "largest"),
    "attention": ("fused", "reconstruct"),
}

METHODS: dict[str, dict[str, Any]] = {
    # Attention sinks and the newest tokens (StreamingLLM, arXiv 2309.17453).
    "window": {"ranking": "recency", "original_share": 1.0, "n_sink": 4},
    # Heavy hitters and the window, evicting only.
    "origin": {"original_share": 1.0},
    # Heavy hitters Quantized, the window Original.
    "quant": {"original_share": 0.0},
    # ARKV: Original and Quantized by each layer's OQ ratio.
    "mix": {},
    # The same by a second reading of the prompt (KVzip, arXiv 2505.23416): see :func:`arkv.replay`.
    "mix-replay": {"importance": "replay"},
}
"""The compressing methods in token units, each as settings of the one tri-state cache: as published, but for
``mix-replay``, which is of this library."""

BYTE_DEFAULTS: dict[str, Any] = {
    "n_sink": 4,
    "quant_format": "k4v3",
    "importance": "mean_max",
    "query_span": 128,
    "decode_importance": "mean",
}
"""Settings of every method in byte units."""

BYTE_METHODS: dict[str, dict[str, Any]] = {
    "window": {"ranking": "recency", "original_share": 1.0},
    "origin": {"original_share": 1.0, "head_budgets": "layer"},
    "quant": {"original_share": 0.0, "head_budgets": "layer"},
    # At an eighth of a prompt's bytes a whole window of Original tokens would be an eighth of what there is.
    "mix": {"original_share": 0.05, "layer_budgets": "oq", "head_budgets": "layer", "n_recent": 16},
    # What a question behind the prompt needs lies in few layers and heads: tokens of all of them compete. What is read
    # and written behind it is scored on the same scale, by its largest attention, or every head would evict it first.
    "mix-replay": {
        "original_share": 0.05,
        "importance": "replay",
        "head_budgets": "all",
        "n_recent": 4,
        "decode_importance": "largest",
        "decode_rate": 1 / 16,
    },
}
"""The methods in byte units."""
