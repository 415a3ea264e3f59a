/* Attention of one query for each sequence, whose keys and values lie in pages. In float32 inside.
 *
 * A unit of work is one sequence and one key/value head, with the query heads that share it: each key is read once. The
 * softmax is taken online (Milakov and Gimelshein 2018), and starts as if only the sink had been seen. */
#pragma once
#include "activation.h"
#include "float32.h"

typedef struct {
    const void *q;                            /* [R, H, D] */
    const void *keys, *values;                /* [pages, N, page_size, D] */
    const float *sinks;                       /* [H] */
    const int32_t *tables, *firsts, *lengths; /* [R, width]: pages; [R]: the first key there is, and one past the last */
    void *out;                                /* [R, H, D] */
    long heads, kv_heads, head_dim, width, page_size, window; /* window 0: all keys */
    float scale;
    int half;
} Paged;

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

/* The sums of 16 vectors, side by side. Overwrites them. */
INLINE Floats sums_of(Floats *s) {
    for (int i = 0; i < 8; i++)
        s[i] = SHUFFLE(s[2 * i], s[2 * i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
               SHUFFLE(s[2 * i], s[2 * i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    for (int i = 0; i < 4; i++)
        s[i] = SHUFFLE(s[2 * i], s[2 * i + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLE(s[2 * i], s[2 * i + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    for (int i = 0; i < 2; i++)
        s[i] = SHUFFLE(s[2 * i], s[2 * i + 1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               SHUFFLE(s[2 * i], s[2 * i + 1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    return SHUFFLE(s[0], s[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(s[0], s[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

static size_t paged_scratch(long group, long head_dim) {
    return (size_t)(group * (2 * head_dim + KEYS + LANES + 1) + LANES * head_dim) * sizeof(float);
}

/* Where the next up to KEYS keys of a head are, from token `at` to `end`, and how many they are. */
INLINE long paged_places(const Paged *p, const int32_t *table, long at, long end, long kv_head, long *rows) {
    const long count = at >= end ? 0 : end - at < KEYS ? end - at : KEYS;
    long page = at / p->page_size, place = at % p->page_size;
    for (long j = 0; j < count; j++) {
        rows[j] = ((table[page] * p->kv_heads + kv_head) * p->page_size + place) * p->head_dim;
        if (++place == p->page_size) place = 0, page++;
    }
    for (long j = count; count && j < KEYS; j++) rows[j] = rows[count - 1]; /* read, but not used */
    return count;
}

/* Ask for them: what lies in pages the processor does not foresee. */
INLINE void paged_fetch(const Paged *p, const void *from, const long *rows, long count, int half) {
    const long item = half ? 2 : 4, bytes = p->head_dim * item;
    for (long j = 0; j < count; j++)
        for (long at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)from + rows[j] * item + at);
}

/* The logits of 16 keys, `rows` of p->keys, for each of the heads. */
INLINE void paged_logits(const Paged *p, const long *rows, const float *q, long group, float *tile, float *logits,
                         int half) {
    const long dim = p->head_dim;
    for (long i = 0; i < LANES; i++)
        for (long d = 0; d < dim; d += LANES) *(Floats *)(tile + i * dim + d) = lanes(p->keys, rows[i] + d, half);
    for (long g = 0; g < group; g++) {
        Floats products[LANES] = {0};
        for (long d = 0; d < dim; d += LANES) {
            const Floats part = *(const Floats *)(q + g * dim + d);
            UNROLL for (long i = 0; i < LANES; i++) products[i] += part * *(const Floats *)(tile + i * dim + d);
        }
        *(Floats *)(logits + g * KEYS) = sums_of(products);
    }
}

/* From the logits of KEYS keys to their weights, and what was seen before is scaled to the same largest logit. */
INLINE void paged_softmax(float *logits, float *largest, float *totals, float *sum, long dim) {
    float most[LANES], before = *largest;
    for (long i = 0; i < LANES; i++) most[i] = before;
    for (long j = 0; j < KEYS; j += LANES)
        for (long i = 0; i < LANES; i++) most[i] = logits[j + i] > most[i] ? logits[j + i] : most[i];
    for (long i = 0; i < LANES; i++) *largest = most[i] > *largest ? most[i] : *largest;
    const float now = *largest, less = exponential(before - now);
    for (long i = 0; i < LANES; i++) totals[i] *= less;
    for (long j = 0; j < KEYS; j += LANES)
        for (long i = 0; i < LANES; i++) {
            logits[j + i] = exponential(logits[j + i] - now);
            totals[i] += logits[j + i];
        }
    for (long d = 0; d < dim; d++) sum[d] *= less;
}

/* The weighted values of `count` keys, added to the sums of `heads` heads: `width` vectors of them at a time. */
INLINE void paged_values(const Paged *p, const long *rows, long count, const float *weights, float *sum, const int heads,
                         const int width, int half) {
    const long dim = p->head_dim;
    for (long d = 0; d < dim; d += width * LANES) {
        Floats part[4][2];
        UNROLL for (int g = 0; g < heads; g++)
            UNROLL for (int w = 0; w < width; w++) part[g][w] = *(const Floats *)(sum + g * dim + d + w * LANES);
        for (long j = 0; j < count; j++) UNROLL for (int w = 0; w < width; w++) {
            const Floats value = lanes(p->values, rows[j] + d + w * LANES, half);
            UNROLL for (int g = 0; g < heads; g++) part[g][w] += weights[g * KEYS + j] * value;
        }
        UNROLL for (int g = 0; g < heads; g++)
            UNROLL for (int w = 0; w < width; w++) *(Floats *)(sum + g * dim + d + w * LANES) = part[g][w];
    }
}

INLINE void paged_rows(const Paged *p, long index, float *scratch, int half) {
    const long dim = p->head_dim, group = p->heads / p->kv_heads;
    const long row = index / p->kv_heads, kv_head = index % p->kv_heads, first_head = kv_head * group;
    float *q = scratch, *sum = q + group * dim, *logits = sum + group * dim, *totals = logits + group * KEYS;
    float *largest = totals + group * LANES, *tile = largest + group;
    for (long i = 0; i < group * dim; i++) {
        q[i] = load(p->q, (row * p->heads + first_head) * dim + i, half) * p->scale;
        sum[i] = 0;
    }
    for (long g = 0; g < group; g++) {
        largest[g] = p->sinks[first_head + g];
        for (long i = 0; i < LANES; i++) totals[g * LANES + i] = i == 0;
    }
    const int32_t *table = p->tables + row * p->width;
    const long end = p->lengths[row], oldest = p->window && end > p->window ? end - p->window : 0;
    const long begin = oldest > p->firsts[row] ? oldest : p->firsts[row];
    long both[2][KEYS], count = paged_places(p, table, begin, end, kv_head, both[0]);
    paged_fetch(p, p->keys, both[0], count, half);
    for (long at = begin, turn = 0; at < end; at += KEYS, turn ^= 1) {
        const long *rows = both[turn], behind = paged_places(p, table, at + KEYS, end, kv_head, both[turn ^ 1]);
        paged_fetch(p, p->values, rows, count, half);
        paged_fetch(p, p->keys, both[turn ^ 1], behind, half);
        for (long j = 0; j < count; j += LANES) paged_logits(p, rows + j, q, group, tile, logits + j, half);
        for (long g = 0; g < group; g++) {
            for (long j = count; j < KEYS; j++) logits[g * KEYS + j] = -INFINITY;
            paged_softmax(logits + g * KEYS, largest + g, totals + g * LANES, sum + g * dim, dim);
        }
        for (long g = 0; g < group; g += 4) {
            const float *weights = logits + g * KEYS;
            float *to = sum + g * dim;
            if (dim % (2 * LANES) || group - g < 4)
                for (long h = g; h < group && h < g + 4; h++)
                    paged_values(p, rows, count, weights + (h - g) * KEYS, to + (h - g) * dim, 1, 1, half);
            else
                paged_values(p, rows, count, weights, to, 4, 2, half);
        }
        count = behind;
    }
    for (long g = 0; g < group; g++) {
        float total = 0;
        for (long i = 0; i < LANES; i++) total += totals[g * LANES + i];
        for (long d = 0; d < dim; d++)
            store(p->out, (row * p->heads + first_head + g) * dim + d, half, sum[g * dim + d] / total);
    }
}

INLINE void paged_unit(const Paged *p, long index, float *scratch) {
    p->half ? paged_rows(p, index, scratch, 1) : paged_rows(p, index, scratch, 0);
}
