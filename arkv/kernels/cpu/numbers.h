/* What the C functions share: number types, their conversion, exponentials. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* A vector is what a register holds: compilers make poor code of longer ones. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vector __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))

enum { BFLOAT16 = 16, FLOAT32 = 32 }; /* types by their bits */

static inline float number(const uint8_t *at, int64_t index, int64_t type) {
    if (type == FLOAT32) {
        float found;
        memcpy(&found, at + 4 * index, 4);
        return found;
    }
    uint16_t half;
    memcpy(&half, at + 2 * index, 2);
    uint32_t bits = (uint32_t)half << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

/* The nearest number of that type, the even one of two. */
static inline void put_number(uint8_t *at, int64_t index, int64_t type, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (type == FLOAT32) {
        memcpy(at + 4 * index, &bits, 4);
        return;
    }
    uint16_t half = x != x ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    memcpy(at + 2 * index, &half, 2);
}

/* To 2 units in the last place; 0 below the smallest normal number. Unlike expf, a loop over it is vectorized. */
static inline float exponential(float x) {
    float limited = x < -87.0f ? -87.0f : x;
    float n = (limited * 1.44269504f + 12582912.0f) - 12582912.0f; /* the nearest whole number */
    float r = (limited - n * 0.693359375f) + n * 2.12194440e-4f;   /* Cephes: ln 2 in two parts */
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : y * power;
}

/* tanh, vectorized likewise. */
static inline float hyperbolic_tangent(float x) {
    float size = fabsf(x) < 10.0f ? fabsf(x) : 10.0f, square = size * size; /* from 10 on it is 1 */
    float y = -5.70498872745e-3f;                                         /* Cephes */
    y = y * square + 2.06390887954e-2f;
    y = y * square - 5.37397155531e-2f;
    y = y * square + 1.33314422036e-1f;
    y = y * square - 3.33332819422e-1f;
    float small = size + size * square * y, large = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
    return copysignf(size < 0.625f ? small : large, x);
}
