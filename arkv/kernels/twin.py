"""One decoding step in torch operations: the readable twin of the kernels, which must agree with it.

Letters: ``R`` rows, ``H`` KV heads, ``G`` query heads per KV head, ``S`` slots of a pool, ``D`` head dim, ``n`` rows of
a layer.

A step is three calls: :func:`make_room` for all rows of all layers, before the first layer computes; :func:`attend`
once a layer; :func:`remember` for all rows, after the last layer. :mod:`arkv.store` says what rows and pools are,
:mod:`arkv.states` the rule that a step follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arkv.pools import Pool
from arkv.store import CAPACITY, COUNT, FIRST, SEEN, START, column, place_of, slots_of


def make_room(rows: torch.Tensor, pools: Sequence[Pool], n_sink: int, window: int, recency: bool) -> None:
    """Give the next token of every row its slot; in place.

    While the row has a free Original slot, the token that leaves the window moves there. Then the past token with the
    lowest score gives up its slot (of equal ones the newest): it is quantized into a free Quantized slot or into that
    of the Quantized token with the lowest score, if that one is lower, or equal and newer, and else evicted. The new
    token takes the place of the one that leaves the window. Its key and value come later, in :func:`attend`.

    Args:
        rows: the row table [R, columns].
        recency: tokens are ranked by age instead of by attention.
    """
    original, *quantized = pools
    start, count, capacity = (rows[:, column(0, which)] for which in (START, COUNT, CAPACITY))
    relative = rows[:, SEEN] - rows[:, FIRST]
    place = place_of(relative, n_sink, window)
    leaves = relative >= n_sink + window
    outgoing = start + place
    full = count == capacity
    gives_up = leaves & full
    # While the sinks and the window fill up, the new token takes the next slot.
    freed = torch.where(leaves, start + count, outgoing)
    if bool(gives_up.any()):
        # The past, and the token that leaves the window.
        held = slots_of(start, count)
        within = held.slots - start[held.rows]
        candidate = (within >= n_sink + window) | (within == place[held.rows])
        candidate &= gives_up[held.rows]
        victim = _lowest(original, held.slots[candidate], held.rows[candidate], len(rows))
        freed = torch.where(gives_up, victim, freed)
        if quantized:
            _demote(rows, original, quantized[0], freed, gives_up.nonzero().squeeze(1))
    count += ~gives_up
    moves = (leaves & (freed != outgoing)).nonzero().squeeze(1)
    for tensor in original.tensors():
        tensor.index_copy_(0, freed[moves], tensor.index_select(0, outgoing[moves]))
    position = rows[:, SEEN].to(original.position.dtype)
    original.position.index_copy_(0, outgoing, position)
    original.score.index_copy_(0, outgoing, position.float() if recency else torch.zeros_like(position.float()))
    rows[:, SEEN] += 1


def _lowest(pool: Pool, slots: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """The slot with the lowest score in every one of ``count`` rows, the newest token of equal ones; 0 in rows without
    any of ``slots`` [n], which are in ``rows`` [n]."""
    # Sorts are stable: by position, then by score, then by row. The first of every row is the one.
    order = pool.position[slots].argsort(descending=True, stable=True)
    order = order[pool.score[slots[order]].argsort(stable=True)]
    order = order[rows[order].argsort(stable=True)]
    slots, rows = slots[order], rows[order]
    first = rows.diff(prepend=rows.new_tensor([-1])) != 0
    found = slots.new_zeros(count)
    found[rows[first]] = slots[first]
    return found


def _demote(rows: torch.Tensor, original: Pool, stored: Pool, freed: torch.Tensor, which: torch.Tensor) -> None:
    """Quantize the tokens in the Original slots ``freed`` [R] of the rows ``which`` [n], or evict them."""
    start, count, capacity = (rows[:, column(1, index)] for index in (START, COUNT, CAPACITY))
    which = which[capacity[which] > 0]
    has_free = count < capacity
    held = slots_of(start, torch.where(has_free, 0, count))
    target = torch.where(has_free, start + count, _lowest(stored, held.slots, held.rows, len(rows)))
    score, lowest = original.score[freed[which]], stored.score[target[which]]
    older = original.position[freed[which]] < stored.position[target[which]]
    which = which[has_free[which] | (score > lowest) | ((score == lowest) & older)]
    source, target = freed[which], target[which]
    for mine, theirs in ((original.key, stored.key), (original.value, stored.value)):
        theirs.write(target, which, mine.codes.index_select(0, source))
    stored.score[target] = original.score[source]
    stored.position[target] = original.position[source]
    count[which] += has_free[which].long()


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    begin: int,
    pools: Sequence[Pool],
    n_sink: int,
    window: int,
    scaling: float,
    softcap: float,
    sinks: torch.Tensor | None,
    importance: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Store the new token of one layer, and attend to all that the layer holds.

    Products are taken in float32: a bfloat16 product would round the logits to 8 bits.

    Args:
        query: [B, H * G, 1, D].
        key, value: [B, H, 1, D].
        rows: the row table [R, columns] after :func:`make_room`.
        begin: the first row of the layer, which has B * H of them.
        scaling: factor of the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``, as in Gemma 2; 0: they stay.
        sinks: one more logit for every query head, which takes attention and gives nothing, as in GPT-OSS; [H * G].
        importance: for every pool [S] float32, where the attention that each token gets is left, the mean over the
            query heads; none: it is not wanted.

    Returns:
        Attention output [B, 1, H * G, D].
    """
    batch, query_heads, _, dim = query.shape
    count = key.shape[0] * key.shape[1]
    layer = slice(begin, begin + count)
    relative = rows[layer, SEEN] - 1 - rows[layer, FIRST]
    slot = rows[layer, column(0, START)] + place_of(relative, n_sink, window)
    for plane, new in ((pools[0].key, key), (pools[0].value, value)):
        plane.codes.index_copy_(0, slot, new.reshape(count, -1).to(plane.codes.dtype))

    grouped = query.reshape(count, -1, dim).float() * scaling
    logits, values, taken, places = [], [], [], []
    for number, pool in enumerate(pools):
        counts = rows[layer, column(number, COUNT)]
        held = slots_of(rows[layer, column(number, START)], counts)
        width = int(counts.max())
        within = torch.arange(width, device=query.device) < counts[:, None]
        keys = grouped.new_zeros(count, width, dim)
        keys[within] = pool.key.read(held.slots, begin + held.rows)
        padded = grouped.new_zeros(count, width, pool.value.dim)
        padded[within] = pool.value.read(held.slots, begin + held.rows)
        logits.append(grouped @ keys.transpose(1, 2))
        values.append(padded)
        taken.append(within)
        places.append(held.slots)
    joined = torch.cat(logits, dim=-1)
    if softcap:
        joined = softcap * torch.tanh(joined / softcap)
    joined = joined.masked_fill(~torch.cat(taken, dim=-1).unsqueeze(1), float("-inf"))
    if sinks is not None:
        extra = sinks.float().view(1, -1, joined.shape[1]).expand(batch, -1, -1).reshape(count, -1, 1)
        joined = torch.cat([joined, extra], dim=-1)
    probabilities = joined.softmax(dim=-1)
    output, place = torch.zeros_like(grouped[..., :1]), 0
    for number, (padded, within, slots) in enumerate(zip(values, taken, places, strict=True)):
        part = probabilities[..., place : place + padded.shape[1]]
        output = output + part @ padded
        if importance:
            importance[number].index_copy_(0, slots, part.mean(dim=1)[within])
        place += padded.shape[1]
    return output.to(query.dtype).view(batch, 1, query_heads, -1)


def remember(
    rows: torch.Tensor,
    pools: Sequence[Pool],
    importance: Sequence[torch.Tensor],
    window: int,
    rate: float,
    pool_width: int,
    largest: bool = False,
) -> None:
    """Bring the scores of all rows up to date with the attention of a step; in place.

    Args:
        importance: as :func:`attend` left it.
        rate: weight of the newest step in a running average; 0: the newest attention replaces the score, averaged over
            neighbours among the tokens that can leave at the next step (the published update).
        pool_width: how many neighbours, odd; beyond the ends counts as zero.
        largest: a score is the largest attention so far, of which it loses the share ``rate`` with every step.
    """
    if largest:
        for stored, new in zip(pools, importance, strict=True):
            torch.maximum(stored.score.mul_(1.0 - rate), new, out=stored.score)
        return
    if rate:
        for stored, new in zip(pools, importance, strict=True):
            stored.score.mul_(1.0 - rate).add_(new, alpha=rate)
        return
    held = [slots_of(rows[:, column(number, START)], rows[:, column(number, COUNT)]) for number in range(len(pools))]
    row = torch.cat([item.rows for item in held])
    position = torch.cat([pool.position[item.slots] for pool, item in zip(pools, held, strict=True)])
    newest = torch.cat([part[item.slots] for part, item in zip(importance, held, strict=True)])
    # All but the window, and the token that leaves it next, row by row in sequence order.
    order = position.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    order = order[(position <= rows[row, SEEN] - window)[order]]
    alone, row = newest[order], row[order]
    total = alone.clone()
    for distance in range(1, pool_width // 2 + 1):
        near = row[distance:] == row[:-distance]
        total[distance:] += alone[:-distance] * near
        total[:-distance] += alone[distance:] * near
    newest[order] = total / pool_width
    for pool, item, new in zip(pools, held, newest.split([len(item.slots) for item in held]), strict=True):
        pool.score.index_copy_(0, item.slots, new)
