"""Who is Original, Quantized, Evicted: the state rule (ARKV, arXiv 2603.08727, section 3).

Letters: ``n`` rows (samples times KV heads) of a layer, ``M`` Original candidates, ``Q`` Quantized tokens, ``T`` new
tokens, ``W`` newest tokens that stay (``CacheConfig.recent``), ``O`` Original slots beside these.

After every forward, in every row:

1. The first ``n_sink`` tokens and the newest ``W`` ones are Original, whatever their score.
2. Of all other tokens, Original and Quantized together, those with the highest scores stay, as many as the row has
   places for; the rest is Evicted. Of equal scores the older token stays.
3. Of those still Original, the ``O - n_sink`` with the highest scores stay so; the rest is Quantized, once, from its
   original value.

States move one way: Original, Quantized, Evicted. :func:`assign` is this rule for a forward of several tokens. For a
single new token it comes to one victim, which :func:`arkv.kernels.twin.make_room` finds: of those that may leave, the
token with the lowest score.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from arkv.config import CacheConfig
from arkv.store import place_of


class Tokens(NamedTuple):
    """Tokens of every row of a layer, [n, m]; of places that hold no token ``taken`` is False."""

    score: torch.Tensor
    """float32, not negative."""
    position: torch.Tensor
    """int64: tokens before this one in its sequence, padding included."""
    taken: torch.Tensor


class Choice(NamedTuple):
    """What becomes of every token: its place in the row's run of Original or of Quantized slots, -1 if it has none."""

    original: torch.Tensor
    """Of the Original candidates, [n, M] int64."""
    demoted: torch.Tensor
    """Of the same, where they become Quantized."""
    quantized: torch.Tensor
    """Of the tokens that are Quantized already, [n, Q]."""


def assign(
    tokens: Tokens,
    stored: Tokens | None,
    seen: torch.Tensor,
    first: torch.Tensor,
    original: torch.Tensor,
    quantized: torch.Tensor,
    config: CacheConfig,
) -> Choice:
    """Choose the state of every token.

    Args:
        tokens: Original candidates: those held and the new ones.
        stored: the tokens that are Quantized already.
        seen: tokens seen of every row, the new ones and padding included, [n] int64.
        first: how many of them are padding, [n].
        original, quantized: slots of every row beside the window, [n].
    """
    n_sink, window = config.n_sink, config.recent
    relative = tokens.position - first[:, None]
    fixed = tokens.taken & ((relative < n_sink) | (tokens.position >= (seen - window)[:, None]))
    past = tokens.taken & ~fixed
    places = (original - n_sink).clamp_min(0)
    best, is_original, kept = _rank(tokens, past, stored, places + quantized)
    # In order of importance: the first of those still Original stay so.
    nth = (kept & is_original).cumsum(dim=-1) - 1
    stays = kept & is_original & (nth < places[:, None])
    falls = kept & is_original & ~stays
    width = tokens.score.shape[1]

    sequence = torch.where(fixed, place_of(relative, n_sink, window), -1)
    chosen = _scatter(best, n_sink + window + nth, stays, width)
    if stored is None:
        remains = best.new_full((len(best), 0), -1)
        before = torch.zeros_like(places)
    else:
        still = _scatter(best - width, torch.zeros_like(best), kept & ~is_original, stored.score.shape[1]) >= 0
        # They keep their order, so that those in front of the first gap stay where they are.
        remains = torch.where(still, still.cumsum(dim=-1) - 1, -1)
        before = still.sum(dim=-1)
    demoted = _scatter(best, before[:, None] + falls.cumsum(dim=-1) - 1, falls, width)
    return Choice(torch.maximum(sequence, chosen), demoted, remains)


def _rank(
    tokens: Tokens, past: torch.Tensor, stored: Tokens | None, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Past and stored tokens, best first, as far as there are places: [n, k] each.

    Returns:
        Index among the candidates and, behind them, the stored tokens; whether it is one of the candidates; whether
        there is such a token and it has a place.
    """
    score, position, taken = tokens.score, tokens.position, past
    if stored is not None:
        score, position, taken = (
            torch.cat(pair, dim=-1)
            for pair in zip((score, position, taken), (stored.score, stored.position, stored.taken), strict=True)
        )
    # The order of such numbers is that of their bits; the position below them makes each unique.
    key = (score.contiguous().view(torch.int32).long() << 32) | (torch.iinfo(torch.int32).max - position)
    count = min(int(places.max()), key.shape[1]) if len(places) else 0
    value, index = key.masked_fill(~taken, -1).topk(count, dim=-1)
    kept = (value >= 0) & (torch.arange(count, device=places.device) < places[:, None])
    return index, index < tokens.score.shape[1], kept


def _scatter(index: torch.Tensor, value: torch.Tensor, where: torch.Tensor, width: int) -> torch.Tensor:
    """[n, width] with ``value`` at ``index`` where ``where``, else -1; all three [n, k]."""
    # One column more takes what is not wanted.
    result = index.new_full((index.shape[0], width + 1), -1)
    result.scatter_(1, torch.where(where, index, width), torch.where(where, value, -1))
    return result[:, :width]
