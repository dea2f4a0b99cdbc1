"""The state rule for one new token: the slot that every row's victim gives up, and the token that takes it.

Letters as in :mod:`arkv.kernels.gpu`; ``P`` a size padded to a power of two.
"""

import triton
import triton.language as tl

from arkv.kernels.gpu.shared import (
    CAPACITY,
    COUNT,
    FIRST,
    SEEN,
    START,
    STORED_CAPACITY,
    STORED_COUNT,
    STORED_START,
    place_of,
)

ROUND = tl.constexpr(1.5 * 2.0**23)
"""Added and taken away again, it rounds a float32 to the nearest even integer, up to 2**22."""
TINY = tl.constexpr(2.0**-126)
"""The smallest normal number, of float32 and of bfloat16."""


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
    outgoing = place_of(relative, n_sink, window)
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
