"""The two kernels of :func:`arkv.kernels.decode.decode_attention`. This module alone imports Triton.

A program of :func:`attend_splits` serves one KV head (``tl.program_id(0)``, of B * H) and one split of its slots. Tiles
are float32: ``q`` [G, D], keys and values [N, D] of N = ``BLOCK`` slots, where G and D are padded to powers of two.
"""

import triton
import triton.language as tl

# Codes and numbers of half precision are exact in TF32; three products make up for what it cuts off the other factor.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _unpack(rows, channel, inside, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Codes of ``BITS`` bits, packed as ``quantization.QuantizedTensor`` says. A byte is read once for each of its
    codes: from the second time on it comes from the cache."""
    if BITS == 3:
        RUN: tl.constexpr = WIDTH // 8
        run = channel // RUN
        byte = channel % RUN
        first = tl.where(run < 6, run // 2, run - 6) * RUN + byte
        shift = tl.where(run < 6, run % 2 * 3, 6)
        codes = (tl.load(rows + first[None, :], mask=inside, other=0).to(tl.int32) >> shift[None, :]) & 7
        high = tl.load(rows + (2 * RUN + byte)[None, :], mask=inside & (run >= 6)[None, :], other=0).to(tl.int32)
        result = codes | (((high >> run[None, :]) & 1) << 2)
    else:
        BYTES: tl.constexpr = WIDTH * BITS // 8
        packed = tl.load(rows + (channel % BYTES)[None, :], mask=inside, other=0).to(tl.int32)
        result = (packed >> (channel // BYTES * BITS)[None, :]) & ((1 << BITS) - 1)
    return result


@triton.jit
def _read(numbers, slot, channel, inside, WIDTH: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr):
    """Numbers or codes [N, D] as float32, 0 where not ``inside``. ``BITS`` 0 means numbers as they are."""
    if BITS == 0:
        result = tl.load(numbers + slot[:, None] * WIDTH + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    elif BITS == 8:
        codes = tl.load(numbers + slot[:, None] * WIDTH + channel[None, :], mask=inside, other=0)
        if FLOATING:
            # e4m3 by way of float16, as ``quantization.e4m3_to_float``: only newer GPUs convert it themselves.
            bits = codes.to(tl.uint16)
            half = ((bits & 0x7F) << 7) | ((bits & 0x80) << 8)
            result = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        else:
            result = codes.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        rows = numbers + slot[:, None] * (WIDTH * BITS // 8)
        result = _unpack(rows, channel, inside, WIDTH, BITS).to(tl.float32)
    return result


@triton.jit
def _attend(
    q,
    bias,
    key,
    key_scale,
    key_zero,
    value,
    value_scale,
    value_zero,
    position,
    logits,
    partial,
    peak_out,
    total_out,
    start,
    end,
    slots,
    logits_stride,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_KEY_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    FLOATING: tl.constexpr,
):
    """Slots ``start`` to ``end`` of one head in one pool of ``slots``; all pointers are those of the head. ``bias`` [G]
    is added to the logits."""
    query_head = tl.arange(0, PADDED_GROUP)
    key_channel = tl.arange(0, PADDED_KEY_DIM)
    value_channel = tl.arange(0, PADDED_VALUE_DIM)
    peak = tl.full((PADDED_GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((PADDED_GROUP,), tl.float32)
    output = tl.zeros((PADDED_GROUP, PADDED_VALUE_DIM), tl.float32)
    for block in range(start, end, BLOCK):
        slot = block + tl.arange(0, BLOCK)
        used = slot < slots
        inside = used[:, None] & (key_channel < KEY_DIM)[None, :]
        k = tl.trans(_read(key, slot, key_channel, inside, KEY_DIM, KEY_BITS, FLOATING))
        scores = tl.dot(q, k, input_precision=PRECISION)
        if KEY_BITS > 0:
            scores *= tl.load(key_scale + slot, mask=used, other=0.0).to(tl.float32)[None, :]
            if key_zero is not None:
                zero = tl.load(key_zero + slot, mask=used, other=0.0).to(tl.float32)
                scores += tl.sum(q, axis=1)[:, None] * zero[None, :]
        scores += bias[:, None]
        taken = used
        if MASKED:
            taken = used & (tl.load(position + slot, mask=used, other=-1) >= 0)
        scores = tl.where(taken[None, :], scores, float("-inf"))
        place = query_head[:, None] * logits_stride + slot[None, :]
        tl.store(logits + place, scores, mask=(query_head < GROUP)[:, None] & used[None, :])

        before = peak
        peak = tl.maximum(before, tl.max(scores, axis=1))
        # Until a slot holds a token the maximum is -inf, of which there is no difference.
        finite = tl.where(peak == float("-inf"), 0.0, peak)
        shrink = tl.exp(before - finite)
        weights = tl.exp(scores - finite[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        output *= shrink[:, None]
        inside = used[:, None] & (value_channel < VALUE_DIM)[None, :]
        v = _read(value, slot, value_channel, inside, VALUE_DIM, VALUE_BITS, FLOATING)
        if VALUE_BITS > 0:
            if value_zero is not None:
                zero = tl.load(value_zero + slot, mask=used, other=0.0).to(tl.float32)
                output += tl.sum(weights * zero[None, :], axis=1)[:, None]
            weights *= tl.load(value_scale + slot, mask=used, other=0.0).to(tl.float32)[None, :]
        output += tl.dot(weights, v, input_precision=PRECISION)

    tl.store(peak_out + query_head, peak, mask=query_head < GROUP)
    tl.store(total_out + query_head, total, mask=query_head < GROUP)
    place = query_head[:, None] * VALUE_DIM + value_channel[None, :]
    inside = (query_head < GROUP)[:, None] & (value_channel < VALUE_DIM)[None, :]
    tl.store(partial + place, output, mask=inside)


# Slots in use grow step by step: specialised on them, the kernel would be compiled anew on the way.
@triton.jit(do_not_specialize=["original", "quantized", "original_splits", "slots_per_split"])
def attend_splits(
    query,
    turned,
    bias,
    scaling,
    key,
    value,
    position,
    key_stride,
    value_stride,
    position_stride,
    key_codes,
    key_scale,
    key_zero,
    value_codes,
    value_scale,
    value_zero,
    stored_position,
    logits,
    partial,
    peak,
    total,
    original,
    quantized,
    original_splits,
    slots_per_split,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_KEY_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK_ORIGINAL: tl.constexpr,
    MASK_QUANTIZED: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    FLOATING: tl.constexpr,
):
    """Logits [B * H, G, S], outputs [B * H, splits, G, D], maxima and sums [B * H, splits, G] of all splits.

    Quantized keys are read with ``turned`` [B * H, G, D], the query in their coordinates, and ``bias`` [B * H, G], its
    product with their center (None is 0).
    """
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    query_head = tl.arange(0, PADDED_GROUP)
    channel = tl.arange(0, PADDED_KEY_DIM)
    inside = (query_head < GROUP)[:, None] & (channel < KEY_DIM)[None, :]
    place = head * GROUP * KEY_DIM + query_head[:, None] * KEY_DIM + channel[None, :]
    slots = original + quantized
    logits += head * GROUP * slots
    part = head * splits + split
    partial += part * GROUP * VALUE_DIM
    peak += part * GROUP
    total += part * GROUP
    offset = tl.zeros((PADDED_GROUP,), tl.float32)
    if split < original_splits:
        start = split * slots_per_split
        _attend(
            tl.load(query + place, mask=inside, other=0.0).to(tl.float32) * scaling,
            offset,
            key + head * key_stride,
            None,
            None,
            value + head * value_stride,
            None,
            None,
            position + head * position_stride,
            logits,
            partial,
            peak,
            total,
            start,
            tl.minimum(start + slots_per_split, original),
            original,
            slots,
            GROUP,
            KEY_DIM,
            VALUE_DIM,
            PADDED_GROUP,
            PADDED_KEY_DIM,
            PADDED_VALUE_DIM,
            BLOCK,
            MASK_ORIGINAL,
            KEY_BITS=0,
            VALUE_BITS=0,
            FLOATING=False,
        )
    elif key_codes is not None:
        start = (split - original_splits) * slots_per_split
        ranges = head * quantized
        if key_zero is not None:
            key_zero += ranges
        if value_zero is not None:
            value_zero += ranges
        if bias is not None:
            offset = tl.load(bias + head * GROUP + query_head, mask=query_head < GROUP, other=0.0) * scaling
        _attend(
            tl.load(turned + place, mask=inside, other=0.0).to(tl.float32) * scaling,
            offset,
            key_codes + ranges * (KEY_DIM * KEY_BITS // 8),
            key_scale + ranges,
            key_zero,
            value_codes + ranges * (VALUE_DIM * VALUE_BITS // 8),
            value_scale + ranges,
            value_zero,
            stored_position + ranges,
            logits + original,
            partial,
            peak,
            total,
            start,
            tl.minimum(start + slots_per_split, quantized),
            quantized,
            slots,
            GROUP,
            KEY_DIM,
            VALUE_DIM,
            PADDED_GROUP,
            PADDED_KEY_DIM,
            PADDED_VALUE_DIM,
            BLOCK,
            MASK_QUANTIZED,
            KEY_BITS,
            VALUE_BITS,
            FLOATING,
        )


@triton.jit(do_not_specialize=["slots", "splits", "original_splits"])
def combine_splits(
    probabilities,
    output,
    partial,
    peak,
    total,
    slots,
    splits,
    original_splits,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn the logits in ``probabilities`` [B * H, G, S] into what its name says, ``BLOCK`` slots to a program; the
    first program of a head also writes its outputs [B * H, 2, G, D], of the Original and of the Quantized slots."""
    head = tl.program_id(0).to(tl.int64)
    query_head = tl.arange(0, PADDED_GROUP)
    split = tl.arange(0, PADDED_SPLITS)
    peak += head * splits * GROUP
    place = split[None, :] * GROUP + query_head[:, None]
    inside = (query_head < GROUP)[:, None] & (split < splits)[None, :]
    peaks = tl.load(peak + place, mask=inside, other=float("-inf"))
    totals = tl.load(total + head * splits * GROUP + place, mask=inside, other=0.0)
    # Rows of padding have no maximum: 0 keeps them free of -inf - -inf.
    highest = tl.where(query_head < GROUP, tl.max(peaks, axis=1), 0.0)
    whole = tl.sum(totals * tl.exp(peaks - highest[:, None]), axis=1)
    whole = tl.where(query_head < GROUP, whole, 1.0)

    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = head * GROUP * slots + query_head[:, None] * slots + slot[None, :]
    inside = (query_head < GROUP)[:, None] & (slot < slots)[None, :]
    logits = tl.load(probabilities + place, mask=inside, other=float("-inf"))
    tl.store(probabilities + place, tl.exp(logits - highest[:, None]) / whole[:, None], mask=inside)

    if tl.program_id(1) == 0:
        channel = tl.arange(0, PADDED_VALUE_DIM)
        own = query_head[:, None] * VALUE_DIM + channel[None, :]
        wanted = (query_head < GROUP)[:, None] & (channel < VALUE_DIM)[None, :]
        output += head * 2 * GROUP * VALUE_DIM
        for pool in range(2):
            result = tl.zeros((PADDED_GROUP, PADDED_VALUE_DIM), tl.float32)
            first = pool * original_splits
            for index in range(first, tl.where(pool == 0, original_splits, splits)):
                share = tl.exp(tl.load(peak + index * GROUP + query_head, mask=query_head < GROUP, other=0.0) - highest)
                part = tl.load(partial + (head * splits + index) * GROUP * VALUE_DIM + own, mask=wanted, other=0.0)
                result += part * share[:, None]
            tl.store(output + pool * GROUP * VALUE_DIM + own, result / whole[:, None], mask=wanted)
