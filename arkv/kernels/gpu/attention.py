"""Attention over a layer's rows, in splits that :mod:`arkv.kernels.gpu.combining` brings together.

Letters as in :mod:`arkv.kernels.gpu`; ``N`` slots of a block, ``P`` a size padded to a power of two. Tiles are float32
but for those that ``HALF`` lets be of half precision: numbers as the model has them and codes are exact in it, and what
they are multiplied with is split in two halves, which together have 16 bits and more.

A tile of bytes [N, P / RUNS] is loaded once, and a shift and a mask make a tile of each run, which are joined to [N, P]
without moving anything between threads: index ``i`` of such a tile is channel ``i / RUNS`` of run ``i % RUNS``.
Products do not mind the order of channels, so queries are loaded, and outputs stored, in the same order.
"""

import triton
import triton.language as tl

from arkv.kernels.gpu.shared import COUNT, FIRST, PRECISION, SEEN, START, STORED_COUNT, STORED_START, place_of


@triton.jit
def _channels(DIM: tl.constexpr, PADDED: tl.constexpr, RUNS: tl.constexpr):
    """The channels [P] of an unpacked tile, and which of them there are."""
    index = tl.arange(0, PADDED)
    within = index // RUNS
    return within + index % RUNS * (DIM // RUNS), within < DIM // RUNS


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
            new = place_of(tl.load(table + SEEN) - 1 - tl.load(table + FIRST), n_sink, window)
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
