/* The attention of a prompt's newest queries, summed up for each key: the twin of
 * arkv.scores.attention.summarize, called by score.py.
 *
 * Letters: R rows (batch times KV heads), G query heads per KV head, Q queries, N keys, D head dim.
 *
 * Attention itself is never in memory. Keys are taken in panels of a few dozen; a first pass finds what each query's
 * exponentials sum up to, and a second one computes the logits again, and from them all that is asked for. Products are
 * summed in float32; where the processor multiplies tiles of bfloat16 (AMX), which does so too, it is told to.
 */

#include "numbers.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && LANES == 16 && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TILES 1
#else
#define TILES 0
#endif

#define WIDTH 3               /* vectors of keys in a panel */
#define PANEL (WIDTH * LANES) /* keys */
#define CHUNK 4               /* panels that a thread takes at a time */
#define ROWS (LANES == 16 ? 8 : 4) /* queries that a panel is multiplied with at a time, as registers allow */
#define TILE_ROWS 16          /* the same with tiles; a multiple of ROWS */
#define TILE_CHANNELS 32
#define HIDDEN -1e30f         /* logit of a key that a query may not see: nothing to its exponential */
#define MIN_SECOND_MOMENT 1e-8f

struct summary {
    int64_t rows, heads, group, queries, keys, dim;
    const uint8_t *query;          /* R x G x Q x D of query_type */
    int64_t query_type;
    const uint8_t *key;            /* of key_type: the first token of the first head; channels follow one another */
    int64_t key_type, key_batch, key_head, key_token; /* numbers from one sample, head, token to the next */
    double scaling;
    int64_t stride;                /* tokens from one query to the next; the newest is that of the newest key */
    int64_t past;                  /* keys that the statistics of the layer are of, from the first on */
    int64_t threads, tiles;        /* tiles: whether to multiply by them, if arkv_has_tiles */
    float *mean, *largest;         /* R x N: attention of the group's queries */
    float *spread;                 /* R x N: its variance over the queries, mean over the group; or NULL */
    double *layer;                 /* R x 3: entropy, variance, kurtosis, summed over the group; NULL if spread is */
    float *space;                  /* arkv_summary_space numbers */
};

static int64_t chunks_of(const struct summary *s) { return (s->keys + CHUNK * PANEL - 1) / (CHUNK * PANEL); }

/* Queries of a row, so many that blocks of them are whole. */
static int64_t padded_queries(const struct summary *s) {
    return (s->group * s->queries + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
}

/* Numbers that a thread needs: a panel of keys, logits of all queries with a chunk. */
static int64_t own_space(const struct summary *s) { return (s->dim + padded_queries(s) * CHUNK) * PANEL; }

int64_t arkv_summary_space(const struct summary *s) {
    int64_t tasks = s->rows * chunks_of(s);
    return LANES + s->threads * own_space(s) + s->rows * padded_queries(s) * (s->dim + 1) +
           2 * tasks * s->group * s->queries + (tasks * 3 + 1) * 2;
}

/* A row's queries as float32, scaled, [blocks of ROWS, D, ROWS]; for tiles as they are, [queries, D]. */
static void lay_out_queries(const struct summary *s, int64_t row, float *restrict to) {
    int64_t count = s->group * s->queries, dim = s->dim, first = row * count * dim;
    memset(to, 0, sizeof(float) * (size_t)(padded_queries(s) * dim));
    if (s->tiles) {
        memcpy(to, s->query + 2 * first, 2 * (size_t)(count * dim));
        return;
    }
    for (int64_t q = 0; q < count; q++)
        for (int64_t d = 0; d < dim; d++)
            to[q / ROWS * ROWS * dim + d * ROWS + q % ROWS] =
                number(s->query, first + q * dim + d, s->query_type) * (float)s->scaling;
}

/* A panel of keys as float32, [D, PANEL], zeros beyond the last key; for tiles as pairs of channels, [D / 2, PANEL]. */
static void lay_out_keys(const struct summary *s, int64_t row, int64_t first, float *restrict to) {
    int64_t start = row / s->heads * s->key_batch + row % s->heads * s->key_head + first * s->key_token;
    int64_t count = s->keys - first < PANEL ? s->keys - first : PANEL;
    if (count < PANEL) memset(to, 0, sizeof(float) * (size_t)(s->dim * PANEL));
    if (s->tiles) {
        for (int64_t i = 0; i < count; i++)
            for (int64_t d = 0; d < s->dim / 2; d++)
                memcpy(to + d * PANEL + i, s->key + 2 * (start + i * s->key_token + 2 * d), 4);
        return;
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < s->dim; d++)
            to[d * PANEL + i] = number(s->key, start + i * s->key_token + d, s->key_type);
}

#if TILES

/* What the system asks of a process before it may use tiles: 18 is the state of their data. */
int64_t arkv_has_tiles(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0; }

static void multiply_tiles(const struct summary *s, const float *restrict queries, const float *restrict panel,
                           float *restrict logits, int64_t stride) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } shapes = {.palette = 1};
    int64_t count = padded_queries(s);
    for (int i = 0; i < 7; i++) shapes.bytes[i] = 64, shapes.rows[i] = 16;
    _tile_loadconfig(&shapes);
    for (int64_t q = 0; q < count; q += TILE_ROWS) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        for (int64_t d = 0; d < s->dim; d += TILE_CHANNELS) {
            const float *keys = panel + d / 2 * PANEL;
            _tile_loadd(3, (const uint16_t *)queries + q * s->dim + d, s->dim * 2);
            _tile_loadd(4, keys, PANEL * 4);
            _tile_loadd(5, keys + LANES, PANEL * 4);
            _tile_loadd(6, keys + 2 * LANES, PANEL * 4);
            _tile_dpbf16ps(0, 3, 4);
            _tile_dpbf16ps(1, 3, 5);
            _tile_dpbf16ps(2, 3, 6);
        }
        float *to = logits + q * stride;
        _tile_stored(0, to, stride * 4);
        _tile_stored(1, to + LANES, stride * 4);
        _tile_stored(2, to + 2 * LANES, stride * 4);
    }
    _tile_release();
    for (int64_t q = 0; q < count; q++)
        for (int i = 0; i < PANEL; i++) logits[q * stride + i] *= (float)s->scaling;
}

#else

int64_t arkv_has_tiles(void) { return 0; }
#define multiply_tiles multiply

#endif

/* Logits of a row's queries and one panel, stride numbers from one query to the next. */
static void multiply(const struct summary *s, const float *restrict queries, const float *restrict panel,
                     float *restrict logits, int64_t stride) {
    const int64_t dim = s->dim, count = padded_queries(s);
    for (int64_t block = 0; block < count; block += ROWS, queries += dim * ROWS) {
        const vector *keys = (const vector *)panel;
        vector sum[ROWS * WIDTH];
#pragma GCC unroll 24
        for (int i = 0; i < ROWS * WIDTH; i++) sum[i] = (vector){0};
        for (int64_t d = 0; d < dim; d++, keys += WIDTH) {
            vector these[WIDTH];
#pragma GCC unroll 3
            for (int v = 0; v < WIDTH; v++) these[v] = keys[v];
#pragma GCC unroll 24
            for (int i = 0; i < ROWS * WIDTH; i++) sum[i] += queries[d * ROWS + i / WIDTH] * these[i % WIDTH];
        }
#pragma GCC unroll 24
        for (int i = 0; i < ROWS * WIDTH; i++)
            ((vector *)(logits + (block + i / WIDTH) * stride))[i % WIDTH] = sum[i];
    }
}

/* The same from where the keys are; what queries may not see is hidden. */
static void find_logits(const struct summary *s, int64_t row, int64_t first, const float *queries,
                        float *restrict panel, float *restrict logits, int64_t stride) {
    lay_out_keys(s, row, first, panel);
    (s->tiles ? multiply_tiles : multiply)(s, queries, panel, logits, stride);
    if (s->keys - (s->queries - 1) * s->stride >= first + PANEL) return;
    for (int64_t q = 0; q < s->group * s->queries; q++) {
        int64_t seen = s->keys - (s->queries - 1 - q % s->queries) * s->stride - first;
        for (int64_t i = seen < 0 ? 0 : seen; i < PANEL; i++) logits[q * stride + i] = HIDDEN;
    }
}

/* Largest logit of each query within a chunk, and the sum of the exponentials of the differences to it. */
static void sum_up(const struct summary *s, int64_t row, int64_t begin, int64_t end, const float *queries,
                   float *space, float *restrict peaks, float *restrict totals) {
    float *logits = space + s->dim * PANEL;
    int64_t count = (end - begin + PANEL - 1) / PANEL * PANEL;
    for (int64_t i = 0; i < count; i += PANEL)
        find_logits(s, row, begin + i, queries, space, logits + i, CHUNK * PANEL);
    for (int64_t q = 0; q < s->group * s->queries; q++) {
        const float *mine = logits + q * CHUNK * PANEL;
        float peak = HIDDEN, total = 0.0f;
#pragma omp simd reduction(max : peak)
        for (int64_t i = 0; i < count; i++) peak = mine[i] > peak ? mine[i] : peak;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < count; i++) total += exponential(mine[i] - peak);
        peaks[q] = peak;
        /* All alike where nothing is seen. */
        totals[q] = peak == HIDDEN ? 0.0f : total;
    }
}

/* What a chunk's keys get. offset: the logarithm of what each query's exponentials sum up to, [G x Q]. */
static void share_out(const struct summary *s, int64_t row, int64_t begin, int64_t end, const float *queries,
                      const float *restrict offset, float *space, double *restrict layer) {
    float *logits = space + s->dim * PANEL;
    const float among = 1.0f / (float)s->queries, unbiased = 1.0f / (float)(s->queries > 1 ? s->queries - 1 : 1);
    const float groups = 1.0f / (float)s->group;
    layer[0] = layer[1] = layer[2] = 0.0;
    for (int64_t first = begin; first < end; first += PANEL) {
        find_logits(s, row, first, queries, space, logits, PANEL);
        float mean[PANEL] = {0}, largest[PANEL] = {0}, spread[PANEL] = {0}, entropy[PANEL] = {0}, kurtosis[PANEL] = {0};
        for (int64_t g = 0; g < s->group; g++) {
            float total[PANEL] = {0}, second[PANEL] = {0}, fourth[PANEL] = {0}, *mine = logits + g * s->queries * PANEL;
            for (int64_t q = 0; q < s->queries; q++, mine += PANEL)
                for (int i = 0; i < PANEL; i++) {
                    float logarithm = mine[i] - offset[g * s->queries + q], p = exponential(logarithm);
                    mine[i] = p;
                    total[i] += p;
                    largest[i] = p > largest[i] ? p : largest[i];
                    entropy[i] -= p * logarithm;
                }
            for (int i = 0; i < PANEL; i++) mean[i] += total[i] * among * groups;
            if (!s->spread) continue;
            mine = logits + g * s->queries * PANEL;
            for (int64_t q = 0; q < s->queries; q++, mine += PANEL)
                for (int i = 0; i < PANEL; i++) {
                    float deviation = mine[i] - total[i] * among, square = deviation * deviation;
                    second[i] += square;
                    fourth[i] += square * square;
                }
            for (int i = 0; i < PANEL; i++) {
                float m2 = second[i] * among > MIN_SECOND_MOMENT ? second[i] * among : MIN_SECOND_MOMENT;
                spread[i] += second[i] * unbiased;
                kurtosis[i] += fourth[i] * among / (m2 * m2);
            }
        }
        int64_t count = s->keys - first < PANEL ? s->keys - first : PANEL, at = row * s->keys + first;
        memcpy(s->mean + at, mean, sizeof(float) * (size_t)count);
        memcpy(s->largest + at, largest, sizeof(float) * (size_t)count);
        for (int64_t i = 0; s->spread && i < count; i++) {
            s->spread[at + i] = spread[i] * groups;
            if (first + i >= s->past) continue;
            layer[0] += entropy[i];
            layer[1] += spread[i];
            layer[2] += kurtosis[i];
        }
    }
}

void arkv_summarize(const struct summary *s) {
    int64_t chunks = chunks_of(s), tasks = s->rows * chunks, queries = s->group * s->queries, padded = padded_queries(s);
    /* Vectors lie at multiples of their size. */
    float *own = s->space + (LANES - (uintptr_t)s->space / sizeof(float) % LANES) % LANES;
    float *laid_out = own + s->threads * own_space(s), *offsets = laid_out + s->rows * padded * s->dim;
    float *peaks = offsets + s->rows * padded, *totals = peaks + tasks * queries;
    double *layers = (double *)(((uintptr_t)(totals + tasks * queries) + 7) / 8 * 8);
#pragma omp parallel num_threads((int)s->threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < s->rows; row++) lay_out_queries(s, row, laid_out + row * padded * s->dim);
#pragma omp for schedule(static)
        for (int64_t thread = 0; thread < s->threads; thread++)
            for (int64_t task = thread; task < tasks; task += s->threads) {
                int64_t row = task / chunks, begin = task % chunks * CHUNK * PANEL, end = begin + CHUNK * PANEL;
                sum_up(s, row, begin, end < s->keys ? end : s->keys, laid_out + row * padded * s->dim,
                       own + thread * own_space(s), peaks + task * queries, totals + task * queries);
            }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < s->rows * queries; item++) {
            int64_t row = item / queries, q = item % queries;
            float peak = HIDDEN;
            double total = 0.0;
            for (int64_t c = row * chunks; c < (row + 1) * chunks; c++)
                peak = peaks[c * queries + q] > peak ? peaks[c * queries + q] : peak;
            for (int64_t c = row * chunks; c < (row + 1) * chunks; c++)
                total += totals[c * queries + q] * exp((double)peaks[c * queries + q] - peak);
            offsets[row * padded + q] = peak + (float)log(total);
        }
#pragma omp for schedule(static)
        for (int64_t thread = 0; thread < s->threads; thread++)
            for (int64_t task = thread; task < tasks; task += s->threads) {
                int64_t row = task / chunks, begin = task % chunks * CHUNK * PANEL, end = begin + CHUNK * PANEL;
                share_out(s, row, begin, end < s->keys ? end : s->keys, laid_out + row * padded * s->dim,
                          offsets + row * padded, own + thread * own_space(s), layers + task * 3);
            }
    }
    for (int64_t row = 0; s->layer && row < s->rows; row++)
        for (int k = 0; k < 3; k++) {
            s->layer[row * 3 + k] = 0.0;
            for (int64_t c = row * chunks; c < (row + 1) * chunks; c++) s->layer[row * 3 + k] += layers[c * 3 + k];
        }
}
