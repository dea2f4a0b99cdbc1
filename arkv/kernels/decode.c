/* Decode attention on a CPU: the twin of TriStateLayer._attend_folded, built and called by native.py.
 *
 * Letters: R rows (batch times KV heads), G query heads per KV head, D head dim, S slots of both pools.
 *
 * The slots of each row are cut into pieces of PIECE, which threads share. A piece is read BLOCK tokens at a time: their
 * codes are expanded into a buffer in the first cache, so that nothing dequantized goes to memory. It leaves
 * exponentials of its logits, their maximum and sum, and its share of the output (flash-decoding); a second pass brings
 * the pieces of a row to the same maximum, which makes probabilities of the exponentials. How codes lie in bytes:
 * quantization.QuantizedTensor.
 */

#include "numbers.h"

#define PIECE 128
#define BLOCK 4
#define MAX_DIM 256
#define MAX_GROUP 64

#if LANES == 16
typedef float eight __attribute__((vector_size(32)));
#elif LANES == 8
typedef vector eight;
#endif
typedef float four __attribute__((vector_size(16)));

enum { E4M3 = 1 }; /* in the place of a number of bits */

struct pool {
    int64_t slots;
    const uint8_t *key, *value;        /* numbers or codes of the first slot of the first row */
    int64_t key_stride, value_stride;  /* bytes from one row to the next */
    int64_t key_bits, value_bits;      /* of a code; E4M3; 0: numbers of number_type */
    int64_t number_type, range_type;
    const uint8_t *key_scale, *key_zero, *value_scale, *value_zero; /* R x slots of range_type; zero points may be NULL */
    const uint8_t *position;           /* NULL if every slot holds a token */
    int64_t position_bytes, position_stride; /* of a position; from one row to the next, in bytes */
    const float *query;                /* R x G x D, scaled and in the coordinates of the codes */
    const float *bias;                 /* R x G, added to the logits, or NULL */
};

struct call {
    int64_t rows, group, key_dim, value_dim;
    const uint8_t *query;              /* R x G x D of query_type */
    int64_t query_type;
    double scaling;
    const float *key_rotation, *value_rotation; /* D x D, of the codes, or NULL */
    const uint8_t *center;             /* R x D, bfloat16, what codes of keys stand for less than the keys, or NULL */
    const float *e4m3;                 /* numbers by code */
    float *probabilities;              /* R x G x S, Original slots first */
    float *output;                     /* R x G x value dim */
    float *space;                      /* arkv_space floats */
    int64_t threads;
    struct pool original, quantized;   /* without query and bias */
};

static inline int is_empty(const struct pool *p, int64_t row, int64_t slot) {
    if (!p->position) return 0;
    const uint8_t *at = p->position + row * p->position_stride + slot * p->position_bytes;
    return (at[p->position_bytes - 1] & 0x80) != 0; /* the sign of a little-endian number */
}

#define EACH(byte) (0x0101010101010101u * (uint64_t)(byte))

/* Codes of 3 bits to a byte each, eight bytes at a time: loops over so few bytes would not be vectorized. */
static inline __attribute__((always_inline)) void unpack3(const uint8_t *restrict from, uint8_t *restrict to, int dim) {
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

/* One token as float32. */
static inline __attribute__((always_inline)) void expand(
    const uint8_t *restrict from, float *restrict to, int64_t bits, int64_t type, const float *restrict e4m3, int dim) {
    if (bits == 0 && type == FLOAT32) {
        memcpy(to, from, 4 * (size_t)dim);
    } else if (bits == 0) {
        uint32_t wide[MAX_DIM];
        uint16_t half[MAX_DIM];
        memcpy(half, from, 2 * (size_t)dim);
        for (int d = 0; d < dim; d++) wide[d] = (uint32_t)half[d] << 16;
        memcpy(to, wide, 4 * (size_t)dim);
    } else if (bits == E4M3) {
        for (int d = 0; d < dim; d++) to[d] = e4m3[from[d]];
    } else if (bits == 8) {
        const int8_t *codes = (const int8_t *)from;
        for (int d = 0; d < dim; d++) to[d] = codes[d];
    } else if (bits == 4) {
        int n = dim / 2;
        for (int j = 0; j < n; j++) to[j] = from[j] & 15;
        for (int j = 0; j < n; j++) to[n + j] = from[j] >> 4;
    } else if (bits == 2) {
        int n = dim / 4;
        for (int r = 0; r < 4; r++)
            for (int j = 0; j < n; j++) to[r * n + j] = (from[j] >> (2 * r)) & 3;
    } else {
        uint8_t codes[MAX_DIM];
        unpack3(from, codes, dim);
        for (int d = 0; d < dim; d++) to[d] = codes[d];
    }
}

/* Codes of a token times its scale, plus its zero point: as it is read, since sums of codes alone would lose digits. */
static inline __attribute__((always_inline)) void rescale(
    float *restrict codes, const uint8_t *scales, const uint8_t *zeros, int64_t index, int64_t type, int dim) {
    float scale = number(scales, index, type), zero = zeros ? number(zeros, index, type) : 0.0f;
    for (int d = 0; d < dim; d++) codes[d] = codes[d] * scale + zero;
}

static inline int64_t token_bytes(int64_t bits, int64_t type, int dim) {
    if (bits == 0) return (int64_t)dim * (type == FLOAT32 ? 4 : 2);
    return bits == E4M3 ? dim : (int64_t)dim * bits / 8;
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

/* BLOCK tokens from slot on as float32, [BLOCK, padded dim]; zeros where there is none. */
static inline __attribute__((always_inline)) void read_block(
    const uint8_t *from, const struct pool *p, const uint8_t *scales, const uint8_t *zeros, int64_t bits, int64_t type,
    const float *e4m3, int64_t row, int64_t slot, int64_t end, int dim, float *restrict buffer) {
    int padded = (dim + LANES - 1) / LANES * LANES;
    int64_t bytes = token_bytes(bits, type, dim);
    for (int64_t i = 0; i < BLOCK; i++) {
        float *to = buffer + i * padded;
        if (slot + i >= end || is_empty(p, row, slot + i)) {
            for (int d = 0; d < dim; d++) to[d] = 0.0f;
            continue;
        }
        expand(from + (slot + i) * bytes, to, bits, type, e4m3, dim);
        if (bits) rescale(to, scales, zeros, row * p->slots + slot + i, p->range_type, dim);
    }
}

/* Slots begin to end of one pool in one row.
 *
 * logits: of slot begin for the first query head, stride numbers from one query head to the next; they become
 * exponentials of their difference to peak [G], which sum up to total [G]. output: [G, value dim], before divisions. */
static inline __attribute__((always_inline)) void piece(
    const struct pool *p, const float *e4m3, int64_t row, int64_t begin, int64_t end, int group, int key_dim,
    int value_dim, int64_t key_bits, int64_t value_bits, int64_t type, float *restrict logits, int64_t stride,
    float *restrict peak, float *restrict total, float *restrict output) {
    const int keys = (key_dim + LANES - 1) / LANES, values = (value_dim + LANES - 1) / LANES;
    vector buffer[BLOCK * MAX_DIM / LANES], mine[MAX_GROUP * MAX_DIM / LANES];
    memset(buffer, 0, sizeof(vector) * (size_t)(BLOCK * (keys > values ? keys : values)));
    memset(mine, 0, sizeof(vector) * (size_t)(group * keys));
    for (int g = 0; g < group; g++) {
        memcpy(mine + g * keys, p->query + (row * group + g) * key_dim, sizeof(float) * (size_t)key_dim);
        peak[g] = -INFINITY;
    }
    const uint8_t *key = p->key + row * p->key_stride;
    for (int64_t slot = begin; slot < end; slot += BLOCK) {
        read_block(key, p, p->key_scale, p->key_zero, key_bits, type, e4m3, row, slot, end, key_dim, (float *)buffer);
        for (int g = 0; g < group; g++) {
            vector dots[BLOCK];
            for (int i = 0; i < BLOCK; i++) {
                dots[i] = mine[g * keys] * buffer[i * keys];
                for (int v = 1; v < keys; v++) dots[i] += mine[g * keys + v] * buffer[i * keys + v];
            }
            four found = sums(dots) + (p->bias ? p->bias[row * group + g] : 0.0f);
            for (int i = 0; i < BLOCK && slot + i < end; i++) {
                float logit = is_empty(p, row, slot + i) ? -INFINITY : found[i];
                logits[g * stride + slot + i - begin] = logit;
                peak[g] = logit > peak[g] ? logit : peak[g];
            }
        }
    }
    for (int g = 0; g < group; g++) {
        float *row_logits = logits + g * stride, sum = 0.0f;
        /* Until a slot holds a token the maximum is -inf, of which there is no difference. */
        float top = peak[g] == -INFINITY ? 0.0f : peak[g];
        for (int64_t i = 0; i < end - begin; i++) row_logits[i] = exponential(row_logits[i] - top);
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < end - begin; i++) sum += row_logits[i];
        total[g] = sum;
    }
    memset(mine, 0, sizeof(vector) * (size_t)(group * values));
    if (key_dim != value_dim) memset(buffer, 0, sizeof(vector) * (size_t)(BLOCK * values));
    const uint8_t *value = p->value + row * p->value_stride;
    for (int64_t slot = begin; slot < end; slot += BLOCK) {
        read_block(
            value, p, p->value_scale, p->value_zero, value_bits, type, e4m3, row, slot, end, value_dim, (float *)buffer);
        for (int g = 0; g < group; g++) {
            float weights[BLOCK] = {0};
            for (int i = 0; i < BLOCK && slot + i < end; i++) weights[i] = logits[g * stride + slot + i - begin];
            for (int v = 0; v < values; v++)
                for (int i = 0; i < BLOCK; i++) mine[g * values + v] += weights[i] * buffer[i * values + v];
        }
    }
    for (int g = 0; g < group; g++)
        memcpy(output + g * value_dim, mine + g * values, sizeof(float) * (size_t)value_dim);
}

/* Dims and bits that are known when this is compiled let loops over a token be unrolled. */
static void any_piece(const struct pool *p, const float *e4m3, int64_t row, int64_t begin, int64_t end, int group,
                      int key_dim, int value_dim, float *logits, int64_t stride, float *peak, float *total,
                      float *output) {
#define WITH(DIM, KEY_BITS, VALUE_BITS, TYPE)                                                                         \
    if (key_dim == DIM && value_dim == DIM && p->key_bits == KEY_BITS && p->value_bits == VALUE_BITS &&               \
        p->number_type == TYPE) {                                                                                     \
        piece(p, e4m3, row, begin, end, group, DIM, DIM, KEY_BITS, VALUE_BITS, TYPE, logits, stride, peak, total,     \
              output);                                                                                                \
        return;                                                                                                       \
    }
#define WITH_DIM(DIM)                                                                                                 \
    WITH(DIM, 0, 0, BFLOAT16) WITH(DIM, 0, 0, FLOAT32) WITH(DIM, 8, 8, 0) WITH(DIM, 4, 4, 0) WITH(DIM, 4, 3, 0)
    WITH_DIM(64)
    WITH_DIM(128)
#undef WITH_DIM
#undef WITH
    piece(p, e4m3, row, begin, end, group, key_dim, value_dim, p->key_bits, p->value_bits, p->number_type, logits,
          stride, peak, total, output);
}

static int64_t pieces_of(const struct pool *p) { return (p->slots + PIECE - 1) / PIECE; }

/* Numbers that a call needs for itself. */
int64_t arkv_space(const struct call *c) {
    int64_t pieces = pieces_of(&c->original) + pieces_of(&c->quantized);
    return c->rows * c->group * (2 * c->key_dim + 1 + pieces * (2 + c->value_dim));
}

/* The query of one head: scaled, in the coordinates of the codes, and its product with the center. */
static void turn(const struct call *c, int64_t item, float *restrict scaled, float *restrict turned, float *bias) {
    int64_t dim = c->key_dim, row = item / c->group;
    for (int64_t d = 0; d < dim; d++)
        scaled[d] = number(c->query, item * dim + d, c->query_type) * (float)c->scaling;
    if (!c->key_rotation) {
        memcpy(turned, scaled, sizeof(float) * (size_t)dim);
    } else {
        memset(turned, 0, sizeof(float) * (size_t)dim);
        for (int64_t i = 0; i < dim; i++)
            for (int64_t d = 0; d < dim; d++) turned[d] += scaled[i] * c->key_rotation[i * dim + d];
    }
    float sum = 0.0f;
    if (c->center)
        for (int64_t d = 0; d < dim; d++) sum += scaled[d] * number(c->center, row * dim + d, BFLOAT16);
    *bias = sum;
}

/* Brings the pieces of one query head to the same maximum. */
static void combine(const struct call *c, int64_t item, const float *peaks, const float *totals, const float *partial) {
    int64_t firsts = pieces_of(&c->original), pieces = firsts + pieces_of(&c->quantized);
    int64_t row = item / c->group, g = item % c->group, dim = c->value_dim;
    int64_t slots = c->original.slots + c->quantized.slots;
    float highest = -INFINITY, whole = 0.0f, low[MAX_DIM] = {0}, *output = c->output + item * dim;
    for (int64_t i = 0; i < pieces; i++) {
        float peak = peaks[(row * pieces + i) * c->group + g];
        highest = peak > highest ? peak : highest;
    }
    for (int64_t i = 0; i < pieces; i++) {
        int64_t at = (row * pieces + i) * c->group + g;
        whole += totals[at] * exponential(peaks[at] - highest);
    }
    memset(output, 0, sizeof(float) * (size_t)dim);
    for (int64_t i = 0; i < pieces; i++) {
        int64_t at = (row * pieces + i) * c->group + g;
        float share = exponential(peaks[at] - highest) / whole;
        float *to = i < firsts ? output : low;
        for (int64_t d = 0; d < dim; d++) to[d] += share * partial[at * dim + d];
        const struct pool *p = i < firsts ? &c->original : &c->quantized;
        int64_t begin = (i < firsts ? i : i - firsts) * PIECE;
        int64_t end = begin + PIECE < p->slots ? begin + PIECE : p->slots;
        float *mine = c->probabilities + item * slots + (i < firsts ? 0 : c->original.slots);
        for (int64_t s = begin; s < end; s++) mine[s] *= share;
    }
    for (int64_t d = 0; d < dim; d++) {
        float sum = 0.0f;
        if (c->value_rotation) {
            const float *rotation = c->value_rotation + d * dim;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < dim; j++) sum += low[j] * rotation[j];
        } else {
            sum = low[d];
        }
        output[d] += sum;
    }
}

void arkv_decode(const struct call *c) {
    int64_t firsts = pieces_of(&c->original), pieces = firsts + pieces_of(&c->quantized);
    int64_t slots = c->original.slots + c->quantized.slots, items = c->rows * c->group;
    float *scaled = c->space, *turned = scaled + items * c->key_dim, *bias = turned + items * c->key_dim;
    float *peaks = bias + items, *totals = peaks + items * pieces, *partial = totals + items * pieces;
    struct pool original = c->original, quantized = c->quantized;
    original.query = scaled;
    quantized.query = turned;
    quantized.bias = c->center ? bias : NULL;
#pragma omp parallel num_threads((int)c->threads)
    {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items; item++)
            turn(c, item, scaled + item * c->key_dim, turned + item * c->key_dim, bias + item);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < c->rows * pieces; task++) {
            int64_t row = task / pieces, index = task % pieces;
            const struct pool *p = index < firsts ? &original : &quantized;
            int64_t begin = (index < firsts ? index : index - firsts) * PIECE;
            int64_t end = begin + PIECE < p->slots ? begin + PIECE : p->slots;
            int64_t before = index < firsts ? 0 : original.slots;
            any_piece(p, c->e4m3, row, begin, end, (int)c->group, (int)c->key_dim, (int)c->value_dim,
                      c->probabilities + row * c->group * slots + before + begin, slots, peaks + task * c->group,
                      totals + task * c->group, partial + task * c->group * c->value_dim);
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items; item++) combine(c, item, peaks, totals, partial);
    }
}
