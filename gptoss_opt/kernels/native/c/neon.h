/* Products of bfloat16 with packed or dense weights on ARM's bfloat16 instructions: BFDOT multiplies pairs of values, and
 * BFMMLA two rows by two rows of four. Sums are in float32. */
#pragma once
#include "common.h"
#include "linear.h"

/* How functions are let use the instructions: compilers know several ways, and none where extensions are chosen by hand on
 * the oldest architecture. */
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define NEON_TARGET
#elif defined(__aarch64__) && defined(__clang__) && __clang_major__ >= 16
#define NEON_TARGET __attribute__((target("bf16")))
#elif defined(__aarch64__) && !defined(__clang__) && __GNUC__ >= 10
#if defined(__ARM_FEATURE_QRDMX)
#define NEON_TARGET __attribute__((target("+bf16")))
#elif !defined(__ARM_FEATURE_CRC32) && !defined(__ARM_FEATURE_CRYPTO) && !defined(__ARM_FEATURE_SVE)
#define NEON_TARGET __attribute__((target("arch=armv8.2-a+bf16")))
#endif
#endif

#if defined(__aarch64__) && defined(NEON_TARGET)
#define NEON_BF16 1
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#define NEON_INLINE INLINE NEON_TARGET

enum { NEON_TOKENS = 4, NEON_PAIRS = 4 }; /* rows of x at a time, by BFDOT; pairs of them, by BFMMLA */
enum { VECTORS = BLOCK / 8 };             /* of 8 values in a block */

/* Whether the processor has the instructions. */
static int has_neon_bf16(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP2) >> 14 & 1) != 0; /* HWCAP2_BF16 */
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, NULL, 0) == 0 && has;
#else
    return 0;
#endif
}

/* ---- weights in registers ------------------------------------------------------------------------------------- */

NEON_INLINE void neon_decode(const uint8_t *block, uint8_t scale, uint16x8_t to[VECTORS]) {
    const uint8x16_t low = vld1q_u8(SPLIT[scale][0]), high = vld1q_u8(SPLIT[scale][1]), bytes = vld1q_u8(block);
    const uint8x16_t even = vandq_u8(bytes, vdupq_n_u8(15)), odd = vshrq_n_u8(bytes, 4);
    const uint8x16_t codes[2] = {vzip1q_u8(even, odd), vzip2q_u8(even, odd)};
    UNROLL for (int i = 0; i < 2; i++) {
        const uint8x16_t lows = vqtbl1q_u8(low, codes[i]), highs = vqtbl1q_u8(high, codes[i]);
        to[2 * i] = vreinterpretq_u16_u8(vzip1q_u8(lows, highs));
        to[2 * i + 1] = vreinterpretq_u16_u8(vzip2q_u8(lows, highs));
    }
}

/* Block `at` of an expert's weights. */
NEON_INLINE void neon_weights(const Expert *e, long at, uint16x8_t to[VECTORS]) {
    if (e->scales)
        neon_decode(e->weights + at * BYTES, e->scales[at], to);
    else
        UNROLL for (int i = 0; i < VECTORS; i++) to[i] = vld1q_u16((const uint16_t *)e->weights + at * BLOCK + 8 * i);
}

NEON_INLINE float32x4_t neon_dot(float32x4_t sum, uint16x8_t a, uint16x8_t b) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_u16(a), vreinterpretq_bf16_u16(b));
}

/* ---- dot ------------------------------------------------------------------------------------------------------ */

/* Where rows of weights begin: past the last one, that again. Packed ones have scales. */
typedef struct {
    const uint8_t *weights[ROWS], *scales[ROWS];
    long ahead; /* bytes from a read to its prefetch */
} NeonRows;

/* `tokens` rows of x times ROWS rows of weights, over whole blocks, by BFDOT. */
NEON_INLINE void neon_tile(const int tokens, const int packed, const NeonRows *w, const uint16_t *x, long x_stride,
                           long whole, float sums[NEON_TOKENS][ROWS]) {
    float32x4_t sum[NEON_TOKENS][ROWS];
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int r = 0; r < ROWS; r++) sum[t][r] = vdupq_n_f32(0);
    for (long l = 0; l < whole; l += BLOCK)
        UNROLL for (int r = 0; r < ROWS; r++) {
            uint16x8_t row[VECTORS];
            const uint8_t *from = w->weights[r] + (packed ? l / 2 : 2 * l);
            __builtin_prefetch(from + w->ahead);
            if (packed)
                neon_decode(from, w->scales[r][l / BLOCK], row);
            else
                UNROLL for (int i = 0; i < VECTORS; i++) row[i] = vld1q_u16((const uint16_t *)from + 8 * i);
            UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int i = 0; i < VECTORS; i++)
                sum[t][r] = neon_dot(sum[t][r], row[i], vld1q_u16(x + t * x_stride + l + 8 * i));
        }
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int r = 0; r < ROWS; r++) sums[t][r] = vaddvq_f32(sum[t][r]);
}

/* `count` rows of x, in `pairs` of which the last may have one, times ROWS dense rows of weights, by BFMMLA. */
NEON_INLINE void neon_tile_pairs(const int pairs, const uint16_t *w, const uint16_t *x, long count, long length,
                                 float sums[2 * NEON_PAIRS][ROWS]) {
    float32x4_t sum[NEON_PAIRS][ROWS / 2];
    UNROLL for (int p = 0; p < pairs; p++) UNROLL for (int r = 0; r < ROWS / 2; r++) sum[p][r] = vdupq_n_f32(0);
    for (long l = 0; l < length; l += 8) {
        uint64x2_t rows[ROWS], low[ROWS / 2], high[ROWS / 2];
        UNROLL for (int r = 0; r < ROWS; r++) rows[r] = vreinterpretq_u64_u16(vld1q_u16(w + r * length + l));
        UNROLL for (int r = 0; r < ROWS / 2; r++) {
            low[r] = vzip1q_u64(rows[2 * r], rows[2 * r + 1]);
            high[r] = vzip2q_u64(rows[2 * r], rows[2 * r + 1]);
        }
        UNROLL for (int p = 0; p < pairs; p++) {
            const long other = 2 * p + 1 < count ? 2 * p + 1 : 2 * p;
            const uint64x2_t a = vreinterpretq_u64_u16(vld1q_u16(x + 2 * p * length + l));
            const uint64x2_t b = vreinterpretq_u64_u16(vld1q_u16(x + other * length + l));
            const bfloat16x8_t first = vreinterpretq_bf16_u64(vzip1q_u64(a, b));
            const bfloat16x8_t last = vreinterpretq_bf16_u64(vzip2q_u64(a, b));
            UNROLL for (int r = 0; r < ROWS / 2; r++) {
                sum[p][r] = vbfmmlaq_f32(sum[p][r], first, vreinterpretq_bf16_u64(low[r]));
                sum[p][r] = vbfmmlaq_f32(sum[p][r], last, vreinterpretq_bf16_u64(high[r]));
            }
        }
    }
    /* A sum has row 0 of x with both rows of weights, then row 1. */
    UNROLL for (int p = 0; p < pairs; p++) UNROLL for (int r = 0; r < ROWS / 2; r++) {
        vst1_f32(&sums[2 * p][2 * r], vget_low_f32(sum[p][r]));
        vst1_f32(&sums[2 * p + 1][2 * r], vget_high_f32(sum[p][r]));
    }
}

/* y[n, r..r + count] from sums. */
NEON_INLINE void neon_store(const Product *p, const Expert *e, long n, long r, long count, const float sums[ROWS]) {
    uint16_t *y = (uint16_t *)p->y + n * p->rows + r;
    for (long i = 0; i < count; i++) y[i] = to_bf16(sums[i] + (e->bias ? load(e->bias, r + i, 1) : 0));
}

/* One unit: GROUP_ROWS rows of one expert's weights, times all its rows of x. */
NEON_TARGET static void dot_neon(const void *arguments, long index, void *scratch) {
    const Product *p = arguments;
    const Expert *e = &p->experts[index / p->units_each];
    const long length = p->length, tokens = e->end - e->begin, first = index % p->units_each * GROUP_ROWS;
    const long last = first + GROUP_ROWS < p->rows ? first + GROUP_ROWS : p->rows;
    const uint16_t *x = (const uint16_t *)p->x + e->begin * length;
    uint16_t *room = scratch;
    for (long r = first; r < last; r += ROWS) {
        const long count = last - r < ROWS ? last - r : ROWS;
        if (tokens == 1) { /* decoded on the way */
            float sums[NEON_TOKENS][ROWS];
            NeonRows w = {.ahead = ROWS * length * (e->scales ? 1 : 4) / 2};
            for (long i = 0; i < ROWS; i++) {
                const long at = (r + (i < count ? i : count - 1)) * length;
                w.weights[i] = e->weights + (e->scales ? at / 2 : 2 * at);
                w.scales[i] = e->scales ? e->scales + at / BLOCK : NULL;
            }
            if (e->scales)
                neon_tile(1, 1, &w, x, length, length, sums);
            else
                neon_tile(1, 0, &w, x, length, length, sums);
            neon_store(p, e, e->begin, r, count, sums[0]);
            continue;
        }
        for (long i = 0; i < ROWS; i++) /* past the last row, that again */
            for (long b = 0; b < length / BLOCK; b++) {
                uint16x8_t values[VECTORS];
                neon_weights(e, (r + (i < count ? i : count - 1)) * length / BLOCK + b, values);
                for (int v = 0; v < VECTORS; v++) vst1q_u16(room + i * length + b * BLOCK + 8 * v, values[v]);
            }
        for (long n = 0, some; n < tokens; n += some) {
            float sums[2 * NEON_PAIRS][ROWS];
            some = tokens - n < 2 * NEON_PAIRS ? tokens - n : 2 * NEON_PAIRS;
#define PAIRS(P) neon_tile_pairs(P, room, x + n * length, some, length, sums)
            CASES_4((some + 1) / 2, PAIRS)
            for (long t = 0; t < some; t++) neon_store(p, e, e->begin + n + t, r, count, sums[t]);
        }
    }
}

/* ---- columns -------------------------------------------------------------------------------------------------- */

enum { NEON_ACROSS = 3 }; /* rows of x at a time: with a block of columns their sums fill the registers */

/* `tokens` rows of x times a block of columns, of which rows are interleaved two by two. */
NEON_INLINE void neon_tile_columns(const int tokens, const uint16_t *panel, const uint16_t *x, long rows,
                                   const uint16_t *bias, uint16_t *y, long length) {
    float32x4_t sum[NEON_ACROSS][2 * VECTORS];
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int v = 0; v < 2 * VECTORS; v++) sum[t][v] = vdupq_n_f32(0);
    for (long r = 0; r < rows; r += 2, panel += 2 * BLOCK)
        UNROLL for (int t = 0; t < tokens; t++) {
            const uint32_t both = x[t * rows + r] | (r + 1 < rows ? (uint32_t)x[t * rows + r + 1] << 16 : 0);
            const uint16x8_t pair = vreinterpretq_u16_u32(vdupq_n_u32(both));
            UNROLL for (int v = 0; v < 2 * VECTORS; v++) sum[t][v] = neon_dot(sum[t][v], vld1q_u16(panel + 8 * v), pair);
        }
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int v = 0; v < 2 * VECTORS; v++) {
        float values[4];
        vst1q_f32(values, sum[t][v]);
        for (int i = 0; i < 4; i++)
            y[t * length + 4 * v + i] = to_bf16(values[i] + (bias ? load(bias, 4 * v + i, 1) : 0));
    }
}

/* One unit: GROUP_BLOCKS blocks of columns of one expert's weights, for all its rows of x. */
NEON_TARGET static void columns_neon(const void *arguments, long index, void *scratch) {
    const Product *p = arguments;
    const Expert *e = &p->experts[index / p->units_each];
    const long rows = p->rows, length = p->length, blocks = length / BLOCK, tokens = e->end - e->begin;
    const long first = index % p->units_each * GROUP_BLOCKS;
    const uint16_t *x = (const uint16_t *)p->x + e->begin * rows;
    uint16_t *panel = scratch;
    for (long b = first; b < first + GROUP_BLOCKS && b < blocks; b++) {
        for (long r = 0; r < rows; r += 2) {
            uint16x8_t even[VECTORS], odd[VECTORS];
            neon_weights(e, r * blocks + b, even);
            UNROLL for (int v = 0; v < VECTORS; v++) odd[v] = vdupq_n_u16(0);
            if (r + 1 < rows) neon_weights(e, (r + 1) * blocks + b, odd);
            for (int v = 0; v < VECTORS; v++) {
                vst1q_u16(panel + r * BLOCK + 16 * v, vzip1q_u16(even[v], odd[v]));
                vst1q_u16(panel + r * BLOCK + 16 * v + 8, vzip2q_u16(even[v], odd[v]));
            }
        }
        const uint16_t *bias = e->bias ? (const uint16_t *)e->bias + b * BLOCK : NULL;
        for (long n = 0, some; n < tokens; n += some) {
            uint16_t *y = (uint16_t *)p->y + (e->begin + n) * length + b * BLOCK;
            some = tokens - n < NEON_ACROSS ? tokens - n : NEON_ACROSS;
#define ACROSS_BLOCK(T) neon_tile_columns(T, panel, x + n * rows, rows, bias, y, length)
            CASES_3(some, ACROSS_BLOCK)
        }
    }
}

/* ---- linear layers -------------------------------------------------------------------------------------------- */

/* One unit: some rows of weights, times all rows of x; sums in one order, whatever the number of rows. */
NEON_TARGET static void linear_neon(const void *arguments, long index, void *scratch) {
    (void)scratch;
    const Linear *p = arguments;
    const long length = p->length, whole = length / BLOCK * BLOCK;
    const long each = linear_each(p), first = index * each, last = first + each < p->rows ? first + each : p->rows;
    for (long r = first; r < last; r += ROWS) {
        NeonRows w = {.ahead = ROWS * length * 2};
        const char *rows[ROWS];
        linear_rows(p, r, rows);
        for (int i = 0; i < ROWS; i++) w.weights[i] = (const uint8_t *)rows[i];
        for (long n = 0, some; n < p->num_rows; n += some) {
            float sums[NEON_TOKENS][ROWS];
            const uint16_t *x = (const uint16_t *)p->x + n * length;
            some = p->num_rows - n < NEON_TOKENS ? p->num_rows - n : NEON_TOKENS;
#define LINEAR_ROWS(T) neon_tile(T, 0, &w, x, length, whole, sums)
            CASES_4(some, LINEAR_ROWS)
            for (long t = 0; t < some; t++) linear_store(p, 1, n + t, r, whole, sums[t]);
        }
    }
}
#endif
