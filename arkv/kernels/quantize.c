/* Codes, scales and zero points of tokens: the twin of quantization._quantized, to the last bit, called by quantize.py.
 *
 * Tokens are taken by themselves, so that what one takes stays in the first cache. How codes lie in bytes:
 * quantization.QuantizedTensor.
 */

#include "numbers.h"

#define MAX_DIM 256

struct quantize {
    int64_t tokens, dim, bits;
    int64_t zero_point;       /* codes are of [0, 2^bits - 1] with a zero point, else symmetric around zero, of 8 bits */
    const float *numbers;     /* tokens x dim */
    uint8_t *codes;           /* tokens x dim * bits / 8 */
    uint16_t *scale, *zero;   /* bfloat16, with a zero point */
    float *wide_scale;        /* without one */
    int64_t threads;
};

/* bfloat16 rounded up or down, so that a range rounded to it still covers its numbers. */
static inline uint16_t outward(float x, int up) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint16_t toward_zero = (uint16_t)(bits >> 16);
    int exact = (bits & 0xFFFF) == 0, negative = (bits >> 31) != 0;
    return exact || negative == up ? toward_zero : (uint16_t)(toward_zero + 1);
}

static inline __attribute__((always_inline)) void pack(
    const uint8_t *restrict codes, uint8_t *restrict to, int64_t bits, int dim) {
    if (bits == 4) {
        int n = dim / 2;
        for (int j = 0; j < n; j++) to[j] = (uint8_t)(codes[j] | codes[n + j] << 4);
    } else if (bits == 2) {
        int n = dim / 4;
        for (int j = 0; j < n; j++)
            to[j] = (uint8_t)(codes[j] | codes[n + j] << 2 | codes[2 * n + j] << 4 | codes[3 * n + j] << 6);
    } else {
        int n = dim / 8;
        for (int r = 0; r < 3; r++)
            for (int j = 0; j < n; j++) {
                uint8_t seventh = codes[6 * n + j], last = codes[7 * n + j];
                uint8_t top = r == 0 ? seventh & 3 : r == 1 ? last & 3 : (uint8_t)(seventh >> 2 | last >> 2 << 1);
                to[r * n + j] = (uint8_t)(codes[2 * r * n + j] | codes[(2 * r + 1) * n + j] << 3 | top << 6);
            }
    }
}

static inline __attribute__((always_inline)) void token(const struct quantize *c, int64_t index, int dim,
                                                        int64_t bits) {
    const float *from = c->numbers + index * dim;
    uint8_t *to = c->codes + index * dim * bits / 8, codes[MAX_DIM];
    if (!c->zero_point) {
        float largest = 0.0f;
#pragma omp simd reduction(max : largest)
        for (int d = 0; d < dim; d++) largest = fabsf(from[d]) > largest ? fabsf(from[d]) : largest;
        float scale = largest / 127.0f;
        /* The smallest normal number instead of zero. */
        scale = scale < 1.17549435e-38f ? 1.17549435e-38f : scale;
        c->wide_scale[index] = scale;
        for (int d = 0; d < dim; d++) {
            float code = rintf(from[d] / scale);
            code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
            to[d] = (uint8_t)(int8_t)(int32_t)code;
        }
        return;
    }
    float top = (float)((1 << bits) - 1), low = from[0], high = from[0];
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int d = 0; d < dim; d++) {
        low = from[d] < low ? from[d] : low;
        high = from[d] > high ? from[d] : high;
    }
    c->zero[index] = outward(low, 0);
    float zero = number((const uint8_t *)(c->zero + index), 0, BFLOAT16);
    c->scale[index] = outward((high - zero) / top, 1);
    if (c->scale[index] < 0x0080) c->scale[index] = 0x0080; /* the smallest normal number */
    float scale = number((const uint8_t *)(c->scale + index), 0, BFLOAT16);
    for (int d = 0; d < dim; d++) {
        float code = rintf((from[d] - zero) / scale);
        code = code > top ? top : code < 0.0f ? 0.0f : code;
        codes[d] = (uint8_t)(int32_t)code;
    }
    pack(codes, to, bits, dim);
}

/* Dims and bits that are known when this is compiled let loops over a token be unrolled. */
static void any_token(const struct quantize *c, int64_t index) {
    int dim = (int)c->dim;
    int64_t bits = c->bits;
#define WITH(DIM, BITS) \
    if (dim == DIM && bits == BITS) { \
        token(c, index, DIM, BITS); \
        return; \
    }
    WITH(64, 8) WITH(64, 4) WITH(64, 3) WITH(128, 8) WITH(128, 4) WITH(128, 3)
#undef WITH
    token(c, index, dim, bits);
}

void arkv_quantize(const struct quantize *c) {
#pragma omp parallel for schedule(static) num_threads((int)c->threads)
    for (int64_t index = 0; index < c->tokens; index++) any_token(c, index);
}
