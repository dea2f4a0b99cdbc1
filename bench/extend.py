"""A cache method of your own: the interface, and what most methods need.

A :class:`Method` gets a prompt that the model has read, and gives back a cache from which the model goes on. Bytes,
statistics, tables and the handling of failures are the suite's. ``docs/plugins.md`` is the recipe;
:mod:`bench.methods.plugins` finds methods and tasks, :mod:`bench.methods.peers` runs them.

Letters: ``H`` KV heads, ``Hq`` query heads, ``N`` tokens of the prompt, ``W`` newest queries, ``D`` head dim.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from arkv import PrefillCache, TriStateCache, attach
from arkv.prefill import PrefillLayer
from bench.errors import UserError, place_of
from tasks.base import TaskError


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt that the model has read once for all methods. Nothing in it may be written to."""

    ids: torch.Tensor
    """Its tokens, [1, N]."""
    cache: PrefillCache
    """What the model made of it. Layers with a sliding window of their own are transformers' own."""

    @property
    def tokens(self) -> int:
        """N."""
        return self.ids.shape[1]

    @property
    def layers(self) -> list[PrefillLayer]:
        """The layers with full attention: ``keys`` and ``values`` [1, H, N, D], the newest ``queries`` [1, Hq, W, D],
        all after rotation, and the ``scaling`` of the attention's logits."""
        return [layer for layer in self.cache.layers if isinstance(layer, PrefillLayer)]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a method may keep of a prompt."""

    tokens: int
    """Tokens of each layer, or their worth in bytes: from 1 to N."""
    nbytes: int
    """Keys and values of so many tokens at model precision, in all layers together."""
    unit: str
    """``tokens``: no more of them than that, whatever each takes. ``bytes``: no more bytes than that, so that a method
    that quantizes may keep more tokens."""


class Method(ABC):
    """A cache method of your own. Subclasses give ``name`` and :meth:`compress`; they are made without arguments."""

    name: str
    """As in ``--quant-type``: no comma, colon or space, and no other method's name."""
    description: str = ""
    """One line for ``arkv-bench list methods``."""
    quant_format: str | None = None
    """Number format of the tokens that the method quantizes, such as ``int4``; None where it quantizes nothing."""
    has_budget: bool = True
    """False for a method of one size: it is measured once, whatever budgets are asked for."""
    queries: int = 32
    """W, how many of the newest queries the prompt's layers keep for :meth:`compress`."""

    @abstractmethod
    def compress(self, model: PreTrainedModel, prompt: Prompt, budget: Budget) -> Cache:
        """A cache that has seen the N tokens of the prompt, from which ``model`` goes on token by token.

        :func:`keep_tokens` makes one of the tokens that stay, and an ``arkv.TriStateCache`` is one too. A cache class
        of your own may compress while decoding as well. It must not hold slices of the prompt's tensors: a slice
        holds on to the whole, and the whole is what is counted. Its layers replace their tensors and never write into
        them, as transformers' own do: choices of a question are read from shallow copies.

        Numbers drawn with torch are the same in every run.
        """

    def token_counts(self, cache: Cache) -> dict[str, float]:
        """Tokens ``original``, ``quantized`` and ``evicted`` of a cache, mean over layers and KV heads.

        As it is: what a layer's ``keys`` [1, H, n, D] hold is there, the rest of the tokens seen is evicted.
        """
        if isinstance(cache, TriStateCache):
            return cache.token_counts()
        layers = [layer for layer in cache.layers if not getattr(layer, "is_sliding", False)]
        held = fmean(0 if layer.keys is None else layer.keys.shape[-2] for layer in layers)
        state = "original" if self.quant_format is None else "quantized"
        return {"original": 0.0, "quantized": 0.0, state: held, "evicted": cache.get_seq_length() - held}

    def decoding(self, model: PreTrainedModel, cache: Cache) -> contextlib.AbstractContextManager[Any]:
        """What ``model`` needs around it while it decodes with a cache of :meth:`compress`."""
        return attach(model) if isinstance(cache, TriStateCache) else contextlib.nullcontext()


class KeptLayer(DynamicLayer):
    """Some tokens of a layer, at model precision. Positions go on counting the tokens seen.

    Args:
        keys: [1, H, n, D].
        values: same shape.
        seen: how many tokens have been seen.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.removed = seen - keys.shape[-2]

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return super().get_seq_length() + self.removed

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:  # type: ignore[override]
        """Tokens attended to, and how many positions before them are gone.

        transformers 5.2 passes the positions of the queries, later versions their number.
        """
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return super().get_seq_length() + new, self.removed


def keep_tokens(prompt: Prompt, kept: Sequence[torch.Tensor]) -> Cache:
    """A cache of some of the prompt's tokens, at model precision and in their order.

    Args:
        kept: for each of :attr:`Prompt.layers` the indices of the tokens that stay, [n] for all KV heads or [H, n] for
            each. Layers with a sliding window stay as they are.

    Raises:
        ValueError: not one tensor of indices per layer, or an index twice.
    """
    if len(kept) != len(prompt.layers):
        raise ValueError(f"indices for {len(kept)} layers, but {len(prompt.layers)} layers have full attention")
    rest = iter(kept)
    layers: list[Any] = []
    for layer in prompt.cache.layers:
        if not isinstance(layer, PrefillLayer):
            # Stock layers replace their tensors and never write into them.
            layers.append(copy.copy(layer))
            continue
        keys, values = layer.states()
        order = next(rest).to(keys.device).expand(keys.shape[1], -1).sort(dim=-1).values
        if bool((order[:, 1:] == order[:, :-1]).any()):
            raise ValueError("a token is to be kept twice")
        # Gathered: a slice would hold on to all tokens.
        index = order[None, :, :, None]
        gathered = [states.gather(2, index.expand(-1, -1, -1, states.shape[3])) for states in (keys, values)]
        layers.append(KeptLayer(gathered[0], gathered[1], prompt.tokens))
    return Cache(layers=layers)


class OthersCode:
    """Whatever the code of a user's own under this raises becomes one line that names it; nothing is swallowed.

    Args:
        name: whose code it is.
        placed: say where the error was raised.
        file: the user's own file, whose innermost line is said; without, it is the innermost of all.

    Raises:
        UserError: ``name``, the kind of the error, what it said, and where.
    """

    passing = (UserError, TaskError)
    """These say what they mean themselves."""

    def __init__(self, name: str, *, placed: bool = False, file: str | None = None) -> None:
        self.name, self.placed, self.file = name, placed, file

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A plugin is often a script, and a script ends itself.
        if isinstance(error, SystemExit) or (isinstance(error, Exception) and not isinstance(error, self.passing)):
            said = " ".join(str(error).split())
            where = f" ({place_of(error, self.file)})" if self.placed else ""
            raise UserError(f"{self.name}: {type(error).__name__}" + (f": {said}" if said else "") + where) from error
