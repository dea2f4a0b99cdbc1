"""The Triton kernels behind :mod:`arkv.kernels.gpu`. This module alone imports Triton.

Letters as there; ``N`` slots of a block, ``P`` a size padded to a power of two. Tiles are float32 but for those that
``HALF`` lets be of half precision: numbers as the model has them and codes are exact in it, and what they are
multiplied with is split in two halves, which together have 16 bits and more.

Codes of fewer than 8 bits come as planes of ``RUNS`` codes to a byte (:mod:`arkv.formats.packing`). A tile of bytes
[N, P / RUNS] is loaded once, and a shift and a mask make a tile of each run, which are joined to [N, P] without moving
anything between threads: index ``i`` of such a tile is channel ``i / RUNS`` of run ``i % RUNS``. Products do not mind
the order of channels, so queries are loaded, and outputs stored, in the same order.
"""

import triton
import triton.language as tl

from arkv import store

# Codes and numbers of half precision are exact in TF32; three products make up for what it cuts off the other factor.
PRECISION = tl.constexpr("tf32x3")

SEEN, FIRST = tl.constexpr(store.SEEN), tl.constexpr(store.FIRST)
START, COUNT, CAPACITY = (tl.constexpr(store.column(0, which)) for which in (store.START, store.COUNT, store.CAPACITY))
STORED_START, STORED_COUNT, STORED_CAPACITY = (
    tl.constexpr(store.column(1, which)) for which in (store.START, store.COUNT, store.CAPACITY)
)

ROUND = tl.constexpr(1.5 * 2.0**23)
"""Added and taken away again, it rounds a float32 to the nearest even integer, up to 2**22."""
TINY = tl.constexpr(2.0**-126)
"""The smallest normal number, of float32 and of bfloat16."""


@triton.jit
def _place(relative, n_sink, window):
    """As ``store.place_of``."""
    return tl.where(relative < n_sink + window, relative, n_sink + (relative - n_sink) % window).to(tl.int32)


@triton.jit
def _channels(DIM: tl.constexpr, PADDED: tl.constexpr, RUNS: tl.constexpr):
    """The channels [P] of an unpacked tile, and which of them there are."""
    index = tl.arange(0, PADDED)
    within = index // RUNS
    return within + index % RUNS * (DIM // RUNS), within < DIM // RUNS


# -- attention ---------------------------------------------------------------------------------------------------------


@triton.jit
def _bytes(tokens, first, used, RUN: tl.constexpr, PADDED_RUN: tl.constexpr):
    """``RUN`` neighbouring bytes of every token, from ``first`` on."""
    byte = tl.arange(0, PADDED_RUN)
    return tl.load(tokens + first + byte[None, :], mask=used[:, None] & (byte < RUN)[None, :], other=0)


@triton.jit
def _unpack(tokens, used, DIM: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, RUNS: tl.constexpr):
    """Codes [N, P] of 2, 3 or 4 bits."""
    RUN: tl.constexpr = DIM // RUNS
    PADDED_RUN: tl.constexpr = PADDED // RUNS
    one = _bytes(tokens, 0, used, RUN, PADDED_RUN)
    if BITS == 4:
        codes = tl.join(one & 15, one >> 4)
    elif BITS == 2:
        codes = tl.join(tl.join(one & 3, (one >> 4) & 3), tl.join((one >> 2) & 3, one >> 6))
    else:
        two = _bytes(tokens, RUN, used, RUN, PADDED_RUN)
        three = _bytes(tokens, 2 * RUN, used, RUN, PADDED_RUN)
        seventh = (one >> 6) | ((three >> 4) & 4)
        last = (two >> 6) | ((three >> 5) & 4)
        # The last axis of the outermost join is the lowest bit of the run's number.
        even = tl.join(tl.join(one & 7, three & 7), tl.join(two & 7, seventh))
        odd = tl.join(tl.join((one >> 3) & 7, (three >> 3) & 7), tl.join((two >> 3) & 7, last))
        codes = tl.join(even, odd)
    return tl.reshape(codes, (used.shape[0], PADDED))


@triton.jit
def _read(
    codes,
    levels,
    slot,
    used,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BITS: tl.constexpr,
    RUNS: tl.constexpr,
    FLOATING: tl.constexpr,
    HALF: tl.constexpr,
):
    """Numbers as they are (``BITS`` 0), or levels without scale and zero point; [N, P]."""
    channel = tl.arange(0, PADDED)
    inside = used[:, None] & (channel < DIM)[None, :]
    if BITS == 0:
        result = tl.load(codes + slot[:, None] * DIM + channel[None, :], mask=inside, other=0.0)
        if not HALF:
            result = result.to(tl.float32)
    else:
        if BITS == 8:
            bits = tl.load(codes + slot[:, None] * DIM + channel[None, :], mask=inside, other=0)
            if FLOATING:
                # e4m3 by way of float16, as ``formats.base.e4m3_to_float``: only newer GPUs convert it themselves.
                wide = bits.to(tl.uint16)
                half = ((wide & 0x7F) << 7) | ((wide & 0x80) << 8)
                result = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
            else:
                result = bits.to(tl.int8, bitcast=True).to(tl.float32)
        else:
            unpacked = _unpack(codes + slot[:, None] * (DIM * BITS // 8), used, DIM, PADDED, BITS, RUNS)
            if levels is None:
                result = unpacked.to(tl.float32)
            else:
                # Of 64 bytes, which stay in the nearest cache.
                result = tl.load(levels + unpacked.to(tl.int32))
        if HALF and levels is None:
            result = result.to(tl.bfloat16)
    return result


@triton.jit
def _dot(a, b, EXACT: tl.constexpr):
    """``a @ b`` in float32; ``EXACT``: ``a`` is exact in ``b``'s type."""
    if b.dtype == tl.float32:
        result = tl.dot(a.to(tl.float32), b, input_precision=PRECISION)
    else:
        high = a.to(b.dtype)
        result = tl.dot(high, b)
        if not EXACT:
            low = (a.to(tl.float32) - high.to(tl.float32)).to(b.dtype)
            result = tl.dot(low, b, result)
    return result


@triton.jit
def _cap(logits, softcap, CAPPED: tl.constexpr):
    """``softcap * tanh(logits / softcap)``."""
    if CAPPED:
        # exp may become infinite, and tanh 1 by that.
        logits = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * logits / softcap)))
    return logits


@triton.jit
def _slots(
    q,
    bias,
    key,
    key_scale,
    key_zero,
    key_levels,
    value,
    value_scale,
    value_zero,
    value_levels,
    logits,
    peak,
    total,
    output,
    start,
    end,
    skipped,
    scaling,
    softcap,
    logits_stride,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_KEY_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_RUNS: tl.constexpr,
    KEY_FLOATING: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_RUNS: tl.constexpr,
    VALUE_FLOATING: tl.constexpr,
    CAPPED: tl.constexpr,
    HALF: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Attend to the slots from ``start`` to ``end`` of one row in one pool, but for ``skipped``; all pointers are those
    of the row. ``bias`` [G] is added to the products. Takes and returns the softmax's maximum and sum [G] and an output
    [G, P] that is not yet divided by it."""
    query_head = tl.arange(0, PADDED_GROUP)
    summed = tl.sum(q.to(tl.float32), axis=1)
    for block in range(start, end, BLOCK):
        slot = block + tl.arange(0, BLOCK)
        used = (slot < end) & (slot != skipped)
        k = _read(key, key_levels, slot, used, KEY_DIM, PADDED_KEY_DIM, KEY_BITS, KEY_RUNS, KEY_FLOATING, HALF)
        scores = _dot(q, tl.trans(k), EXACT)
        if key_scale is not None:
            scores *= tl.load(key_scale + slot, mask=used, other=0.0).to(tl.float32)[None, :]
        if key_zero is not None:
            scores += summed[:, None] * tl.load(key_zero + slot, mask=used, other=0.0).to(tl.float32)[None, :]
        scores = _cap((scores + bias[:, None]) * scaling, softcap, CAPPED)
        scores = tl.where(used[None, :], scores, float("-inf"))
        if logits is not None:
            place = query_head[:, None] * logits_stride + slot[None, :]
            tl.store(logits + place, scores, mask=(query_head < GROUP)[:, None] & used[None, :])

        before = peak
        peak = tl.maximum(before, tl.max(scores, axis=1))
        # A block whose only slot is skipped has no maximum, and -inf has no difference to itself.
        finite = tl.where(peak == float("-inf"), 0.0, peak)
        shrink = tl.exp(before - finite)
        weights = tl.exp(scores - finite[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        output *= shrink[:, None]
        v = _read(
            value, value_levels, slot, used, VALUE_DIM, PADDED_VALUE_DIM, VALUE_BITS, VALUE_RUNS, VALUE_FLOATING, HALF
        )
        if value_zero is not None:
            zero = tl.load(value_zero + slot, mask=used, other=0.0).to(tl.float32)
            output += tl.sum(weights * zero[None, :], axis=1)[:, None]
        if value_scale is not None:
            weights *= tl.load(value_scale + slot, mask=used, other=0.0).to(tl.float32)[None, :]
        output += _dot(weights, v, False)
    return peak, total, output


@triton.jit
def _query(
    query,
    rotation,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    RUNS: tl.constexpr,
):
    """A row's queries [G, P] with their channels in the order of an unpacked tile, turned if there is a rotation."""
    query_head = tl.arange(0, PADDED_GROUP)
    channel, present = _channels(DIM, PADDED, RUNS)
    if rotation is None:
        inside = (query_head < GROUP)[:, None] & present[None, :]
        q = tl.load(query + query_head[:, None] * DIM + channel[None, :], mask=inside, other=0.0)
    else:
        CHUNK: tl.constexpr = min(32, PADDED)
        q = tl.zeros((PADDED_GROUP, PADDED), tl.float32)
        for first in range(0, DIM, CHUNK):
            from_channel = first + tl.arange(0, CHUNK)
            inside = (query_head < GROUP)[:, None] & (from_channel < DIM)[None, :]
            part = tl.load(query + query_head[:, None] * DIM + from_channel[None, :], mask=inside, other=0.0)
            inside = (from_channel < DIM)[:, None] & present[None, :]
            turn = tl.load(rotation + from_channel[:, None] * DIM + channel[None, :], mask=inside, other=0.0)
            q += tl.dot(part.to(tl.float32), turn, input_precision=PRECISION)
    return q


# Widths grow and layers follow one another: specialised on them, the kernels would be compiled anew on the way.
@triton.jit(do_not_specialize=["begin", "logits_stride", "original_width", "original_splits", "slots_per_split"])
def attend_splits(
    query,
    key,
    value,
    rows,
    begin,
    original_key,
    original_value,
    key_codes,
    key_scale,
    key_zero,
    key_center,
    key_rotation,
    key_levels,
    value_codes,
    value_scale,
    value_zero,
    value_levels,
    logits,
    partial,
    peaks,
    totals,
    n_sink,
    window,
    scaling,
    softcap,
    logits_stride,
    original_width,
    original_splits,
    slots_per_split,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_KEY_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_RUNS: tl.constexpr,
    KEY_FLOATING: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_RUNS: tl.constexpr,
    VALUE_FLOATING: tl.constexpr,
    CAPPED: tl.constexpr,
    HALF: tl.constexpr,
    EXACT: tl.constexpr,
):
    """What each split of a row's slots adds: outputs [rows, splits, G, D], maxima and sums [rows, splits, G], and, if
    wanted, logits [rows, G, slots]. The splits of pool 0 come first; those behind a pool's count leave nothing.

    The new token is taken from ``key`` and ``value`` [rows, D] by the split that covers its slot, which also stores it.
    """
    row = tl.program_id(0)
    split = tl.program_id(1)
    table = rows + (begin + row).to(tl.int64) * COLUMNS
    query_head = tl.arange(0, PADDED_GROUP)
    present = query_head < GROUP
    query += row.to(tl.int64) * GROUP * KEY_DIM
    if logits is not None:
        logits += row.to(tl.int64) * GROUP * logits_stride
    part = row.to(tl.int64) * tl.num_programs(1) + split
    partial += part * GROUP * VALUE_DIM
    peaks += part * GROUP
    totals += part * GROUP
    if split < original_splits:
        start = split * slots_per_split
        end = tl.minimum(start + slots_per_split, tl.load(table + COUNT).to(tl.int32))
        if start < end:
            base = tl.load(table + START)
            original_key += base * KEY_DIM
            original_value += base * VALUE_DIM
            q = _query(query, None, GROUP, KEY_DIM, PADDED_GROUP, PADDED_KEY_DIM, 1)
            new = _place(tl.load(table + SEEN) - 1 - tl.load(table + FIRST), n_sink, window)
            own = (new >= start) & (new < end)
            channel = tl.arange(0, PADDED_KEY_DIM)
            k = tl.load(key + row * KEY_DIM + channel, mask=channel < KEY_DIM, other=0.0)
            tl.store(original_key + new * KEY_DIM + channel, k, mask=own & (channel < KEY_DIM))
            logit = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1)
            logit = tl.where(own, _cap(logit * scaling, softcap, CAPPED), float("-inf"))
            if logits is not None:
                tl.store(logits + query_head * logits_stride + new, logit, mask=own & present)
            channel = tl.arange(0, PADDED_VALUE_DIM)
            inside = channel < VALUE_DIM
            v = tl.load(value + row * VALUE_DIM + channel, mask=inside, other=0.0)
            tl.store(original_value + new * VALUE_DIM + channel, v, mask=own & inside)
            output = tl.where(own, v.to(tl.float32), 0.0)[None, :] + tl.zeros((PADDED_GROUP, 1), tl.float32)
            peak, total, output = _slots(
                q,
                tl.zeros((PADDED_GROUP,), tl.float32),
                original_key,
                None,
                None,
                None,
                original_value,
                None,
                None,
                None,
                logits,
                logit,
                tl.where(own, 1.0, 0.0) + tl.zeros((PADDED_GROUP,), tl.float32),
                output,
                start,
                end,
                new,
                scaling,
                softcap,
                logits_stride,
                GROUP,
                KEY_DIM,
                VALUE_DIM,
                PADDED_GROUP,
                PADDED_KEY_DIM,
                PADDED_VALUE_DIM,
                BLOCK,
                KEY_BITS=0,
                KEY_RUNS=1,
                KEY_FLOATING=False,
                VALUE_BITS=0,
                VALUE_RUNS=1,
                VALUE_FLOATING=False,
                CAPPED=CAPPED,
                HALF=HALF,
                EXACT=True,
            )
            tl.store(peaks + query_head, peak, mask=present)
            tl.store(totals + query_head, total, mask=present)
            place = query_head[:, None] * VALUE_DIM + channel[None, :]
            tl.store(partial + place, output, mask=present[:, None] & inside[None, :])
    elif key_codes is not None:
        start = (split - original_splits) * slots_per_split
        end = tl.minimum(start + slots_per_split, tl.load(table + STORED_COUNT).to(tl.int32))
        if start < end:
            base = tl.load(table + STORED_START)
            if logits is not None:
                logits += original_width
            if key_zero is not None:
                key_zero += base
            if value_zero is not None:
                value_zero += base
            bias = tl.zeros((PADDED_GROUP,), tl.float32)
            if key_center is not None:
                channel = tl.arange(0, PADDED_KEY_DIM)
                inside = channel < KEY_DIM
                center = key_center + (begin + row).to(tl.int64) * KEY_DIM
                plain = _query(query, None, GROUP, KEY_DIM, PADDED_GROUP, PADDED_KEY_DIM, 1).to(tl.float32)
                center = tl.load(center + channel, mask=inside, other=0.0).to(tl.float32)
                bias = tl.sum(plain * center[None, :], axis=1)
            peak, total, output = _slots(
                _query(query, key_rotation, GROUP, KEY_DIM, PADDED_GROUP, PADDED_KEY_DIM, KEY_RUNS),
                bias,
                key_codes + base * (KEY_DIM * KEY_BITS // 8),
                key_scale + base,
                key_zero,
                key_levels,
                value_codes + base * (VALUE_DIM * VALUE_BITS // 8),
                value_scale + base,
                value_zero,
                value_levels,
                logits,
                tl.full((PADDED_GROUP,), float("-inf"), tl.float32),
                tl.zeros((PADDED_GROUP,), tl.float32),
                tl.zeros((PADDED_GROUP, PADDED_VALUE_DIM), tl.float32),
                start,
                end,
                -1,
                scaling,
                softcap,
                logits_stride,
                GROUP,
                KEY_DIM,
                VALUE_DIM,
                PADDED_GROUP,
                PADDED_KEY_DIM,
                PADDED_VALUE_DIM,
                BLOCK,
                KEY_BITS,
                KEY_RUNS,
                KEY_FLOATING,
                VALUE_BITS,
                VALUE_RUNS,
                VALUE_FLOATING,
                CAPPED=CAPPED,
                HALF=HALF,
                EXACT=EXACT,
            )
            tl.store(peaks + query_head, peak, mask=present)
            tl.store(totals + query_head, total, mask=present)
            channel, inside = _channels(VALUE_DIM, PADDED_VALUE_DIM, VALUE_RUNS)
            place = query_head[:, None] * VALUE_DIM + channel[None, :]
            tl.store(partial + place, output, mask=present[:, None] & inside[None, :])


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


# -- the state rule ----------------------------------------------------------------------------------------------------


@triton.jit
def _lowest(score, position, start, end, also, BLOCK: tl.constexpr):
    """The place of the lowest score from ``start`` to ``end`` and at ``also`` (-1: nowhere), of equal ones that of the
    newest token; pointers are those of the row."""
    lane = tl.arange(0, BLOCK)
    chosen = (lane == 0) & (also >= 0)
    least = tl.load(score + also + lane, mask=chosen, other=float("inf"))
    newest = tl.load(position + also + lane, mask=chosen, other=-1).to(tl.int32)
    place = tl.where(chosen, also, 0)
    for block in range(start, end, BLOCK):
        slot = block + lane
        one = tl.load(score + slot, mask=slot < end, other=float("inf"))
        its = tl.load(position + slot, mask=slot < end, other=-1).to(tl.int32)
        lower = (one < least) | ((one == least) & (its > newest))
        least = tl.where(lower, one, least)
        newest = tl.where(lower, its, newest)
        place = tl.where(lower, slot, place)
    lanes = least == tl.min(least)
    newest = tl.where(lanes, newest, -1)
    # Positions are unique: one lane is left.
    return tl.max(tl.where(lanes & (newest == tl.max(newest)), place, 0))


@triton.jit
def _outward(x, UP: tl.constexpr):
    """A float32 rounded up or down to what a bfloat16 can say."""
    bits = x.to(tl.int32, bitcast=True)
    cut = bits & -65536
    # Cutting bits off goes toward zero, which is the wrong way for one sign.
    wrong = (cut != bits) & ((bits >= 0) if UP else (bits < 0))
    return tl.where(wrong, cut + 65536, cut).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(x):
    """Numbers of at most 448 as e4m3 codes, to the nearest, of two the even one: only newer GPUs do it themselves."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Three bits of the mantissa stay; an exponent is 120 less. Below 2**-6 codes are multiples of 2**-9.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = ((tl.abs(x) * 512.0 + ROUND) - ROUND).to(tl.int32)
    return tl.where(tl.abs(x) < 2.0**-6, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _encode(
    x,
    slot,
    codes,
    scale,
    zero,
    center,
    rotation,
    levels,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BITS: tl.constexpr,
    RUNS: tl.constexpr,
    FLOATING: tl.constexpr,
):
    """Store the numbers at ``x`` [D] in ``slot``, as ``Layout.encode`` does; ``center`` is that of the row.

    The token is a tile [RUNS, P / RUNS], in which packing goes along the first axis.
    """
    RUN: tl.constexpr = DIM // RUNS
    run = tl.arange(0, RUNS)[:, None]
    within = tl.arange(0, PADDED // RUNS)[None, :]
    channel = run * RUN + within
    inside = (within < RUN) & (run < RUNS)
    if rotation is None:
        numbers = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
        if center is not None:
            numbers -= tl.load(center + channel, mask=inside, other=0.0).to(tl.float32)
    else:
        CHUNK: tl.constexpr = 16
        numbers = tl.zeros((RUNS, PADDED // RUNS), tl.float32)
        for first in range(0, DIM, CHUNK):
            source = first + tl.arange(0, CHUNK)
            part = tl.load(x + source, mask=source < DIM, other=0.0).to(tl.float32)
            if center is not None:
                part -= tl.load(center + source, mask=source < DIM, other=0.0).to(tl.float32)
            wanted = (source < DIM)[:, None, None] & inside[None, :, :]
            turn = tl.load(rotation + source[:, None, None] * DIM + channel[None, :, :], mask=wanted, other=0.0)
            numbers += tl.sum(part[:, None, None] * turn, axis=0)

    if zero is None:
        TOP: tl.constexpr = 448.0 if FLOATING else 127.0
        largest = tl.max(tl.max(tl.where(inside, tl.abs(numbers), 0.0), axis=1), axis=0)
        step = tl.maximum(tl.div_rn(largest, TOP), TINY)
        scaled = tl.minimum(tl.maximum(tl.div_rn(numbers, step), -TOP), TOP)
        if FLOATING:
            code = _e4m3(scaled)
        else:
            code = ((scaled + ROUND) - ROUND).to(tl.int32) & 255
    else:
        LAST: tl.constexpr = 2**BITS - 1
        top = LAST * 1.0
        if levels is not None:
            top = tl.load(levels + LAST)
        low = tl.min(tl.min(tl.where(inside, numbers, float("inf")), axis=1), axis=0)
        high = tl.max(tl.max(tl.where(inside, numbers, float("-inf")), axis=1), axis=0)
        low = _outward(low, False)
        step = tl.maximum(_outward(tl.div_rn(high - low, top), True), TINY)
        scaled = tl.div_rn(numbers - low, step)
        if levels is None:
            scaled = tl.minimum(tl.maximum(scaled, 0.0), LAST * 1.0)
            code = ((scaled + ROUND) - ROUND).to(tl.int32)
        else:
            code = tl.zeros((RUNS, PADDED // RUNS), tl.int32)
            for level in range(LAST):
                middle = (tl.load(levels + level) + tl.load(levels + level + 1)) * 0.5
                code += (scaled > middle).to(tl.int32)
        tl.store(zero + slot, low.to(tl.bfloat16))
    tl.store(scale + slot, step.to(scale.dtype.element_ty))

    byte = tl.arange(0, PADDED // RUNS)
    own = codes + slot * (DIM * BITS // 8) + byte
    if BITS == 3:
        for third in tl.static_range(3):
            # Two whole codes, and the low bits of the last two runs or, in the third byte, their high ones.
            packed = tl.where(run // 2 == third, code << (run % 2 * 3), 0)
            if third < 2:
                packed += tl.where(run == 6 + third, (code & 3) << 6, 0)
            else:
                packed = tl.where(run < 6, packed, (code >> 2) << run)
            tl.store(own + third * RUN, tl.sum(packed, axis=0).to(tl.uint8), mask=byte < RUN)
    else:
        tl.store(own, tl.sum(code << (run * BITS), axis=0).to(tl.uint8), mask=byte < RUN)


@triton.jit
def make_room_rows(
    rows,
    score,
    position,
    key,
    value,
    stored_score,
    stored_position,
    key_codes,
    key_scale,
    key_zero,
    key_center,
    key_rotation,
    key_levels,
    value_codes,
    value_scale,
    value_zero,
    value_rotation,
    value_levels,
    n_sink,
    window,
    COLUMNS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_KEY_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_RUNS: tl.constexpr,
    KEY_FLOATING: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_RUNS: tl.constexpr,
    VALUE_FLOATING: tl.constexpr,
    RECENCY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``kernels.twin.make_room``, a row to a program."""
    row = tl.program_id(0).to(tl.int64)
    table = rows + row * COLUMNS
    seen = tl.load(table + SEEN)
    relative = seen - tl.load(table + FIRST)
    start = tl.load(table + START)
    count = tl.load(table + COUNT).to(tl.int32)
    leaves = relative >= n_sink + window
    gives_up = leaves & (count == tl.load(table + CAPACITY))
    outgoing = _place(relative, n_sink, window)
    score += start
    position += start
    key += start * KEY_DIM
    value += start * VALUE_DIM
    # While the sinks and the window fill up, the new token takes the next slot.
    freed = tl.where(leaves, count, outgoing)
    if gives_up:
        freed = _lowest(score, position, n_sink + window, count, outgoing, BLOCK)
        if key_codes is not None:
            stored_start = tl.load(table + STORED_START)
            stored_count = tl.load(table + STORED_COUNT).to(tl.int32)
            has_free = stored_count < tl.load(table + STORED_CAPACITY)
            lost = tl.load(score + freed)
            target = stored_count
            demoted = has_free
            if (not has_free) & (stored_count > 0):
                target = _lowest(
                    stored_score + stored_start, stored_position + stored_start, 0, stored_count, -1, BLOCK
                )
                least = tl.load(stored_score + stored_start + target)
                older = tl.load(position + freed) < tl.load(stored_position + stored_start + target)
                demoted = (lost > least) | ((lost == least) & older)
            if demoted:
                slot = stored_start + target
                if key_center is not None:
                    key_center += row * KEY_DIM
                _encode(
                    key + freed * KEY_DIM,
                    slot,
                    key_codes,
                    key_scale,
                    key_zero,
                    key_center,
                    key_rotation,
                    key_levels,
                    KEY_DIM,
                    PADDED_KEY_DIM,
                    KEY_BITS,
                    KEY_RUNS,
                    KEY_FLOATING,
                )
                _encode(
                    value + freed * VALUE_DIM,
                    slot,
                    value_codes,
                    value_scale,
                    value_zero,
                    None,
                    value_rotation,
                    value_levels,
                    VALUE_DIM,
                    PADDED_VALUE_DIM,
                    VALUE_BITS,
                    VALUE_RUNS,
                    VALUE_FLOATING,
                )
                # All threads have read what one of them now writes.
                tl.debug_barrier()
                tl.store(stored_score + slot, lost)
                tl.store(stored_position + slot, tl.load(position + freed))
                tl.store(table + STORED_COUNT, (stored_count + has_free).to(tl.int64))
    key_channel = tl.arange(0, PADDED_KEY_DIM)
    value_channel = tl.arange(0, PADDED_VALUE_DIM)
    moved_key = tl.load(key + outgoing * KEY_DIM + key_channel, mask=key_channel < KEY_DIM)
    moved_value = tl.load(value + outgoing * VALUE_DIM + value_channel, mask=value_channel < VALUE_DIM)
    moved_score = tl.load(score + outgoing)
    moved_position = tl.load(position + outgoing)
    # As above.
    tl.debug_barrier()
    moves = leaves & (freed != outgoing)
    tl.store(key + freed * KEY_DIM + key_channel, moved_key, mask=moves & (key_channel < KEY_DIM))
    tl.store(value + freed * VALUE_DIM + value_channel, moved_value, mask=moves & (value_channel < VALUE_DIM))
    tl.store(score + freed, moved_score, mask=moves)
    tl.store(position + freed, moved_position, mask=moves)
    tl.store(score + outgoing, seen.to(tl.float32) if RECENCY else 0.0)
    tl.store(position + outgoing, seen.to(position.dtype.element_ty))
    tl.store(table + COUNT, tl.where(gives_up, count, count + 1).to(tl.int64))
    tl.store(table + SEEN, seen + 1)
