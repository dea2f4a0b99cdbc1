/* The flat store as the C functions read it: what a table of pools.py says, and the row table of arkv/store.py. */

#include "numbers.h"

#define MAX_DIM 256
#define MAX_LEVELS 16

_Static_assert(sizeof(void *) == 8, "tables hold addresses as int64");

/* The fields are those of pools.py, in its order. */
struct code {
    const float *levels; /* what codes stand for, MAX_LEVELS; NULL: themselves, those of 8 bits with a sign */
    int64_t bits;        /* of a code; BFLOAT16 or FLOAT32: no codes but numbers */
    int64_t floating;    /* codes of 8 bits are e4m3 */
};

/* Codes of so many bits that stand for themselves; numbers as they are, likewise. */
static inline int is_plain(struct code c, int64_t bits, int64_t floating) {
    return c.bits == bits && c.floating == floating && !c.levels;
}

struct plane {
    uint8_t *codes;         /* of slot 0 */
    uint8_t *scale;         /* by slot; bfloat16 with a zero point, else float32; NULL: numbers are stored as they are */
    uint16_t *zero;         /* by slot, bfloat16, or NULL */
    const uint16_t *center; /* R x dim, bfloat16, what the numbers are stored less, or NULL */
    const float *rotation;  /* dim x dim, that they are turned by, or NULL */
    struct code code;
    int64_t dim;
};

struct pool {
    float *score;           /* by slot, like the next */
    uint8_t *position;
    int64_t position_bytes; /* 2 or 4 */
    struct plane key, value;
};

/* Columns of the row table, as in arkv/store.py. */
enum { SEEN = 0, FIRST = 1 };
static inline int64_t start_of(const int64_t *row, int64_t pool) { return row[2 + 3 * pool]; }
static inline int64_t count_of(const int64_t *row, int64_t pool) { return row[3 + 3 * pool]; }
static inline int64_t capacity_of(const int64_t *row, int64_t pool) { return row[4 + 3 * pool]; }

/* The place in its row that a token has while it is a sink or in the window. */
static inline int64_t place_of(int64_t relative, int64_t n_sink, int64_t window) {
    return relative < n_sink + window ? relative : n_sink + (relative - n_sink) % window;
}

static inline int64_t token_bytes(const struct plane *p) { return p->dim * p->code.bits / 8; }

static inline int64_t position_of(const struct pool *p, int64_t slot) {
    if (p->position_bytes == 2) return ((const int16_t *)p->position)[slot];
    return ((const int32_t *)p->position)[slot];
}

static inline void put_position(const struct pool *p, int64_t slot, int64_t position) {
    if (p->position_bytes == 2)
        ((int16_t *)p->position)[slot] = (int16_t)position;
    else
        ((int32_t *)p->position)[slot] = (int32_t)position;
}
