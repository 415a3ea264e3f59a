/* Attention on pages in bfloat16, on AVX-512 BF16: of several queries at a time, whose products are as fast as those of
 * matrices. Sums and the softmax are in float32; weights are rounded to bfloat16 before they meet the values. */
#pragma once
#include "bfloat16.h"
#include "paged.h"

enum { KEY_VECTORS = KEYS / LANES };

/* e^v for v <= 0, as `exponential`; 0 where v is far below, and NaN where it is NaN: of two the second stays. */
BF16_INLINE __m512 exponentials(__m512 v) {
    v = _mm512_max_ps(_mm512_set1_ps(-104.0f), v);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), v), p = _mm512_set1_ps(1.0f / 5040);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* KEYS keys as a panel: pairs of their values, side by side by key. */
BF16_INLINE void panel_of_keys(const uint16_t *keys, const long *places, long dim, uint16_t *panel) {
    for (long v = 0; v < KEY_VECTORS; v++)
        for (long d = 0; d < dim; d += BLOCK) {
            __m512i words[LANES];
            UNROLL for (int i = 0; i < LANES; i++) words[i] = _mm512_loadu_si512(keys + places[v * LANES + i] + d);
            transpose_words(words);
            UNROLL for (int j = 0; j < LANES; j++)
                _mm512_store_si512(panel + ((d / 2 + j) * KEY_VECTORS + v) * BLOCK, words[j]);
        }
}

/* The values of KEYS keys as panels of PANEL_WIDTH dims: two keys at a time, interleaved. */
BF16_INLINE void panels_of_values(const uint16_t *values, const long *places, long dim, uint16_t *panel) {
    for (long d = 0; d < dim; d += PANEL_WIDTH)
        for (long j = 0; j < KEYS; j += 2)
            UNROLL for (long b = 0; b < PANEL; b++, panel += 2 * BLOCK) {
                const __m512i even = ordered(values + places[j] + d + b * BLOCK);
                const __m512i odd = ordered(values + places[j + 1] + d + b * BLOCK);
                _mm512_store_si512(panel, _mm512_unpacklo_epi16(even, odd));
                _mm512_store_si512(panel + BLOCK, _mm512_unpackhi_epi16(even, odd));
            }
}

/* What some rows of a unit have seen so far, and what they look at now. */
typedef struct {
    const uint16_t *q; /* [rows, dim] */
    float *sum;        /* [rows, dim]: weighted values */
    float *largest, *totals;
    long first, count;  /* the key at the beginning of the block, and how many there are */
    long start, group;  /* the place of the first query, and rows of each query */
    int all;            /* whether every row sees every key */
} Seen;

/* `rows` rows, from the r-th on, see a block of keys. */
BF16_INLINE void see_keys(const int rows, const PagedArguments *p, const Seen *s, long r, const uint16_t *keys,
                          const uint16_t *values) {
    const long dim = p->head_dim;
    uint16_t weights[TOKENS][KEYS] __attribute__((aligned(64)));
    __m512 sum[TOKENS][2 * PANEL], less[TOKENS];
    panel_sums(rows, keys, s->q + r * dim, dim, sum);
    UNROLL for (int t = 0; t < rows; t++) {
        __mmask16 seen[KEY_VECTORS];
        const long last = s->start + (r + t) / s->group, newest = last - s->first;
        const long oldest = p->window ? last + 1 - p->window - s->first : 0;
        __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
        UNROLL for (int v = 0; v < KEY_VECTORS; v++) {
            seen[v] = 0xffff;
            if (!s->all) {
                const __m512i key = _mm512_add_epi32(_mm512_set1_epi32(v * LANES), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8,
                                                                                         9, 10, 11, 12, 13, 14, 15));
                const long end = newest + 1 < s->count ? newest + 1 : s->count;
                seen[v] = _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32((int)end)) &
                          _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32((int)(oldest < 0 ? 0 : oldest)));
            }
            sum[t][v] = _mm512_mul_ps(sum[t][v], _mm512_set1_ps(p->scale));
            most = _mm512_mask_max_ps(most, seen[v], most, sum[t][v]);
        }
        const float before = s->largest[r + t], block = _mm512_reduce_max_ps(most);
        const float now = block > before ? block : before;
        const int nothing = before == -INFINITY && !(seen[0] | seen[1] | seen[2] | seen[3]); /* neither key nor sink */
        UNROLL for (int v = 0; v < KEY_VECTORS; v++) {
            const __m512 weight = _mm512_maskz_mov_ps(
                seen[v], exponentials(_mm512_sub_ps(sum[t][v], _mm512_set1_ps(now))));
            total = _mm512_add_ps(total, weight);
            _mm256_store_si256((__m256i *)(weights[t] + v * LANES), (__m256i)_mm512_cvtneps_pbh(weight));
        }
        const float scaled = nothing ? 1 : exponential(before - now);
        less[t] = _mm512_set1_ps(before == -INFINITY ? 0 : scaled);
        s->totals[r + t] = s->totals[r + t] * _mm512_cvtss_f32(less[t]) + _mm512_reduce_add_ps(total);
        s->largest[r + t] = now;
    }
    for (long d = 0; d < dim; d += PANEL_WIDTH, values += KEYS * PANEL_WIDTH) {
        UNROLL for (int t = 0; t < rows; t++) UNROLL for (int v = 0; v < 2 * PANEL; v++)
            sum[t][v] = _mm512_mul_ps(less[t], _mm512_loadu_ps(s->sum + (r + t) * dim + d + v * LANES));
        add_panel(rows, values, weights[0], KEYS, sum);
        UNROLL for (int t = 0; t < rows; t++) UNROLL for (int v = 0; v < 2 * PANEL; v++)
            _mm512_storeu_ps(s->sum + (r + t) * dim + d + v * LANES, sum[t][v]);
    }
}

BF16_TARGET static void paged_block_bf16(const PagedArguments *p, long index, char *scratch) {
    const long dim = p->head_dim, group = p->heads / p->kv_heads, kv_head = index % p->kv_heads;
    const int32_t *block = p->blocks + index / p->kv_heads * 4;
    const long sequence = block[0], query = block[1], rows = block[2] * group, start = block[3];
    uint16_t *keys = (uint16_t *)scratch, *values = keys + KEYS * dim, *q = values + KEYS * dim;
    float *sum = (float *)(q + rows * dim), *largest = sum + rows * dim, *totals = largest + rows;
    for (long r = 0; r < rows; r++) { /* the heads of the first query, then those of the next */
        const long head = kv_head * group + r % group, from = ((query + r / group) * p->heads + head) * dim;
        memcpy(q + r * dim, (const uint16_t *)p->q + from, (size_t)dim * 2);
        memset(sum + r * dim, 0, (size_t)dim * sizeof(float));
        largest[r] = p->sinks[head];
        totals[r] = p->sinks[head] == -INFINITY ? 0 : 1;
    }
    const int32_t *table = p->block_table + sequence * p->width;
    const long first = p->context_starts[sequence], end = start + block[2];
    const long begin = p->window && start + 1 - p->window > first ? start + 1 - p->window : first;
    long places[KEYS];
    for (long at = begin, count; at < end; at += KEYS) {
        count = paged_places(p, table, at, end, kv_head, places);
        panel_of_keys(p->keys, places, dim, keys);
        panels_of_values(p->values, places, dim, values);
        const int all = count == KEYS && at + KEYS <= start + 1 && (!p->window || end - p->window <= at);
        const Seen seen = {q, sum, largest, totals, at, count, start, group, all};
        const long tiles = (rows + TOKENS - 1) / TOKENS;
        for (long tile = 0, r = 0, some; tile < tiles; tile++, r += some) {
            some = (rows - r + tiles - tile - 1) / (tiles - tile);
#define SEE(T) see_keys(T, p, &seen, r, keys, values)
            CASES_6(some, SEE)
        }
    }
    for (long r = 0; r < rows; r++) {
        const long to = (query + r / group) * p->heads + kv_head * group + r % group;
        for (long d = 0; d < dim; d++) store(p->out, to * dim + d, 1, sum[r * dim + d] / totals[r]);
        if (p->lse) p->lse[to] = largest[r] + logf(totals[r]);
    }
}
