/* Attention to uniform codes of at most 4 bits by products of integers: what the logits of a piece are, and what its
 * values sum up to.
 *
 * A number that codes are multiplied with (a channel of the query, the weight of a token) is written as three digits of
 * 8 bits with a sign, to 23 bits of the largest of them: as exact as float32. Processors multiply four codes with four
 * digits and add them up at once. Codes are taken less their middle, whose share is added in float32, so that nothing
 * large cancels. How codes lie in bytes: arkv/formats/packing.py. */

#if LANES == 16 ? defined(__AVX512BW__) : defined(__AVX2__)
#define INTEGERS 1

#if LANES == 16
typedef __m512i integers;
typedef __m512 floats;
#define OF(OPERATION) _mm512_##OPERATION
#define LOAD(FROM) _mm512_loadu_si512(FROM)
#define STORE(TO, WHAT) _mm512_storeu_si512(TO, WHAT)
#define AND _mm512_and_si512
#else
typedef __m256i integers;
typedef __m256 floats;
#define OF(OPERATION) _mm256_##OPERATION
#define LOAD(FROM) _mm256_loadu_si256((const __m256i *)(FROM))
#define STORE(TO, WHAT) _mm256_storeu_si256((__m256i *)(TO), WHAT)
#define AND _mm256_and_si256
#endif

#define WIDTH (4 * LANES) /* bytes of a register */
#define TOP (126.0f * 65536.0f)
#define SMALL 1e-20f
#define LARGER 0x1p80f
#define LEAST 1e-34f
#define TOGETHER (LANES == 16 ? 4 : 2) /* query heads, as registers allow */

static inline float middle_of(int64_t bits) { return (float)(1 << (bits - 1)); }

/* Adds four products to each sum. codes: at most 15, so that two of their products fit 16 bits. */
INLINE integers multiply(integers sum, integers codes, integers digits) {
#if LANES == 16 && defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sum, codes, digits);
#elif LANES == 8 && defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, codes, digits);
#else
    return OF(add_epi32)(sum, OF(madd_epi16)(OF(maddubs_epi16)(codes, digits), OF(set1_epi16)(1)));
#endif
}

/* Four bytes, in all lanes. */
INLINE integers everywhere(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, sizeof(four));
    return OF(set1_epi32)(four);
}

/* The lowest bytes of the lanes. */
INLINE void store_bytes(int8_t *to, integers lanes) {
#if LANES == 16
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(lanes));
#else
    for (int half = 0; half < 2; half++) {
        __m128i four = half ? _mm256_extracti128_si256(lanes, 1) : _mm256_castsi256_si128(lanes);
        int32_t bytes = _mm_cvtsi128_si32(_mm_shuffle_epi8(four, _mm_set1_epi32(0x0C080400)));
        memcpy(to + 4 * half, &bytes, sizeof(bytes));
    }
#endif
}

/* Digits of numbers, [DIGITS, stride] from the high one on; count: a multiple of LANES. unit: what a unit of the lowest
 * is. Returns the sum of the numbers in units, which fits. */
INLINE int32_t to_digits(const float *numbers, int count, int8_t *to, int stride, float *unit) {
    vector largest = {0};
    for (int i = 0; i < count; i += LANES) largest = larger(largest, size_of(load(numbers + i)));
    const float most = largest_of(largest);
    /* In two steps where the factor has no number; what is less still is nothing beside all that is added to it. */
    const float step = most < SMALL ? LARGER : 1.0f, factor = most < LEAST ? 0.0f : TOP / (most * step);
    integers sum = OF(set1_epi32)(0);
    const integers half = OF(set1_epi32)(128);
    for (int i = 0; i < count; i += LANES) {
        vector scaled = load(numbers + i) * step * factor;
        integers low = OF(cvtps_epi32)((floats)scaled);
        integers middle = OF(srai_epi32)(OF(add_epi32)(low, half), 8);
        integers high = OF(srai_epi32)(OF(add_epi32)(middle, half), 8);
        store_bytes(to + i, high);
        store_bytes(to + stride + i, middle);
        store_bytes(to + 2 * stride + i, low);
        sum = OF(add_epi32)(sum, low);
    }
    int32_t lanes[LANES], total = 0;
    memcpy(lanes, &sum, sizeof(lanes));
    for (int i = 0; i < LANES; i++) total += lanes[i];
    *unit = most / TOP;
    return total;
}

/* Where sums of products with digits start, so that codes are taken less their middle; total: the sum of the numbers. */
INLINE void start_sums(integers sums[DIGITS], int32_t total, int bits) {
    const int middle = 1 << (bits - 1);
    sums[0] = OF(set1_epi32)(-(total >> 16) * middle);
    sums[1] = OF(set1_epi32)(0);
    sums[2] = OF(set1_epi32)(-(total & 0xFFFF) * middle);
}

/* Sums of the digits as the numbers that they make. */
INLINE vector joined(const integers sums[DIGITS]) {
    integers low = OF(add_epi32)(OF(slli_epi32)(sums[1], 8), sums[2]);
    return (vector)OF(cvtepi32_ps)(sums[0]) * 65536.0f + (vector)OF(cvtepi32_ps)(low);
}

INLINE vector from_bfloat16(const uint16_t *from) {
#if LANES == 16
    integers wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
#else
    integers wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
#endif
    return (vector)OF(slli_epi32)(wide, 16);
}

/* 16 bytes of each of LANES tokens, `step` bytes apart: register i of the four has their bytes 4 * i to 4 * i + 3. */
INLINE void turn_tokens(const uint8_t *from, int step, integers to[4]) {
    integers row[4];
    for (int i = 0; i < 4; i++) {
#define TOKEN(I) _mm_loadu_si128((const __m128i *)(from + (4 * (I) + i) * step))
#if LANES == 16
        row[i] = _mm512_inserti32x4(_mm512_castsi128_si512(TOKEN(0)), TOKEN(1), 1);
        row[i] = _mm512_inserti32x4(_mm512_inserti32x4(row[i], TOKEN(2), 2), TOKEN(3), 3);
#else
        row[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(TOKEN(0)), TOKEN(1), 1);
#endif
#undef TOKEN
    }
    integers low[2] = {OF(unpacklo_epi32)(row[0], row[1]), OF(unpacklo_epi32)(row[2], row[3])};
    integers high[2] = {OF(unpackhi_epi32)(row[0], row[1]), OF(unpackhi_epi32)(row[2], row[3])};
    to[0] = OF(unpacklo_epi64)(low[0], low[1]);
    to[1] = OF(unpackhi_epi64)(low[0], low[1]);
    to[2] = OF(unpacklo_epi64)(high[0], high[1]);
    to[3] = OF(unpackhi_epi64)(high[0], high[1]);
}

/* Whether logits of a plane are products with digits. */
static inline int asks_in_digits(const struct plane *p) {
    return (is_plain(p->code, 4, 0) || is_plain(p->code, 2, 0)) && token_bytes(p) % 16 == 0;
}

/* Logits of LANES tokens for some heads; lanes are tokens. */
INLINE void block_logits(const uint8_t *codes, const uint16_t *scales, const uint16_t *zeros, const struct asked *heads,
                         const int8_t *digits, float *logits, int among, int dim, int bits) {
    const int n = dim * bits / 8;
    const integers mask = OF(set1_epi8)((char)((1 << bits) - 1));
    integers sums[TOGETHER][DIGITS], quads[4];
    for (int g = 0; g < among; g++) start_sums(sums[g], heads[g].total, bits);
    for (int chunk = 0; chunk < n; chunk += 16) {
        turn_tokens(codes + chunk, n, quads);
        for (int i = 0; i < 4; i++)
            for (int run = 0; run < 8 / bits; run++) {
                integers four = AND(OF(srli_epi32)(quads[i], run * bits), mask);
                for (int g = 0; g < among; g++)
                    for (int d = 0; d < DIGITS; d++)
                        sums[g][d] = multiply(sums[g][d], four,
                                              everywhere(digits + (g * DIGITS + d) * dim + run * n + chunk + 4 * i));
            }
    }
    const vector scale = from_bfloat16(scales), zero = from_bfloat16(zeros) + scale * middle_of(bits);
    for (int g = 0; g < among; g++) {
        vector found = joined(sums[g]) * heads[g].unit * scale + zero * heads[g].sum + heads[g].bias;
        memcpy(logits + g * PIECE, &found, sizeof(found));
    }
}

/* Logits of a piece. */
INLINE void code_logits(const struct plane *p, int64_t first, int64_t count, struct queries q, float *logits, int group,
                        struct ahead ahead, int dim, int bits) {
    const int n = dim * bits / 8;
    const uint8_t *codes = p->codes + first * n;
    const uint16_t *scales = (const uint16_t *)p->scale + first, *zeros = p->zero + first;
    for (int64_t at = 0; at < count; at += LANES) {
        uint8_t last[LANES * MAX_DIM / 2];
        uint16_t last_scales[LANES] = {0}, last_zeros[LANES] = {0};
        const uint8_t *from = codes + at * n;
        const uint16_t *scale = scales + at, *zero = zeros + at;
        if (count - at < LANES) {
            /* What follows the last token may not be read. */
            size_t left = (size_t)(count - at);
            memset(last, 0, (size_t)(LANES * n));
            from = memcpy(last, from, left * (size_t)n);
            scale = memcpy(last_scales, scale, left * sizeof(*scale));
            zero = memcpy(last_zeros, zero, left * sizeof(*zero));
        }
        fetch(ahead, at, LANES);
        for (int g = 0; g < group; g += TOGETHER) {
#define FOR(AMONG)                                                                                                     \
    block_logits(from, scale, zero, q.each + g, q.digits + g * DIGITS * dim, logits + g * PIECE + at, AMONG, dim, bits)
            switch (group - g) {
            case 1: FOR(1); break;
            case 2: FOR(2); break;
            case 3: FOR(TOGETHER < 3 ? TOGETHER : 3); break;
            default: FOR(TOGETHER);
            }
#undef FOR
        }
    }
}

/* Bytes of four tokens, side by side: lane l of register i has those of channels 16 * l + 4 * i to 16 * l + 4 * i + 3. */
INLINE void interleave(const uint8_t *from, int step, uint8_t *to) {
    integers a = LOAD(from), b = LOAD(from + step), c = LOAD(from + 2 * step), d = LOAD(from + 3 * step);
    integers low[2] = {OF(unpacklo_epi8)(a, b), OF(unpacklo_epi8)(c, d)};
    integers high[2] = {OF(unpackhi_epi8)(a, b), OF(unpackhi_epi8)(c, d)};
    STORE(to, OF(unpacklo_epi16)(low[0], low[1]));
    STORE(to + WIDTH, OF(unpackhi_epi16)(low[0], low[1]));
    STORE(to + 2 * WIDTH, OF(unpacklo_epi16)(high[0], high[1]));
    STORE(to + 3 * WIDTH, OF(unpackhi_epi16)(high[0], high[1]));
}

/* The values of a piece, summed up by their weights, G x PIECE and 0 beyond count; output: G x dim. */
INLINE void code_sums(const struct plane *p, int64_t first, int64_t count, const float *weights, float *output,
                      int group, struct ahead ahead, int dim, int bits) {
    const int n = dim * bits / 8, wide = (dim + WIDTH - 1) / WIDTH, padded = wide * WIDTH, fours = (int)(count + 3) / 4;
    const int whole = (int)(count + LANES - 1) / LANES * LANES;
    const uint8_t *codes = p->codes + first * n;
    const uint16_t *scales = (const uint16_t *)p->scale + first, *zeros = p->zero + first;
    uint8_t plain[16 * MAX_DIM], side_by_side[PIECE * MAX_DIM];
    float scale[PIECE], rest[PIECE], scaled[PIECE];
    int8_t digits[DIGITS * PIECE];
    /* While four tokens are multiplied with one head. */
    const struct ahead each = {ahead.from, ahead.bytes * 4 / group + 1};
    memset(plain, 0, (size_t)(16 * padded));
    for (int64_t at = 0; at < count; at += 16) {
        int left = count - at < 16 ? (int)(count - at) : 16;
        for (int i = 0; i < left; i++) unpack(codes + (at + i) * n, plain + i * padded, bits, dim);
        for (int i = 0; i < left; i += 4)
            for (int v = 0; v < wide; v++)
                interleave(plain + i * padded + v * WIDTH, padded,
                           side_by_side + ((at + i) * wide + 4 * v) * WIDTH);
    }
    vector widest = {0};
    for (int i = 0; i < whole; i += LANES) {
        uint16_t last[2][LANES] = {{0}};
        const uint16_t *from[2] = {scales + i, zeros + i};
        if (i + LANES > count) {
            /* What follows the last token may not be read. */
            size_t left = (size_t)(count - i);
            for (int which = 0; which < 2; which++)
                from[which] = memcpy(last[which], from[which], left * sizeof(uint16_t));
        }
        vector mine = from_bfloat16(from[0]), its = from_bfloat16(from[1]);
        widest = larger(widest, mine);
        memcpy(scale + i, &mine, sizeof(mine));
        memcpy(rest + i, &its, sizeof(its));
    }
    /* Numbers next to the smallest ones that there are, and those of a token that is zero, are made larger meanwhile, and
     * their codes are taken as they are: a middle would leave its rounding where all codes are 0. */
    const int small = largest_of(widest) < SMALL;
    for (int i = 0; i < whole; i += LANES) {
        vector mine = load(scale + i), its = load(rest + i);
        if (small) mine *= LARGER;
        else its += mine * middle_of(bits);
        memcpy(scale + i, &mine, sizeof(mine));
        memcpy(rest + i, &its, sizeof(its));
    }
    for (int g = 0; g < group; g++) {
        vector both = {0};
        float unit;
        for (int i = 0; i < whole; i += LANES) {
            vector mine = load(weights + g * PIECE + i), its = mine * load(scale + i);
            both += mine * load(rest + i);
            memcpy(scaled + i, &its, sizeof(its));
        }
        const float sum = sum_of(both);
        const int32_t total = to_digits(scaled, whole, digits, PIECE, &unit);
        for (int v = 0; v < wide; v++) {
            integers sums[4][DIGITS];
            for (int i = 0; i < 4; i++) start_sums(sums[i], small ? 0 : total, bits);
            for (int four = 0; four < fours; four++) {
                const uint8_t *from = side_by_side + 4 * (four * wide + v) * WIDTH;
                integers weight[DIGITS];
                for (int d = 0; d < DIGITS; d++) weight[d] = everywhere(digits + d * PIECE + 4 * four);
                for (int i = 0; i < 4; i++) {
                    integers four_codes = LOAD(from + i * WIDTH);
                    for (int d = 0; d < DIGITS; d++) sums[i][d] = multiply(sums[i][d], four_codes, weight[d]);
                }
                if (v == 0) fetch(each, g * fours + four, 1);
            }
            float found[4][LANES];
            for (int i = 0; i < 4; i++) {
                vector four = joined(sums[i]) * unit;
                if (small) four /= LARGER;
                four += sum;
                memcpy(found[i], &four, sizeof(four));
            }
            for (int d = v * WIDTH; d < (v + 1) * WIDTH && d < dim; d += 4)
                for (int i = 0; i < 4 && d + i < dim; i++)
                    output[g * dim + d + i] = found[d % 16 / 4][(d - v * WIDTH) / 16 * 4 + i];
        }
    }
}

#undef OF
#undef LOAD
#undef STORE
#undef AND
#else
#define INTEGERS 0
#endif
