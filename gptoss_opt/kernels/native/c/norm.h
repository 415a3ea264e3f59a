/* RMS norms (Zhang and Sennrich 2019): y[n, l] = w[l] x[n, l] / sqrt(mean_l x[n, l]^2 + eps), in float32 inside. */
#pragma once
#include "common.h"

typedef struct {
    const void *x, *weight;
    void *y;
    long num_rows, length;
    float eps;
    int half; /* all are bfloat16, or float32 */
} Norm;

enum { NORMED = 8, SQUARES = 32 }; /* rows in a unit of work; sums side by side */

INLINE void norm_row(const Norm *p, long n, int half) {
    const long at = n * p->length, whole = p->length / SQUARES * SQUARES;
    float squares[SQUARES] = {0}, total = 0;
    for (long l = 0; l < whole; l += SQUARES)
        for (int i = 0; i < SQUARES; i++) {
            const float value = load(p->x, at + l + i, half);
            squares[i] += value * value;
        }
    for (int i = 0; i < SQUARES; i++) total += squares[i];
    for (long l = whole; l < p->length; l++) total += load(p->x, at + l, half) * load(p->x, at + l, half);
    const float scale = 1 / sqrtf(total / (float)p->length + p->eps);
    for (long l = 0; l < p->length; l++)
        store(p->y, at + l, half, load(p->weight, l, half) * (load(p->x, at + l, half) * scale));
}

INLINE void norm_unit(const Norm *p, long index) {
    const long first = index * NORMED, last = first + NORMED < p->num_rows ? first + NORMED : p->num_rows;
    for (long n = first; n < last; n++) p->half ? norm_row(p, n, 1) : norm_row(p, n, 0);
}
