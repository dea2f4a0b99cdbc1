/* Attention to uniform codes of at most 4 bits by products of integers: what the logits of a piece are, and what its
 * values sum up to.
 *
 * A number that codes are multiplied with (a channel of the query, the weight of a token) is written as three digits of
 * 8 bits with a sign, to 23 bits of the largest of them: as exact as float32. Weights are two, of 15 bits, where the
 * output is bfloat16. Processors multiply four codes with four digits and add them up at once. Codes are taken less
 * their middle, whose share is added in float32, so that nothing large cancels. How codes lie in bytes:
 * arkv/formats/packing.py. */

#if LANES == 16 ? defined(__AVX512BW__) : defined(__AVX2__)
#define INTEGERS 1

#if LANES == 16
typedef __m512i integers;
typedef __m512 floats;
#define OF(OPERATION) _mm512_##OPERATION
#define LOAD(FROM) _mm512_loadu_si512(FROM)
#define STORE(TO, WHAT) _mm512_storeu_si512(TO, WHAT)
#define AND _mm512_and_si512
#define OR _mm512_or_si512
#define XOR _mm512_xor_si512
#else
typedef __m256i integers;
typedef __m256 floats;
#define OF(OPERATION) _mm256_##OPERATION
#define LOAD(FROM) _mm256_loadu_si256((const __m256i *)(FROM))
#define STORE(TO, WHAT) _mm256_storeu_si256((__m256i *)(TO), WHAT)
#define AND _mm256_and_si256
#define OR _mm256_or_si256
#define XOR _mm256_xor_si256
#endif

#define WIDTH (4 * LANES) /* bytes of a register */
#define SIDE (LANES / 2) /* tokens that lie side by side in a register */
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

/* The sum of all lanes. */
INLINE int32_t total_of(integers lanes) {
#if LANES == 16
    return _mm512_reduce_add_epi32(lanes);
#else
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
#endif
}

/* Digits of numbers, from the low one on: of every SIDE numbers, those of each digit side by side, in PLACES runs.
 * count: a multiple of LANES. digits: how many. unit: what a unit of the lowest is. Returns the sum of the numbers in
 * units, which fits. */
INLINE int32_t to_digits(const float *numbers, int count, int8_t *to, int digits, float *unit) {
    const float top = digits == 3 ? 126.0f * 65536.0f : 126.0f * 256.0f;
    vector largest = {0};
    for (int i = 0; i < count; i += LANES) largest = larger(largest, size_of(load(numbers + i)));
    const float most = largest_of(largest);
    /* In two steps where the factor has no number; what is less still is nothing beside all that is added to it. */
    const float step = most < SMALL ? LARGER : 1.0f, factor = most < LEAST ? 0.0f : top / (most * step);
    integers sum = OF(set1_epi32)(0);
    /* A byte less 128 is a digit: so much is added to each, and taken off by the sign. */
    const integers half = OF(set1_epi32)(digits == 3 ? 0x808080 : 0x8080);
#if LANES == 16
    const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
#endif
    const __m128i turned = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int i = 0; i < count; i += LANES) {
        vector scaled = load(numbers + i) * step * factor;
        integers whole = OF(cvtps_epi32)((floats)scaled);
        integers bytes = XOR(OF(add_epi32)(whole, half), half);
#if LANES == 16
        bytes = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(turned));
        bytes = _mm512_permutexvar_epi32(order, bytes);
#else
        bytes = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(turned));
#endif
        STORE(to + i * PLACES, bytes);
        sum = OF(add_epi32)(sum, whole);
    }
    *unit = most / top;
    return total_of(sum);
}

/* Where digits of a number and those beside it lie. */
INLINE const int8_t *digits_of(const int8_t *digits, int number, int digit) {
    return digits + number / SIDE * SIDE * PLACES + digit * SIDE + number % SIDE;
}

/* Where sums of products with digits start, so that codes are taken less their middle; total: the sum of the numbers. */
INLINE void start_sums(integers *sums, int32_t total, int bits, int digits) {
    const int middle = 1 << (bits - 1);
    sums[0] = OF(set1_epi32)(-(digits == 3 ? total & 0xFFFF : total) * middle);
    sums[1] = OF(set1_epi32)(0);
    if (digits == 3) sums[2] = OF(set1_epi32)(-(total >> 16) * middle);
}

/* Sums of the digits as the numbers that they make. */
INLINE vector joined(const integers *sums, int digits) {
    vector low = (vector)OF(cvtepi32_ps)(OF(add_epi32)(OF(slli_epi32)(sums[1], 8), sums[0]));
    return digits == 3 ? (vector)OF(cvtepi32_ps)(sums[2]) * 65536.0f + low : low;
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
    for (int g = 0; g < among; g++) start_sums(sums[g], heads[g].total, bits, DIGITS);
    for (int chunk = 0; chunk < n; chunk += 16) {
        turn_tokens(codes + chunk, n, quads);
        for (int i = 0; i < 4; i++)
            for (int run = 0; run < 8 / bits; run++) {
                const int channel = run * n + chunk + 4 * i;
                integers four = AND(OF(srli_epi32)(quads[i], run * bits), mask);
                for (int g = 0; g < among; g++)
                    for (int d = 0; d < DIGITS; d++)
                        sums[g][d] =
                            multiply(sums[g][d], four, everywhere(digits_of(digits + g * PLACES * dim, channel, d)));
            }
    }
    const vector scale = from_bfloat16(scales), zero = from_bfloat16(zeros) + scale * middle_of(bits);
    for (int g = 0; g < among; g++) {
        vector found = joined(sums[g], DIGITS) * heads[g].unit * scale + zero * heads[g].sum + heads[g].bias;
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
    block_logits(from, scale, zero, q.each + g, q.digits + g * PLACES * dim, logits + g * PIECE + at, AMONG, dim, bits)
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

/* 8 bytes of each of four tokens, `step` bytes apart: lane i has byte i of all. */
INLINE __m256i turn_four(const uint8_t *from, int step) {
#define TOKEN(I) _mm_loadl_epi64((const __m128i *)(from + (I) * step))
    const __m128i two = _mm_unpacklo_epi8(TOKEN(0), TOKEN(1)), others = _mm_unpacklo_epi8(TOKEN(2), TOKEN(3));
#undef TOKEN
    return _mm256_setr_m128i(_mm_unpacklo_epi16(two, others), _mm_unpackhi_epi16(two, others));
}

/* The same of SIDE tokens. */
INLINE integers turn_side(const uint8_t *from, int step) {
#if LANES == 16
    return _mm512_permutex2var_epi32(
        _mm512_castsi256_si512(turn_four(from, step)),
        _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
        _mm512_castsi256_si512(turn_four(from + 4 * step, step)));
#else
    return turn_four(from, step);
#endif
}

/* Two codes in the low bits of each byte of a register are a pair; so many pairs make up all bytes of a token. */
INLINE int pairs_of(int bits) { return bits == 3 ? 4 : 4 / bits; }

/* Eight bytes of each run of SIDE tokens, as pairs; runs: `n` bytes apart. */
INLINE void turn_pairs(const uint8_t *from, int step, int n, uint8_t *to, int bits) {
    integers pair[4] = {turn_side(from, step)};
    if (bits == 2) pair[1] = OF(srli_epi16)(pair[0], 4);
    if (bits == 3) {
        const integers two = OF(set1_epi8)(3), third = OF(set1_epi8)(4);
        pair[1] = turn_side(from + n, step);
        pair[2] = turn_side(from + 2 * n, step);
        /* As other pairs are. */
        integers low = OR(AND(OF(srli_epi16)(pair[0], 6), two), AND(OF(srli_epi16)(pair[2], 4), third));
        integers high = OR(AND(OF(srli_epi16)(pair[1], 6), two), AND(OF(srli_epi16)(pair[2], 5), third));
        pair[3] = OR(low, OF(slli_epi16)(high, 3));
    }
    for (int i = 0; i < pairs_of(bits); i++) STORE(to + i * WIDTH, pair[i]);
}

/* The weights of a head's tokens times their scales, in digits. */
struct weighed {
    float unit, sum; /* sum: of weights times what is added to the codes */
    int32_t total;
};

/* The digits of SIDE tokens, for every channel. */
INLINE integers beside(const int8_t *from) {
#if LANES == 16
    int64_t eight;
    memcpy(&eight, from, sizeof(eight));
    return _mm512_set1_epi64(eight);
#else
    return everywhere(from);
#endif
}

/* The sums of a pair's codes for some heads. pair: of SIDE tokens, then of the next ones, `pairs` registers apart.
 * output: of the first code's channels; `n` numbers from there are the second one's. */
INLINE void pair_sums(const uint8_t *pair, int sides, const int8_t *weights, const struct weighed *heads, float *output,
                      int n, int dim, int among, int bits, int digits, float shrunk, struct ahead ahead) {
    const integers mask = OF(set1_epi8)((char)((1 << bits) - 1));
    integers sums[TOGETHER][2][DIGITS];
    for (int g = 0; g < among; g++)
        for (int d = 0; d < digits; d++) sums[g][0][d] = sums[g][1][d] = OF(set1_epi32)(0);
    for (int side = 0; side < sides; side++) {
        const integers both = LOAD(pair + side * pairs_of(bits) * WIDTH);
        const integers first = AND(both, mask), second = AND(OF(srli_epi16)(both, bits), mask);
        const int8_t *from = weights + side * SIDE * PLACES;
        for (int g = 0; g < among; g++)
            for (int d = 0; d < digits; d++) {
                const integers weight = beside(from + g * PIECE * PLACES + d * SIDE);
                sums[g][0][d] = multiply(sums[g][0][d], first, weight);
                sums[g][1][d] = multiply(sums[g][1][d], second, weight);
            }
        fetch(ahead, side, 1);
    }
    for (int g = 0; g < among; g++) {
        integers start[DIGITS];
        float found[16];
        start_sums(start, heads[g].total, bits, digits);
#if LANES == 16
        /* Each channel is in two lanes: those of both codes become one register. */
        const integers even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const integers odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        for (int d = 0; d < digits; d++) {
            start[d] = OF(add_epi32)(start[d], _mm512_permutex2var_epi32(sums[g][0][d], even, sums[g][1][d]));
            start[d] = OF(add_epi32)(start[d], _mm512_permutex2var_epi32(sums[g][0][d], odd, sums[g][1][d]));
        }
        vector both = joined(start, digits) * heads[g].unit * shrunk + heads[g].sum;
        memcpy(found, &both, sizeof(both));
#else
        for (int code = 0; code < 2; code++) {
            integers moved[DIGITS];
            for (int d = 0; d < digits; d++) moved[d] = OF(add_epi32)(start[d], sums[g][code][d]);
            vector one = joined(moved, digits) * heads[g].unit * shrunk + heads[g].sum;
            memcpy(found + 8 * code, &one, sizeof(one));
        }
#endif
        memcpy(output + g * dim, found, 8 * sizeof(float));
        memcpy(output + g * dim + n, found + 8, 8 * sizeof(float));
    }
}

/* Bytes of a run of a token's codes. */
static inline int run_of(int bits, int dim) { return bits == 3 ? dim / 8 : dim * bits / 8; }

/* Whether values of a plane are summed up by products with digits. */
static inline int weighs_in_digits(const struct plane *p) {
    return p->code.bits <= 4 && !p->code.levels && run_of((int)p->code.bits, (int)p->dim) >= 8;
}

/* The values of a piece, summed up by their weights, G x PIECE and 0 beyond count; output: G x dim. */
INLINE void code_sums(const struct plane *p, int64_t first, int64_t count, const float *weights, float *output,
                      int group, struct ahead ahead, int bits, int digits) {
    const int dim = (int)p->dim, step = dim * bits / 8, n = run_of(bits, dim), pairs = pairs_of(bits);
    const int whole = (int)(count + LANES - 1) / LANES * LANES, sides = (int)(count + SIDE - 1) / SIDE;
    const uint8_t *codes = p->codes + first * step;
    const uint16_t *scales = (const uint16_t *)p->scale + first, *zeros = p->zero + first;
    uint8_t turned[PIECE / SIDE * 4 * WIDTH], last[SIDE * MAX_DIM / 2] = {0};
    float scale[PIECE], rest[PIECE], scaled[PIECE];
    int8_t in_digits[MAX_GROUP * PIECE * PLACES];
    struct weighed heads[MAX_GROUP];
    vector widest = {0};
    for (int i = 0; i < whole; i += LANES) {
        uint16_t ends[2][LANES] = {{0}};
        const uint16_t *from[2] = {scales + i, zeros + i};
        if (i + LANES > count) {
            /* What follows the last token may not be read. */
            size_t left = (size_t)(count - i);
            for (int which = 0; which < 2; which++)
                from[which] = memcpy(ends[which], from[which], left * sizeof(uint16_t));
        }
        vector mine = from_bfloat16(from[0]), its = from_bfloat16(from[1]);
        widest = larger(widest, mine);
        memcpy(scale + i, &mine, sizeof(mine));
        memcpy(rest + i, &its, sizeof(its));
    }
    /* Numbers next to the smallest ones that there are, and those of a token that is zero, are made larger meanwhile, and
     * their codes are taken as they are: a middle would leave its rounding where all codes are 0. */
    const int small = largest_of(widest) < SMALL;
    const float shrunk = small ? 1.0f / LARGER : 1.0f;
    for (int i = 0; i < whole; i += LANES) {
        vector mine = load(scale + i), its = load(rest + i);
        if (small) mine *= LARGER;
        else its += mine * middle_of(bits);
        memcpy(scale + i, &mine, sizeof(mine));
        memcpy(rest + i, &its, sizeof(its));
    }
    for (int g = 0; g < group; g++) {
        vector both = {0};
        for (int i = 0; i < whole; i += LANES) {
            vector mine = load(weights + g * PIECE + i), its = mine * load(scale + i);
            both += mine * load(rest + i);
            memcpy(scaled + i, &its, sizeof(its));
        }
        heads[g].sum = sum_of(both);
        heads[g].total = to_digits(scaled, whole, in_digits + g * PIECE * PLACES, digits, &heads[g].unit);
        if (small) heads[g].total = 0;
    }
    /* Beyond whole sides lie zeros. */
    const int64_t past = count / SIDE * SIDE;
    memcpy(last, codes + past * step, (size_t)((count - past) * step));
    for (int at = 0; at < n; at += 8) {
        /* The last block begins where it ends with the run. */
        const int place = at + 8 <= n ? at : n - 8;
        for (int side = 0; side < sides; side++)
            turn_pairs(side * SIDE < past ? codes + side * SIDE * step + place : last + place, step, n,
                       turned + side * pairs * WIDTH, bits);
        for (int pair = 0; pair < pairs; pair++)
            for (int g = 0; g < group; g += TOGETHER) {
                const int64_t part = at == 0 && g == 0 ? ahead.bytes * SIDE / pairs : 0;
                const struct ahead mine = {ahead.from + pair * sides * part, part};
#define FOR(AMONG)                                                                                                   \
    pair_sums(turned + pair * WIDTH, sides, in_digits + g * PIECE * PLACES, heads + g,                                 \
              output + g * dim + 2 * pair * n + place, n, dim, AMONG, bits, digits, shrunk, mine)
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

#undef OF
#undef LOAD
#undef STORE
#undef AND
#undef OR
#undef XOR
#else
#define INTEGERS 0
#endif
