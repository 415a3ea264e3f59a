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
