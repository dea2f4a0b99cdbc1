"""What the rows of one layer may hold, and when that changes: the budget as its tokens become more.

Letters: ``B`` batch, ``H`` KV heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from arkv.budget import Geometry, Slots, byte_slots
from arkv.config import CacheConfig

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
