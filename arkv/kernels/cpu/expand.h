/* Attention to tokens of any format, which are expanded into a buffer: logits of a piece, and its values summed up.
 *
 * A piece is read BLOCK tokens at a time into the first cache, so that nothing dequantized goes to memory. How codes lie
 * in bytes: arkv/formats/packing.py. */

#include "vectors.h"

#define PIECE 128 /* tokens */
#define BLOCK 4
#define MAX_GROUP 64

/* What is read after a piece, so much while each of its tokens is: caches of processors foresee no more than a page. */
struct ahead {
    const uint8_t *from;
    int64_t bytes;
};

INLINE void fetch(struct ahead ahead, int64_t token, int64_t tokens) {
    for (int64_t at = token * ahead.bytes; at < (token + tokens) * ahead.bytes; at += 64)
        __builtin_prefetch(ahead.from + at);
}

#define EACH(byte) (0x0101010101010101u * (uint64_t)(byte))

/* Codes of 3 bits to a byte each, eight bytes at a time: loops over so few bytes would not be vectorized. */
INLINE void unpack3(const uint8_t *restrict from, uint8_t *restrict to, int dim) {
    int n = dim / 8;
    for (int j = 0; j < n; j += 8) {
        size_t size = n - j < 8 ? (size_t)(n - j) : 8;
        uint64_t word[3] = {0}, code[8];
        for (int r = 0; r < 3; r++) {
            memcpy(word + r, from + r * n + j, size);
            code[2 * r] = word[r] & EACH(7);
            code[2 * r + 1] = (word[r] >> 3) & EACH(7);
        }
        code[6] = ((word[0] >> 6) & EACH(3)) | ((word[2] >> 4) & EACH(4));
        code[7] = ((word[1] >> 6) & EACH(3)) | ((word[2] >> 5) & EACH(4));
        for (int r = 0; r < 8; r++) memcpy(to + r * n + j, code + r, size);
    }
}

/* Codes of fewer than 8 bits to a byte each. */
INLINE void unpack(const uint8_t *restrict from, uint8_t *restrict to, int64_t bits, int dim) {
    if (bits == 3) {
        unpack3(from, to, dim);
        return;
    }
    if (bits == 4) {
        int n = dim / 2;
        for (int j = 0; j < n; j++) {
            to[j] = from[j] & 15;
            to[n + j] = from[j] >> 4;
        }
        return;
    }
    int n = dim / 4;
    for (int j = 0; j < n; j++) {
        to[j] = from[j] & 3;
        to[n + j] = from[j] >> 2 & 3;
        to[2 * n + j] = from[j] >> 4 & 3;
        to[3 * n + j] = from[j] >> 6;
    }
}

/* What codes of at most 4 bits stand for; levels: MAX_LEVELS. */
INLINE void look_up(const uint8_t *restrict codes, float *restrict to, const float *restrict levels, int dim) {
    int d = 0;
#if LANES == 16
    __m512 table = _mm512_loadu_ps(levels);
    for (; d + LANES <= dim; d += LANES) {
        __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + d)));
        _mm512_storeu_ps(to + d, _mm512_permutexvar_ps(index, table));
    }
#endif
    for (; d < dim; d++) to[d] = levels[codes[d]];
}

/* Unlike a look-up among 256 numbers, a loop over it is vectorized. */
INLINE float from_e4m3(uint8_t code) {
    uint32_t size = code & 0x7F, bits = (size << 20) + (120u << 23);
    float normal;
    memcpy(&normal, &bits, 4);
    float found = size < 8 ? (float)(int32_t)size * 0x1p-9f : normal;
    return code & 0x80 ? -found : found;
}

/* One token as float32: codes times its scale, plus its zero point, as sums of codes alone would lose digits. */
INLINE void expand(const struct plane *p, int64_t slot, float *restrict to, struct code code, int dim) {
    const int64_t bits = code.bits;
    const uint8_t *from = p->codes + slot * dim * bits / 8;
    if (bits == FLOAT32) {
        memcpy(to, from, 4 * (size_t)dim);
        return;
    }
    if (bits == BFLOAT16) {
        uint32_t wide[MAX_DIM];
        uint16_t half[MAX_DIM];
        memcpy(half, from, 2 * (size_t)dim);
        for (int d = 0; d < dim; d++) wide[d] = (uint32_t)half[d] << 16;
        memcpy(to, wide, 4 * (size_t)dim);
        return;
    }
    if (bits == 8) {
        float scale = number(p->scale, slot, FLOAT32);
        if (code.floating)
            for (int d = 0; d < dim; d++) to[d] = from_e4m3(from[d]) * scale;
        else
            for (int d = 0; d < dim; d++) to[d] = (float)(int8_t)from[d] * scale;
        return;
    }
    float scale = number(p->scale, slot, BFLOAT16), zero = number((const uint8_t *)p->zero, slot, BFLOAT16);
    if (bits == 4 && !code.levels) {
        int n = dim / 2;
        for (int j = 0; j < n; j++) to[j] = (float)(from[j] & 15) * scale + zero;
        for (int j = 0; j < n; j++) to[n + j] = (float)(from[j] >> 4) * scale + zero;
        return;
    }
    uint8_t codes[MAX_DIM];
    unpack(from, codes, bits, dim);
    if (!code.levels) {
        for (int d = 0; d < dim; d++) to[d] = (float)codes[d] * scale + zero;
        return;
    }
    look_up(codes, to, code.levels, dim);
    for (int d = 0; d < dim; d++) to[d] = to[d] * scale + zero;
}

/* Tokens of a plane as float32, [BLOCK, padded dim]; zeros beyond count. */
INLINE void read_block(const struct plane *p, int64_t slot, int64_t count, float *restrict buffer, struct code code,
                       int dim) {
    int padded = (dim + LANES - 1) / LANES * LANES;
    for (int64_t i = 0; i < BLOCK; i++) {
        if (i < count)
            expand(p, slot + i, buffer + i * padded, code, dim);
        else
            for (int d = 0; d < dim; d++) buffer[i * padded + d] = 0.0f;
    }
}

/* The sums of four vectors. */
static inline four sums(const vector x[BLOCK]) {
    four a = fold(x[0]), b = fold(x[1]), c = fold(x[2]), d = fold(x[3]);
    four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

/* Logits of a piece, G x PIECE. */
INLINE void expanded_logits(const struct plane *p, int64_t first, int64_t count, struct queries q, float *logits,
                            int group, int dim, struct code code) {
    const int vectors = (dim + LANES - 1) / LANES;
    vector buffer[BLOCK * MAX_DIM / LANES], mine[MAX_GROUP * MAX_DIM / LANES];
    memset(buffer, 0, sizeof(vector) * (size_t)(BLOCK * vectors));
    memset(mine, 0, sizeof(vector) * (size_t)(group * vectors));
    for (int g = 0; g < group; g++) memcpy(mine + g * vectors, q.numbers + g * dim, sizeof(float) * (size_t)dim);
    for (int64_t at = 0; at < count; at += BLOCK) {
        read_block(p, first + at, count - at, (float *)buffer, code, dim);
        for (int g = 0; g < group; g++) {
            vector dots[BLOCK];
            for (int i = 0; i < BLOCK; i++) {
                dots[i] = mine[g * vectors] * buffer[i * vectors];
                for (int v = 1; v < vectors; v++) dots[i] += mine[g * vectors + v] * buffer[i * vectors + v];
            }
            four sum = sums(dots) + q.each[g].bias;
            memcpy(logits + g * PIECE + at, &sum, sizeof(sum));
        }
    }
}

/* The values of a piece, summed up by their weights, G x PIECE and 0 up to a whole block; output: G x dim. */
INLINE void expanded_sums(const struct plane *p, int64_t first, int64_t count, const float *weights, float *output,
                          int group, int dim, struct code code) {
    const int vectors = (dim + LANES - 1) / LANES;
    vector buffer[BLOCK * MAX_DIM / LANES], mine[MAX_GROUP * MAX_DIM / LANES];
    memset(buffer, 0, sizeof(vector) * (size_t)(BLOCK * vectors));
    memset(mine, 0, sizeof(vector) * (size_t)(group * vectors));
    for (int64_t at = 0; at < count; at += BLOCK) {
        read_block(p, first + at, count - at, (float *)buffer, code, dim);
        for (int g = 0; g < group; g++) {
            const float *some = weights + g * PIECE + at;
            for (int v = 0; v < vectors; v++)
                for (int i = 0; i < BLOCK; i++) mine[g * vectors + v] += some[i] * buffer[i * vectors + v];
        }
    }
    for (int g = 0; g < group; g++) memcpy(output + g * dim, mine + g * vectors, sizeof(float) * (size_t)dim);
}
