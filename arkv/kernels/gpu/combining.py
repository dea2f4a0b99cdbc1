"""What the splits of :mod:`arkv.kernels.gpu.attention` left, combined: the output, and the importance of every slot.

Letters as there.
"""

import triton
import triton.language as tl

from arkv.kernels.gpu.shared import COUNT, PRECISION, START, STORED_COUNT, STORED_START


@triton.jit
def _merged(
    partial,
    peaks,
    highest,
    first,
    splits,
    channel,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
):
    """The sum of the outputs of ``splits`` splits from ``first`` on, brought to one maximum; some channels [G, n]."""
    query_head = tl.arange(0, PADDED_GROUP)
    present = query_head < GROUP
    place = query_head[:, None] * VALUE_DIM + channel[None, :]
    inside = present[:, None] & (channel < VALUE_DIM)[None, :]
    result = tl.zeros((PADDED_GROUP, channel.shape[0]), tl.float32)
    for split in range(first, first + splits):
        peak = tl.load(peaks + split * GROUP + query_head, mask=present, other=float("-inf"))
        part = tl.load(partial + split * GROUP * VALUE_DIM + place, mask=inside, other=0.0)
        result += part * tl.exp(peak - highest)[:, None]
    return result


@triton.jit
def _importance(
    logits,
    importance,
    block,
    count,
    highest,
    whole,
    logits_stride,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean probability of a block of slots, over the query heads."""
    query_head = tl.arange(0, PADDED_GROUP)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    used = slot < count
    place = query_head[:, None] * logits_stride + slot[None, :]
    inside = (query_head < GROUP)[:, None] & used[None, :]
    found = tl.load(logits + place, mask=inside, other=float("-inf"))
    mean = tl.sum(tl.exp(found - highest[:, None]) / whole[:, None], axis=0) / GROUP
    tl.store(importance + slot, mean, mask=used)


@triton.jit(
    do_not_specialize=[
        "begin",
        "logits_stride",
        "original_width",
        "splits",
        "original_splits",
        "slots_per_split",
        "original_blocks",
    ]
)
def combine_splits(
    rows,
    begin,
    heads,
    sinks,
    rotation,
    logits,
    partial,
    peaks,
    totals,
    output,
    original_importance,
    stored_importance,
    logits_stride,
    original_width,
    splits,
    original_splits,
    slots_per_split,
    original_blocks,
    COLUMNS: tl.constexpr,
    STORED: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Output [rows, G, D] and importance from what :func:`attend_splits` left. The first programs of a row write
    ``CHUNK`` channels of its output each, the others the importance of ``BLOCK`` slots."""
    row = tl.program_id(0)
    chunks = tl.cdiv(VALUE_DIM, CHUNK)
    table = rows + (begin + row).to(tl.int64) * COLUMNS
    count = tl.load(table + COUNT).to(tl.int32)
    original_used = tl.cdiv(count, slots_per_split)
    stored_count, stored_used = 0, 0
    if STORED:
        stored_count = tl.load(table + STORED_COUNT).to(tl.int32)
        stored_used = tl.cdiv(stored_count, slots_per_split)
    query_head = tl.arange(0, PADDED_GROUP)
    present = query_head < GROUP
    peaks += row.to(tl.int64) * splits * GROUP
    totals += row.to(tl.int64) * splits * GROUP
    partial += row.to(tl.int64) * splits * GROUP * VALUE_DIM

    # Heads of padding get 0, to keep them free of differences of infinities.
    highest = tl.where(present, float("-inf"), 0.0)
    extra = tl.zeros((PADDED_GROUP,), tl.float32)
    if sinks is not None:
        extra = tl.load(sinks + row % heads * GROUP + query_head, mask=present, other=0.0).to(tl.float32)
        highest = extra
    for first in range(0, splits, 64):
        split = first + tl.arange(0, 64)
        used = (split < original_used) | ((split >= original_splits) & (split < original_splits + stored_used))
        inside = present[:, None] & used[None, :]
        found = tl.load(peaks + split[None, :] * GROUP + query_head[:, None], mask=inside, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(found, axis=1))
    whole = tl.where(present, 0.0, 1.0)
    if sinks is not None:
        whole += tl.exp(extra - highest)
    for first in range(0, splits, 64):
        split = first + tl.arange(0, 64)
        used = (split < original_used) | ((split >= original_splits) & (split < original_splits + stored_used))
        inside = present[:, None] & used[None, :]
        place = split[None, :] * GROUP + query_head[:, None]
        found = tl.load(peaks + place, mask=inside, other=float("-inf"))
        total = tl.load(totals + place, mask=inside, other=0.0)
        whole += tl.sum(total * tl.exp(found - highest[:, None]), axis=1)

    program = tl.program_id(1)
    if program < chunks:
        channel = program * CHUNK + tl.arange(0, CHUNK)
        result = _merged(partial, peaks, highest, 0, original_used, channel, GROUP, VALUE_DIM, PADDED_GROUP)
        if STORED:
            if rotation is None:
                result += _merged(
                    partial, peaks, highest, original_splits, stored_used, channel, GROUP, VALUE_DIM, PADDED_GROUP
                )
            else:
                PART: tl.constexpr = min(128, PADDED_VALUE_DIM)
                for start in tl.static_range(0, PADDED_VALUE_DIM, PART):
                    turned = start + tl.arange(0, PART)
                    low = _merged(
                        partial, peaks, highest, original_splits, stored_used, turned, GROUP, VALUE_DIM, PADDED_GROUP
                    )
                    inside = (channel < VALUE_DIM)[:, None] & (turned < VALUE_DIM)[None, :]
                    turn = tl.load(rotation + channel[:, None] * VALUE_DIM + turned[None, :], mask=inside, other=0.0)
                    result += tl.dot(low, tl.trans(turn), input_precision=PRECISION)
        result /= whole[:, None]
        place = row.to(tl.int64) * GROUP * VALUE_DIM + query_head[:, None] * VALUE_DIM + channel[None, :]
        inside = present[:, None] & (channel < VALUE_DIM)[None, :]
        tl.store(output + place, result.to(output.dtype.element_ty), mask=inside)
    elif logits is not None:
        logits += row.to(tl.int64) * GROUP * logits_stride
        block = program - chunks
        if block < original_blocks:
            if block * BLOCK < count:
                own = original_importance + tl.load(table + START)
                _importance(logits, own, block, count, highest, whole, logits_stride, GROUP, PADDED_GROUP, BLOCK)
        elif STORED:
            block -= original_blocks
            if block * BLOCK < stored_count:
                own = stored_importance + tl.load(table + STORED_START)
                logits += original_width
                _importance(logits, own, block, stored_count, highest, whole, logits_stride, GROUP, PADDED_GROUP, BLOCK)
