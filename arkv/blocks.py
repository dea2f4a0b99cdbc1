"""Attention of a prompt, or of a further block of tokens, over what the cache holds and, causally, over itself.

Letters: ``B`` batch, ``Hq`` query heads, ``H`` KV heads, ``G = Hq / H``, ``T`` new tokens, ``m`` stored tokens, ``D``
head dim.

A prompt of its own goes through SDPA as in a stock model. Behind stored tokens, of which every KV head may hold another
number, the block's attention to itself and that to the stored tokens are computed apart and merged by their log-sum-exp
(as in FlashAttention, arXiv 2205.14135): no mask of T x (m + T) is ever made, and little more memory is taken than the
output's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from arkv.parts import InOrder

CHUNK_BYTES = 1 << 21
"""Logits that are in memory at a time."""


def attend_block(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    stored: InOrder | None,
    padding: torch.Tensor | None,
    dense: Callable[[], torch.Tensor | None],
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention output [B, T, Hq, D].

    Args:
        query: [B, Hq, T, D].
        key, value: of the new tokens, [B, H, T, D].
        stored: the tokens of earlier forwards; None: this is the first one.
        padding: bool [B, T], False where a new token is padding; None: none is.
        dense: gives the mask that SDPA would get in a first forward.
        scaling, softcap, sinks: as for :func:`arkv.kernels.twin.attend`.
    """
    if stored is None:
        return plain_attention(module, query, key, value, dense(), scaling, softcap, sinks, **kwargs)
    batch, heads = key.shape[:2]
    grouped = query.unflatten(1, (heads, -1))
    visible = None if padding is None else padding[:, None, None, :]
    output, total = _itself(grouped, key, value, visible, True, scaling, softcap)
    keys, values = stored.key, stored.value
    hidden = (stored.position < 0).view(batch, heads, 1, 1, -1)
    # In place, unless gradients need what was there before.
    merged, totals = torch.empty_like(output) if output.requires_grad else output, []
    for chunk in _chunks(batch * query.shape[1] * keys.shape[2], query.shape[2]):
        logits = _logits(grouped[:, :, :, chunk], keys, scaling, softcap).masked_fill(hidden, float("-inf"))
        both = torch.logaddexp(total[..., chunk], logits.logsumexp(dim=-1))
        # Padding may see nothing at all: then there is no difference to -inf.
        finite = both.masked_fill(both == float("-inf"), 0.0)
        found = _weighted((logits - finite.unsqueeze(-1)).exp(), values)
        own = output[..., chunk, :] * (total[..., chunk] - finite).exp().unsqueeze(-1)
        merged[..., chunk, :] = (found + own).to(output.dtype)
        totals.append(both)
    return _with_sinks(merged, torch.cat(totals, dim=-1), sinks)


def plain_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dense: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention to plain keys and values, [B, T, Hq, D]: SDPA as in a stock model, and, where logits are capped or have
    sinks among them, which SDPA does not know, the same in float32.

    Args:
        query: [B, Hq, T, D].
        key, value: [B, H, N, D].
        dense: bool or float [B, 1, T, N]; None: the queries are the newest tokens, and causal.
        softcap, s_aux: names of transformers for the ``softcap`` and ``sinks`` of :func:`arkv.kernels.twin.attend`.
    """
    if not softcap and s_aux is None:
        output: torch.Tensor
        output, _ = sdpa_attention_forward(module, query, key, value, dense, scaling=scaling, **kwargs)
        return output
    grouped = query.unflatten(1, (key.shape[1], -1))
    return _with_sinks(*_itself(grouped, key, value, dense, dense is None, scaling, softcap), s_aux)


def one_token_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, **kwargs: Any
) -> torch.Tensor:
    """:func:`plain_attention` of one new token that sees all keys and values, [B, 1, Hq, D].

    The queries that share a KV head are rows of one product, and no head is repeated, which SDPA is faster with on CPUs
    in bfloat16. The sums are the same but for rounding.

    Args:
        query: [B, Hq, 1, D].
        key, value: [B, H, N, D].
    """
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        return plain_attention(module, query, key, value, None, scaling, **kwargs)
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
    output = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, scale=scaling)
    return output.flatten(1, 2).unsqueeze(1)


def _with_sinks(output: torch.Tensor, total: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """[B, T, Hq, D] of ``output`` [B, H, G, T, D] with log-sum-exp ``total`` [B, H, G, T]."""
    if sinks is not None:
        # One more logit takes its share of the attention and gives nothing.
        extra = sinks.float().view(1, output.shape[1], -1, 1)
        output = (output * (total - torch.logaddexp(total, extra)).exp().unsqueeze(-1)).to(output.dtype)
    # As transformers' functions leave it: some models view it.
    return output.flatten(1, 2).transpose(1, 2).contiguous()


def _itself(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    causal: bool,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``query`` [B, H, G, T, D] to ``key`` [B, H, N, D]: output [B, H, G, T, D] and the log-sum-exp of the
    logits [B, H, G, T].

    A query that sees nothing has the output 0 and the log-sum-exp -inf.

    Args:
        visible: [B, 1, T or 1, N], bool or what is added to the logits; None: everything is.
        causal: the queries are the newest of the tokens, and see none after themselves.
    """
    batch, heads, group, length, dim = query.shape
    gradients = torch.is_grad_enabled() and query.requires_grad
    plain = visible is None and causal and not softcap and key.shape[2] == length and not gradients
    if query.device.type == "cpu" and plain and dim == value.shape[-1]:
        output = query.new_empty(batch, length, heads, group, dim).permute(0, 2, 3, 1, 4)
        total = torch.empty(batch, heads, group, length, dtype=torch.float32)
        for head in range(heads):
            # The heads of a group share keys and values without a copy of them.
            shared = (item[:, head : head + 1].expand(-1, group, -1, -1) for item in (key, value))
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, head], *shared, is_causal=True, scale=scaling
            )
            output[:, head], total[:, head] = found[0], found[1].view(batch, group, length)
        return output, total
    outputs, totals = [], []
    index = torch.arange(key.shape[2], device=query.device)
    for chunk in _chunks(batch * heads * group * key.shape[2], length):
        logits = _logits(query[:, :, :, chunk], key, scaling, softcap)
        if causal:
            newest = index[key.shape[2] - length :]
            logits = logits.masked_fill(index > newest[chunk, None], float("-inf"))
        if visible is not None:
            seen = (visible if visible.shape[2] == 1 else visible[:, :, chunk]).unsqueeze(1)
            logits = logits.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else logits + seen
        totals.append(logits.logsumexp(dim=-1))
        # A row that sees nothing gives NaN.
        weights = logits.softmax(dim=-1).nan_to_num(0.0)
        outputs.append(_weighted(weights, value).to(query.dtype))
    return torch.cat(outputs, dim=3), torch.cat(totals, dim=3)


def _logits(query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    """[B, H, G, t, n] in float32 of ``query`` [B, H, G, t, D] and ``key`` [B, H, n, D]."""
    # The group's queries side by side: a product that broadcasts would copy the keys for each.
    rows = (query.float() * scaling).flatten(2, 3)
    logits = (rows @ key.float().transpose(-1, -2)).unflatten(2, query.shape[2:4])
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _weighted(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[B, H, G, t, D] in float32 of ``weights`` [B, H, G, t, n] and ``value`` [B, H, n, D]."""
    rows: torch.Tensor = weights.flatten(2, 3) @ value.float()
    return rows.view(*weights.shape[:4], -1)


def _chunks(numbers: int, length: int) -> Iterator[slice]:
    """Parts of ``length`` queries, each with few enough of ``numbers`` float32 logits per query."""
    size = max(CHUNK_BYTES // (4 * max(numbers, 1)), 1)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
