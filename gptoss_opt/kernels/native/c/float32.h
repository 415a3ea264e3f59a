/* Products of float32 with packed weights, in the compiler's vector types: compiled for several targets. */
#pragma once
#include "common.h"

typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4)));
enum { LANES = 16 };

/* 32 values of a block in their order. Twice the value of a code, 0 1 2 3 4 6 8 12, are the digits of one constant. */
INLINE void decode_f32(const uint8_t *block, uint8_t scale, float *to) {
    int32_t codes[BLOCK];
    for (int i = 0; i < BYTES; i++) {
        codes[2 * i] = block[i] & 15;
        codes[2 * i + 1] = block[i] >> 4;
    }
    for (int i = 0; i < BLOCK; i++) {
        float value = (float)(0xc8643210u >> (codes[i] & 7) * 4 & 15);
        to[i] = (codes[i] & 8 ? -value : value) * SCALE[scale];
    }
}

INLINE void tile_dot_f32(const int tokens, const float *weights, const float *x, long length, const float *bias,
                         float *y, long y_stride, long count) {
    Floats sum[4][ROWS] = {0};
    for (long l = 0; l < length; l += LANES)
        UNROLL for (int r = 0; r < ROWS; r++) {
            const Floats w = *(const Floats *)(weights + (r < count ? r : 0) * length + l);
            UNROLL for (int t = 0; t < tokens; t++) sum[t][r] += w * *(const Floats *)(x + t * length + l);
        }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < count; r++) {
            float total = bias ? bias[r] : 0;
            for (int lane = 0; lane < LANES; lane++) total += sum[t][r][lane];
            y[t * y_stride + r] = total;
        }
}

INLINE void dot_f32(const Product *p, long index, float *decoded) {
    const Expert *e = &p->experts[index / p->units_each];
    const long length = p->length, first = index % p->units_each * GROUP_ROWS;
    const long last = first + GROUP_ROWS < p->rows ? first + GROUP_ROWS : p->rows;
    for (long r = first, count; r < last; r += count) {
        count = last - r < ROWS ? 1 : ROWS;
        for (long at = r * length / BLOCK, i = 0; i < count * length / BLOCK; i++)
            decode_f32(e->weights + (at + i) * BYTES, e->scales[at + i], decoded + i * BLOCK);
        const float *bias = e->bias ? (const float *)e->bias + r : NULL;
        for (long n = e->begin; n < e->end; n += 4) {
            const float *x = (const float *)p->x + n * length;
            float *y = (float *)p->y + n * p->rows + r;
            switch (e->end - n) {
            case 1: tile_dot_f32(1, decoded, x, length, bias, y, p->rows, count); break;
            case 2: tile_dot_f32(2, decoded, x, length, bias, y, p->rows, count); break;
            case 3: tile_dot_f32(3, decoded, x, length, bias, y, p->rows, count); break;
            default: tile_dot_f32(4, decoded, x, length, bias, y, p->rows, count);
            }
        }
    }
}

INLINE void tile_columns_f32(const int tokens, const float *panel, const float *x, long rows, float *y, long length) {
    Floats sum[4][2] = {0};
    for (long r = 0; r < rows; r++, panel += BLOCK)
        UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int v = 0; v < 2; v++)
            sum[t][v] += x[t * rows + r] * *(const Floats *)(panel + v * LANES);
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < 2; v++) *(Floats *)(y + t * length + v * LANES) = sum[t][v];
}

INLINE void columns_f32(const Product *p, long index, float *panel) {
    const Expert *e = &p->experts[index / p->units_each];
    const long rows = p->rows, length = p->length, block = index % p->units_each;
    for (long r = 0; r < rows; r++) {
        const long at = r * length / BLOCK + block;
        decode_f32(e->weights + at * BYTES, e->scales[at], panel + r * BLOCK);
    }
    for (long n = e->begin; n < e->end; n += 4) {
        const float *x = (const float *)p->x + n * rows;
        float *y = (float *)p->y + n * length + block * BLOCK;
        switch (e->end - n) {
        case 1: tile_columns_f32(1, panel, x, rows, y, length); break;
        case 2: tile_columns_f32(2, panel, x, rows, y, length); break;
        case 3: tile_columns_f32(3, panel, x, rows, y, length); break;
        default: tile_columns_f32(4, panel, x, rows, y, length);
        }
    }
}
