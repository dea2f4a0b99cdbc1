"""What a scorer sees of a layer: the newest queries, and all keys and values.

Letters: ``B`` batch, ``Hq`` query heads, ``H`` KV heads, ``N`` tokens, ``T`` of them new, ``W`` window, ``D`` head dim.
"""

from __future__ import annotations

from functools import cached_property

import torch

from arkv import kernels
from arkv.scores.attention import Summary, causal_visibility, summarize, summarize_span, window_attention


class Prompt:
    """One layer at the end of a forward of several tokens.

    Args:
        query: the newest queries after RoPE, [B, Hq, n, D].
        key, value: of all tokens in sequence order, [B, H, N, D]; those of earlier forwards as the cache holds them.
        new: T, tokens of this forward.
        window: W; fewer where the forward has fewer tokens.
        scaling: factor of the logits.
        moments: whether anything depends on the variance over the queries.
        held: bool [B, H, N - T], which of the places before the new tokens hold a token.
        sinks: bool [B, 1 or H, N], tokens that stay whatever their score.
        padding: bool [B, T], False where a new token is padding.
        fused: whether a kernel may do it.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        new: int,
        window: int,
        scaling: float,
        sinks: torch.Tensor,
        moments: bool = False,
        held: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        fused: bool = True,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.new, self.window, self.scaling = new, min(window, new), scaling
        self.past = key.shape[2] - self.window
        """Tokens before the window."""
        self.sinks = sinks
        """Bool [B, 1 or H, N]: tokens that stay whatever their score."""
        if held is not None and bool(held.all()):
            held = None
        self.moments, self.held, self.padding = moments, held, padding
        # Without padding and places that hold nothing, queries see all keys up to their own.
        self.alone = held is None and padding is None
        self.kernel = None
        if fused and self.alone and query.dtype == key.dtype:
            self.kernel = kernels.score.summarize if kernels.score.supported(key.device, key.dtype) else None

    def sample(self, index: int, window: int) -> Prompt:
        """One sample alone, with a window of so many queries."""
        one = slice(index, index + 1)
        return Prompt(
            self.query[one],
            self.key[one],
            self.value[one],
            new=self.new,
            window=window,
            scaling=self.scaling,
            sinks=self.sinks[one],
            moments=self.moments,
            held=None if self.held is None else self.held[one],
            padding=None if self.padding is None else self.padding[one],
        )

    @cached_property
    def near(self) -> Summary:
        """What the keys get from the window's queries."""
        if self.kernel is not None:
            queries = self.query[:, :, -self.window :]
            return self.kernel(queries, self.key, self.scaling, 1, self.past, self.moments)
        return summarize(self.attention, self.key.shape[1], self.past, self.moments)

    def far(self, span: int, stride: int) -> Summary:
        """The same of every ``stride``-th of the newest ``span`` queries, without moments."""
        few = slice((span - 1) % stride, None, stride)
        queries = self.query[:, :, -span:][:, :, few]
        if self.kernel is not None:
            return self.kernel(queries, self.key, self.scaling, stride, self.past, False)
        visible = self.visible(span)[:, :, few]
        return summarize_span(self.attention, queries, self.key, self.scaling, visible, stride)

    @cached_property
    def attention(self) -> torch.Tensor:
        """Attention of the window's queries, [B, Hq, W, N] float32."""
        visible = self.visible(self.window)
        if self.alone:
            # They see all older keys.
            visible = visible[..., -self.window :]
        return window_attention(self.query[:, :, -self.window :], self.key, self.scaling, visible)

    def visible(self, queries: int) -> torch.Tensor:
        """Which keys the newest ``queries`` see: bool [B, 1 or H, queries, N], or only the newest keys of these."""
        if self.alone:
            return causal_visibility(queries, queries, None, self.key.device)
        block = causal_visibility(self.new, queries, self.padding, self.key.device)
        if self.held is None:
            return block
        batch, heads, stored = self.held.shape
        before = self.held.unsqueeze(2).expand(-1, -1, queries, stored)
        return torch.cat([before, block.expand(batch, heads, queries, self.new)], dim=-1)

    def only_tokens(self, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` [B, H, N], in place 0 where there is no token."""
        if self.padding is not None:
            scores[..., -self.new :].masked_fill_(~self.padding.unsqueeze(1), 0.0)
        if self.held is not None:
            scores[..., : -self.new].masked_fill_(~self.held, 0.0)
        return scores
