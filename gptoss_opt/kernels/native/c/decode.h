/* The 32 values of a block in their order, as float32 in vectors of each width. */
#pragma once
#include "common.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

typedef float Floats_4 __attribute__((vector_size(16), aligned(4)));
typedef float Floats_8 __attribute__((vector_size(32), aligned(4)));
typedef float Floats_16 __attribute__((vector_size(64), aligned(4)));

/* A bfloat16 is the upper half of a float32: its two bytes are looked up, and zeros put below. */
INLINE void decode_4(const uint8_t *block, uint8_t scale, Floats_4 *to) {
#if defined(__aarch64__)
    const uint8x16_t low = vld1q_u8(SPLIT[scale][0]), high = vld1q_u8(SPLIT[scale][1]), bytes = vld1q_u8(block);
    const uint8x16_t even = vandq_u8(bytes, vdupq_n_u8(15)), odd = vshrq_n_u8(bytes, 4);
    const uint8x16_t codes[2] = {vzip1q_u8(even, odd), vzip2q_u8(even, odd)};
    const uint16x8_t zeros = vdupq_n_u16(0);
    UNROLL for (int i = 0; i < 2; i++) {
        const uint8x16_t lows = vqtbl1q_u8(low, codes[i]), highs = vqtbl1q_u8(high, codes[i]);
        const uint16x8_t halves[2] = {vreinterpretq_u16_u8(vzip1q_u8(lows, highs)),
                                      vreinterpretq_u16_u8(vzip2q_u8(lows, highs))};
        UNROLL for (int h = 0; h < 2; h++) {
            to[4 * i + 2 * h] = (Floats_4)vzip1q_u16(zeros, halves[h]);
            to[4 * i + 2 * h + 1] = (Floats_4)vzip2q_u16(zeros, halves[h]);
        }
    }
#else
    float values[BLOCK];
    UNROLL for (int i = 0; i < BYTES; i++) {
        values[2 * i] = HALVES[block[i] & 15] * SCALE[scale];
        values[2 * i + 1] = HALVES[block[i] >> 4] * SCALE[scale];
    }
    memcpy(to, values, sizeof values);
#endif
}

/* Four values of bfloat16: compilers take such short vectors apart. */
INLINE Floats_4 widened_4(const uint16_t *from) {
#if defined(__aarch64__)
    return (Floats_4)vshlq_n_u32(vmovl_u16(vld1_u16(from)), 16);
#elif X86
    return (Floats_4)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *)from));
#else
    return (Floats_4){from_bf16(from[0]), from_bf16(from[1]), from_bf16(from[2]), from_bf16(from[3])};
#endif
}

#if X86
/* A block. Each 32 bits of bfloat16 hold values that are 8 apart, of which the lower is shifted up. */
AVX2_TARGET INLINE void decode_8(const uint8_t *block, uint8_t scale, Floats_8 *to) {
    const __m256i places = _mm256_setr_epi8(0, 4, 0, 4, 1, 5, 1, 5, 8, 12, 8, 12, 9, 13, 9, 13, /* twice each byte */
                                            2, 6, 2, 6, 3, 7, 3, 7, 10, 14, 10, 14, 11, 15, 11, 15);
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    const __m256i bytes =
        _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)block)), places);
    const __m256i codes =
        _mm256_and_si256(_mm256_blend_epi16(bytes, _mm256_srli_epi16(bytes, 4), 0xaa), _mm256_set1_epi8(15));
    const __m128i *split = (const __m128i *)SPLIT[scale];
    const __m256i low = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(split)), codes);
    const __m256i high = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(split + 1)), codes);
    const __m256i first = _mm256_unpacklo_epi8(low, high), last = _mm256_unpackhi_epi8(low, high);
    to[0] = (Floats_8)_mm256_slli_epi32(first, 16);
    to[1] = (Floats_8)_mm256_and_si256(first, upper);
    to[2] = (Floats_8)_mm256_slli_epi32(last, 16);
    to[3] = (Floats_8)_mm256_and_si256(last, upper);
}

/* A block. The codes select from 16 floats: 64 bits get a byte, and a copy of it with the upper code from bit 32 on.
 * What stands above four bits does not count. */
AVX512_TARGET INLINE void decode_16(const uint8_t *block, uint8_t scale, Floats_16 *to) {
    const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(HALVES), _mm512_set1_ps(SCALE[scale]));
    UNROLL for (int i = 0; i < 2; i++) {
        const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(block + 8 * i)));
        const __m512i codes = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));
        to[i] = (Floats_16)_mm512_permutexvar_ps(codes, table);
    }
}
#endif
