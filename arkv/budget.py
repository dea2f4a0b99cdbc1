"""From a budget to slots: what every row may hold.

Letters: ``L`` layers, ``B`` batch, ``H`` KV heads, ``N`` prompt tokens, ``C`` cache size, ``W`` newest tokens that
stay (``CacheConfig.recent``), ``D`` head dim.

In token units every layer holds ``C`` tokens, and a Quantized one costs as much as an Original one (ARKV, arXiv
2603.08727). In byte units a budget is what ``C`` tokens take at model precision; positions, scores and quantization
ranges are paid from it, and what quantization saves buys more tokens.

An :class:`Allocator` turns scores and the budget into a :class:`Grant` for every layer.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from arkv.config import CacheConfig, ConfigError
from arkv.formats import Format
from arkv.scores.oq import oq_ratios


class Slots(NamedTuple):
    """Slots of one layer and sample, per KV head: ``original`` without the window, ``quantized``."""

    original: int
    quantized: int


@dataclass(frozen=True)
class Geometry:
    """What a token costs: one KV head of one layer."""

    key_dim: int
    value_dim: int
    dtype: torch.dtype
    slot_bytes: int
    """Position and score of a slot."""
    row_bytes: int = 0
    """What a row takes whatever it holds: its entry in the row table."""

    @property
    def full_bytes(self) -> int:
        """Key and value of a token at model precision, as a stock cache holds them."""
        return (self.key_dim + self.value_dim) * self.dtype.itemsize

    @property
    def original_bytes(self) -> int:
        """An Original slot, position and score included."""
        return self.full_bytes + self.slot_bytes

    def quantized_bytes(self, number_format: Format) -> float:
        """A Quantized slot, position and score included."""
        return number_format.bytes_per_token(self.key_dim, self.value_dim) + self.slot_bytes


def token_limit(config: CacheConfig, tokens: int) -> int:
    """C in token units for a prompt of ``tokens`` tokens; a ratio gives at least the window, the sinks and one."""
    if config.cache_ratio is None:
        return config.tokens_worth(tokens)
    return max(config.tokens_worth(tokens), config.recent + config.n_sink + 1)


def token_slots(config: CacheConfig, limit: int, ratio: float) -> Slots:
    """Token budgets: of ``limit - W`` past tokens, ``round(r_l (C - W))`` stay Original and the others are Quantized.

    Args:
        limit: C of the sample, from :func:`token_limit`.
        ratio: OQ ratio of the layer, which counts where ``original_share`` is None.
    """
    past = limit - config.recent
    original = round((ratio if config.original_share is None else config.original_share) * past)
    original = min(max(original, config.n_sink), past)
    return Slots(original, past - original)


def minimal_bytes(config: CacheConfig, geometry: Geometry) -> int:
    """The least that one KV head of a layer needs: the window, the sinks, and one token more in each state."""
    quantized = 0
    if config.quantizes:
        per_token = math.ceil(geometry.quantized_bytes(config.number_format))
        quantized = per_token + config.number_format.bytes_per_head(geometry.key_dim)
    return geometry.row_bytes + (config.recent + config.n_sink + 1) * geometry.original_bytes + quantized


class ByteBudget:
    """Shares one sample's bytes among the layers, in the order in which they are computed.

    A layer gets the share of what is left that its OQ score has among the layers to come, which are expected to be like
    the mean of those seen. So each layer is compressed once, right after it was computed, and never again, and the sum
    is what was asked for. The price is that equal scores get unequal shares where the layers before them differ: the
    first layer always gets the mean, the last one what is left.

    Args:
        config: settings; ``layer_budgets`` says whether the OQ scores count at all.
        geometry: sizes of one KV head.
        layers: number of compressible layers L.
        tokens: prompt length N of the sample.

    Raises:
        ConfigError: the budget does not hold the window and the sinks of every layer.
    """

    def __init__(self, config: CacheConfig, geometry: Geometry, layers: int, tokens: int) -> None:
        self.config, self.geometry, self.layers = config, geometry, layers
        self.minimum = minimal_bytes(config, geometry)
        each = config.tokens_worth(tokens) * geometry.full_bytes
        if each < self.minimum:
            if config.cache_size is not None:
                raise ConfigError(
                    f"cache_size={config.cache_size} in bytes is too small for {config.recent_setting}, "
                    f"n_sink={config.n_sink} and one token more: "
                    f"use cache_size >= {-(-self.minimum // geometry.full_bytes)}"
                )
            each = self.minimum
        self.left = each * layers
        self.scores: list[float] = []

    def next_layer(self, score: float) -> int:
        """Bytes of one KV head of the next layer, which has OQ score ``score``."""
        self.scores.append(score)
        remaining = self.layers - len(self.scores) + 1
        share = 1.0 / remaining
        expected = score + (remaining - 1) * sum(self.scores) / len(self.scores)
        if self.config.layer_budgets == "oq" and expected > 0:
            share = score / expected
        # Every layer to come keeps its minimum.
        most = self.left - (remaining - 1) * self.minimum
        granted = max(min(round(self.left * share), most), self.minimum)
        self.left -= granted
        return granted


def byte_slots(config: CacheConfig, geometry: Geometry, budget: int, tokens: int) -> Slots:
    """Slots that ``budget`` bytes of one KV head buy beside the window.

    ``original_share`` of the past bytes stays Original, the rest is Quantized; where more could be quantized than there
    are tokens, and any share stays Original, the bytes left over keep more of them so.

    Args:
        tokens: how many the split is for: those of the prompt, or those soon to have been seen.
    """
    past_bytes = budget - geometry.row_bytes - config.recent * geometry.original_bytes
    most_original = past_bytes // geometry.original_bytes
    if not config.quantizes:
        return Slots(most_original, 0)
    assert config.original_share is not None
    past_bytes -= config.number_format.bytes_per_head(geometry.key_dim)
    per_token = geometry.quantized_bytes(config.number_format)
    original = max(int(config.original_share * past_bytes) // geometry.original_bytes, config.n_sink)
    quantized = int((past_bytes - original * geometry.original_bytes) / per_token)
    if config.original_share > 0:
        # Beyond the tokens there are, Quantized slots would stay empty for long.
        quantized = min(quantized, max(tokens - config.recent - original, 0))
        original = int((past_bytes - quantized * per_token) // geometry.original_bytes)
    return Slots(original, quantized)


GROWTH, LEAST_GROWTH = 1.25, 64
"""A split that has become too small is replaced by one for so many times the tokens seen, or at least so many more."""


RESERVE = 64
"""Free slots, at the least, that rows get which have not outgrown their limit; else as many as they hold."""

NEVER = 1 << 62
"""More tokens than will ever be seen."""


Counts = list[list[int]]
"""Of every KV head of every sample, [B][H]. The host's accounts are no tensors: tensors are what a cache holds."""


@dataclass
class Grant:
    """What the rows of one layer may hold beside the window, and when that changes."""

    config: CacheConfig
    limit: Counts
    """Tokens that a row holds, all Original, until it has seen more."""
    original: Counts
    """Original slots beside the window from then on."""
    quantized: Counts
    nbytes: Counts = field(default_factory=list)
    """Bytes of every KV head, in byte units: then the split follows the tokens seen."""
    geometry: Geometry | None = None
    outgrown: list[list[bool]] = field(init=False)
    """The row has seen more tokens than its limit."""

    def __post_init__(self) -> None:
        self.outgrown = [[False] * len(row) for row in self.limit]
        self.final = [[not self.nbytes] * len(row) for row in self.limit]
        """No later split of the row would hold more."""

    def now(self) -> tuple[Counts, Counts]:
        """Original and Quantized slots beside the window, as long as nothing changes."""
        window = self.config.recent
        original = [
            [slots if outgrown else limit - window for slots, outgrown, limit in zip(*rows, strict=True)]
            for rows in zip(self.original, self.outgrown, self.limit, strict=True)
        ]
        quantized = [
            [slots if outgrown else 0 for slots, outgrown in zip(*rows, strict=True)]
            for rows in zip(self.quantized, self.outgrown, strict=True)
        ]
        return original, quantized

    def holds(self) -> list[int]:
        """Tokens that every sample may have seen until :meth:`follow` changes anything."""
        found = []
        for rows in zip(self.outgrown, self.limit, self.final, self.original, self.quantized, strict=True):
            total = [
                (NEVER if final else self.config.recent + original + quantized) if outgrown else limit
                for outgrown, limit, final, original, quantized in zip(*rows, strict=True)
            ]
            found.append(min(total))
        return found

    def follow(self, tokens: Sequence[int]) -> bool:
        """Take note that samples have seen so many ``tokens``; returns whether slots have changed."""
        changed = False
        for sample, seen in enumerate(tokens):
            outgrown = [
                was or seen > limit for was, limit in zip(self.outgrown[sample], self.limit[sample], strict=True)
            ]
            changed |= outgrown != self.outgrown[sample]
            self.outgrown[sample] = outgrown
            for head, has_outgrown in enumerate(outgrown):
                slots = Slots(self.original[sample][head], self.quantized[sample][head])
                if self.final[sample][head] or not has_outgrown or seen <= self.config.recent + sum(slots):
                    continue
                assert self.geometry is not None
                soon = max(int(seen * GROWTH), seen + LEAST_GROWTH)
                better = byte_slots(self.config, self.geometry, self.nbytes[sample][head], soon)
                if sum(better) > sum(slots):
                    self.original[sample][head], self.quantized[sample][head] = better
                    changed = True
                else:
                    self.final[sample][head] = True
        return changed

    def capacities(self, tokens: Sequence[int]) -> list[list[int]]:
        """Slots that every row gets now, Original ones with the window, and Quantized ones.

        A prompt that is much shorter than the budget does not take all of it at once.

        Args:
            tokens: how many samples have seen.
        """
        original, quantized = self.now()
        window = self.config.recent
        found = [
            min(slots + window, max(2 * seen, seen + RESERVE))
            for row, seen in zip(original, tokens, strict=True)
            for slots in row
        ]
        return [found, [slots for row in quantized for slots in row]]

    def until(self, capacity: Sequence[int]) -> list[int]:
        """Tokens that every sample may have seen until its rows, of so many Original slots, need others."""
        original, _ = self.now()
        rows, found = iter(capacity), []
        for slots, holds in zip(original, self.holds(), strict=True):
            # Below what the budget has, rows hold all tokens, and are full when so many have been seen.
            free = [have for want, have in zip(slots, rows, strict=False) if have < want + self.config.recent]
            found.append(min([holds, *free]))
        return found

    def select(self, samples: Sequence[int]) -> Grant:
        """The grant of ``samples``, in that order, which can go its own way."""
        twin = dataclasses.replace(
            self,
            limit=[list(self.limit[i]) for i in samples],
            original=[list(self.original[i]) for i in samples],
            quantized=[list(self.quantized[i]) for i in samples],
            nbytes=[list(self.nbytes[i]) for i in samples] if self.nbytes else [],
        )
        twin.outgrown = [list(self.outgrown[i]) for i in samples]
        twin.final = [list(self.final[i]) for i in samples]
        return twin

    @staticmethod
    def join(grants: Sequence[Grant]) -> Grant:
        """One grant of the samples of all ``grants``."""
        whole = grants[0].select(range(len(grants[0].limit)))
        for grant in grants[1:]:
            more = grant.select(range(len(grant.limit)))
            for name in ("limit", "original", "quantized", "nbytes", "outgrown", "final"):
                getattr(whole, name).extend(getattr(more, name))
        return whole


class LayerScores(NamedTuple):
    """What an allocator sees of a layer that has been computed."""

    importance: torch.Tensor
    """Of every prompt token, padding included, [B, H, N] float32."""
    oq: Sequence[float]
    """OQ score, for every sample."""
    lengths: Sequence[int]
    """Prompt tokens of every sample, without padding."""
    heads: int
    geometry: Geometry
    stream: Sequence[float] = ()
    """Norm of the hidden states that the layer reads, for every sample; none where it is not known."""


class Allocator(Protocol):
    """Scores and a budget to slots. One object serves one cache, from its first forward on."""

    def layer(self, scores: LayerScores) -> Grant:
        """The grant of the next layer, as soon as it has been computed."""

    def settle(self, oq: Sequence[Sequence[float]], grants: Sequence[Grant]) -> bool:
        """Once all layers have been computed: change grants where they depend on other layers' scores ([L][B]); returns
        whether any has been changed."""


class JointAllocator(ABC):
    """An allocator that must have seen all layers before it can grant one of them anything: until then the cache holds
    the whole prompt, as a full cache does."""

    @abstractmethod
    def grants(self, layers: Sequence[LayerScores]) -> list[Grant]:
        """Of all layers, once the prompt has been computed."""

    def settle(self, oq: Sequence[Sequence[float]], grants: Sequence[Grant]) -> bool:
        """See :class:`Allocator`: nothing is left to be settled."""
        return False


class TokenAllocator:
    """``C`` tokens in every layer, all Original until the OQ score of every layer is known."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config

    def layer(self, scores: LayerScores) -> Grant:
        """See :class:`Allocator`."""
        limits = [token_limit(self.config, length) for length in scores.lengths]
        if self.config.original_share is None:
            slots = [Slots(limit - self.config.recent, 0) for limit in limits]
        else:
            slots = [token_slots(self.config, limit, 1.0) for limit in limits]
        return Grant(self.config, _per_head(limits, scores.heads), *_per_head_slots(slots, scores.heads))

    def settle(self, oq: Sequence[Sequence[float]], grants: Sequence[Grant]) -> bool:
        """See :class:`Allocator`."""
        if self.config.original_share is not None:
            return False
        for sample, of_layers in enumerate(zip(*oq, strict=True)):
            for grant, ratio in zip(grants, oq_ratios(of_layers), strict=True):
                slots, heads = token_slots(self.config, grant.limit[sample][0], ratio), len(grant.limit[sample])
                grant.original[sample], grant.quantized[sample] = [slots.original] * heads, [slots.quantized] * heads
        return True


class ByteAllocator:
    """The bytes of ``C`` tokens in every layer, or more of them the higher a layer's OQ score is."""

    def __init__(self, config: CacheConfig, layers: int) -> None:
        self.config, self.layers = config, layers
        self.budgets: list[ByteBudget] = []

    def layer(self, scores: LayerScores) -> Grant:
        """See :class:`Allocator`."""
        config, (_, oq, lengths, heads, geometry, _) = self.config, scores
        if not self.budgets:
            self.budgets = [ByteBudget(config, geometry, self.layers, length) for length in lengths]
        granted = [budget.next_layer(score) for budget, score in zip(self.budgets, oq, strict=True)]
        once = geometry.row_bytes
        if config.quantizes:
            once += config.number_format.bytes_per_head(geometry.key_dim)
        limits = [(budget - once) // geometry.original_bytes for budget in granted]
        slots = [byte_slots(config, geometry, *pair) for pair in zip(granted, lengths, strict=True)]
        counts = (_per_head(limits, heads), *_per_head_slots(slots, heads), _per_head(granted, heads))
        return Grant(config, *counts, geometry)

    def settle(self, oq: Sequence[Sequence[float]], grants: Sequence[Grant]) -> bool:
        """See :class:`Allocator`."""
        return False


class GivenCounts:
    """Slots beside the window as they are given, integers [B, H] for every layer: as far apart as one likes.

    Raises:
        ConfigError: a row has no room for the sinks.
    """

    def __init__(
        self, config: CacheConfig, original: Sequence[torch.Tensor], quantized: Sequence[torch.Tensor]
    ) -> None:
        self.config = config
        self.left = [(one.tolist(), other.tolist()) for one, other in zip(original, quantized, strict=True)]
        least = min(count for counts, _ in self.left for row in counts for count in row)
        if least < config.n_sink:
            raise ConfigError(
                f"{least} Original slots beside the window, but n_sink={config.n_sink} tokens always stay: "
                f"give every KV head at least {config.n_sink}"
            )
        if not config.quantizes and any(count for _, counts in self.left for row in counts for count in row):
            raise ConfigError("Quantized slots, but original_share=1.0 quantizes nothing: use original_share=0.0")

    def layer(self, scores: LayerScores) -> Grant:
        """See :class:`Allocator`."""
        if not self.left:
            raise ConfigError(
                "these counts have been given to a cache already: make new GivenCounts for another one, and for one "
                "that was reset"
            )
        original, quantized = self.left.pop(0)
        limit = [
            [self.config.recent + high + low for high, low in zip(*rows, strict=True)]
            for rows in zip(original, quantized, strict=True)
        ]
        grant = Grant(self.config, limit, original, quantized)
        # A row that has not outgrown its limit would hold more Original tokens than it was given slots for.
        grant.outgrown = [[True] * len(row) for row in limit]
        return grant

    def settle(self, oq: Sequence[Sequence[float]], grants: Sequence[Grant]) -> bool:
        """See :class:`Allocator`."""
        return False


def _per_head(numbers: Sequence[int], heads: int) -> Counts:
    """[B] numbers as [B][H]."""
    return [[number] * heads for number in numbers]


def _per_head_slots(slots: Sequence[Slots], heads: int) -> tuple[Counts, Counts]:
    """Original and Quantized slots of every sample, alike for all heads."""
    return _per_head([each.original for each in slots], heads), _per_head([each.quantized for each in slots], heads)
