/* Attention of tokens that are read behind a prompt, and the largest that any of them gives to each of its keys: the twin
 * of arkv.rereading.plain_reread, called by reread.py.
 *
 * Letters: R rows (batch times KV heads), G query heads per KV head, T new tokens, N keys of the prompt, K = N + T keys,
 * D head dim of keys, E of values.
 *
 * The logits of ROWS queries with all keys lie in the core's own memory between their product and the sum of values, so
 * that each is computed once. Keys and values are laid out in words of four bytes: a number of float32, or a pair of
 * bfloat16, which processors multiply and sum up in float32 at a time. A word of keys is of neighbouring channels, one of
 * values of neighbouring tokens.
 */

#include "numbers.h"

#if defined(__AVX512BF16__) && LANES == 16
#include <immintrin.h>
#define PAIRS 1
#else
#define PAIRS 0
#endif

#define WIDTH 3                    /* vectors of keys in a panel */
#define PANEL (WIDTH * LANES)      /* keys */
#define ROWS (LANES == 16 ? 8 : 4) /* queries at a time, as registers allow */
#define CHANNELS (2 * LANES)       /* of values, that are summed up at a time */
#define HIDDEN -1e30f              /* logit of a key that a query may not see: nothing to its exponential */

struct reread {
    int64_t batch, heads, group, queries, keys, prompt, dim, value_dim;
    const uint8_t *query;  /* B x (H x G) x T x D */
    const uint8_t *key;    /* B x H x K x D */
    const uint8_t *value;  /* B x H x K x E */
    int64_t type, threads; /* of the numbers; of the processor */
    double scaling;
    float *largest;        /* R x N, which is raised */
    uint8_t *output;       /* B x T x (H x G) x E */
    float *space;          /* arkv_reread_space numbers, at a multiple of 64 bytes */
};


static int64_t up_to(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

static int in_pairs(const struct reread *s) { return PAIRS && s->type == BFLOAT16 && s->dim % 2 == 0; }

static int64_t words_of(const struct reread *s, int64_t count) { return in_pairs(s) ? count / 2 : count; }

static int64_t padded_keys(const struct reread *s) { return up_to(s->keys, PANEL); }

static int64_t padded_channels(const struct reread *s) { return up_to(s->value_dim, CHANNELS); }

/* Words of a row's keys, and of its values. */
static int64_t key_words(const struct reread *s) { return padded_keys(s) * words_of(s, s->dim); }

static int64_t value_words(const struct reread *s) { return words_of(s, padded_keys(s)) * padded_channels(s); }

/* Of a thread: queries, logits, probabilities in words, the largest of all rows. */
static int64_t own_space(const struct reread *s) {
    int64_t rows = s->batch * s->heads;
    return up_to(ROWS * words_of(s, s->dim) + ROWS * padded_keys(s) * 2 + rows * s->prompt, LANES);
}

int64_t arkv_reread_space(const struct reread *s) {
    return s->batch * s->heads * (key_words(s) + value_words(s)) + s->threads * own_space(s);
}

/* The number at an index as one of float32, or of bfloat16 in its half of a word. */
INLINE void put(const struct reread *s, float *words, int64_t word, int64_t half, const uint8_t *from, int64_t index) {
    if (in_pairs(s))
        memcpy((uint8_t *)(words + word) + 2 * half, from + 2 * index, 2);
    else
        words[word] = number(from, index, s->type);
}

/* A row's keys, [panels, words, PANEL]. */
static void lay_out_keys(const struct reread *s, int64_t row, float *restrict to) {
    int64_t words = words_of(s, s->dim), each = in_pairs(s) ? 2 : 1, first = row * s->keys * s->dim;
    memset(to, 0, sizeof(float) * (size_t)key_words(s));
    for (int64_t k = 0; k < s->keys; k++)
        for (int64_t d = 0; d < s->dim; d++) {
            int64_t word = (k / PANEL * words + d / each) * PANEL + k % PANEL, index = first + k * s->dim + d;
            put(s, to, word, d % 2, s->key, index);
        }
}

/* A row's values, [words of tokens, padded channels]. */
static void lay_out_values(const struct reread *s, int64_t row, float *restrict to) {
    int64_t each = in_pairs(s) ? 2 : 1, first = row * s->keys * s->value_dim, wide = padded_channels(s);
    memset(to, 0, sizeof(float) * (size_t)value_words(s));
    for (int64_t k = 0; k < s->keys; k++)
        for (int64_t e = 0; e < s->value_dim; e++) {
            int64_t word = k / each * wide + e, index = first + k * s->value_dim + e;
            put(s, to, word, k % 2, s->value, index);
        }
}

/* ROWS queries of a head, [words, ROWS]; zeros behind the last one. */
static void lay_out_queries(const struct reread *s, int64_t first, int64_t count, float *restrict to) {
    int64_t each = in_pairs(s) ? 2 : 1;
    memset(to, 0, sizeof(float) * (size_t)(ROWS * words_of(s, s->dim)));
    for (int64_t q = 0; q < count; q++)
        for (int64_t d = 0; d < s->dim; d++) {
            int64_t word = d / each * ROWS + q, index = (first + q) * s->dim + d;
            put(s, to, word, d % 2, s->query, index);
        }
}

/* sum + words times one word, in each lane. */
INLINE vector add_product(vector sum, vector words, float word, const int pairs) {
#if PAIRS
    if (pairs) return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)words, (__m512bh)_mm512_set1_ps(word));
#endif
    return sum + words * word;
}

/* Logits of ROWS queries with the first so many keys, stride numbers from one query to the next. */
INLINE void multiply(const float *restrict queries, const float *restrict keys, int64_t words, int64_t count,
                     float scaling, float *restrict logits, int64_t stride, const int pairs) {
    for (int64_t begin = 0; begin < count; begin += PANEL, keys += words * PANEL) {
        vector sum[ROWS * WIDTH];
#pragma GCC unroll 24
        for (int i = 0; i < ROWS * WIDTH; i++) sum[i] = (vector){0};
        for (int64_t w = 0; w < words; w++) {
            const vector *panel = (const vector *)(keys + w * PANEL);
            vector these[WIDTH];
#pragma GCC unroll 3
            for (int v = 0; v < WIDTH; v++) these[v] = panel[v];
#pragma GCC unroll 24
            for (int i = 0; i < ROWS * WIDTH; i++)
                sum[i] = add_product(sum[i], these[i % WIDTH], queries[w * ROWS + i / WIDTH], pairs);
        }
#pragma GCC unroll 24
        for (int i = 0; i < ROWS * WIDTH; i++)
            ((vector *)(logits + i / WIDTH * stride + begin))[i % WIDTH] = sum[i] * scaling;
    }
}

/* Sums of values by the probabilities of ROWS queries, for CHANNELS of their channels. */
INLINE void weigh(const float *restrict probabilities, int64_t stride, const float *restrict values, int64_t words,
                  int64_t wide, vector sum[ROWS * 2], const int pairs) {
    vector found[ROWS * 2];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS * 2; i++) found[i] = (vector){0};
    for (int64_t w = 0; w < words; w++) {
        const vector *token = (const vector *)(values + w * wide);
        vector these[2] = {token[0], token[1]};
#pragma GCC unroll 16
        for (int i = 0; i < ROWS * 2; i++)
            found[i] = add_product(found[i], these[i % 2], probabilities[i / 2 * stride + w], pairs);
    }
    for (int i = 0; i < ROWS * 2; i++) sum[i] = found[i];
}

/* Exponentials in the place of a query's logits, and what they sum up to. */
static float exponentials(float *restrict logits, int64_t count) {
    float peak = HIDDEN, total = 0.0f;
#pragma omp simd reduction(max : peak)
    for (int64_t i = 0; i < count; i++) peak = logits[i] > peak ? logits[i] : peak;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; i++) {
        logits[i] = exponential(logits[i] - peak);
        total += logits[i];
    }
    return total;
}

/* Numbers as pairs of bfloat16. */
static void pack(const float *restrict from, int64_t count, float *restrict to) {
#if PAIRS
    for (int64_t i = 0; i < count; i += LANES)
        _mm256_storeu_si256((__m256i *)(to + i / 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#else
    (void)from, (void)count, (void)to;
#endif
}

/* ROWS queries, or fewer, of one head, from the first-th on. */
INLINE void attend(const struct reread *s, int64_t row, int64_t head, int64_t first, const float *keys,
                   const float *values, float *space, const int pairs) {
    const int64_t words = words_of(s, s->dim), stride = padded_keys(s), wide = padded_channels(s);
    const int64_t count = s->queries - first < ROWS ? s->queries - first : ROWS;
    const int64_t seen = up_to(s->prompt + first + count, PANEL), query_head = row % s->heads * s->group + head;
    const int64_t query_heads = s->heads * s->group, sample = row / s->heads;
    float *logits = space, *packed = logits + ROWS * stride, *queries = packed + ROWS * stride;
    float *largest = queries + ROWS * words + row * s->prompt, inverse[ROWS];
    lay_out_queries(s, (sample * query_heads + query_head) * s->queries + first, count, queries);
    multiply(queries, keys, words, seen, (float)s->scaling, logits, stride, pairs);
    for (int64_t q = 0; q < ROWS; q++) {
        float *mine = logits + q * stride;
        for (int64_t i = s->prompt + first + q + 1; i < seen; i++) mine[i] = HIDDEN;
        inverse[q] = 1.0f / exponentials(mine, seen);
        for (int64_t i = 0; q < count && i < s->prompt; i++) {
            float p = mine[i] * inverse[q];
            largest[i] = p > largest[i] ? p : largest[i];
        }
        if (pairs) pack(mine, seen, packed + q * stride);
    }
    for (int64_t e = 0; e < s->value_dim; e += CHANNELS) {
        vector sum[ROWS * 2];
        weigh(pairs ? packed : logits, stride, values + e, words_of(s, seen), wide, sum, pairs);
        for (int64_t q = 0; q < count; q++) {
            int64_t at = ((sample * s->queries + first + q) * query_heads + query_head) * s->value_dim + e;
            for (int64_t i = 0; i < CHANNELS && e + i < s->value_dim; i++)
                put_number(s->output, at + i, s->type, ((const float *)(sum + q * 2))[i] * inverse[q]);
        }
    }
}

void arkv_reread(const struct reread *s) {
    const int64_t rows = s->batch * s->heads, blocks = (s->queries + ROWS - 1) / ROWS, tasks = rows * s->group * blocks;
    const int64_t each = key_words(s) + value_words(s), own = own_space(s);
    float *const spaces = s->space + rows * each;
    /* Where a thread's largest begin. */
    const int64_t before = 2 * ROWS * padded_keys(s) + ROWS * words_of(s, s->dim);
#pragma omp parallel num_threads((int)s->threads)
    {
#pragma omp for schedule(static)
        for (int64_t part = 0; part < 2 * rows; part++) {
            float *to = s->space + part / 2 * each;
            if (part % 2) lay_out_values(s, part / 2, to + key_words(s));
            else lay_out_keys(s, part / 2, to);
        }
#pragma omp for schedule(static)
        for (int64_t thread = 0; thread < s->threads; thread++) {
            float *space = spaces + thread * own;
            memset(space + before, 0, sizeof(float) * (size_t)(rows * s->prompt));
            /* Later queries see more: each thread gets some of all. */
            for (int64_t task = thread; task < tasks; task += s->threads) {
                int64_t row = task / (s->group * blocks), head = task / blocks % s->group;
                const float *keys = s->space + row * each, *values = keys + key_words(s);
                int64_t first = task % blocks * ROWS;
                if (in_pairs(s)) attend(s, row, head, first, keys, values, space, 1);
                else attend(s, row, head, first, keys, values, space, 0);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * s->prompt; i++)
            for (int64_t thread = 0; thread < s->threads; thread++) {
                float found = spaces[thread * own + before + i];
                s->largest[i] = found > s->largest[i] ? found : s->largest[i];
            }
    }
}
