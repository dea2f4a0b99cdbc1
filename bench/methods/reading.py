"""How tokens are read through caches: one or several rows in a forward, in chunks, and a prompt that is recorded.

Letters: ``B`` rows, ``T`` tokens of the longest row, ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from transformers.cache_utils import Cache, DynamicCache

from arkv import CacheBatch, PrefillCache, attach
from arkv.config import NotCompressible
from bench.methods.prompt import Prompt, StockPrefill
from bench.methods.rope import factors_for
from bench.telemetry import Stopwatch

_T = TypeVar("_T")


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """[B, T] of rows of token ids, padded on the left."""
    longest = max(map(len, rows))
    return torch.tensor([[*[0] * (longest - len(row)), *row] for row in rows], device=device)


def forward(model: Any, caches: Sequence[Cache], rows: Sequence[Sequence[int]], **options: Any) -> torch.Tensor:
    """Logits [B, T, V] of new tokens behind each of the caches; rows are padded on the left.

    Several caches need :func:`arkv.attach` around them.
    """
    ids = padded(rows, model.device)
    logits: torch.Tensor
    if len(caches) == 1:
        logits = model(ids, past_key_values=caches[0], **options).logits
    else:
        batch = CacheBatch(caches, [len(row) for row in rows])
        positions = batch.position_ids(model.device)
        with _head_once(model):
            logits = model(ids, position_ids=positions, past_key_values=batch, **options).logits
    return logits


@contextlib.contextmanager
def _head_once(model: Any) -> Iterator[None]:
    """Under this the output embeddings are given what lies in one piece. The last tokens of rows do not, and torch
    multiplies such row by row, each with a copy of all weights."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _module, inputs: tuple(item.contiguous() for item in inputs))
    try:
        yield
    finally:
        hook.remove()


def read(
    model: Any, caches: Sequence[Cache], rows: Sequence[Sequence[int]], chunk: int | None = None
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Feed each of the caches its row of token ids, in chunks if wanted.

    Yields the place of a chunk's first token in the rows, and the log-probabilities [t, V] behind each row's tokens in
    it, of which there may be none.
    """
    longest = max(map(len, rows))
    for begin in range(0, longest, chunk or longest):
        parts = [row[begin : begin + (chunk or longest)] for row in rows]
        going = [place for place, part in enumerate(parts) if part]
        logits = forward(model, [caches[place] for place in going], [parts[place] for place in going])
        log_probabilities = logits.float().log_softmax(dim=-1)
        found = [log_probabilities[0, :0]] * len(rows)
        for place, mine in zip(going, log_probabilities, strict=True):
            found[place] = mine[-len(parts[place]) :]
        yield begin, found


def read_on(
    model: Any, caches: Sequence[Cache], rows: Sequence[Sequence[int]], chunk: int | None = None
) -> torch.Tensor:
    """Feed each of the caches its row of token ids, none of them empty, in chunks if wanted; logits [B, V] behind each
    row's last token. Nothing else is kept of the vocabulary."""
    longest = max(map(len, rows))
    last: dict[int, torch.Tensor] = {}
    for begin in range(0, longest, chunk or longest):
        going = [place for place, row in enumerate(rows) if len(row) > begin]
        parts = [rows[place][begin : begin + (chunk or longest)] for place in going]
        logits = forward(model, [caches[place] for place in going], parts, logits_to_keep=1)[:, -1]
        last.update(zip(going, logits, strict=True))
    return torch.stack([last[place] for place in range(len(rows))])


def read_prompts(
    model: Any, caches: Sequence[Cache], rows: Sequence[Sequence[int]], chunk: int | None = None
) -> torch.Tensor:
    """Feed empty caches their prompts, a single one in chunks if wanted; logits [B, V] behind each one's last token."""
    longest = max(map(len, rows))
    with factors_for(model, longest):
        for begin in range(0, longest, chunk or longest):
            parts = [row[begin : begin + (chunk or longest)] for row in rows]
            logits = forward(model, caches, parts, logits_to_keep=1)[:, -1]
    return logits


def recorded(
    model: Any,
    rows: Sequence[Sequence[int]],
    queries: int,
    reading: Callable[[Sequence[Cache], Sequence[Sequence[int]]], Sequence[_T]],
) -> list[tuple[PrefillCache, _T]]:
    """Caches that have recorded the prompts ``rows``, and what ``reading`` gives for each as it feeds them.

    A model that no compressed cache serves reads prompts one after the other, into transformers' own full cache and
    with its own attention.

    Raises:
        ConfigError: not even that cache serves the model.
    """
    try:
        caches = [PrefillCache(model, queries) for _ in rows]
        with attach(model):
            return list(zip(caches, reading(caches, rows), strict=True))
    except NotCompressible as error:
        refused = error
    done: list[tuple[PrefillCache, _T]] = []
    for row in rows:
        cache = DynamicCache(config=model.config)
        (found,) = reading([cache], [row])
        # Some models leave a cache alone without a word.
        if not cache.get_seq_length():
            raise refused
        done.append((StockPrefill(cache, refused), found))
    return done


def record(model: Any, rows: Sequence[Sequence[int]], queries: int, chunk: int | None = None) -> list[Prompt]:
    """Read prompts once for all methods, in one forward, or a single one in chunks.

    Args:
        queries: how many of the newest queries are kept for methods that score tokens by them.
    """
    clock = Stopwatch(model.device)
    with clock:
        done = recorded(model, rows, queries, lambda caches, some: read_prompts(model, caches, some, chunk).split(1))
    return [
        Prompt(
            ids=torch.tensor([row], device=model.device),
            cache=cache,
            logits=mine,
            seconds=clock.seconds / len(rows),
        )
        for row, (cache, mine) in zip(rows, done, strict=True)
    ]


def kl_divergence(full: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """KL full || mine in nats, of log-probabilities [..., V]: [...]."""
    return (full.exp() * (full - mine)).sum(dim=-1)
