/* What all parts share: formats, tables, and the shape of a product. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#else
#define X86 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define AVX2_TARGET __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define AVX512_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#else
#define UNROLL _Pragma("GCC unroll 32")
#define AVX512_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif

/* call(count), of at most so many. */
#define CASES_2(count, call) \
    switch (count) {         \
    case 1: call(1); break;  \
    default: call(2); break; \
    }
#define CASES_3(count, call) \
    switch (count) {         \
    case 1: call(1); break;  \
    case 2: call(2); break;  \
    default: call(3); break; \
    }
#define CASES_4(count, call) \
    switch (count) {         \
    case 1: call(1); break;  \
    case 2: call(2); break;  \
    case 3: call(3); break;  \
    default: call(4); break; \
    }
#define CASES_6(count, call) \
    switch (count) {         \
    case 1: call(1); break;  \
    case 2: call(2); break;  \
    case 3: call(3); break;  \
    case 4: call(4); break;  \
    case 5: call(5); break;  \
    default: call(6); break; \
    }

enum { BLOCK = 32, BYTES = 16 }; /* values of a block, and the bytes they take when packed */
/* From BF16 on, bfloat16 is multiplied as such: by AVX-512 BF16, or the bfloat16 instructions of ARM. */
enum { PLAIN, AVX2, AVX512, BF16, AMX };
enum { ROWS = 4, GROUP_ROWS = 128 }; /* rows of weights in registers, and in a unit of work */
enum { GROUP_BLOCKS = 8 };           /* blocks of columns in a unit of work, where bfloat16 is multiplied */

/* What is written once for all widths of registers. */
typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4)));
enum { LANES = 16 };

static const float HALVES[16] = {0, 1, 2, 3, 4, 6, 8, 12, -0.0f, -1, -2, -3, -4, -6, -8, -12}; /* twice each code */
static float SCALE[256];                                     /* 2^(s - 128): half the scale, as codes count halves */
static uint16_t TABLE[256][16] __attribute__((aligned(64))); /* every code under every scale, as bfloat16 */
static uint8_t SPLIT[256][2][16] __attribute__((aligned(64))); /* the same: the low byte of each, then the high one */

static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

/* Value `at` of an array of bfloat16 (`half`) or float32. */
INLINE float load(const void *from, long at, int half) {
    return half ? from_bf16(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

INLINE void store(void *to, long at, int half, float value) {
    if (half)
        ((uint16_t *)to)[at] = to_bf16(value);
    else
        ((float *)to)[at] = value;
}

/* One expert that has rows of x. Its weights are a matrix [rows, length], packed if there are scales. */
typedef struct {
    long begin, end; /* its rows of y, and of x where nothing else is said */
    long at;         /* where x begins that is in the order of `decode`, or in tiles */
    const uint8_t *weights, *scales;
    const void *bias;
} Expert;

/* dot:      y[n, r] = sum_l x[n, l] W[r, l] + bias[r]
 * columns:  y[n, l] = sum_r x[n, r] W[r, l] + bias[l]; in float32 without bias, as only gradients take it */
typedef struct {
    const void *x;
    void *y;
    long rows, length;
    long units_each; /* units of work per expert */
    const Expert *experts;
} Product;

/* The weights of one projection: [E, rows, length], packed if there are scales, else dense bfloat16, which takes
 * BF16 or AMX. */
typedef struct {
    const uint8_t *weights, *scales;
    const void *bias; /* [E, .], as the product gives it, or NULL */
    long rows, length;
} Matrices;

/* ROWS rows of weights; with strides of zero, one row as often. */
typedef struct {
    const uint8_t *weights, *scales;
    long stride, scale_stride;
} Strip;

enum { STRIPS_AHEAD = 2 }; /* strips from a read of packed weights to its prefetch */

/* Fetch what is to be read STRIPS_AHEAD strips later: each step along the ROWS rows takes one line of 64 bytes. */
INLINE void prefetch_strip(Strip w, long l) {
    __builtin_prefetch(w.weights + STRIPS_AHEAD * ROWS * w.stride + l * ROWS / 2, 0, 2);
    if (l % (16 * BLOCK) == 0)
        __builtin_prefetch(w.scales + STRIPS_AHEAD * ROWS * w.scale_stride + l * ROWS / BLOCK, 0, 2);
}

/* Rows of x, by `routes` if there are any: row n is that of token routes[n] / top_k. */
typedef struct {
    const void *x;
    void *to;
    const long *routes;
    long top_k, num_rows, length;
    size_t item; /* bytes of a value */
} Gathering;

enum { GATHERED_ROWS = 32 };

INLINE long row_of(const Gathering *g, long n) { return g->routes ? g->routes[n] / g->top_k : n; }
