/* Codes, scales and zero points of many tokens, called by quantize.py.
 *
 * Tokens are taken by themselves, so that what one takes stays in the first cache. */

#include "encode.h"

/* levels, bits, floating: struct code. codes: tokens x dim * bits / 8. */
void arkv_quantize(const float *numbers, int64_t tokens, int64_t dim, const float *levels, int64_t bits,
                   int64_t floating, uint8_t *codes, uint8_t *scale, uint16_t *zero, int64_t threads) {
    const struct code code = {levels, bits, floating};
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t index = 0; index < tokens; index++)
        encode(numbers + index * dim, (int)dim, code, codes + index * dim * bits / 8, scale, zero, index);
}
