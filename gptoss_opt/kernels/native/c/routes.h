/* Which rows go to which expert: tokens sorted by expert on the way in, summed by token on the way out. */
#pragma once
#include "common.h"

/* T tokens of `length` values, top_k experts each: N = T * top_k routes, laid out token by token. */
typedef struct {
    long num_tokens, top_k, num_experts;
    long *order;      /* [N] the route of each row; rows are sorted by expert, those of no expert last */
    long *inverse;    /* [N] the row of each route */
    int32_t *offsets; /* [E] the rows of expert e end before offsets[e] */
} Routes;

/* Fill in order, inverse and offsets. Experts outside [0, E) belong to other ranks. */
static void sort_routes(const Routes *r, const int64_t *indices) {
    const long num_routes = r->num_tokens * r->top_k, num_experts = r->num_experts;
    memset(r->offsets, 0, (size_t)num_experts * sizeof *r->offsets);
    for (long n = 0; n < num_routes; n++)
        if (indices[n] >= 0 && indices[n] < num_experts) r->offsets[indices[n]]++;
    int32_t next = 0;
    for (long e = 0; e < num_experts; e++) {
        const int32_t count = r->offsets[e];
        r->offsets[e] = next; /* where it begins, for now */
        next += count;
    }
    for (long n = 0; n < num_routes; n++) {
        const long row = indices[n] >= 0 && indices[n] < num_experts ? r->offsets[indices[n]]++ : next++;
        r->order[row] = n;
        r->inverse[n] = row;
    }
}

static void gather_rows(const void *arguments, long index, void *scratch) {
    (void)scratch;
    const Gathering *g = arguments;
    const size_t bytes = (size_t)g->length * g->item;
    const long first = index * GATHERED_ROWS, last = first + GATHERED_ROWS;
    for (long n = first; n < last && n < g->num_rows; n++)
        memcpy((char *)g->to + (size_t)n * bytes, (const char *)g->x + (size_t)row_of(g, n) * bytes, bytes);
}

/* out[t] = sum_k weights[t, k] * y[row of route (t, k)], in float32, k ascending. */
typedef struct {
    const Routes *routes;
    const void *y;
    const float *weights;
    void *out;
    long length;
    int half; /* bfloat16, or float32 */
} Combining;

enum { COMBINED = 512 };

INLINE void combine_token(const Combining *c, long t, int half) {
    const Routes *r = c->routes;
    const long rows = r->num_experts ? r->offsets[r->num_experts - 1] : 0, length = c->length;
    for (long begin = 0; begin < length; begin += COMBINED) {
        const long count = length - begin < COMBINED ? length - begin : COMBINED;
        float sum[COMBINED] = {0};
        for (long k = 0; k < r->top_k; k++) {
            const long row = r->inverse[t * r->top_k + k];
            const float weight = c->weights[t * r->top_k + k];
            if (row < rows)
                for (long i = 0; i < count; i++) sum[i] += weight * load(c->y, row * length + begin + i, half);
        }
        for (long i = 0; i < count; i++) store(c->out, t * length + begin + i, half, sum[i]);
    }
}

INLINE void combine_unit(const Combining *c, long t) { c->half ? combine_token(c, t, 1) : combine_token(c, t, 0); }
