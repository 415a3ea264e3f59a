/* Products of bfloat16 with packed or dense weights, on AVX-512 BF16 and VBMI. Sums are in float32. */
#pragma once
#include "common.h"
#include "linear.h"

#define BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")))
#define BF16_INLINE INLINE BF16_TARGET

enum { TOKENS = 6 };          /* rows of x at a time, at most: their sums with ROWS rows of weights fill the registers */
enum { PANEL = 2 };           /* blocks of columns at a time */
enum { PANEL_WIDTH = PANEL * BLOCK };
enum { PACKED_AHEAD = 4096 }; /* bytes from a read of packed weights to its prefetch, where one row is read at a time */
enum { ROWS_AHEAD = 16 };     /* rows from a read of dense weights to its prefetch */

/* ---- weights in registers ------------------------------------------------------------------------------------- */

/* Decoded blocks lie in groups of four values, in the order 0 4 1 5 2 6 3 7, as one shift gives it: each 64 bits of
 * the result take 16 bits of the block, a nibble to a word. What stands above a nibble does not count, as both halves of
 * the table, which holds the 16 values under this scale, are the same. */
BF16_INLINE __m512i decode(const uint8_t *block, uint8_t scale) {
    const __m512i nibbles = _mm512_set_epi64(0x003c003800340030, 0x003c003800340030, 0x002c002800240020,
                                             0x002c002800240020, 0x001c001800140010, 0x001c001800140010,
                                             0x000c000800040000, 0x000c000800040000);
    __m512i table = _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i *)TABLE[scale]));
    __m512i bytes = _mm512_broadcast_i64x2(_mm_loadu_si128((const __m128i *)block));
    return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(nibbles, bytes), table);
}

/* 32 dense values in the order of `decode`. */
BF16_INLINE __m512i ordered(const uint16_t *values) {
    return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), _mm512_loadu_si512(values));
}

BF16_INLINE __m512i weights_at(const Expert *e, long at) {
    return e->scales ? decode(e->weights + at * BYTES, e->scales[at])
                     : ordered((const uint16_t *)e->weights + at * BLOCK);
}

/* ---- panels --------------------------------------------------------------------------------------------------- */

/* v[i][j] becomes v[j][i]. */
BF16_INLINE void transpose_words(__m512i v[LANES]) {
    __m512i a[LANES], b[LANES];
    UNROLL for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int j = 0; j < 2; j++) {
        b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
        b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
    }
    /* b[4 i + j] has, in each of its four parts p, column 4 p + j of rows 4 i to 4 i + 3. */
    UNROLL for (int j = 0; j < 4; j++) {
        const __m512i low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), odd = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
        const __m512i high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        v[j] = _mm512_shuffle_i32x4(low, high, 0x88);
        v[8 + j] = _mm512_shuffle_i32x4(low, high, 0xdd);
        v[4 + j] = _mm512_shuffle_i32x4(odd, odd_high, 0x88);
        v[12 + j] = _mm512_shuffle_i32x4(odd, odd_high, 0xdd);
    }
}

/* The weights of PANEL blocks of columns: rows two by two, interleaved, each block as its 16 low and 16 high columns. */
BF16_INLINE void fill_panel(const Expert *e, long block, long num_blocks, long rows, long length, uint16_t *panel) {
    for (long r = 0; r < rows; r += 2)
        for (long b = 0; b < PANEL; b++, panel += 2 * BLOCK) {
            __m512i even = _mm512_setzero_si512(), odd = even;
            if (b < num_blocks) {
                const long at = r * length / BLOCK + block + b, next = at + length / BLOCK;
                const char *ahead = (const char *)e->weights + (e->scales ? at * BYTES + 16 * length / 2
                                                                          : (at * BLOCK + 16 * length) * 2);
                _mm_prefetch(ahead, _MM_HINT_T0);
                even = weights_at(e, at);
                if (r + 1 < rows) odd = weights_at(e, next);
            }
            _mm512_store_si512(panel, _mm512_unpacklo_epi16(even, odd));
            _mm512_store_si512(panel + BLOCK, _mm512_unpackhi_epi16(even, odd));
        }
}

/* The same of PANEL_WIDTH rows, seen as columns; packed ones in the order of `decode`. Past the last, the last again. */
BF16_INLINE void fill_panel_across(const Expert *e, long first, long last, long length, uint16_t *panel) {
    const long blocks = length / BLOCK, block_bytes = e->scales ? BYTES : 2 * BLOCK;
    for (long v = 0; v < 2 * PANEL; v++)
        for (long b = 0; b < blocks; b++) {
            const long next = (first + (v + 1) * LANES) * blocks + b * LANES; /* as much of the next rows, straight on */
            for (long at = 0; at < LANES * block_bytes; at += 64)
                _mm_prefetch((const char *)e->weights + next * block_bytes + at, _MM_HINT_T0);
            __m512i words[LANES];
            UNROLL for (int i = 0; i < LANES; i++) {
                const long row = first + v * LANES + i, at = (row < last ? row : last - 1) * blocks + b;
                words[i] = e->scales ? decode(e->weights + at * BYTES, e->scales[at])
                                     : _mm512_loadu_si512((const uint16_t *)e->weights + at * BLOCK);
            }
            transpose_words(words);
            UNROLL for (int j = 0; j < LANES; j++)
                _mm512_store_si512(panel + ((b * LANES + j) * 2 * PANEL + v) * BLOCK, words[j]);
        }
}

/* x[n, r] and x[n, r + 1] everywhere; past the last row of weights, zero. */
BF16_INLINE __m512bh pair(const uint16_t *x, long r, long rows) {
    uint32_t both;
    if (r + 1 < rows)
        memcpy(&both, x + r, 4);
    else
        both = x[r];
    return (__m512bh)_mm512_set1_epi32((int)both);
}

/* y[0..count] = sums + bias. */
BF16_INLINE void store_columns(const int vectors, const __m512 *sum, const uint16_t *bias, uint16_t *y, long count) {
    UNROLL for (int v = 0; v < vectors; v++) {
        const long left = count - LANES * v;
        const __mmask16 some = (__mmask16)(left >= LANES ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
        __m512 out = sum[v];
        if (bias) {
            __m256i start = _mm256_maskz_loadu_epi16(some, bias + LANES * v);
            out = _mm512_add_ps(out, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(start), 16)));
        }
        _mm256_mask_storeu_epi16(y + LANES * v, some, (__m256i)_mm512_cvtneps_pbh(out));
    }
}

/* `tokens` rows of x times a panel, added to sums. */
BF16_INLINE void add_panel(const int tokens, const uint16_t *panel, const uint16_t *x, long rows,
                           __m512 sum[TOKENS][2 * PANEL]) {
    for (long r = 0; r < rows; r += 2, panel += 2 * PANEL * BLOCK) {
        __m512i w[2 * PANEL];
        UNROLL for (int v = 0; v < 2 * PANEL; v++) w[v] = _mm512_load_si512(panel + v * BLOCK);
        UNROLL for (int t = 0; t < tokens; t++) {
            const __m512bh both = pair(x + t * rows, r, rows);
            UNROLL for (int v = 0; v < 2 * PANEL; v++) sum[t][v] = _mm512_dpbf16_ps(sum[t][v], both, (__m512bh)w[v]);
        }
    }
}

BF16_INLINE void panel_sums(const int tokens, const uint16_t *panel, const uint16_t *x, long rows,
                            __m512 sum[TOKENS][2 * PANEL]) {
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int v = 0; v < 2 * PANEL; v++) sum[t][v] = _mm512_setzero_ps();
    add_panel(tokens, panel, x, rows, sum);
}

/* `tokens` rows of x times a panel: y[t, 0..count]. */
BF16_INLINE void tile_panel(const int tokens, const uint16_t *panel, const uint16_t *x, long rows, long length,
                            const uint16_t *bias, uint16_t *y, long count) {
    __m512 sum[TOKENS][2 * PANEL];
    panel_sums(tokens, panel, x, rows, sum);
    UNROLL for (int t = 0; t < tokens; t++) store_columns(2 * PANEL, sum[t], bias, y + t * length, count);
}

/* All of `tokens` rows of x [tokens, rows] times a panel, to y [tokens, 0..count]. */
BF16_INLINE void multiply_panel(const uint16_t *panel, const uint16_t *x, long tokens, long rows, uint16_t *y,
                                long stride, long count, const uint16_t *bias) {
    const long tiles = (tokens + TOKENS - 1) / TOKENS;
    for (long tile = 0, n = 0, some; tile < tiles; tile++, n += some) {
        some = (tokens - n + tiles - tile - 1) / (tiles - tile);
#define PANELS(T) tile_panel(T, panel, x + n * rows, rows, stride, bias, y + n * stride, count)
        CASES_6(some, PANELS)
    }
}

/* ---- dot ------------------------------------------------------------------------------------------------------ */

/* The sums of four vectors. */
BF16_INLINE __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Where the sums of a tile go: y[t, 0..count], with the bias added. */
typedef struct {
    uint16_t *y;
    long stride, count;
    const uint16_t *bias;
} Target;

BF16_INLINE void store_sums(__m512 a, __m512 b, __m512 c, __m512 d, const Target *to, long t) {
    const __mmask8 some = (__mmask8)((1 << to->count) - 1);
    __m128 start = _mm_setzero_ps();
    if (to->bias)
        start = _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_maskz_loadu_epi16(some, to->bias)), 16));
    _mm_mask_storeu_epi16(to->y + t * to->stride, some, (__m128i)_mm_cvtneps_pbh(_mm_add_ps(start, sums(a, b, c, d))));
}

/* `tokens` rows of x times a strip, packed (then x is in the order of `decode`) or dense. */
BF16_INLINE void tile_dot(const int tokens, const int packed, Strip w, const uint16_t *x, long length, Target to) {
    __m512 sum[TOKENS][ROWS];
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int r = 0; r < ROWS; r++) sum[t][r] = _mm512_setzero_ps();
    for (long l = 0; l < length; l += BLOCK) {
        if (packed) prefetch_strip(w, l);
        UNROLL for (int r = 0; r < ROWS; r++) {
            __m512i row;
            if (packed)
                row = decode(w.weights + r * w.stride + l / 2, w.scales[r * w.scale_stride + l / BLOCK]);
            else
                row = _mm512_loadu_si512(w.weights + r * w.stride + 2 * l);
            UNROLL for (int t = 0; t < tokens; t++)
                sum[t][r] = _mm512_dpbf16_ps(sum[t][r], (__m512bh)_mm512_loadu_si512(x + t * length + l), (__m512bh)row);
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) store_sums(sum[t][0], sum[t][1], sum[t][2], sum[t][3], &to, t);
}

/* As tile_dot for one or two rows of x and packed weights: row by row, as memory is fastest when it is read straight on,
 * and each row in PARTS sums, as one would wait for itself. */
BF16_INLINE void tile_dot_few(const int tokens, Strip w, const uint16_t *x, long length, Target to) {
    enum { PARTS = 4 };
    __m512 whole[2][ROWS];
    const long blocks = length / BLOCK, even = blocks / PARTS * PARTS;
    for (long r = 0; r < ROWS; r++) {
        const uint8_t *row = w.weights + r * w.stride, *scales = w.scales + r * w.scale_stride;
        __m512 sum[PARTS][2];
        UNROLL for (int i = 0; i < PARTS; i++) UNROLL for (int t = 0; t < tokens; t++) sum[i][t] = _mm512_setzero_ps();
        for (long b = 0; b < even; b += PARTS) {
            uint32_t some;
            memcpy(&some, scales + b, 4);
            _mm_prefetch((const char *)row + b * BYTES + PACKED_AHEAD, _MM_HINT_T0);
            UNROLL for (int i = 0; i < PARTS; i++) {
                const __m512bh values = (__m512bh)decode(row + (b + i) * BYTES, (uint8_t)(some >> 8 * i));
                UNROLL for (int t = 0; t < tokens; t++) {
                    const __m512i part = _mm512_loadu_si512(x + t * length + (b + i) * BLOCK);
                    sum[i][t] = _mm512_dpbf16_ps(sum[i][t], (__m512bh)part, values);
                }
            }
        }
        for (long b = even; b < blocks; b++) {
            const __m512bh values = (__m512bh)decode(row + b * BYTES, scales[b]);
            UNROLL for (int t = 0; t < tokens; t++) {
                const __m512i part = _mm512_loadu_si512(x + t * length + b * BLOCK);
                sum[0][t] = _mm512_dpbf16_ps(sum[0][t], (__m512bh)part, values);
            }
        }
        UNROLL for (int t = 0; t < tokens; t++)
            whole[t][r] = _mm512_add_ps(_mm512_add_ps(sum[0][t], sum[1][t]), _mm512_add_ps(sum[2][t], sum[3][t]));
    }
    UNROLL for (int t = 0; t < tokens; t++) store_sums(whole[t][0], whole[t][1], whole[t][2], whole[t][3], &to, t);
}

/* Some rows of weights, times all rows of x, of which there are no more than TOKENS. */
BF16_INLINE void dot_few(const Product *p, const Expert *e, long first, long last) {
    const long length = p->length, tokens = e->end - e->begin;
    const uint16_t *x = (const uint16_t *)p->x + e->at * length;
    for (long r = first, count; r < last; r += count) {
        count = last - r < ROWS ? 1 : ROWS; /* what is left of ROWS at the end goes one by one */
        const Target to = {(uint16_t *)p->y + e->begin * p->rows + r, p->rows, count,
                           e->bias ? (const uint16_t *)e->bias + r : NULL};
        if (!e->scales) {
            const Strip w = {e->weights + r * length * 2, NULL, count == ROWS ? 2 * length : 0, 0};
#define DOT_DENSE(T) tile_dot(T, 0, w, x, length, to)
            CASES_6(tokens, DOT_DENSE)
            continue;
        }
        const Strip w = {e->weights + r * length / 2, e->scales + r * length / BLOCK, count == ROWS ? length / 2 : 0,
                         count == ROWS ? length / BLOCK : 0};
#define DOT_FEW(T) tile_dot_few(T, w, x, length, to)
#define DOT_PACKED(T) tile_dot(T, 1, w, x, length, to)
        if (tokens <= 2)
            CASES_2(tokens, DOT_FEW)
        else
            CASES_6(tokens, DOT_PACKED)
    }
}

/* One unit: GROUP_ROWS rows of one expert's weights, times all its rows of x. */
BF16_TARGET static void dot_bf16(const void *arguments, long index, void *panel) {
    const Product *p = arguments;
    const Expert *e = &p->experts[index / p->units_each];
    const long length = p->length, tokens = e->end - e->begin, first = index % p->units_each * GROUP_ROWS;
    const long last = first + GROUP_ROWS < p->rows ? first + GROUP_ROWS : p->rows;
    if (tokens <= TOKENS) {
        dot_few(p, e, first, last);
        return;
    }
    for (long r = first; r < last; r += PANEL_WIDTH) {
        fill_panel_across(e, r, last, length, panel);
        multiply_panel(panel, (const uint16_t *)p->x + e->at * length, tokens, length,
                       (uint16_t *)p->y + e->begin * p->rows + r, p->rows, last - r < PANEL_WIDTH ? last - r : PANEL_WIDTH,
                       e->bias ? (const uint16_t *)e->bias + r : NULL);
    }
}

/* ---- columns -------------------------------------------------------------------------------------------------- */

/* `tokens` rows of x times `blocks` blocks of columns of dense weights, straight from where they are. */
BF16_INLINE void tile_columns(const int tokens, const int blocks, const uint16_t *w, const uint16_t *x, long rows,
                              long length, const uint16_t *bias, uint16_t *y) {
    __m512 sum[24];
    UNROLL for (int i = 0; i < tokens * 2 * blocks; i++) sum[i] = _mm512_setzero_ps();
    for (long r = 0; r < rows; r += 2, w += 2 * length)
        UNROLL for (int b = 0; b < blocks; b++) {
            const uint16_t *at = w + b * BLOCK;
            _mm_prefetch((const char *)(at + ROWS_AHEAD * length), _MM_HINT_T0);
            _mm_prefetch((const char *)(at + (ROWS_AHEAD + 1) * length), _MM_HINT_T0);
            __m512i even = ordered(at), odd = r + 1 < rows ? ordered(at + length) : _mm512_setzero_si512();
            __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
            UNROLL for (int t = 0; t < tokens; t++) {
                const __m512bh both = pair(x + t * rows, r, rows);
                __m512 *to = sum + 2 * (t * blocks + b);
                to[0] = _mm512_dpbf16_ps(to[0], both, (__m512bh)low);
                to[1] = _mm512_dpbf16_ps(to[1], both, (__m512bh)high);
            }
        }
    UNROLL for (int t = 0; t < tokens; t++) store_columns(2 * blocks, sum + 2 * t * blocks, bias, y + t * length, blocks * BLOCK);
}

/* One unit: GROUP_BLOCKS blocks of columns of one expert's weights, for all its rows of x. */
BF16_TARGET static void columns_bf16(const void *arguments, long index, void *scratch) {
    const Product *p = arguments;
    const Expert *e = &p->experts[index / p->units_each];
    const long rows = p->rows, length = p->length, first = index % p->units_each * GROUP_BLOCKS;
    const long last = first + GROUP_BLOCKS < length / BLOCK ? first + GROUP_BLOCKS : length / BLOCK;
    const long tokens = e->end - e->begin;
    const int straight = !e->scales && tokens <= TOKENS;
    for (long block = first, blocks; block < last; block += blocks) {
        const uint16_t *x = (const uint16_t *)p->x + e->begin * rows;
        const uint16_t *w = (const uint16_t *)e->weights + block * BLOCK;
        const uint16_t *bias = e->bias ? (const uint16_t *)e->bias + block * BLOCK : NULL;
        uint16_t *y = (uint16_t *)p->y + e->begin * length + block * BLOCK;
        const long left = last - block;
        if (straight && tokens == 1 && left >= 8) {
            tile_columns(1, 8, w, x, rows, length, bias, y);
            blocks = 8;
        } else if (straight && tokens <= 3 && left >= 4) {
            blocks = 4;
#define FOUR(T) tile_columns(T, 4, w, x, rows, length, bias, y)
            if (tokens == 1)
                FOUR(1);
            else if (tokens == 2)
                FOUR(2);
            else
                FOUR(3);
        } else if (straight) {
            blocks = left >= PANEL ? PANEL : 1;
#define TWO(T) tile_columns(T, 2, w, x, rows, length, bias, y)
#define ONE(T) tile_columns(T, 1, w, x, rows, length, bias, y)
            if (blocks == PANEL)
                CASES_6(tokens, TWO)
            else
                CASES_6(tokens, ONE)
        } else {
            blocks = left >= PANEL ? PANEL : 1;
            fill_panel(e, block, blocks, rows, length, scratch);
            multiply_panel(scratch, x, tokens, rows, y, length, blocks * BLOCK, bias);
        }
    }
}

/* `count` rows of x in the order of `decode`. */
BF16_TARGET static void order_rows(const Gathering *g, long first, long count, uint16_t *to) {
    for (long n = first; n < first + count; n++, to += g->length) {
        const uint16_t *x = (const uint16_t *)g->x + row_of(g, n) * g->length;
        for (long at = 0; at < g->length; at += BLOCK) _mm512_storeu_si512(to + at, ordered(x + at));
    }
}

/* ---- linear layers -------------------------------------------------------------------------------------------- */

/* `tokens` rows of x, from the n-th on, times ROWS rows of weights from r on. */
BF16_INLINE void tile_linear(const int tokens, const Linear *p, long n, long r) {
    const long length = p->length, whole = length / BLOCK * BLOCK;
    const uint16_t *x = (const uint16_t *)p->x + n * length;
    const char *w[ROWS];
    linear_rows(p, r, w);
    __m512 sum[TOKENS][ROWS];
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int i = 0; i < ROWS; i++) sum[t][i] = _mm512_setzero_ps();
    for (long l = 0; l < whole; l += BLOCK) {
        __m512bh row[ROWS];
        UNROLL for (int i = 0; i < ROWS; i++) {
            _mm_prefetch(w[i] + 2 * (ROWS * length + l), _MM_HINT_T0);
            row[i] = (__m512bh)_mm512_loadu_si512(w[i] + 2 * l);
        }
        UNROLL for (int t = 0; t < tokens; t++) {
            const __m512bh values = (__m512bh)_mm512_loadu_si512(x + t * length + l);
            UNROLL for (int i = 0; i < ROWS; i++) sum[t][i] = _mm512_dpbf16_ps(sum[t][i], values, row[i]);
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) {
        float to[ROWS];
        _mm_storeu_ps(to, sums(sum[t][0], sum[t][1], sum[t][2], sum[t][3]));
        linear_store(p, 1, n + t, r, whole, to);
    }
}

enum { FEW_TOKENS = 4 }; /* rows of x that are multiplied with one row of weights at a time */

/* As tile_linear, to the bit: one row of weights after the other, as memory is fastest when it is read straight on. */
BF16_INLINE void rows_linear(const int tokens, const Linear *p, long r) {
    const long length = p->length, whole = length / BLOCK * BLOCK;
    const uint16_t *x = p->x;
    const char *w[ROWS];
    linear_rows(p, r, w);
    __m512 sum[FEW_TOKENS][ROWS];
    for (int i = 0; i < ROWS; i++) {
        __m512 part[FEW_TOKENS];
        UNROLL for (int t = 0; t < tokens; t++) part[t] = _mm512_setzero_ps();
        for (long l = 0; l < whole; l += BLOCK) {
            _mm_prefetch(w[i] + 2 * l + LINEAR_AHEAD, _MM_HINT_NTA);
            const __m512bh row = (__m512bh)_mm512_loadu_si512(w[i] + 2 * l);
            UNROLL for (int t = 0; t < tokens; t++)
                part[t] = _mm512_dpbf16_ps(part[t], (__m512bh)_mm512_loadu_si512(x + t * length + l), row);
        }
        UNROLL for (int t = 0; t < tokens; t++) sum[t][i] = part[t];
    }
    UNROLL for (int t = 0; t < tokens; t++) {
        float to[ROWS];
        _mm_storeu_ps(to, sums(sum[t][0], sum[t][1], sum[t][2], sum[t][3]));
        linear_store(p, 1, t, r, whole, to);
    }
}

/* One unit: some rows of weights, times all rows of x. */
BF16_TARGET static void linear_bf16(const void *arguments, long index, void *scratch) {
    (void)scratch;
    const Linear *p = arguments;
    const long each = linear_each(p), first = index * each, last = first + each < p->rows ? first + each : p->rows;
    if (p->num_rows <= FEW_TOKENS) {
        for (long r = first; r < last; r += ROWS) {
#define ROWS_LINEAR(T) rows_linear(T, p, r)
            CASES_4(p->num_rows, ROWS_LINEAR)
        }
        return;
    }
    const long tiles = (p->num_rows + TOKENS - 1) / TOKENS;
    for (long r = first; r < last; r += ROWS)
        for (long tile = 0, n = 0, tokens; tile < tiles; tile++, n += tokens) {
            tokens = (p->num_rows - n + tiles - tile - 1) / (tiles - tile);
#define LINEAR(T) tile_linear(T, p, n, r)
            CASES_6(tokens, LINEAR)
        }
}
