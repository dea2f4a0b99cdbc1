/* One token as codes, a scale and a zero point: the twin of Layout.encode_rotated, to the last bit.
 *
 * How codes lie in bytes: arkv/formats/packing.py. */

#include "pools.h"

/* bfloat16 rounded up or down, so that a range rounded to it still covers its numbers. */
static inline uint16_t outward(float x, int up) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint16_t toward_zero = (uint16_t)(bits >> 16);
    int exact = (bits & 0xFFFF) == 0, negative = (bits >> 31) != 0;
    return exact || negative == up ? toward_zero : (uint16_t)(toward_zero + 1);
}

/* The nearest e4m3 number of one that is at most 448, the even one of two. */
static inline uint8_t to_e4m3(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits & 0x80000000u, size = bits ^ sign;
    if (size < 121u << 23) {
        /* Less than the smallest normal one: the addition rounds to a multiple of 2^-9. */
        float wide;
        memcpy(&wide, &size, 4);
        wide += 16384.0f;
        memcpy(&size, &wide, 4);
        size -= 141u << 23;
    } else {
        size = (size - (120u << 23) + 0x7FFFF + (size >> 20 & 1)) >> 20;
    }
    return (uint8_t)(size | sign >> 24);
}

INLINE void pack(const uint8_t *restrict codes, uint8_t *restrict to, int64_t bits, int dim) {
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

INLINE void encode_as(const float *restrict from, int dim, struct code code, uint8_t *restrict to,
                      uint8_t *restrict scales, uint16_t *restrict zeros, int64_t index) {
    if (code.bits == 8) {
        float largest = 0.0f, top = code.floating ? 448.0f : 127.0f;
#pragma omp simd reduction(max : largest)
        for (int d = 0; d < dim; d++) largest = fabsf(from[d]) > largest ? fabsf(from[d]) : largest;
        float scale = largest / top;
        /* The smallest normal number instead of zero. */
        scale = scale < 1.17549435e-38f ? 1.17549435e-38f : scale;
        put_number(scales, index, FLOAT32, scale);
        for (int d = 0; d < dim; d++) {
            float x = code.floating ? from[d] / scale : rintf(from[d] / scale);
            x = x > top ? top : x < -top ? -top : x;
            to[d] = code.floating ? to_e4m3(x) : (uint8_t)(int8_t)(int32_t)x;
        }
        return;
    }
    const float *levels = code.levels;
    int count = 1 << code.bits;
    uint8_t codes[MAX_DIM];
    float top = levels ? levels[count - 1] : (float)(count - 1), low = from[0], high = from[0];
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int d = 0; d < dim; d++) {
        low = from[d] < low ? from[d] : low;
        high = from[d] > high ? from[d] : high;
    }
    zeros[index] = outward(low, 0);
    float zero = number((const uint8_t *)zeros, index, BFLOAT16);
    uint16_t range = outward((high - zero) / top, 1);
    range = range < 0x0080 ? 0x0080 : range; /* the smallest normal number */
    memcpy(scales + 2 * index, &range, 2);
    float scale = number(scales, index, BFLOAT16);
    if (levels) {
        float scaled[MAX_DIM];
        for (int d = 0; d < dim; d++) scaled[d] = (from[d] - zero) / scale;
        memset(codes, 0, sizeof(codes));
        /* A code is how many of the places where the nearest level changes lie below. */
        for (int k = 1; k < count; k++) {
            float middle = (levels[k] + levels[k - 1]) / 2.0f;
            for (int d = 0; d < dim; d++) codes[d] = (uint8_t)(codes[d] + (scaled[d] > middle));
        }
    } else {
        for (int d = 0; d < dim; d++) {
            float x = rintf((from[d] - zero) / scale);
            x = x > top ? top : x < 0.0f ? 0.0f : x;
            codes[d] = (uint8_t)(int32_t)x;
        }
    }
    pack(codes, to, code.bits, dim);
}

/* Dims and bits that are known when this is compiled let loops over a token be unrolled. */
static inline void encode(const float *from, int dim, struct code code, uint8_t *to, uint8_t *scales, uint16_t *zeros,
                          int64_t index) {
#define WITH(DIM, BITS)                                                                      \
    if (dim == DIM && code.bits == BITS && !code.levels && !code.floating) {                 \
        encode_as(from, DIM, (struct code){NULL, BITS, 0}, to, scales, zeros, index);        \
        return;                                                                              \
    }
    WITH(64, 8) WITH(64, 4) WITH(64, 3) WITH(128, 8) WITH(128, 4) WITH(128, 3)
#undef WITH
    encode_as(from, dim, code, to, scales, zeros, index);
}
