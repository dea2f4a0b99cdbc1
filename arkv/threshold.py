"""Budgets of KV heads by one threshold: the tokens of several KV heads compete for the same bytes.

Letters: ``L`` layers, ``B`` batch, ``H`` KV heads, ``N`` prompt tokens, ``R`` KV heads that share a budget.

A head whose tokens nobody looks at keeps few of them, so that another one can keep more: as in AdaKV (arXiv
2407.11550), where the heads of a layer compete, and KVzip (arXiv 2505.23416), where all of them do. Every head is sure
of an even share of a part of the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from arkv.allocators import Allocator, ByteAllocator, JointAllocator, LayerScores, TokenAllocator
from arkv.config import CacheConfig, ConfigError
from arkv.grant import Grant


class Won(NamedTuple):
    """Tokens that KV heads keep, [R] int64 each."""

    original: torch.Tensor
    quantized: torch.Tensor


def compete(scores: torch.Tensor, original: int, quantized: int, sure: int) -> Won:
    """The best tokens of all heads together stay Original, and the next ones are Quantized.

    Args:
        scores: of the tokens that compete, [R, n].
        original, quantized: how many there may be, of all heads together.
        sure: tokens that every head keeps in any case.
    """
    heads, count = scores.shape
    total = min(original + quantized, scores.numel())
    sure = min(sure, count, total // heads)
    raised = scores.clone()
    raised.scatter_(1, scores.topk(sure, dim=1).indices, float("inf"))
    kept = _per_head(raised, total)
    if not quantized:
        return Won(kept, torch.zeros_like(kept))
    # Of those that a head is sure of, only the best are among the best of all.
    best = torch.minimum(_per_head(scores, min(original, total)), kept)
    return Won(best, kept - best)


def _per_head(scores: torch.Tensor, count: int) -> torch.Tensor:
    """How many of the ``count`` highest of ``scores`` [R, n] each head has, [R]."""
    best = scores.flatten().topk(count).indices
    return torch.bincount(best // scores.shape[1], minlength=scores.shape[0])


class HeadAllocator(ByteAllocator):
    """KV heads get the tokens of their layer that are above one threshold, within what :class:`ByteAllocator` gives the
    layer.

    Where that would hold the whole prompt if heads had the same, they have.
    """

    def layer(self, scores: LayerScores) -> Grant:
        """See :class:`Allocator`."""
        grant = super().layer(scores)
        for sample in range(len(scores.lengths)):
            if _evicts(self.config, grant, sample, scores.lengths[sample]):
                _share(self.config, [scores], [grant], sample)
        return grant


class ThresholdAllocator(JointAllocator):
    """KV heads of all layers get the tokens that are above one threshold.

    Where the budget would hold the whole prompt if heads had the same, they have.

    Raises:
        ConfigError: layers whose KV heads have other sizes cannot share one budget.
    """

    def __init__(self, config: CacheConfig, layers: int) -> None:
        self.config, self.layers = config, layers

    def grants(self, layers: Sequence[LayerScores]) -> list[Grant]:
        """See :class:`JointAllocator`."""
        even = ByteAllocator(self.config, self.layers)
        grants = [even.layer(each) for each in layers]
        for sample, tokens in enumerate(layers[0].lengths):
            if all(_evicts(self.config, grant, sample, tokens) for grant in grants):
                _share(self.config, layers, grants, sample)
        return grants


def _evicts(config: CacheConfig, grant: Grant, sample: int, tokens: int) -> bool:
    """Whether heads of the same size cannot hold the whole prompt."""
    return config.recent + grant.original[sample][0] + grant.quantized[sample][0] < tokens


def _share(config: CacheConfig, layers: Sequence[LayerScores], grants: Sequence[Grant], sample: int) -> None:
    """Change what ``grants`` have for one sample: the heads of ``layers`` compete for all of it."""
    geometry, tokens = layers[0].geometry, layers[0].lengths[sample]
    if any(each.geometry != geometry for each in layers):
        raise ConfigError(
            "head_budgets='all': this model has layers whose KV heads have other sizes than those of others, which "
            "cannot share one budget: use head_budgets='layer'"
        )
    past = slice(-tokens + config.n_sink, -config.recent)
    if config.stream_norm and not all(each.stream for each in layers):
        raise ConfigError(
            "stream_norm=True: this model does not give the hidden states of every layer: use stream_norm=False"
        )
    streams = [each.stream[sample] if config.stream_norm else 1.0 for each in layers]
    scores = torch.cat(
        [each.importance[sample, :, past] / stream for each, stream in zip(layers, streams, strict=True)]
    )
    once = geometry.row_bytes + (config.recent + config.n_sink) * geometry.original_bytes
    per_token: float = geometry.original_bytes
    if config.quantizes:
        once += config.number_format.bytes_per_head(geometry.key_dim)
        per_token = geometry.quantized_bytes(config.number_format)
    left = sum(sum(grant.nbytes[sample]) for grant in grants) - len(scores) * once
    assert config.original_share is not None
    original = int(config.original_share * left) // geometry.original_bytes
    quantized = int((left - original * geometry.original_bytes) / per_token) if config.quantizes else 0
    sure = int(config.sure_share * (original + quantized) / len(scores))
    won = compete(scores, original, quantized, sure)
    counts = zip(*(item.split([each.heads for each in layers]) for item in won), strict=True)
    for grant, (high, low) in zip(grants, counts, strict=True):
        grant.original[sample] = [config.n_sink + count for count in high.tolist()]
        grant.quantized[sample] = low.tolist()
        grant.nbytes[sample] = [
            int(once + more * geometry.original_bytes + few * per_token)
            for more, few in zip(high.tolist(), low.tolist(), strict=True)
        ]
        grant.limit[sample] = [0] * len(high)
        # What a head has won is of this prompt's tokens: no other split of its bytes would hold more of them.
        grant.final[sample] = [True] * len(high)


def allocator_of(config: CacheConfig, layers: int) -> Allocator | JointAllocator:
    """What shares a budget as ``config`` says, among so many layers."""
    if config.budget_unit == "tokens":
        return TokenAllocator(config)
    if config.head_budgets == "all":
        return ThresholdAllocator(config, layers)
    return (HeadAllocator if config.head_budgets == "layer" else ByteAllocator)(config, layers)
