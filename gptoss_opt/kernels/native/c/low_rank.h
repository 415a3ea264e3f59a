/* Low-rank products beside those of the experts, in float32: rows to `rank` values each, from there back, and the sums
 * over rows that are the gradients of the factors.
 *
 * A factor is [E, rank, length] in float32, rows are bfloat16 or float32, sorted by expert. Lengths are multiples of 16. */
#pragma once
#include "common.h"

typedef struct {
    const int32_t *offsets; /* [E] the rows of expert e end before offsets[e] */
    long num_experts, rank, length;
    const float *factor; /* [E, rank, length] */
    float *hidden;       /* [N, rank] */
    void *rows;          /* [N, length] */
    float *sums;         /* [E, rank, length] */
    int half;            /* rows are bfloat16, or float32 */
} LowRank;

enum { LOW_RANK_ROWS = 32, LOW_RANK_COLUMNS = 64, LOW_RANK_STRIP = 256 };

/* The expert of a row, from one that is not behind it. */
INLINE long expert_of(const LowRank *p, long row, long expert) {
    while (expert < p->num_experts && p->offsets[expert] <= row) expert++;
    return expert;
}

/* How many rows from n on, up to `most`, are of one expert: the first from *expert on that has row n. */
INLINE long low_rank_some(const LowRank *p, long n, long end, long most, long *expert) {
    *expert = expert_of(p, n, *expert);
    const long stop = p->offsets[*expert] < end ? p->offsets[*expert] : end;
    return stop - n < most ? stop - n : most;
}

/* Where the rows of a unit end. */
INLINE long low_rank_end(const LowRank *p, long index) {
    const long last = p->num_experts ? p->offsets[p->num_experts - 1] : 0;
    return (index + 1) * LOW_RANK_ROWS < last ? (index + 1) * LOW_RANK_ROWS : last;
}

/* rows[n, l] += sum_r hidden[n, r] factor[r, l], for some rows of one expert. */
INLINE void low_rank_out(const LowRank *p, const float *factor, long n, const int count, int half) {
    const long length = p->length;
    for (long begin = 0; begin < length; begin += LOW_RANK_COLUMNS) {
        const long width = length - begin < LOW_RANK_COLUMNS ? length - begin : LOW_RANK_COLUMNS;
        float sum[4][LOW_RANK_COLUMNS];
        for (int t = 0; t < count; t++)
            for (long i = 0; i < width; i++) sum[t][i] = load(p->rows, (n + t) * length + begin + i, half);
        for (long r = 0; r < p->rank; r++) {
            const float *w = factor + r * length + begin;
            for (int t = 0; t < count; t++) {
                const float h = p->hidden[(n + t) * p->rank + r];
                for (long i = 0; i < width; i++) sum[t][i] += h * w[i];
            }
        }
        for (int t = 0; t < count; t++)
            for (long i = 0; i < width; i++) store(p->rows, (n + t) * length + begin + i, half, sum[t][i]);
    }
}

/* One unit: some rows, of whichever experts. */
INLINE void low_rank_out_rows(const LowRank *p, long index, int half) {
    const long end = low_rank_end(p, index);
    for (long n = index * LOW_RANK_ROWS, e = 0, count; n < end; n += count) {
        count = low_rank_some(p, n, end, 4, &e);
        low_rank_out(p, p->factor + e * p->rank * p->length, n, (int)count, half);
    }
}

/* sums[e, r, l] = sum_n hidden[n, r] rows[n, l], for a strip of columns of one expert. */
INLINE void low_rank_sums(const LowRank *p, long index, int half) {
    const long strips = (p->length + LOW_RANK_STRIP - 1) / LOW_RANK_STRIP;
    const long e = index / strips, begin = index % strips * LOW_RANK_STRIP, length = p->length;
    const long width = length - begin < LOW_RANK_STRIP ? length - begin : LOW_RANK_STRIP;
    float *sums = p->sums + e * p->rank * length + begin;
    float x[LOW_RANK_STRIP];
    for (long r = 0; r < p->rank; r++) memset(sums + r * length, 0, (size_t)width * sizeof *sums);
    for (long n = e ? p->offsets[e - 1] : 0; n < p->offsets[e]; n++) {
        for (long i = 0; i < width; i++) x[i] = load(p->rows, n * length + begin + i, half);
        for (long r = 0; r < p->rank; r++) {
            const float h = p->hidden[n * p->rank + r];
            float *to = sums + r * length;
            for (long i = 0; i < width; i++) to[i] += h * x[i];
        }
    }
}

INLINE void low_rank_out_unit(const LowRank *p, long index) {
    p->half ? low_rank_out_rows(p, index, 1) : low_rank_out_rows(p, index, 0);
}

INLINE void low_rank_sums_unit(const LowRank *p, long index) {
    p->half ? low_rank_sums(p, index, 1) : low_rank_sums(p, index, 0);
}
