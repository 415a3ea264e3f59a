/* Attention of packed queries whose keys and values lie in pages. In float32 inside.
 *
 * A unit of work is a block of consecutive queries of one sequence (one query, where it decodes) and one key/value head,
 * with the query heads that share it: rows. Keys are read once for all rows of a unit. The softmax is taken online
 * (Milakov and Gimelshein 2018), and starts as if only the sink had been seen. */
#pragma once
#include "activation.h"
#include "common.h"

typedef struct {
    const void *q;                 /* [T, H, D] */
    const void *keys, *values;     /* [pages, N, page_size, D] */
    const float *sinks;            /* [H] */
    const int32_t *block_table;    /* [R, width]: the pages of each sequence */
    const int32_t *context_starts; /* [R]: its first token whose key is in the pages */
    const int32_t *blocks;         /* [B, 4]: sequence, first query, how many, the token that the first query is */
    void *out;                     /* [T, H, D] */
    float *lse;                    /* [T, H]: the log-sum-exp, sink included; or NULL */
    long heads, kv_heads, head_dim, width, page_size, window; /* window 0: all keys */
    long max_rows;                 /* of a unit */
    float scale;
    int half;
} PagedArguments;

enum { KEYS = 64 }; /* looked at at a time */

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#if !defined(SHUFFLE)
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));
typedef uint32_t Bits __attribute__((vector_size(64), aligned(4)));

/* 16 values of an array. */
INLINE Floats lanes(const void *from, long at, int half) {
    if (!half) return *(const Floats *)((const float *)from + at);
    return (Floats)(__builtin_convertvector(*(const Halves *)((const uint16_t *)from + at), Bits) << 16);
}

/* Stages of a transposition of 16 x 16: of lanes in groups of 1, 2, 4 and 8, every other group of a, then of b. */
#define LOW1(a, b) SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#define HIGH1(a, b) SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
#define LOW2(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH2(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define LOW4(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#define HIGH4(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define LOW8(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define HIGH8(a, b) SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)

/* The sums of 16 vectors, side by side. Overwrites them. */
INLINE Floats sums_of(Floats *s) {
    for (int i = 0; i < 8; i++) s[i] = LOW1(s[2 * i], s[2 * i + 1]) + HIGH1(s[2 * i], s[2 * i + 1]);
    for (int i = 0; i < 4; i++) s[i] = LOW2(s[2 * i], s[2 * i + 1]) + HIGH2(s[2 * i], s[2 * i + 1]);
    for (int i = 0; i < 2; i++) s[i] = LOW4(s[2 * i], s[2 * i + 1]) + HIGH4(s[2 * i], s[2 * i + 1]);
    return LOW8(s[0], s[1]) + HIGH8(s[0], s[1]);
}

#define STAGE(distance, LOW, HIGH)                                 \
    UNROLL for (int i = 0; i < LANES; i++) if (!(i & distance)) {  \
        const Floats a = s[i], b = s[i + distance];                \
        s[i] = LOW(a, b);                                          \
        s[i + distance] = HIGH(a, b);                              \
    }

/* 16 vectors, transposed. */
INLINE void transpose(Floats *s) {
    STAGE(1, LOW1, HIGH1)
    STAGE(2, LOW2, HIGH2)
    STAGE(4, LOW4, HIGH4)
    STAGE(8, LOW8, HIGH8)
}

enum { FEW = 8 }; /* rows from which on it pays to transpose the keys */

static size_t paged_scratch(const PagedArguments *p) {
    return (size_t)(p->max_rows * (2 * p->head_dim + KEYS + LANES + 1) + KEYS * p->head_dim) * sizeof(float);
}

/* Where the next up to KEYS keys of a head are, from token `at` to `end`, and how many they are. */
INLINE long paged_places(const PagedArguments *p, const int32_t *table, long at, long end, long kv_head, long *places) {
    const long count = at >= end ? 0 : end - at < KEYS ? end - at : KEYS;
    long page = at / p->page_size, place = at % p->page_size;
    for (long j = 0; j < count; j++) {
        places[j] = ((table[page] * p->kv_heads + kv_head) * p->page_size + place) * p->head_dim;
        if (++place == p->page_size) place = 0, page++;
    }
    for (long j = count; count && j < KEYS; j++) places[j] = places[count - 1]; /* read, but not used */
    return count;
}

/* Ask for them: what lies in pages the processor does not foresee. */
INLINE void paged_fetch(const PagedArguments *p, const void *from, const long *places, long count, int half) {
    const long item = half ? 2 : 4, bytes = p->head_dim * item;
    for (long j = 0; j < count; j++)
        for (long at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)from + places[j] * item + at);
}

/* The logits of 16 keys for `count` rows of q, whose keys are transposed: kt [D, 16]. */
INLINE void paged_logits_of(const float *kt, const float *q, const int count, long dim, float *logits) {
    Floats sum[8];
    UNROLL for (int r = 0; r < count; r++) sum[r] = (Floats){0};
    for (long d = 0; d < dim; d++) {
        const Floats k = *(const Floats *)(kt + d * LANES);
        UNROLL for (int r = 0; r < count; r++) sum[r] += q[r * dim + d] * k;
    }
    UNROLL for (int r = 0; r < count; r++) *(Floats *)(logits + r * KEYS) = sum[r];
}

/* The logits of 16 keys, `places` of p->keys, for each of the rows of q. */
INLINE void paged_logits(const PagedArguments *p, const long *places, const float *q, long rows, float *tile,
                         float *logits, int half) {
    const long dim = p->head_dim;
    if (rows >= FEW) {
        for (long d = 0; d < dim; d += LANES) {
            Floats s[LANES];
            UNROLL for (int i = 0; i < LANES; i++) s[i] = lanes(p->keys, places[i] + d, half);
            transpose(s);
            UNROLL for (int i = 0; i < LANES; i++) *(Floats *)(tile + (d + i) * LANES) = s[i];
        }
        long r = 0;
        for (; r + 8 <= rows; r += 8) paged_logits_of(tile, q + r * dim, 8, dim, logits + r * KEYS);
        for (; r < rows; r++) paged_logits_of(tile, q + r * dim, 1, dim, logits + r * KEYS);
        return;
    }
    for (long i = 0; i < LANES; i++)
        for (long d = 0; d < dim; d += LANES) *(Floats *)(tile + i * dim + d) = lanes(p->keys, places[i] + d, half);
    for (long r = 0; r < rows; r++) {
        Floats products[LANES] = {0};
        for (long d = 0; d < dim; d += LANES) {
            const Floats part = *(const Floats *)(q + r * dim + d);
            UNROLL for (long i = 0; i < LANES; i++) products[i] += part * *(const Floats *)(tile + i * dim + d);
        }
        *(Floats *)(logits + r * KEYS) = sums_of(products);
    }
}

/* From the logits of KEYS keys to their weights, and what was seen before is scaled to the same largest logit. */
INLINE void paged_softmax(float *logits, float *largest, float *totals, float *sum, long dim) {
    float maxima[LANES], before = *largest;
    for (long i = 0; i < LANES; i++) maxima[i] = before;
    for (long j = 0; j < KEYS; j += LANES)
        for (long i = 0; i < LANES; i++) maxima[i] = logits[j + i] > maxima[i] ? logits[j + i] : maxima[i];
    for (long i = 0; i < LANES; i++) *largest = maxima[i] > *largest ? maxima[i] : *largest;
    const float now = *largest, less = exponential(before - now);
    for (long i = 0; i < LANES; i++) totals[i] *= less;
    for (long j = 0; j < KEYS; j += LANES)
        for (long i = 0; i < LANES; i++) {
            logits[j + i] = exponential(logits[j + i] - now);
            totals[i] += logits[j + i];
        }
    for (long d = 0; d < dim; d++) sum[d] *= less;
}

/* The weighted values of `count` keys, added to the sums of some rows: `width` vectors of them at a time. */
INLINE void paged_values_of(const PagedArguments *p, const long *places, long count, const float *weights, float *sum,
                            const int rows, const int width, int half) {
    const long dim = p->head_dim;
    for (long d = 0; d < dim; d += width * LANES) {
        Floats part[8][2];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int w = 0; w < width; w++) part[r][w] = *(const Floats *)(sum + r * dim + d + w * LANES);
        for (long j = 0; j < count; j++) UNROLL for (int w = 0; w < width; w++) {
            const Floats value = lanes(p->values, places[j] + d + w * LANES, half);
            UNROLL for (int r = 0; r < rows; r++) part[r][w] += weights[r * KEYS + j] * value;
        }
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int w = 0; w < width; w++) *(Floats *)(sum + r * dim + d + w * LANES) = part[r][w];
    }
}

INLINE void paged_values(const PagedArguments *p, const long *places, long count, const float *weights, float *sum,
                         long rows, int half) {
    const long dim = p->head_dim;
    const int pairs = dim % (2 * LANES) == 0;
    long r = 0;
    for (; pairs && r + 8 <= rows; r += 8)
        paged_values_of(p, places, count, weights + r * KEYS, sum + r * dim, 8, 2, half);
    for (; pairs && r + 4 <= rows; r += 4)
        paged_values_of(p, places, count, weights + r * KEYS, sum + r * dim, 4, 2, half);
    for (; r < rows; r++) paged_values_of(p, places, count, weights + r * KEYS, sum + r * dim, 1, 1, half);
}

INLINE void paged_block(const PagedArguments *p, long index, float *scratch, int half) {
    const long dim = p->head_dim, group = p->heads / p->kv_heads, kv_head = index % p->kv_heads;
    const int32_t *block = p->blocks + index / p->kv_heads * 4;
    const long sequence = block[0], query = block[1], rows = block[2] * group, start = block[3];
    float *q = scratch, *sum = q + rows * dim, *logits = sum + rows * dim, *totals = logits + rows * KEYS;
    float *largest = totals + rows * LANES, *tile = largest + rows;
    for (long r = 0; r < rows; r++) { /* the heads of the first query, then those of the next */
        const long head = kv_head * group + r % group, from = ((query + r / group) * p->heads + head) * dim;
        for (long d = 0; d < dim; d++) {
            q[r * dim + d] = load(p->q, from + d, half) * p->scale;
            sum[r * dim + d] = 0;
        }
        largest[r] = p->sinks[head];
        for (long i = 0; i < LANES; i++) totals[r * LANES + i] = i == 0;
    }
    const int32_t *table = p->block_table + sequence * p->width;
    const long first = p->context_starts[sequence], end = start + block[2];
    const long begin = p->window && start + 1 - p->window > first ? start + 1 - p->window : first;
    long both[2][KEYS], count = paged_places(p, table, begin, end, kv_head, both[0]);
    paged_fetch(p, p->keys, both[0], count, half);
    for (long at = begin, turn = 0; at < end; at += KEYS, turn ^= 1) {
        const long *places = both[turn], behind = paged_places(p, table, at + KEYS, end, kv_head, both[turn ^ 1]);
        paged_fetch(p, p->values, places, count, half);
        paged_fetch(p, p->keys, both[turn ^ 1], behind, half);
        for (long j = 0; j < count; j += LANES) paged_logits(p, places + j, q, rows, tile, logits + j, half);
        for (long r = 0; r < rows; r++) {
            const long last = start + r / group, oldest = p->window ? last + 1 - p->window : 0;
            for (long j = last + 1 - at < 0 ? 0 : last + 1 - at; j < KEYS; j++) logits[r * KEYS + j] = -INFINITY;
            for (long j = 0; j < oldest - at && j < KEYS; j++) logits[r * KEYS + j] = -INFINITY;
            paged_softmax(logits + r * KEYS, largest + r, totals + r * LANES, sum + r * dim, dim);
        }
        paged_values(p, places, count, logits, sum, rows, half);
        count = behind;
    }
    for (long r = 0; r < rows; r++) {
        const long to = (query + r / group) * p->heads + kv_head * group + r % group;
        float total = 0;
        for (long i = 0; i < LANES; i++) total += totals[r * LANES + i];
        for (long d = 0; d < dim; d++) store(p->out, to * dim + d, half, sum[r * dim + d] / total);
        if (p->lse) p->lse[to] = largest[r] + logf(total);
    }
}

INLINE void paged_unit(const PagedArguments *p, long index, float *scratch) {
    p->half ? paged_block(p, index, scratch, 1) : paged_block(p, index, scratch, 0);
}
