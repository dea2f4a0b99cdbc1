"""Every setting of the tri-state cache, checked in one place."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from arkv.quantization import FORMATS


class ConfigError(ValueError):
    """A setting makes no sense: names the setting, its value and a value that would work."""


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Settings of one tri-state cache. The defaults are those published for ARKV (arXiv 2603.08727).

    The methods ``window``, ``origin``, ``quant`` and ``mix`` are settings of the same mechanism: see :data:`METHODS`
    and :meth:`for_method`.
    """

    cache_size: int
    """C: tokens held per layer and KV head, the window included."""

    window_size: int = 32
    """W: the newest tokens, always Original; also the queries that the prefill statistics are taken from."""

    n_sink: int = 0
    """The first tokens of a sequence that are always kept Original (attention sinks, StreamingLLM)."""

    ranking: Literal["heavy_hitter", "recency"] = "heavy_hitter"
    """What decides which tokens outside the window stay: attention received, or age."""

    original_share: float | None = None
    """Share of the past budget ``C - W`` that stays Original. None: each layer's OQ ratio (ARKV)."""

    quant_format: str = "fp8"
    """Number format of Quantized tokens, one of :data:`arkv.quantization.FORMATS`."""

    tau1: float = 7.774380648611771
    """Temperature of the entropy in the OQ score."""

    tau2: float = 5.407015096778621
    """Temperature of the variance in the OQ score."""

    tau3: float = 5.527702582901318
    """Temperature of the kurtosis in the OQ score."""

    gamma: float = 263.8108280337562
    """Weight of the variance over the window's queries in the heavy-hitter score."""

    pool_width: int = 5
    """Width of the average pooling of heavy-hitter scores over neighbouring tokens; odd, 1 is none."""

    decode_importance: Literal["latest", "mean"] = "latest"
    """How a decoding step updates the scores: replaced by the attention just computed (published), or a running
    average over about W steps."""

    attention: Literal["fused", "reconstruct"] = "fused"
    """Decode on the stored parts directly, or on the reconstructed contiguous cache (the readable twin)."""

    def __post_init__(self) -> None:
        if not isinstance(self.cache_size, int) or self.cache_size < 2:
            raise ConfigError(f"cache_size={self.cache_size!r}: give at least 2 tokens, for example 512")
        if not isinstance(self.window_size, int) or self.window_size < 1:
            raise ConfigError(f"window_size={self.window_size!r}: give at least 1 token, for example 32")
        if self.window_size >= self.cache_size:
            raise ConfigError(
                f"window_size={self.window_size} is not smaller than cache_size={self.cache_size}: "
                f"use window_size <= {self.cache_size - 1} or cache_size >= {self.window_size + 1}"
            )
        if not 0 <= self.n_sink <= self.past_size:
            raise ConfigError(
                f"n_sink={self.n_sink}: the cache has room for 0 to {self.past_size} tokens beside its window"
            )
        if self.ranking not in ("heavy_hitter", "recency"):
            raise ConfigError(f"ranking={self.ranking!r}: use 'heavy_hitter' or 'recency'")
        if self.original_share is not None and not 0.0 <= self.original_share <= 1.0:
            raise ConfigError(f"original_share={self.original_share}: use a number from 0 to 1, or None for OQ ratios")
        if self.quant_format not in FORMATS:
            raise ConfigError(f"quant_format={self.quant_format!r}: {_nearest(self.quant_format, FORMATS)}")
        for name in ("tau1", "tau2", "tau3"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: use a number above 0, for example 5.0")
        if not self.gamma >= 0:
            raise ConfigError(f"gamma={self.gamma}: use a number from 0, for example 200.0")
        if self.pool_width < 1 or self.pool_width % 2 == 0:
            raise ConfigError(f"pool_width={self.pool_width}: use an odd number, for example 5")
        if self.decode_importance not in ("latest", "mean"):
            raise ConfigError(f"decode_importance={self.decode_importance!r}: use 'latest' or 'mean'")
        if self.attention not in ("fused", "reconstruct"):
            raise ConfigError(f"attention={self.attention!r}: use 'fused' or 'reconstruct'")

    @property
    def past_size(self) -> int:
        """C - W: tokens held beside the window."""
        return self.cache_size - self.window_size

    @classmethod
    def for_method(cls, method: str, **settings: Any) -> CacheConfig:
        """The settings of a method by name, the published ones unless overridden.

        >>> CacheConfig.for_method("mix", cache_size=512).original_share is None
        True
        """
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}: {_nearest(method, METHODS)}")
        unknown = set(settings) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            name = min(unknown)
            fields = [field.name for field in dataclasses.fields(cls)]
            raise ConfigError(f"unknown setting {name!r}: {_nearest(name, fields)}")
        return cls(**{**METHODS[method], **settings})


METHODS: dict[str, dict[str, Any]] = {
    # Attention sinks and the newest tokens (StreamingLLM, arXiv 2309.17453).
    "window": {"ranking": "recency", "original_share": 1.0, "n_sink": 4},
    # Heavy hitters and the window, evicting only.
    "origin": {"original_share": 1.0},
    # Heavy hitters Quantized, the window Original.
    "quant": {"original_share": 0.0},
    # ARKV: Original and Quantized by each layer's OQ ratio.
    "mix": {},
}
"""The compressing methods, each as settings of the one tri-state cache."""
