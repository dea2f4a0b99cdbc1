/* Attention to numbers (bfloat16, float32) and to codes of 8 bits, which are widened in registers.
 *
 * Tokens are read as pairs of vectors. A word of two bfloat16 numbers is widened into its halves, so that a pair holds
 * the even channels and the odd ones, and queries are laid out likewise. Scales are applied to logits and weights. */

typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int8_t small __attribute__((vector_size(LANES)));
typedef int32_t whole __attribute__((vector_size(4 * LANES)));

#define PAIR (2 * LANES)
#define SOME (LANES == 16 ? 4 : 2) /* query heads, as registers allow */

struct pair {
    vector first, second;
};

INLINE vector as_numbers(words bits) {
    vector found;
    memcpy(&found, &bits, sizeof(found));
    return found;
}

/* Bytes with a sign, widened. Compilers make poor code of the conversion. */
INLINE whole from_small(const uint8_t *from) {
#if LANES == 16
    return (whole)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif LANES == 8 && defined(__AVX2__)
    return (whole)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    small codes;
    memcpy(&codes, from, sizeof(codes));
    return __builtin_convertvector(codes, whole);
#endif
}

INLINE vector from_codes(const uint8_t *from, int floating) {
    const whole wide = from_small(from);
    if (!floating) return __builtin_convertvector(wide, vector);
    /* As from_e4m3 has it. */
    whole size = wide & 0x7F, is_tiny = size < 8;
    vector normal = as_numbers((words)((size << 20) + (120 << 23)));
    vector tiny = __builtin_convertvector(size, vector) * 0x1p-9f;
    words bits = ((words)is_tiny & (words)tiny) | (~(words)is_tiny & (words)normal);
    return as_numbers(bits | ((words)wide & 0x80000000u));
}

/* PAIR channels, without their scale. */
INLINE struct pair widened(const uint8_t *from, struct code code) {
    struct pair found;
    if (code.bits == BFLOAT16) {
        words both;
        memcpy(&both, from, sizeof(both));
        found.first = as_numbers(both << 16);
        found.second = as_numbers(both & 0xFFFF0000u);
    } else if (code.bits == FLOAT32) {
        found.first = load((const float *)from);
        found.second = load((const float *)from + LANES);
    } else {
        found.first = from_codes(from, (int)code.floating);
        found.second = from_codes(from + LANES, (int)code.floating);
    }
    return found;
}

/* Where in a pair a channel is. */
INLINE int place_in_pair(int channel, struct code code) {
    int within = channel % PAIR;
    return channel - within + (code.bits == BFLOAT16 ? within % 2 * LANES + within / 2 : within);
}

/* Logits of BLOCK tokens for some heads; query: heads x dim, in pairs. */
INLINE void register_block(const uint8_t *from, const float *query, four logits[SOME], int among, int dim,
                           struct code code) {
    const int n = dim * (int)code.bits / 8, step = PAIR * (int)code.bits / 8;
    vector dots[SOME][BLOCK];
#pragma GCC unroll 4
    for (int g = 0; g < among; g++)
        for (int i = 0; i < BLOCK; i++) dots[g][i] = (vector){0};
    for (int v = 0; v < dim / PAIR; v++) {
        struct pair some[BLOCK];
        for (int i = 0; i < BLOCK; i++) some[i] = widened(from + i * n + v * step, code);
#pragma GCC unroll 4 /* else the sums are in memory */
        for (int g = 0; g < among; g++) {
            const vector first = load(query + g * dim + v * PAIR), second = load(query + g * dim + v * PAIR + LANES);
            for (int i = 0; i < BLOCK; i++) dots[g][i] += some[i].first * first;
            for (int i = 0; i < BLOCK; i++) dots[g][i] += some[i].second * second;
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < among; g++) logits[g] = sums(dots[g]);
}

/* Logits of a piece: dim is a multiple of PAIR. */
INLINE void register_logits(const struct plane *p, int64_t first, int64_t count, struct queries q, float *logits,
                            int group, struct ahead ahead, int dim, struct code code) {
    const int n = dim * (int)code.bits / 8;
    const uint8_t *codes = p->codes + first * n;
    float mine[MAX_GROUP * MAX_DIM];
    for (int g = 0; g < group; g++)
        for (int d = 0; d < dim; d++) mine[g * dim + place_in_pair(d, code)] = q.numbers[g * dim + d];
    for (int64_t at = 0; at < count; at += BLOCK) {
        uint8_t last[BLOCK * MAX_DIM * 4];
        const uint8_t *from = codes + at * n;
        four scale = {1.0f, 1.0f, 1.0f, 1.0f};
        size_t left = count - at < BLOCK ? (size_t)(count - at) : BLOCK;
        if (left < BLOCK) {
            /* What follows the last token may not be read. */
            memset(last, 0, (size_t)(BLOCK * n));
            from = memcpy(last, from, left * (size_t)n);
        }
        fetch(ahead, at, BLOCK);
        if (code.bits == 8) memcpy(&scale, (const float *)p->scale + first + at, left * sizeof(float));
        for (int g = 0; g < group; g += SOME) {
            four found[SOME];
            const int among = group - g < SOME ? group - g : SOME;
#define FOR(AMONG) \
    case AMONG: register_block(from, mine + g * dim, found, AMONG < SOME ? AMONG : SOME, dim, code); break;
            switch (among) { FOR(1) FOR(2) FOR(3) FOR(4) }
#undef FOR
            for (int i = 0; i < among; i++) {
                four sum = found[i] * scale + q.each[g + i].bias;
                memcpy(logits + (g + i) * PIECE + at, &sum, sizeof(sum));
            }
        }
    }
}

/* Some pairs of channels of all tokens, summed up for some heads. */
INLINE void register_channels(const uint8_t *codes, int64_t count, const float *weights, float *output, int among,
                              int dim, int pairs, struct code code, struct ahead ahead) {
    const int n = dim * (int)code.bits / 8, step = PAIR * (int)code.bits / 8;
    struct pair found[SOME][2];
    memset(found, 0, sizeof(found));
    for (int64_t t = 0; t < count; t++) {
        struct pair some[2];
        for (int v = 0; v < pairs; v++) some[v] = widened(codes + t * n + v * step, code);
        for (int g = 0; g < among; g++)
            for (int v = 0; v < pairs; v++) {
                found[g][v].first += weights[g * PIECE + t] * some[v].first;
                found[g][v].second += weights[g * PIECE + t] * some[v].second;
            }
        fetch(ahead, t, 1);
    }
    for (int g = 0; g < among; g++) memcpy(output + g * dim, found[g], sizeof(struct pair) * (size_t)pairs);
}

/* The values of a piece, summed up by their weights, G x PIECE; output: G x dim, a multiple of PAIR. */
INLINE void register_sums(const struct plane *p, int64_t first, int64_t count, const float *weights, float *output,
                          int group, struct ahead ahead, int dim, struct code code) {
    const uint8_t *codes = p->codes + first * dim * code.bits / 8;
    float scaled[MAX_GROUP * PIECE], found[SOME * MAX_DIM];
    if (code.bits == 8) {
        const float *scale = (const float *)p->scale + first;
        for (int g = 0; g < group; g++)
            for (int64_t i = 0; i < count; i++) scaled[g * PIECE + i] = weights[g * PIECE + i] * scale[i];
        weights = scaled;
    }
    for (int g = 0; g < group; g += SOME) {
        const int among = group - g < SOME ? group - g : SOME;
        for (int d = 0; d < dim; d += 2 * PAIR) {
            const uint8_t *from = codes + d * code.bits / 8;
            const int pairs = dim - d < 2 * PAIR ? 1 : 2;
            const struct ahead what = g == 0 && d == 0 ? ahead : (struct ahead){NULL, 0};
#define FOR(AMONG, PAIRS)                                                                                             \
    case 2 * AMONG + PAIRS:                                                                                           \
        register_channels(from, count, weights + g * PIECE, found + d, AMONG < SOME ? AMONG : SOME, dim, PAIRS, code,     \
                          what);                                                                                      \
        break;
            switch (2 * among + pairs) {
                FOR(1, 1) FOR(1, 2) FOR(2, 1) FOR(2, 2) FOR(3, 1) FOR(3, 2) FOR(4, 1) FOR(4, 2)
            }
#undef FOR
        }
        for (int i = 0; i < among; i++)
            for (int d = 0; d < dim; d++) output[(g + i) * dim + d] = found[i * dim + place_in_pair(d, code)];
    }
}
