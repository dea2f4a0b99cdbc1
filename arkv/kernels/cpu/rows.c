/* What a decoding step does to all rows of all layers: make_room and remember of arkv/kernels/twin.py, called by
 * steps.py. Every row is by itself, and threads share them. */

#include "encode.h"

#include <stdlib.h>

/* The slot with the lowest score among `found` and first to end; of equal ones that of the newest token. */
static int64_t lowest(const struct pool *p, int64_t first, int64_t end, int64_t found) {
    const float *score = p->score;
    float low = score[found];
    int64_t newest = position_of(p, found);
#pragma omp simd reduction(min : low)
    for (int64_t slot = first; slot < end; slot++) low = score[slot] < low ? score[slot] : low;
    if (low < score[found]) newest = INT64_MIN;
    for (int64_t slot = first; slot < end; slot++)
        if (score[slot] == low && position_of(p, slot) > newest) {
            newest = position_of(p, slot);
            found = slot;
        }
    return found;
}

/* Quantize the numbers of slot `from`, without a scale, into slot `to` of a row. */
static void store(const struct plane *source, int64_t from, const struct plane *target, int64_t to, int64_t row) {
    int64_t dim = target->dim;
    float plain[MAX_DIM], turned[MAX_DIM];
    for (int64_t d = 0; d < dim; d++) plain[d] = number(source->codes, from * dim + d, source->code.bits);
    if (target->center)
        for (int64_t d = 0; d < dim; d++)
            plain[d] -= number((const uint8_t *)target->center, row * dim + d, BFLOAT16);
    if (target->rotation) {
        memset(turned, 0, sizeof(float) * (size_t)dim);
        for (int64_t i = 0; i < dim; i++)
            for (int64_t d = 0; d < dim; d++) turned[d] += plain[i] * target->rotation[i * dim + d];
    }
    encode(target->rotation ? turned : plain, (int)dim, target->code, target->codes + to * token_bytes(target),
           target->scale, target->zero, to);
}

/* The token in Original slot `from` goes to the Quantized pool 1, if there is a place for it. */
static void demote(const struct pool *pools, int64_t *mine, int64_t row, int64_t from) {
    const struct pool *original = pools, *stored = pools + 1;
    int64_t start = start_of(mine, 1), *count = mine + 3 + 3, slot = start + *count;
    if (capacity_of(mine, 1) == 0) return;
    if (*count < capacity_of(mine, 1)) {
        *count += 1;
    } else {
        slot = lowest(stored, start, start + *count, start);
        float high = original->score[from], low = stored->score[slot];
        int older = position_of(original, from) < position_of(stored, slot);
        if (!(high > low || (high == low && older))) return;
    }
    store(&original->key, from, &stored->key, slot, row);
    store(&original->value, from, &stored->value, slot, row);
    stored->score[slot] = original->score[from];
    put_position(stored, slot, position_of(original, from));
}

static void move(const struct pool *p, int64_t from, int64_t to) {
    const struct plane *planes[] = {&p->key, &p->value};
    for (int i = 0; i < 2; i++) {
        int64_t bytes = token_bytes(planes[i]);
        memcpy(planes[i]->codes + to * bytes, planes[i]->codes + from * bytes, (size_t)bytes);
    }
    p->score[to] = p->score[from];
    put_position(p, to, position_of(p, from));
}

void arkv_make_room(const struct pool *pools, int64_t pool_count, int64_t *table, int64_t columns, int64_t rows,
                    int64_t n_sink, int64_t window, int64_t recency, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t row = 0; row < rows; row++) {
        int64_t *mine = table + row * columns, relative = mine[SEEN] - mine[FIRST];
        int64_t start = start_of(mine, 0), *count = mine + 3, end = start + *count;
        int64_t outgoing = start + place_of(relative, n_sink, window);
        if (relative < n_sink + window) {
            *count += 1;
        } else if (*count < capacity_of(mine, 0)) {
            move(pools, outgoing, end);
            *count += 1;
        } else {
            int64_t freed = lowest(pools, start + n_sink + window, end, outgoing);
            if (pool_count > 1) demote(pools, mine, row, freed);
            if (freed != outgoing) move(pools, outgoing, freed);
        }
        put_position(pools, outgoing, mine[SEEN]);
        pools[0].score[outgoing] = recency ? (float)mine[SEEN] : 0.0f;
        mine[SEEN] += 1;
    }
}

/* A running average; rate: the newest one's weight. */
void arkv_average(float *restrict score, const float *restrict importance, int64_t slots, double rate,
                  int64_t threads) {
    const float kept = (float)(1.0 - rate), added = (float)rate;
#pragma omp parallel for simd schedule(static) num_threads((int)threads)
    for (int64_t slot = 0; slot < slots; slot++) score[slot] = score[slot] * kept + importance[slot] * added;
}

/* The largest so far; rate: the share of it that is lost with every step. */
void arkv_largest(float *restrict score, const float *restrict importance, int64_t slots, double rate,
                  int64_t threads) {
    const float kept = (float)(1.0 - rate);
#pragma omp parallel for simd schedule(static) num_threads((int)threads)
    for (int64_t slot = 0; slot < slots; slot++) {
        float before = score[slot] * kept;
        score[slot] = importance[slot] > before ? importance[slot] : before;
    }
}

/* The tokens of a row in sequence order: a bit for every position, and how many bits are set before each word. */
struct order {
    uint64_t *bits;
    int32_t *before;
};

static inline int32_t rank_of(struct order o, int64_t position) {
    uint64_t below = o.bits[position >> 6] & ((UINT64_C(1) << (position & 63)) - 1);
    return o.before[position >> 6] + __builtin_popcountll(below);
}

/* Room for one row. */
struct space {
    struct order order;
    float *alone;  /* tokens in sequence order, width - 1 and a vector more; averaged in place */
    int32_t *rank; /* pool by pool */
};

/* The scores of one row, averaged over neighbours among the tokens up to `last`. */
static void smooth(const struct pool *pools, int64_t pool_count, const int64_t *mine, float *const *importance,
                   int64_t last, int64_t width, struct space s) {
    int64_t words = (last >> 6) + 1, tokens = 0, half = width / 2;
    memset(s.order.bits, 0, sizeof(uint64_t) * (size_t)words);
    for (int64_t pool = 0; pool < pool_count; pool++) {
        const struct pool p = pools[pool];
        int64_t start = start_of(mine, pool), end = start + count_of(mine, pool);
        for (int64_t slot = start; slot < end; slot++) {
            int64_t position = position_of(&p, slot);
            if (position <= last) s.order.bits[position >> 6] |= UINT64_C(1) << (position & 63);
        }
    }
    for (int64_t word = 0; word < words; word++) {
        s.order.before[word] = (int32_t)tokens;
        tokens += __builtin_popcountll(s.order.bits[word]);
    }
    /* Zeros beyond the ends. */
    memset(s.alone, 0, sizeof(float) * (size_t)half);
    memset(s.alone + half + tokens, 0, sizeof(float) * (size_t)(half + LANES));
    int32_t *rank = s.rank;
    for (int64_t pool = 0; pool < pool_count; pool++) {
        const struct pool p = pools[pool];
        const float *new = importance[pool];
        int64_t start = start_of(mine, pool), end = start + count_of(mine, pool);
        for (int64_t slot = start; slot < end; slot++, rank++) {
            int64_t position = position_of(&p, slot);
            *rank = position <= last ? rank_of(s.order, position) : -1;
            if (*rank >= 0) s.alone[half + *rank] = new[slot];
        }
    }
    for (int64_t i = 0; i < tokens; i += LANES) {
        vector sum = {0}, near;
        for (int64_t k = 0; k < width; k++) {
            memcpy(&near, s.alone + i + k, sizeof(near));
            sum += near;
        }
        sum /= (float)width;
        memcpy(s.alone + i, &sum, sizeof(sum));
    }
    rank = s.rank;
    for (int64_t pool = 0; pool < pool_count; pool++) {
        float *score = pools[pool].score;
        const float *new = importance[pool];
        int64_t start = start_of(mine, pool), end = start + count_of(mine, pool);
        for (int64_t slot = start; slot < end; slot++, rank++) score[slot] = *rank >= 0 ? s.alone[*rank] : new[slot];
    }
}

/* Attention averaged over neighbours among the tokens that can leave next; importance: by pool, by slot. Returns
 * whether there was memory. */
int64_t arkv_smooth(const struct pool *pools, int64_t pool_count, const int64_t *table, int64_t columns, int64_t rows,
                    float *const *importance, int64_t window, int64_t width, int64_t threads) {
    int64_t seen = 0, most = 0, fine = 1;
    for (int64_t row = 0; row < rows; row++) {
        int64_t held = 0;
        for (int64_t pool = 0; pool < pool_count; pool++) held += count_of(table + row * columns, pool);
        most = held > most ? held : most;
        seen = table[row * columns + SEEN] > seen ? table[row * columns + SEEN] : seen;
    }
    size_t words = (size_t)(seen / 64 + 1), tokens = (size_t)most;
    size_t bytes = words * (sizeof(uint64_t) + sizeof(int32_t)) + (2 * tokens + (size_t)width + LANES) * sizeof(float);
#pragma omp parallel num_threads((int)threads)
    {
        uint64_t *space = malloc(bytes);
        if (!space) {
#pragma omp atomic write
            fine = 0;
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            if (!space) continue;
            const int64_t *mine = table + row * columns, last = mine[SEEN] < window ? -1 : mine[SEEN] - window;
            struct space s;
            s.order = (struct order){space, (int32_t *)(space + words)};
            s.rank = s.order.before + words;
            s.alone = (float *)(s.rank + tokens);
            smooth(pools, pool_count, mine, importance, last, width, s);
        }
        free(space);
    }
    return fine;
}
