/* Linear layers of few rows: y[n, r] = sum_l x[n, l] W[r, l] + bias[r]. What takes the time is to read W, once. */
#pragma once
#include "common.h"

typedef struct {
    const void *x, *weights, *bias; /* bias may be NULL */
    void *y;
    long num_rows, rows, length; /* of x and y; of the weights; of a row of them */
    int half;                    /* all are bfloat16, or float32 */
} Linear;

enum { LINEAR_BYTES = 1 << 17 }; /* weights in a unit of work, about */
enum { LINEAR_AHEAD = 2048 };    /* bytes from a read of weights to its prefetch */

/* Rows of weights in a unit of work: whole strips of ROWS. */
INLINE long linear_each(const Linear *p) {
    const long fitting = LINEAR_BYTES / (p->length * (p->half ? 2 : 4)) / ROWS * ROWS;
    return fitting < ROWS ? ROWS : fitting;
}

/* Where rows of weights begin, from r on; past the last one, that again. */
INLINE void linear_rows(const Linear *p, long r, const char *w[ROWS]) {
    const long bytes = p->length * (p->half ? 2 : 4);
    for (int i = 0; i < ROWS; i++) w[i] = (const char *)p->weights + (r + i < p->rows ? r + i : p->rows - 1) * bytes;
}

/* y[n, r] from the sum over the first `done` of the row. */
INLINE void linear_store_one(const Linear *p, const int half, long n, long r, long done, float sum) {
    float total = sum + (p->bias ? load(p->bias, r, half) : 0);
    for (long l = done; l < p->length; l++)
        total += load(p->weights, r * p->length + l, half) * load(p->x, n * p->length + l, half);
    store(p->y, n * p->rows + r, half, total);
}

/* y[n, r..r + ROWS] from sums over the first `done` of each row. */
INLINE void linear_store(const Linear *p, const int half, long n, long r, long done, const float sums[ROWS]) {
    for (int i = 0; i < ROWS && r + i < p->rows; i++) linear_store_one(p, half, n, r + i, done, sums[i]);
}
