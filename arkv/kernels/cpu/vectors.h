/* Vectors of float32, as far as the operations of the language do not serve. */

#include "pools.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if LANES == 16
typedef float eight __attribute__((vector_size(32)));
#elif LANES == 8
typedef vector eight;
#endif
#define DIGITS 3
#define PLACES 4 /* bytes that a number takes in digits (integers.h) */

/* What a query head asks of a pool, beside its numbers. */
struct asked {
    float bias;    /* its product with the center */
    float sum;     /* of its numbers */
    float unit;    /* what a unit of the lowest of its digits is (integers.h) */
    int32_t total; /* the sum of its numbers, in units */
};

/* The query heads of a row as a pool needs them. */
struct queries {
    const float *numbers; /* G x key dim, scaled and in the coordinates of the codes */
    const int8_t *digits; /* G x PLACES x key dim */
    const struct asked *each; /* G */
};

typedef float four __attribute__((vector_size(16)));

INLINE vector load(const float *from) {
    vector found;
    memcpy(&found, from, sizeof(found));
    return found;
}

INLINE vector larger(vector x, vector y) {
    for (int i = 0; i < LANES; i++) x[i] = x[i] > y[i] ? x[i] : y[i];
    return x;
}

/* Without its sign. */
INLINE vector size_of(vector x) {
    for (int i = 0; i < LANES; i++) x[i] = fabsf(x[i]);
    return x;
}

INLINE four fold(vector x) {
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

INLINE float sum_of(vector x) {
    four some = fold(x);
    return (some[0] + some[1]) + (some[2] + some[3]);
}

/* Compilers make code for one lane after the other of the loop. */
INLINE float largest_of(vector x) {
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)x);
#else
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
#endif
}

/* The product of two rows of numbers. */
INLINE float product_of(const float *x, const float *y, int64_t count) {
    vector both = {0};
    float sum = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) both += load(x + i) * load(y + i);
    for (; i < count; i++) sum += x[i] * y[i];
    return sum_of(both) + sum;
}
