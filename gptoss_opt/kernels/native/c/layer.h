/* A decoder layer for one token of each sequence, from the parts of this library, in three calls: in between the caller
 * keeps keys and values, and chooses experts. Each part computes as it does by itself, to the bit. */
#pragma once
#include "common.h"

typedef struct {
    const void *input_norm, *q, *q_bias, *k, *k_bias, *v, *v_bias, *sinks, *o, *o_bias; /* a bias may be NULL */
    const void *post_norm, *router, *router_bias;
    Matrices gate_up, down;
    long hidden, heads, kv_heads, head_dim, num_experts, top_k, window; /* window 0: all keys */
    float input_eps, post_eps, scale;
    double alpha, limit;
    int half; /* all are bfloat16, on BF16 or better; or float32 */
} Layer;

typedef struct {
    const void *a, *b;
    void *to;
    long count;
    int half;
} Adding;

enum { ADDED = 4096 };

INLINE void add_some(const Adding *p, long first, long last, const int half) {
    for (long i = first; i < last; i++) store(p->to, i, half, load(p->a, i, half) + load(p->b, i, half));
}

/* One unit: some of the sums. */
INLINE void add_unit(const Adding *p, long index) {
    const long first = index * ADDED, last = first + ADDED < p->count ? first + ADDED : p->count;
    p->half ? add_some(p, first, last, 1) : add_some(p, first, last, 0);
}
