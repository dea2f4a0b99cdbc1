"""Several samples in one forward, each with a cache of its own.

Letters: ``B`` batch, ``Hq`` query heads, ``H`` KV heads, ``T`` new tokens of the longest row, ``N`` tokens that a layer
attends to, ``D`` head dim.

The model's matrices, which are most of the work of a decoding step, are read once for all rows; attention goes row by
row. So rows of any length stand side by side, nothing in a cache is padded, and each holds what it would hold alone,
byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from arkv.attention import Handle
from arkv.blocks import one_token_attention, plain_attention
from arkv.config import ConfigError
from arkv.models import keeps_state


class CacheBatch(Cache):
    """Caches of one sample each, behind one forward.

    Made anew for every forward; the caches go on from one to the next. Rows are padded on the left:

    >>> batch = CacheBatch(caches, lengths=[3, 5])                              # doctest: +SKIP
    >>> with attach(model):                                                     # doctest: +SKIP
    ...     model(ids, position_ids=batch.position_ids(model.device), past_key_values=batch)

    Args:
        caches: one of one sample for each row, of any kinds whose layers have full or sliding-window attention.
        lengths: new tokens of each row, of which there is at least one.

    Raises:
        ConfigError: the caches have layers of other kinds, or one of them stands in two rows.
    """

    def __init__(self, caches: Sequence[Cache], lengths: Sequence[int]) -> None:
        if strangers := [type(cache).__name__ for cache in caches if not isinstance(cache, Cache)]:
            raise ConfigError(f"a row of a CacheBatch is a {strangers[0]}: give caches")
        if len(caches) != len(lengths) or min(lengths, default=0) < 1:
            raise ValueError(f"{len(caches)} caches and rows of {list(lengths)} tokens: each needs one token or more")
        if len({id(cache) for cache in caches}) < len(caches):
            raise ConfigError("one cache stands in several rows of a CacheBatch: give each row a fork() of its own")
        if any(keeps_state(layer) for cache in caches for layer in getattr(cache, "stock", cache).layers):
            raise ConfigError(
                "layers with a recurrence or a convolution keep states, which a CacheBatch cannot serve: give each row "
                "a forward of its own"
            )
        # What the model asks of layers, whether they slide, is the same for all rows.
        super().__init__(layers=caches[0].layers)
        self.caches = list(caches)
        self.lengths = list(lengths)

    def position_ids(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Positions [B, T] of the new tokens on ``device``, which is to be the model's; 0 for padding."""
        longest = max(self.lengths)
        rows = []
        for cache, length in zip(self.caches, self.lengths, strict=True):
            seen = cache.get_seq_length()
            rows.append([0] * (longest - length) + list(range(seen, seen + length)))
        return torch.tensor(rows, device=device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by the longest row."""
        return max(cache.get_seq_length(layer_idx) for cache in self.caches)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Take the new keys and values [B, H, T, D] of a layer; returns what the attention function needs, twice.

        Raises:
            ConfigError: there are other rows than caches, or rows of another length than the longest one.
        """
        wanted, given = (len(self.caches), max(self.lengths)), (key_states.shape[0], key_states.shape[2])
        if given != wanted:
            raise ConfigError(
                f"the model was given {list(given)} token ids, and this CacheBatch has {list(wanted)}: rows, and new "
                "tokens of the longest one"
            )
        rows = []
        for row, (cache, length) in enumerate(zip(self.caches, self.lengths, strict=True)):
            seen = cache.get_seq_length(layer_idx) + length
            key, value = (tensor[row : row + 1, :, -length:] for tensor in (key_states, value_states))
            rows.append(_Row(*cache.update(key, value, layer_idx, *args, **kwargs), length, seen))
        handle = _BatchHandle(rows, getattr(self.layers[layer_idx], "sliding_window", None))
        handle.config = next((row.key.config for row in rows if isinstance(row.key, Handle)), None)
        return handle, handle


class _Row(NamedTuple):
    """What the update of one row's cache returned, and its tokens: new ones, and all that were seen."""

    key: Any
    value: Any
    length: int
    seen: int


class _BatchHandle(Handle):
    """The handle of one layer of a :class:`CacheBatch`."""

    def __init__(self, rows: Sequence[_Row], sliding_window: int | None) -> None:
        self.rows = rows
        self.sliding_window = sliding_window

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> torch.Tensor:
        """Attention output [B, T, Hq, D], zero for padding; each row is causal, whatever ``mask`` says.

        Raises:
            ConfigError: the model has layers of another kind, which look to caches like those with a sliding window.
        """
        config: Any = getattr(module, "config", None)
        if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
            raise ConfigError(
                f"model {config.model_type!r} has layers of type 'chunked_attention', which a CacheBatch cannot serve: "
                "give each row a forward of its own"
            )
        outputs = []
        for place, row in enumerate(self.rows):
            mine = query[place : place + 1, :, -row.length :]
            if isinstance(row.key, torch.Tensor) and row.length == 1:
                output = one_token_attention(module, mine, row.key, row.value, scaling, **kwargs)
            elif isinstance(row.key, torch.Tensor):
                visible = self._visible(row.length, row.key.shape[2], query.device)
                output = plain_attention(module, mine, row.key, row.value, visible, scaling, **kwargs)
            else:
                output = row.key.attend(
                    module, mine, self._visible(row.length, row.seen, query.device), scaling, **kwargs
                )
            missing = query.shape[2] - row.length
            outputs.append(torch.nn.functional.pad(output, (0, 0, 0, 0, missing, 0)) if missing else output)
        return torch.cat(outputs)

    def _visible(self, length: int, held: int, device: torch.device) -> torch.Tensor | None:
        """What ``length`` new tokens see of the last ``held`` ones, themselves included: bool [1, 1, T, N].

        None where SDPA needs no mask: one token sees all that its layer returns, a prompt of its own is causal.
        """
        if length == 1 or (held == length and (self.sliding_window is None or length <= self.sliding_window)):
            return None
        new = torch.arange(held - length, held, device=device)[:, None]
        distance = new - torch.arange(held, device=device)
        visible = distance >= 0
        if self.sliding_window is not None:
            visible &= distance < self.sliding_window
        return visible[None, None]
