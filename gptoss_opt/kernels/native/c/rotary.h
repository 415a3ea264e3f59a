/* Rotary position embeddings (Su et al. 2021) of one tensor, halves of a head as pairs: in float32 inside. */
#pragma once
#include "common.h"

typedef struct {
    const void *x;         /* [B, H, T, D], by its strides; the D values of a head lie side by side */
    const void *cos, *sin; /* [B or 1, T, D / 2]; the first by its stride, which is 0 for one */
    void *out;             /* [B, H, T, D] */
    long heads, num_tokens, head_dim;
    long row, head, token; /* strides of x */
    long angles;           /* the stride of a row of cos and sin */
    int half;              /* all are bfloat16, or float32 */
} Rotary;

/* One unit: the heads of one token. */
INLINE void rotary_token(const Rotary *p, long index, int half) {
    const long b = index / p->num_tokens, t = index % p->num_tokens, pairs = p->head_dim / 2;
    const long angle = b * p->angles + t * pairs;
    for (long h = 0; h < p->heads; h++) {
        const long from = b * p->row + h * p->head + t * p->token;
        const long to = ((b * p->heads + h) * p->num_tokens + t) * p->head_dim;
        for (long i = 0; i < pairs; i++) {
            const float first = load(p->x, from + i, half), second = load(p->x, from + pairs + i, half);
            const float cos = load(p->cos, angle + i, half), sin = load(p->sin, angle + i, half);
            store(p->out, to + i, half, first * cos - second * sin);
            store(p->out, to + pairs + i, half, second * cos + first * sin);
        }
    }
}

INLINE void rotary_unit(const Rotary *p, long index) { p->half ? rotary_token(p, index, 1) : rotary_token(p, index, 0); }
