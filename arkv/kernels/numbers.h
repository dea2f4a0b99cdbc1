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

enum { BFLOAT16 = 0, FLOAT32 = 1 };

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
