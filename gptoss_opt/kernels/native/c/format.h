/* Packing and unpacking of MXFP4. Equal, bit for bit, to the plain torch of format.py. */
#pragma once
#include <stdatomic.h>

#include "common.h"

/* Whole rows at a time: `num_blocks` blocks of 32 values, one unit for every FORMATTED of them. */
typedef struct {
    const void *from;
    void *to;
    const uint8_t *blocks, *scales;
    uint8_t *to_blocks, *to_scales;
    long num_blocks;
    int half; /* dense values are bfloat16, or float32 */
    atomic_int *not_finite;
} Formatting;

enum { FORMATTED = 4096 };

static void unpack_unit(const void *arguments, long index, void *scratch) {
    (void)scratch;
    const Formatting *f = arguments;
    const long first = index * FORMATTED, last = first + FORMATTED < f->num_blocks ? first + FORMATTED : f->num_blocks;
    for (long b = first; b < last; b++) {
        const uint8_t *block = f->blocks + b * BYTES;
        if (f->half) {
            const uint16_t *table = TABLE[f->scales[b]];
            uint16_t *to = (uint16_t *)f->to + b * BLOCK;
            for (int i = 0; i < BYTES; i++) {
                to[2 * i] = table[block[i] & 15];
                to[2 * i + 1] = table[block[i] >> 4];
            }
        } else {
            const float scale = SCALE[f->scales[b]];
            float *to = (float *)f->to + b * BLOCK;
            for (int i = 0; i < BYTES; i++) {
                to[2 * i] = HALVES[block[i] & 15] * scale;
                to[2 * i + 1] = HALVES[block[i] >> 4] * scale;
            }
        }
    }
}

/* The scale's exponent is that of the largest value less 2; values are rounded to nearest, ties to even: by a distance of
 * 0.5 below 2, of 1 below 4, and of 2 above. */
INLINE void pack_block(const Formatting *f, long b, int half) {
    float values[BLOCK];
    uint32_t bits[BLOCK], largest = 0;
    for (int i = 0; i < BLOCK; i++) {
        values[i] = load(f->from, b * BLOCK + i, half);
        memcpy(&bits[i], &values[i], 4);
        const uint32_t magnitude = bits[i] & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= 0x7f800000) atomic_store(f->not_finite, 1);
    int32_t scale = (int32_t)(largest >> 23) - 2;
    scale = scale < 0 ? 0 : scale;
    /* 2^(127 - scale) in two steps, as neither end of the range is a normal number. */
    const int32_t exponent = 127 - scale, first = exponent / 2;
    const uint32_t one = (uint32_t)(127 + first) << 23, other = (uint32_t)(127 + exponent - first) << 23;
    float by_one, by_other;
    memcpy(&by_one, &one, 4);
    memcpy(&by_other, &other, 4);
    const float even = 12582912.0f; /* adding it rounds to an integer, ties to even */
    uint8_t codes[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        float m = values[i] < 0 ? -values[i] : values[i];
        m = m * by_one * by_other;
        const float below_two = (m * 2 + even) - even, below_four = (m + even) - even + 2;
        const float above = (m * 0.5f + even) - even + 4;
        float code = m < 2 ? below_two : m < 4 ? below_four : above;
        code = code > 7 ? 7 : code;
        codes[i] = (uint8_t)((int32_t)code | (int32_t)(bits[i] >> 31) << 3);
    }
    for (int i = 0; i < BYTES; i++) f->to_blocks[b * BYTES + i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
    f->to_scales[b] = (uint8_t)scale;
}

INLINE void pack_unit(const Formatting *f, long index) {
    const long first = index * FORMATTED, last = first + FORMATTED < f->num_blocks ? first + FORMATTED : f->num_blocks;
    for (long b = first; b < last; b++) f->half ? pack_block(f, b, 1) : pack_block(f, b, 0);
}

/* ---- dense weights [rows, length] packed along their rows: blocks [length, rows / 32, 16] ----------------------- */

typedef float Columns __attribute__((vector_size(64), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));
enum { ACROSS = 16, STRIP = 64 }; /* columns in a vector, and in a unit of work */

typedef struct {
    const void *from;
    uint8_t *blocks, *scales;
    double *sums; /* for each unit, the sums of the squares of its values and of their errors */
    long rows, length;
    int half;
    atomic_int *not_finite;
} Packing;

#define CHOSEN(mask, a, b) (((mask) & (a)) | (~(mask) & (b)))

/* 2^exponent in two steps, as neither end of the range is a normal number. */
INLINE void powers(const Integers *exponent, Columns *one, Columns *other) {
    const Integers first = *exponent >> 1;
    *one = (Columns)((127 + first) << 23);
    *other = (Columns)((127 + *exponent - first) << 23);
}

/* The block of `count` columns from `column` on, of rows 32 b to 32 b + 31; the same as pack_block. */
INLINE void pack_columns(const Packing *p, long b, long column, long count, double sums[2]) {
    Columns values[BLOCK];
    Integers largest = {0};
    for (int i = 0; i < BLOCK; i++) {
        const long at = (b * BLOCK + i) * p->length + column;
        if (count < ACROSS) {
            values[i] = (Columns){0};
            for (long c = 0; c < count; c++) values[i][c] = load(p->from, at + c, p->half);
        } else if (p->half) {
            const Halves half = *(const Halves *)((const uint16_t *)p->from + at);
            values[i] = (Columns)(__builtin_convertvector(half, Integers) << 16);
        } else
            values[i] = *(const Columns *)((const float *)p->from + at);
        const Integers magnitude = (Integers)values[i] & 0x7fffffff;
        largest = CHOSEN(magnitude > largest, magnitude, largest);
    }
    for (int c = 0; c < ACROSS; c++)
        if (largest[c] >= 0x7f800000) atomic_store(p->not_finite, 1);
    Integers scale = (largest >> 23) - 2;
    scale &= ~(scale < 0);
    const Integers up = 127 - scale, down = scale - 128; /* quantised values come as twice what they are */
    Columns by_one, by_other, back, and_back, signal = {0}, noise = {0};
    powers(&up, &by_one, &by_other);
    powers(&down, &back, &and_back);
    const float even = 12582912.0f; /* adding it rounds to an integer, ties to even */
    uint8_t bytes[BYTES][ACROSS];
    for (int i = 0; i < BYTES; i++) {
        Integers codes[2];
        UNROLL for (int k = 0; k < 2; k++) {
            const Columns value = values[2 * i + k], size = (Columns)((Integers)value & 0x7fffffff);
            const Columns m = size * by_one * by_other;
            const Columns below_two = (m * 2 + even) - even, below_four = (m + even) - even + 2;
            const Columns above = (m * 0.5f + even) - even + 4;
            const Integers chosen = CHOSEN(m < 2, (Integers)below_two, CHOSEN(m < 4, (Integers)below_four, (Integers)above));
            Integers code = __builtin_convertvector((Columns)chosen, Integers);
            code = CHOSEN(code > 7, 7, code);
            /* Twice the value of a code, 0 1 2 3 4 6 8 12, in a few steps. */
            const Integers twice = CHOSEN(code < 4, code, CHOSEN(code < 6, 2 * code - 4, 4 * code - 16));
            const Columns error = size - __builtin_convertvector(twice, Columns) * back * and_back;
            signal += size * size;
            noise += error * error;
            codes[k] = code | (((Integers)value >> 28) & 8);
        }
        const Integers both = codes[0] | codes[1] << 4;
        for (int c = 0; c < ACROSS; c++) bytes[i][c] = (uint8_t)both[c];
    }
    const long blocks = p->rows / BLOCK;
    for (long c = 0; c < count; c++) {
        uint8_t *to = p->blocks + ((column + c) * blocks + b) * BYTES;
        for (int i = 0; i < BYTES; i++) to[i] = bytes[i][c];
        p->scales[(column + c) * blocks + b] = (uint8_t)scale[c];
    }
    for (int c = 0; c < ACROSS; c++) {
        sums[0] += signal[c];
        sums[1] += noise[c];
    }
}

INLINE void pack_columns_unit(const Packing *p, long index) {
    const long first = index * STRIP, last = first + STRIP < p->length ? first + STRIP : p->length;
    double *sums = p->sums + 2 * index;
    sums[0] = sums[1] = 0;
    for (long b = 0; b < p->rows / BLOCK; b++)
        for (long column = first; column < last; column += ACROSS)
            pack_columns(p, b, column, last - column < ACROSS ? last - column : ACROSS, sums);
}
