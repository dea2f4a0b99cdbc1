/* Decode attention: attend of arkv/kernels/twin.py, called by steps.py.
 *
 * Letters: R rows of the layer, G query heads per row, D head dim.
 *
 * The tokens of each row and pool are cut into pieces of PIECE, which threads share. A piece is read BLOCK tokens at a
 * time: their codes are expanded into a buffer in the first cache, so that nothing dequantized goes to memory. It leaves
 * exponentials of its logits, their maximum and sum, and its share of the output (flash-decoding). Then the pieces of a
 * row are brought to the same maximum, which makes probabilities of the exponentials. How codes lie in bytes:
 * arkv/formats/packing.py. */

#include "pools.h"

#include <stdlib.h>

#define PIECE 128
#define BLOCK 4
#define MAX_GROUP 64

#if LANES == 16
#include <immintrin.h>
typedef float eight __attribute__((vector_size(32)));
#elif LANES == 8
typedef vector eight;
#endif
typedef float four __attribute__((vector_size(16)));
typedef uint64_t runs __attribute__((vector_size(64)));

#define EACH(byte) (0x0101010101010101u * (uint64_t)(byte))

/* Codes of 3 bits to a byte each, eight bytes at a time: loops over so few bytes would not be vectorized. */
INLINE void unpack3(const uint8_t *restrict from, uint8_t *restrict to, int dim) {
    int n = dim / 8;
    if (n == 8) {
        /* All at once: what is stored by eight bytes cannot be loaded by LANES without a wait. */
        uint64_t word[3];
        memcpy(word, from, sizeof(word));
        runs codes = {word[0], word[0], word[1], word[1], word[2], word[2], word[0], word[1]};
        runs highs = {0, 0, 0, 0, 0, 0, word[2], word[2]};
        codes = codes >> (runs){0, 3, 0, 3, 0, 3, 6, 6} &
                (runs){EACH(7), EACH(7), EACH(7), EACH(7), EACH(7), EACH(7), EACH(3), EACH(3)};
        codes |= highs >> (runs){0, 0, 0, 0, 0, 0, 4, 5} & EACH(4);
        memcpy(to, &codes, sizeof(codes));
        return;
    }
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
    int runs = bits == 4 ? 2 : 4, n = dim / runs;
    for (int r = 0; r < runs; r++)
        for (int j = 0; j < n; j++) to[r * n + j] = (from[j] >> (r * bits)) & ((1 << bits) - 1);
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

static inline four fold(vector x) {
#if LANES == 4
    return x;
#else
#if LANES == 16
    eight half = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    eight half = x;
#endif
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#endif
}

/* The sums of four vectors. */
static inline four sums(const vector x[BLOCK]) {
    four a = fold(x[0]), b = fold(x[1]), c = fold(x[2]), d = fold(x[3]);
    four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

/* What all query heads of a row find in one piece. */
struct found {
    float *logits; /* G x PIECE: exponentials of their differences to the peak */
    float *peak;   /* G */
    float *total;  /* G: sums of the exponentials; later what makes probabilities of them */
    float *output; /* G x value dim, before divisions */
};

/* query: G x key dim, scaled and in the coordinates of the codes; bias: G, added to the logits. */
INLINE void piece(const struct pool *p, int64_t first, int64_t count, const float *query, const float *bias,
                  float softcap, struct found f, int group, int key_dim, int value_dim,
                  struct code key_code, struct code value_code) {
    const int keys = (key_dim + LANES - 1) / LANES, values = (value_dim + LANES - 1) / LANES;
    vector buffer[BLOCK * MAX_DIM / LANES], mine[MAX_GROUP * MAX_DIM / LANES];
    memset(buffer, 0, sizeof(vector) * (size_t)(BLOCK * (keys > values ? keys : values)));
    memset(mine, 0, sizeof(vector) * (size_t)(group * keys));
    for (int g = 0; g < group; g++) memcpy(mine + g * keys, query + g * key_dim, sizeof(float) * (size_t)key_dim);
    for (int64_t at = 0; at < count; at += BLOCK) {
        read_block(&p->key, first + at, count - at, (float *)buffer, key_code, key_dim);
        for (int g = 0; g < group; g++) {
            vector dots[BLOCK];
            for (int i = 0; i < BLOCK; i++) {
                dots[i] = mine[g * keys] * buffer[i * keys];
                for (int v = 1; v < keys; v++) dots[i] += mine[g * keys + v] * buffer[i * keys + v];
            }
            four sum = sums(dots) + bias[g];
            memcpy(f.logits + g * PIECE + at, &sum, sizeof(sum));
        }
    }
    for (int g = 0; g < group; g++) {
        float *logits = f.logits + g * PIECE, peak = -INFINITY, sum = 0.0f;
        if (softcap != 0.0f)
            for (int64_t i = 0; i < count; i++) logits[i] = softcap * hyperbolic_tangent(logits[i] / softcap);
#pragma omp simd reduction(max : peak)
        for (int64_t i = 0; i < count; i++) peak = logits[i] > peak ? logits[i] : peak;
        for (int64_t i = 0; i < count; i++) logits[i] = exponential(logits[i] - peak);
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; i++) sum += logits[i];
        for (int64_t i = count; i % BLOCK; i++) logits[i] = 0.0f;
        f.peak[g] = peak;
        f.total[g] = sum;
    }
    memset(mine, 0, sizeof(vector) * (size_t)(group * values));
    if (key_dim != value_dim) memset(buffer, 0, sizeof(vector) * (size_t)(BLOCK * values));
    for (int64_t at = 0; at < count; at += BLOCK) {
        read_block(&p->value, first + at, count - at, (float *)buffer, value_code, value_dim);
        for (int g = 0; g < group; g++) {
            const float *weights = f.logits + g * PIECE + at;
            for (int v = 0; v < values; v++)
                for (int i = 0; i < BLOCK; i++) mine[g * values + v] += weights[i] * buffer[i * values + v];
        }
    }
    for (int g = 0; g < group; g++)
        memcpy(f.output + g * value_dim, mine + g * values, sizeof(float) * (size_t)value_dim);
}

/* Dims and bits that are known when this is compiled let loops over a token be unrolled. */
static void any_piece(const struct pool *p, int64_t first, int64_t count, const float *query, const float *bias,
                      float softcap, struct found f, int group) {
    const struct plane *k = &p->key, *v = &p->value;
#define IS(PLANE, DIM, BITS, FLOATING) \
    (PLANE->dim == DIM && PLANE->code.bits == BITS && PLANE->code.floating == FLOATING && !PLANE->code.levels)
#define WITH(DIM, KEY_BITS, VALUE_BITS, FLOATING)                                                                     \
    if (IS(k, DIM, KEY_BITS, FLOATING) && IS(v, DIM, VALUE_BITS, FLOATING)) {                                         \
        piece(p, first, count, query, bias, softcap, f, group, DIM, DIM, (struct code){NULL, KEY_BITS, FLOATING},     \
              (struct code){NULL, VALUE_BITS, FLOATING});                                                             \
        return;                                                                                                       \
    }
#define WITH_DIM(DIM) \
    WITH(DIM, 16, 16, 0) WITH(DIM, 32, 32, 0) WITH(DIM, 8, 8, 0) WITH(DIM, 8, 8, 1) WITH(DIM, 4, 4, 0) WITH(DIM, 4, 3, 0)
    WITH_DIM(64)
    WITH_DIM(128)
#undef WITH_DIM
#undef WITH
#undef IS
    piece(p, first, count, query, bias, softcap, f, group, (int)k->dim, (int)v->dim, k->code, v->code);
}

struct call {
    const struct pool *pools;
    int64_t pool_count;
    const int64_t *table; /* the row table from the layer's first row on */
    int64_t columns, begin, rows, heads, group;
    float scaling, softcap;
};

/* A piece: count tokens of one pool in one row, from slot first on. */
struct task {
    int64_t row, pool, first, count;
};

/* Queries as every pool needs them. */
struct turned {
    float *query; /* pools x R x G x D, scaled and in the coordinates of the codes */
    float *bias;  /* pools x R x G: their products with the centers */
};

/* The query of one head. */
static void turn(const struct call *c, int64_t item, const uint8_t *query, int64_t type, struct turned t) {
    int64_t dim = c->pools[0].key.dim, items = c->rows * c->group, row = c->begin + item / c->group;
    float scaled[MAX_DIM];
    for (int64_t d = 0; d < dim; d++) scaled[d] = number(query, d, type) * c->scaling;
    for (int64_t pool = 0; pool < c->pool_count; pool++) {
        const struct plane *p = &c->pools[pool].key;
        float *to = t.query + (pool * items + item) * dim, sum = 0.0f;
        if (p->rotation) {
            memset(to, 0, sizeof(float) * (size_t)dim);
            for (int64_t i = 0; i < dim; i++)
                for (int64_t d = 0; d < dim; d++) to[d] += scaled[i] * p->rotation[i * dim + d];
        } else {
            memcpy(to, scaled, sizeof(float) * (size_t)dim);
        }
        if (p->center)
            for (int64_t d = 0; d < dim; d++)
                sum += scaled[d] * number((const uint8_t *)p->center, row * dim + d, BFLOAT16);
        t.bias[pool * items + item] = sum;
    }
}

/* Brings the pieces of one query head to the same maximum. found: of its first piece. */
static void combine(const struct call *c, int64_t g, const struct task *tasks, int64_t pieces, struct found f,
                    const float *sink, uint8_t *output, int64_t type) {
    int64_t dim = c->pools[0].value.dim, group = c->group;
    float highest = sink ? *sink : -INFINITY, whole = 0.0f, sum[MAX_DIM] = {0}, mine[MAX_DIM];
    for (int64_t i = 0; i < pieces; i++) highest = f.peak[i * group + g] > highest ? f.peak[i * group + g] : highest;
    if (sink) whole = exponential(*sink - highest);
    for (int64_t i = 0; i < pieces; i++)
        whole += f.total[i * group + g] * exponential(f.peak[i * group + g] - highest);
    for (int64_t i = 0; i < pieces;) {
        int64_t pool = tasks[i].pool;
        memset(mine, 0, sizeof(float) * (size_t)dim);
        for (; i < pieces && tasks[i].pool == pool; i++) {
            const float share = exponential(f.peak[i * group + g] - highest) / whole;
            const float *part = f.output + (i * group + g) * dim;
            f.total[i * group + g] = share;
            for (int64_t d = 0; d < dim; d++) mine[d] += share * part[d];
        }
        const float *rotation = c->pools[pool].value.rotation;
        if (rotation) {
            for (int64_t d = 0; d < dim; d++, rotation += dim) {
                float product = 0.0f;
#pragma omp simd reduction(+ : product)
                for (int64_t j = 0; j < dim; j++) product += mine[j] * rotation[j];
                sum[d] += product;
            }
        } else {
            for (int64_t d = 0; d < dim; d++) sum[d] += mine[d];
        }
    }
    for (int64_t d = 0; d < dim; d++) put_number(output, d, type, sum[d]);
}

/* The mean over the query heads of what each token of a piece gets. */
static void share_out(int group, int64_t count, const float *restrict logits, const float *restrict shares,
                      float *restrict importance) {
    float among = 1.0f / (float)group;
    for (int64_t i = 0; i < count; i++) importance[i] = logits[i] * (shares[0] * among);
    for (int g = 1; g < group; g++)
        for (int64_t i = 0; i < count; i++) importance[i] += logits[g * PIECE + i] * (shares[g] * among);
}

/* One layer's step. Strides in numbers; key and value have the types of pool 0.
 *
 * sinks: H x G numbers of sinks_type, or NULL. importance: by pool, by slot; NULL: it is not wanted. output: R x G x
 * value dim of query_type. Returns whether there was memory. */
int64_t arkv_attend(const struct pool *pools, int64_t pool_count, const int64_t *table, int64_t columns, int64_t begin,
                    int64_t rows, int64_t heads, int64_t group, const uint8_t *query, int64_t query_type,
                    int64_t query_batch, int64_t query_head, const uint8_t *key, int64_t key_batch, int64_t key_head,
                    const uint8_t *value, int64_t value_batch, int64_t value_head, int64_t n_sink, int64_t window,
                    double scaling, double softcap, const uint8_t *sinks, int64_t sinks_type, float *const *importance,
                    uint8_t *output, int64_t threads) {
    struct call call = {pools, pool_count, table + begin * columns, columns, begin, rows, heads, group,
                        (float)scaling, (float)softcap}, *c = &call;
    const int64_t dim = pools[0].key.dim, value_dim = pools[0].value.dim, items = rows * group;
    int64_t count = 0;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t pool = 0; pool < pool_count; pool++)
            count += (count_of(c->table + row * columns, pool) + PIECE - 1) / PIECE;
    size_t numbers = (size_t)(pool_count * items * (dim + 1) + count * group * (2 + PIECE + value_dim));
    char *space = malloc((size_t)(rows + 1) * sizeof(int64_t) + (size_t)count * sizeof(struct task) +
                         numbers * sizeof(float));
    if (!space) return 0;
    struct task *tasks = (struct task *)space;
    int64_t *first_task = (int64_t *)(tasks + count);
    struct turned t;
    t.query = (float *)(first_task + rows + 1);
    t.bias = t.query + pool_count * items * dim;
    float *peaks = t.bias + pool_count * items, *totals = peaks + count * group, *logits = totals + count * group;
    float *partial = logits + count * group * PIECE;
    count = 0;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t *mine = c->table + row * columns;
        first_task[row] = count;
        for (int64_t pool = 0; pool < pool_count; pool++) {
            int64_t held = count_of(mine, pool);
            for (int64_t at = 0; at < held; at += PIECE)
                tasks[count++] =
                    (struct task){row, pool, start_of(mine, pool) + at, held - at < PIECE ? held - at : PIECE};
        }
    }
    first_task[rows] = count;
#define FOUND(task)                                                                                      \
    (struct found) {                                                                                     \
        logits + (task) * group * PIECE, peaks + (task) * group, totals + (task) * group,                \
            partial + (task) * group * value_dim                                                         \
    }
#pragma omp parallel num_threads((int)threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < rows; row++) {
            const int64_t *mine = c->table + row * columns;
            int64_t slot = start_of(mine, 0) + place_of(mine[SEEN] - 1 - mine[FIRST], n_sink, window);
            int64_t batch = row / heads, head = row % heads, size = pools[0].key.code.bits / 8;
            int64_t key_bytes = token_bytes(&pools[0].key), value_bytes = token_bytes(&pools[0].value);
            memcpy(pools[0].key.codes + slot * key_bytes, key + (batch * key_batch + head * key_head) * size,
                   (size_t)key_bytes);
            memcpy(pools[0].value.codes + slot * value_bytes, value + (batch * value_batch + head * value_head) * size,
                   (size_t)value_bytes);
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items; item++) {
            int64_t batch = item / (heads * group), head = item % (heads * group);
            turn(c, item, query + (batch * query_batch + head * query_head) * (query_type / 8), query_type, t);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < count; task++) {
            const struct task *w = tasks + task;
            int64_t first = w->pool * items + w->row * group;
            any_piece(pools + w->pool, w->first, w->count, t.query + first * dim, t.bias + first, c->softcap,
                      FOUND(task), (int)group);
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items; item++) {
            int64_t row = item / group, first = first_task[row];
            float sink = sinks ? number(sinks, item % (heads * group), sinks_type) : 0.0f;
            combine(c, item % group, tasks + first, first_task[row + 1] - first, FOUND(first), sinks ? &sink : NULL,
                    output + item * value_dim * (query_type / 8), query_type);
        }
        if (importance) {
#pragma omp for schedule(static) nowait
            for (int64_t task = 0; task < count; task++) {
                const struct task *w = tasks + task;
                share_out((int)group, w->count, logits + task * group * PIECE, totals + task * group,
                          importance[w->pool] + w->first);
            }
        }
    }
    free(space);
    return 1;
}
