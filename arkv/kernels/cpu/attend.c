/* Decode attention: attend of arkv/kernels/twin.py, called by steps.py.
 *
 * Letters: R rows of the layer, G query heads per row, D head dim.
 *
 * The tokens of each row and pool are cut into pieces of PIECE, which threads share. A piece leaves exponentials of its
 * logits, their maximum and sum, and its share of the output (flash-decoding). Then the pieces of a row are brought to
 * the same maximum, which makes probabilities of the exponentials. */

#include "expand.h"
#include "integers.h"
#include "registers.h"

#include <stdlib.h>

/* What all query heads of a row find in one piece. */
struct found {
    float *logits; /* G x PIECE: exponentials of their differences to the peak */
    float *peak;   /* G */
    float *total;  /* G: sums of the exponentials; later what makes probabilities of them */
    float *output; /* G x value dim, before divisions */
};

/* Logits of a piece, and sums of its values, by what serves the format. Dims and bits that are known when this is
 * compiled let loops over a token be unrolled. */
static void logits_of(const struct plane *p, int64_t first, int64_t count, struct queries q, float *logits, int group,
                      struct ahead ahead) {
#if INTEGERS
#define WITH(DIM, BITS)                                                      \
    if (is_plain(p->code, BITS, 0) && p->dim == DIM) {                       \
        code_logits(p, first, count, q, logits, group, ahead, DIM, BITS);    \
        return;                                                              \
    }
    WITH(64, 4) WITH(128, 4)
#undef WITH
    if (asks_in_digits(p)) {
        code_logits(p, first, count, q, logits, group, ahead, (int)p->dim, (int)p->code.bits);
        return;
    }
#endif
#define WITH(BITS, FLOATING)                                                                                        \
    if (is_plain(p->code, BITS, FLOATING) && p->dim % PAIR == 0) {                                                  \
        register_logits(p, first, count, q, logits, group, ahead, (int)p->dim, (struct code){NULL, BITS, FLOATING}); \
        return;                                                                                                     \
    }
    WITH(16, 0) WITH(32, 0) WITH(8, 0) WITH(8, 1)
#undef WITH
    expanded_logits(p, first, count, q, logits, group, (int)p->dim, p->code);
}

static void sums_of(const struct plane *p, int64_t first, int64_t count, const float *weights, float *output,
                    int group, struct ahead ahead, int64_t type) {
#if INTEGERS
    if (weighs_in_digits(p)) {
#define WITH(BITS, COUNT)                                                                  \
    if (p->code.bits == BITS && (type == BFLOAT16) == (COUNT < DIGITS)) {                  \
        code_sums(p, first, count, weights, output, group, ahead, BITS, COUNT);            \
        return;                                                                            \
    }
        WITH(4, 3) WITH(3, 3) WITH(2, 3) WITH(4, 2) WITH(3, 2) WITH(2, 2)
#undef WITH
    }
#endif
#define WITH(BITS, FLOATING)                                                                                        \
    if (is_plain(p->code, BITS, FLOATING) && p->dim % PAIR == 0) {                                                  \
        register_sums(p, first, count, weights, output, group, ahead, (int)p->dim,                                     \
                      (struct code){NULL, BITS, FLOATING});                                                         \
        return;                                                                                                     \
    }
    WITH(16, 0) WITH(32, 0) WITH(8, 0) WITH(8, 1)
#undef WITH
    expanded_sums(p, first, count, weights, output, group, (int)p->dim, p->code);
}

static void piece(const struct pool *p, int64_t first, int64_t count, struct queries q, float softcap, struct found f,
                  int group, int64_t type) {
    const int64_t key_bytes = token_bytes(&p->key), value_bytes = token_bytes(&p->value);
    logits_of(&p->key, first, count, q, f.logits, group,
              (struct ahead){p->value.codes + first * value_bytes, value_bytes});
    /* Whole vectors: what is beyond the last token gets no weight. */
    const int64_t whole = (count + LANES - 1) / LANES * LANES;
    for (int g = 0; g < group; g++) {
        float *logits = f.logits + g * PIECE;
        if (softcap != 0.0f)
            for (int64_t i = 0; i < count; i++) logits[i] = softcap * hyperbolic_tangent(logits[i] / softcap);
        for (int64_t i = count; i < whole; i++) logits[i] = -INFINITY;
        vector largest = load(logits), total = {0};
        for (int64_t i = LANES; i < whole; i += LANES) largest = larger(largest, load(logits + i));
        const float peak = largest_of(largest);
        for (int64_t i = 0; i < whole; i++) logits[i] = exponential(logits[i] - peak);
        for (int64_t i = 0; i < whole; i += LANES) total += load(logits + i);
        f.peak[g] = peak;
        f.total[g] = sum_of(total);
    }
    sums_of(&p->value, first, count, f.logits, f.output, group,
            (struct ahead){p->key.codes + (first + count) * key_bytes, key_bytes}, type);
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
    float *query;       /* pools x R x G x D, scaled and in the coordinates of the codes */
    struct asked *each; /* pools x R x G */
    int8_t *digits;     /* pools x R x G x PLACES x D */
};

/* The query of one head. */
static void turn(const struct call *c, int64_t item, const uint8_t *query, int64_t type, struct turned t) {
    int64_t dim = c->pools[0].key.dim, items = c->rows * c->group, row = c->begin + item / c->group;
    float scaled[MAX_DIM];
    for (int64_t d = 0; d < dim; d++) scaled[d] = number(query, d, type) * c->scaling;
    for (int64_t pool = 0; pool < c->pool_count; pool++) {
        const struct plane *p = &c->pools[pool].key;
        struct asked *asked = t.each + pool * items + item;
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
        asked->bias = sum;
#if INTEGERS
        if (asks_in_digits(p)) {
            int8_t *digits = t.digits + (pool * items + item) * PLACES * dim;
            asked->total = to_digits(to, (int)dim, digits, DIGITS, &asked->unit);
            asked->sum = 0.0f;
            for (int64_t d = 0; d < dim; d++) asked->sum += to[d];
        }
#endif
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
            for (int64_t d = 0; d < dim; d++, rotation += dim) sum[d] += product_of(mine, rotation, dim);
        } else {
            for (int64_t d = 0; d < dim; d++) sum[d] += mine[d];
        }
    }
    for (int64_t d = 0; d < dim; d++) put_number(output, d, type, sum[d]);
}

/* The mean over the query heads of what each token of a piece gets. */
static void share_out(int group, int64_t count, const float *logits, const float *shares, float *importance) {
    float among = 1.0f / (float)group;
    for (int64_t i = 0; i < count; i += LANES) {
        vector sum = load(logits + i) * (shares[0] * among);
        for (int g = 1; g < group; g++) sum += load(logits + g * PIECE + i) * (shares[g] * among);
        memcpy(importance + i, &sum, sizeof(float) * (size_t)(count - i < LANES ? count - i : LANES));
    }
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
    size_t numbers = (size_t)(pool_count * items * dim + count * group * (2 + PIECE + value_dim));
    char *space = malloc((size_t)(rows + 1) * sizeof(int64_t) + (size_t)count * sizeof(struct task) +
                         numbers * sizeof(float) +
                         (size_t)(pool_count * items) * (sizeof(struct asked) + (size_t)(PLACES * dim)));
    if (!space) return 0;
    struct task *tasks = (struct task *)space;
    int64_t *first_task = (int64_t *)(tasks + count);
    struct turned t;
    t.each = (struct asked *)(first_task + rows + 1);
    t.query = (float *)(t.each + pool_count * items);
    float *peaks = t.query + pool_count * items * dim, *totals = peaks + count * group, *logits = totals + count * group;
    float *partial = logits + count * group * PIECE;
    t.digits = (int8_t *)(partial + count * group * value_dim);
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
            const struct queries q = {t.query + first * dim, t.digits + first * PLACES * dim, t.each + first};
            piece(pools + w->pool, w->first, w->count, q, c->softcap, FOUND(task), (int)group, query_type);
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
