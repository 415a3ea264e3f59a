/* Matrix products with MXFP4 weights on CPUs, grouped by expert. Plain C, loaded with ctypes.
 *
 *   forward   y[n, o]  = sum_k x[n, k] W[o, k] + bias[o]     one expert's rows n, packed W [out, in]
 *   backward  dx[n, k] = sum_o dy[n, o] W[o, k]
 *
 * W is packed as in the released checkpoints: 32 values of a row share a scale 2^(s - 127) and take 16 bytes, the first
 * of each two in the low four bits (OCP Microscaling Formats v1.0). Sums are in float32.
 *
 * Two implementations:
 *   bfloat16   AVX-512 BF16 and VBMI. A block's 16 possible values, scale included, are one row of a table of 256; a
 *              permutation looks its nibbles up in registers, in an order that takes one shift, and x is laid out so.
 *   float32    written once in the compiler's vector types, compiled for AVX-512, AVX2 and the plain target.
 *
 * Work is cut into units that threads take from a counter. The threads are those of the OpenMP runtime that the caller
 * names (torch's own, so that the two never compete), or new ones where there is none.
 */
#include <pthread.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

enum { BLOCK = 32, BYTES = 16 };
enum { PLAIN, AVX2, AVX512, AVX512_BF16 };
enum { ROWS = 4, TOKENS = 6, GROUP_ROWS = 32, TOKEN_CHUNK = 96 };

static float SCALE[256];                                     /* 2^(s - 128): half the scale, as codes count halves */
static uint16_t TABLE[256][16] __attribute__((aligned(64))); /* every code under every scale, as bfloat16 */

static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Fill the tables. Call once, before anything else. Returns the best implementation that this CPU runs. */
int gptoss_init(void) {
    static const float halves[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    for (int s = 0; s < 256; s++) {
        SCALE[s] = s == 255 ? NAN : ldexpf(1.0f, s - 128);
        for (int code = 0; code < 16; code++)
            TABLE[s][code] = to_bf16((code & 8 ? -halves[code & 7] : halves[code & 7]) * SCALE[s]);
    }
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") ? AVX512_BF16 : AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PLAIN;
}

/* ---- threads ------------------------------------------------------------------------------------------------- */

typedef void (*fork_join)(void (*work)(void *), void *job, unsigned num_threads, unsigned flags);

typedef struct {
    fork_join parallel; /* GOMP_parallel of the caller's OpenMP runtime, or NULL */
    int num_threads;
} Team;

typedef struct {
    void (*unit)(const void *arguments, long index, void *scratch);
    const void *arguments;
    long num_units;
    size_t scratch_bytes;
    atomic_long next;
    atomic_int failed;
} Job;

/* Each thread keeps its scratch memory: fresh pages for every call would cost more than small calls take. */
static _Thread_local void *scratch_memory;
static _Thread_local size_t scratch_size;

static void *scratch_of(size_t bytes) {
    if (bytes > scratch_size) {
        free(scratch_memory);
        bytes = (bytes + 4095) / 4096 * 4096;
        scratch_memory = aligned_alloc(4096, bytes);
        scratch_size = scratch_memory ? bytes : 0;
    }
    return scratch_memory;
}

static void work(void *pointer) {
    Job *job = pointer;
    void *scratch = scratch_of(job->scratch_bytes);
    if (!scratch && job->scratch_bytes) {
        atomic_store(&job->failed, 1);
        return;
    }
    for (long index; (index = atomic_fetch_add(&job->next, 1)) < job->num_units;)
        job->unit(job->arguments, index, scratch);
}

static void *work_in_thread(void *job) {
    work(job);
    free(scratch_memory);
    scratch_memory = NULL;
    scratch_size = 0;
    return NULL;
}

static int run(const Team *team, Job *job) {
    long num_threads = team->num_threads < job->num_units ? team->num_threads : job->num_units;
    if (num_threads <= 1)
        work(job);
    else if (team->parallel)
        team->parallel(work, job, (unsigned)num_threads, 0);
    else {
        pthread_t threads[64];
        int started = 0;
        while (started < num_threads - 1 && started < 64 &&
               pthread_create(&threads[started], NULL, work_in_thread, job) == 0)
            started++;
        work(job);
        while (started) pthread_join(threads[--started], NULL);
    }
    return atomic_load(&job->failed) ? -1 : 0;
}

/* ---- the product, and its units of work ---------------------------------------------------------------------- */

typedef struct {
    long begin, end; /* rows */
    const uint8_t *blocks, *scales;
    const void *bias;
} Expert;

typedef struct {
    const void *x;     /* rows that are multiplied: [N, in] forward, [N, out] backward */
    void *y;           /* [N, out] forward, [N, in] backward */
    long in, out;      /* of the weights */
    long units_each;   /* units per expert */
    const Expert *experts;
} Product;

#if X86
/* ---- bfloat16 on AVX-512 BF16 -------------------------------------------------------------------------------- */
#define BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")))
#define BF16_INLINE INLINE BF16_TARGET

/* 32 values of a block as bfloat16, scale included, in groups of four: 0 4 1 5 2 6 3 7. Each 64 bits of the result take
 * 16 bits of the block, a nibble to a word; what stands above a nibble does not count, as both halves of the table are
 * the same. */
BF16_INLINE __m512i decode(const uint8_t *block, uint8_t scale) {
    const __m512i nibbles = _mm512_set_epi64(0x003c003800340030, 0x003c003800340030, 0x002c002800240020,
                                             0x002c002800240020, 0x001c001800140010, 0x001c001800140010,
                                             0x000c000800040000, 0x000c000800040000);
    __m512i table = _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i *)TABLE[scale]));
    __m512i bytes = _mm512_broadcast_i64x2(_mm_loadu_si128((const __m128i *)block));
    return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(nibbles, bytes), table);
}

/* A row of x in the order of `decode`. */
BF16_TARGET static void permute_row(const uint16_t *x, uint16_t *to, long in) {
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    for (long k = 0; k < in; k += BLOCK)
        _mm512_storeu_si512(to + k, _mm512_permutexvar_epi64(order, _mm512_loadu_si512(x + k)));
}

/* The sums of four vectors. */
BF16_INLINE __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* y[0..rows] = sums + bias. */
BF16_INLINE void store_sums(__m512 a, __m512 b, __m512 c, __m512 d, const uint16_t *bias, uint16_t *y, long rows) {
    const __mmask8 some = (__mmask8)((1 << rows) - 1);
    __m128 start = _mm_setzero_ps();
    if (bias)
        start = _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_maskz_loadu_epi16(some, bias)), 16));
    _mm_mask_storeu_epi16(y, some, (__m128i)_mm_cvtneps_pbh(_mm_add_ps(start, sums(a, b, c, d))));
}

/* y[t, 0..rows] of `tokens` rows of x, with weights either packed (`scales` given) or decoded already. */
BF16_INLINE void tile_bf16(const int tokens, const int packed, const uint8_t *weights, const uint8_t *scales,
                           long weight_stride, long scale_stride, const uint16_t *x, long in, const uint16_t *bias,
                           uint16_t *y, long y_stride, long rows) {
    __m512 sum[TOKENS][ROWS];
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int r = 0; r < ROWS; r++) sum[t][r] = _mm512_setzero_ps();
    for (long k = 0; k < in; k += BLOCK) {
        UNROLL for (int r = 0; r < ROWS; r++) {
            __m512i w;
            if (packed) {
                const uint8_t *block = weights + r * weight_stride + k / 2;
                _mm_prefetch((const char *)block + 6144, _MM_HINT_T1);
                w = decode(block, scales[r * scale_stride + k / BLOCK]);
            } else
                w = _mm512_load_si512(weights + r * weight_stride + 2 * k);
            UNROLL for (int t = 0; t < tokens; t++)
                sum[t][r] = _mm512_dpbf16_ps(sum[t][r], (__m512bh)_mm512_loadu_si512(x + t * in + k), (__m512bh)w);
        }
    }
    UNROLL for (int t = 0; t < tokens; t++)
        store_sums(sum[t][0], sum[t][1], sum[t][2], sum[t][3], bias, y + t * y_stride, rows);
}

/* As `tile_bf16` on packed weights, in half as wide vectors: two of them share one load of the table, and for few rows
 * of x loads are what takes the time. */
BF16_INLINE void tile_few_bf16(const int tokens, const uint8_t *weights, const uint8_t *scales, long weight_stride,
                               long scale_stride, const uint16_t *x, long in, const uint16_t *bias, uint16_t *y,
                               long y_stride, long rows) {
    const __m256i low = _mm256_set_epi64x(0x001c001800140010, 0x001c001800140010, 0x000c000800040000, 0x000c000800040000);
    const __m256i high = _mm256_add_epi16(low, _mm256_set1_epi16(0x20));
    __m256 sum[2][ROWS][2];
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int r = 0; r < ROWS; r++)
        sum[t][r][0] = sum[t][r][1] = _mm256_setzero_ps();
    for (long k = 0; k < in; k += BLOCK)
        UNROLL for (int r = 0; r < ROWS; r++) {
            const uint8_t *block = weights + r * weight_stride + k / 2;
            _mm_prefetch((const char *)block + 6144, _MM_HINT_T1);
            __m256i table = _mm256_load_si256((const __m256i *)TABLE[scales[r * scale_stride + k / BLOCK]]);
            __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)block));
            __m256i w[2] = {_mm256_permutexvar_epi16(_mm256_multishift_epi64_epi8(low, bytes), table),
                            _mm256_permutexvar_epi16(_mm256_multishift_epi64_epi8(high, bytes), table)};
            UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int h = 0; h < 2; h++)
                sum[t][r][h] = _mm256_dpbf16_ps(
                    sum[t][r][h], (__m256bh)_mm256_loadu_si256((const __m256i *)(x + t * in + k + 16 * h)), (__m256bh)w[h]);
        }
    UNROLL for (int t = 0; t < tokens; t++) {
        __m512 whole[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++)
            whole[r] = _mm512_insertf32x8(_mm512_castps256_ps512(sum[t][r][0]), sum[t][r][1], 1);
        store_sums(whole[0], whole[1], whole[2], whole[3], bias, y + t * y_stride, rows);
    }
}

#define TILES(call)            \
    switch (count) {           \
    case 1: call(1); break;    \
    case 2: call(2); break;    \
    case 3: call(3); break;    \
    case 4: call(4); break;    \
    case 5: call(5); break;    \
    default: call(6); break;   \
    }

/* One unit: GROUP_ROWS rows of one expert's weights, times all its rows of x (permuted). */
BF16_TARGET static void forward_bf16(const void *arguments, long index, void *scratch) {
    const Product *p = arguments;
    const Expert *e = &p->experts[index / p->units_each];
    const long in = p->in, first = index % p->units_each * GROUP_ROWS;
    const long last = first + GROUP_ROWS < p->out ? first + GROUP_ROWS : p->out;
    const uint16_t *x = p->x;
    uint16_t *y = p->y;
    for (long chunk = e->begin; chunk < e->end; chunk += TOKEN_CHUNK) {
        const long end = chunk + TOKEN_CHUNK < e->end ? chunk + TOKEN_CHUNK : e->end;
        const int packed = end - chunk <= TOKENS;
        for (long o = first, rows; o < last; o += rows) {
            /* What is left of ROWS at the end goes one by one: four times the same row, of which one is stored. */
            rows = last - o < ROWS ? 1 : ROWS;
            const uint8_t *blocks = e->blocks + o * in / 2, *scales = e->scales + o * in / BLOCK;
            const uint16_t *bias = e->bias ? (const uint16_t *)e->bias + o : NULL;
            const long stride = rows == ROWS ? in / 2 : 0, scale_stride = rows == ROWS ? in / BLOCK : 0;
            uint16_t *decoded = scratch;
            if (!packed)
                for (int r = 0; r < rows; r++)
                    for (long k = 0; k < in; k += BLOCK) {
                        _mm_prefetch((const char *)blocks + r * in / 2 + k / 2 + 6144, _MM_HINT_T1);
                        _mm512_store_si512(decoded + r * in + k,
                                           decode(blocks + r * in / 2 + k / 2, scales[r * in / BLOCK + k / BLOCK]));
                    }
            long tiles = (end - chunk + TOKENS - 1) / TOKENS, n = chunk;
            for (long tile = 0; tile < tiles; tile++) {
                const long count = (end - n + tiles - tile - 1) / (tiles - tile);
#define FEW(T) tile_few_bf16(T, blocks, scales, stride, scale_stride, x + n * in, in, bias, y + n * p->out + o, p->out, rows)
#define PACKED(T) tile_bf16(T, 1, blocks, scales, stride, scale_stride, x + n * in, in, bias, y + n * p->out + o, p->out, rows)
#define DECODED(T) tile_bf16(T, 0, (uint8_t *)decoded, NULL, 2 * in, 0, x + n * in, in, bias, y + n * p->out + o, p->out, rows)
                if (packed && count <= 2)
                    switch (count) {
                    case 1: FEW(1); break;
                    case 2: FEW(2); break;
                    }
                else if (packed)
                    TILES(PACKED)
                else
                    TILES(DECODED)
                n += count;
            }
        }
    }
}

enum { PANEL = 2 }; /* blocks of k that a backward unit takes */

/* dx[t, panel] of `tokens` rows of dy: the panel holds pairs of weight rows, interleaved. */
BF16_INLINE void tile_back_bf16(const int tokens, const uint16_t *panel, const uint16_t *dy, long out, uint16_t *dx,
                                long in, long num_blocks) {
    __m512 sum[TOKENS][2 * PANEL];
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int v = 0; v < 2 * PANEL; v++) sum[t][v] = _mm512_setzero_ps();
    for (long o = 0; o < out; o += 2, panel += 2 * PANEL * BLOCK) {
        __m512i w[2 * PANEL];
        UNROLL for (int v = 0; v < 2 * PANEL; v++) w[v] = _mm512_load_si512(panel + v * BLOCK);
        UNROLL for (int t = 0; t < tokens; t++) {
            uint32_t pair;
            if (o + 1 < out)
                memcpy(&pair, dy + t * out + o, 4);
            else
                pair = dy[t * out + o];
            __m512bh both = (__m512bh)_mm512_set1_epi32((int)pair);
            UNROLL for (int v = 0; v < 2 * PANEL; v++) sum[t][v] = _mm512_dpbf16_ps(sum[t][v], both, (__m512bh)w[v]);
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int b = 0; b < PANEL; b++) {
        if (b >= num_blocks) break;
        UNROLL for (int h = 0; h < 2; h++)
            _mm256_storeu_si256((__m256i *)(dx + t * in + b * BLOCK + h * 16),
                                (__m256i)_mm512_cvtneps_pbh(sum[t][2 * b + h]));
    }
}

/* One unit: PANEL blocks of k of one expert, for all its rows of dy. */
BF16_TARGET static void backward_bf16(const void *arguments, long index, void *scratch) {
    const Product *p = arguments;
    const Expert *e = &p->experts[index / p->units_each];
    const long in = p->in, out = p->out, block = index % p->units_each * PANEL;
    const long num_blocks = in / BLOCK - block < PANEL ? in / BLOCK - block : PANEL;
    uint16_t *panel = scratch;
    for (long o = 0; o < out; o += 2)
        for (long b = 0; b < PANEL; b++) {
            __m512i even = _mm512_setzero_si512(), odd = even;
            if (b < num_blocks) {
                const long at = o * in / BLOCK + block + b, next = at + in / BLOCK;
                _mm_prefetch((const char *)e->blocks + at * BYTES + 16 * in / 2, _MM_HINT_T0);
                even = decode(e->blocks + at * BYTES, e->scales[at]);
                if (o + 1 < out) odd = decode(e->blocks + next * BYTES, e->scales[next]);
            }
            uint16_t *to = panel + (o / 2 * PANEL + b) * 2 * BLOCK;
            _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
            _mm512_store_si512(to + BLOCK, _mm512_unpackhi_epi16(even, odd));
        }
    const uint16_t *dy = p->x;
    uint16_t *dx = p->y;
    long tiles = (e->end - e->begin + TOKENS - 1) / TOKENS, n = e->begin;
    for (long tile = 0; tile < tiles; tile++) {
        const long count = (e->end - n + tiles - tile - 1) / (tiles - tile);
#define BACK(T) tile_back_bf16(T, panel, dy + n * out, out, dx + n * in + block * BLOCK, in, num_blocks)
        TILES(BACK)
        n += count;
    }
}
#endif

/* ---- float32, in the compiler's vector types ----------------------------------------------------------------- */

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

INLINE void tile_f32(const int tokens, const float *weights, const float *x, long in, const float *bias, float *y,
                     long y_stride, long rows) {
    Floats sum[4][ROWS] = {0};
    for (long k = 0; k < in; k += LANES)
        UNROLL for (int r = 0; r < ROWS; r++) {
            const Floats w = *(const Floats *)(weights + (r < rows ? r : 0) * in + k);
            UNROLL for (int t = 0; t < tokens; t++) sum[t][r] += w * *(const Floats *)(x + t * in + k);
        }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) {
            float total = bias ? bias[r] : 0;
            for (int lane = 0; lane < LANES; lane++) total += sum[t][r][lane];
            y[t * y_stride + r] = total;
        }
}

INLINE void forward_f32(const Product *p, long index, float *decoded) {
    const Expert *e = &p->experts[index / p->units_each];
    const long in = p->in, first = index % p->units_each * GROUP_ROWS;
    const long last = first + GROUP_ROWS < p->out ? first + GROUP_ROWS : p->out;
    for (long o = first, rows; o < last; o += rows) {
        rows = last - o < ROWS ? 1 : ROWS;
        for (long r = 0; r < rows; r++)
            for (long b = 0; b < in / BLOCK; b++) {
                const long at = (o + r) * in / BLOCK + b;
                decode_f32(e->blocks + at * BYTES, e->scales[at], decoded + r * in + b * BLOCK);
            }
        const float *bias = e->bias ? (const float *)e->bias + o : NULL;
        for (long n = e->begin; n < e->end; n += 4) {
            const float *x = (const float *)p->x + n * in;
            float *y = (float *)p->y + n * p->out + o;
            switch (e->end - n) {
            case 1: tile_f32(1, decoded, x, in, bias, y, p->out, rows); break;
            case 2: tile_f32(2, decoded, x, in, bias, y, p->out, rows); break;
            case 3: tile_f32(3, decoded, x, in, bias, y, p->out, rows); break;
            default: tile_f32(4, decoded, x, in, bias, y, p->out, rows);
            }
        }
    }
}

INLINE void tile_back_f32(const int tokens, const float *panel, const float *dy, long out, float *dx, long in) {
    Floats sum[4][2] = {0};
    for (long o = 0; o < out; o++, panel += BLOCK)
        UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int v = 0; v < 2; v++)
            sum[t][v] += dy[t * out + o] * *(const Floats *)(panel + v * LANES);
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < 2; v++) *(Floats *)(dx + t * in + v * LANES) = sum[t][v];
}

INLINE void backward_f32(const Product *p, long index, float *panel) {
    const Expert *e = &p->experts[index / p->units_each];
    const long in = p->in, out = p->out, block = index % p->units_each;
    for (long o = 0; o < out; o++) {
        const long at = o * in / BLOCK + block;
        decode_f32(e->blocks + at * BYTES, e->scales[at], panel + o * BLOCK);
    }
    for (long n = e->begin; n < e->end; n += 4) {
        const float *dy = (const float *)p->x + n * out;
        float *dx = (float *)p->y + n * in + block * BLOCK;
        switch (e->end - n) {
        case 1: tile_back_f32(1, panel, dy, out, dx, in); break;
        case 2: tile_back_f32(2, panel, dy, out, dx, in); break;
        case 3: tile_back_f32(3, panel, dy, out, dx, in); break;
        default: tile_back_f32(4, panel, dy, out, dx, in);
        }
    }
}

/* ---- the activation ------------------------------------------------------------------------------------------ */

typedef struct {
    const void *gate_up; /* [count, 2]: gate and up side by side */
    const void *d_out;   /* [count], for the gradient */
    void *to;            /* [count] forward, [count, 2] backward */
    long count;
    int half;            /* bfloat16, or float32 */
    float alpha, limit;
} Activation;

enum { ACTIVATED = 4096 };

INLINE float from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

/* exp by 2^n times a polynomial, to about 1e-7; written so that compilers make vectors of it. */
INLINE float exponential(float v) {
    v = v < -87.0f ? -87.0f : v > 87.0f ? 87.0f : v;
    const float n = (v * 1.44269504f + 12582912.0f) - 12582912.0f;
    const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

INLINE float sigmoid(float v) { return v < -87.0f ? 0.0f : 1.0f / (1.0f + exponential(-v)); }

INLINE float load(const void *from, long at, int half) {
    return half ? from_bf16(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

INLINE void store(void *to, long at, int half, float value) {
    if (half)
        ((uint16_t *)to)[at] = to_bf16(value);
    else
        ((float *)to)[at] = value;
}

/* (up + 1) * gate * sigmoid(alpha * gate), gate clamped from above and up from both sides. */
INLINE void activate(const Activation *a, long first, long last, int half) {
    const float alpha = a->alpha, limit = a->limit;
    for (long i = first; i < last; i++) {
        float gate = load(a->gate_up, 2 * i, half), up = load(a->gate_up, 2 * i + 1, half);
        gate = gate > limit ? limit : gate;
        up = up > limit ? limit : up < -limit ? -limit : up;
        store(a->to, i, half, (up + 1) * gate * sigmoid(alpha * gate));
    }
}

/* Its gradient: none where a clamp holds. */
INLINE void activate_back(const Activation *a, long first, long last, int half) {
    const float alpha = a->alpha, limit = a->limit;
    for (long i = first; i < last; i++) {
        const float g = load(a->gate_up, 2 * i, half), u = load(a->gate_up, 2 * i + 1, half);
        const float d = load(a->d_out, i, half);
        const float gate = g > limit ? limit : g, up = u > limit ? limit : u < -limit ? -limit : u;
        const float s = sigmoid(alpha * gate);
        const float d_gate = d * (up + 1) * s * (1 + alpha * gate * (1 - s)), d_up = d * gate * s;
        store(a->to, 2 * i, half, g > limit ? 0 : d_gate);
        store(a->to, 2 * i + 1, half, u > limit || u < -limit ? 0 : d_up);
    }
}

INLINE void activation_unit(const Activation *a, long index) {
    const long first = index * ACTIVATED, last = first + ACTIVATED < a->count ? first + ACTIVATED : a->count;
    if (a->d_out)
        a->half ? activate_back(a, first, last, 1) : activate_back(a, first, last, 0);
    else
        a->half ? activate(a, first, last, 1) : activate(a, first, last, 0);
}

#define FOR_TARGET(name, target)                                                                       \
    target static void forward_f32_##name(const void *p, long index, void *scratch) {                  \
        forward_f32(p, index, scratch);                                                                \
    }                                                                                                  \
    target static void backward_f32_##name(const void *p, long index, void *scratch) {                 \
        backward_f32(p, index, scratch);                                                               \
    }                                                                                                  \
    target static void activation_##name(const void *a, long index, void *scratch) {                   \
        (void)scratch;                                                                                 \
        activation_unit(a, index);                                                                     \
    }

FOR_TARGET(plain, )
#if X86
FOR_TARGET(avx2, __attribute__((target("avx2,fma"))))
FOR_TARGET(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"))))
#endif

/* ---- entry points -------------------------------------------------------------------------------------------- */

typedef void (*unit_fn)(const void *, long, void *);

typedef struct {
    unit_fn forward, backward, activation;
} Implementation;

static Implementation implementation(int which) {
    switch (which) {
#if X86
    case AVX512_BF16: return (Implementation){forward_bf16, backward_bf16, activation_avx512};
    case AVX512: return (Implementation){forward_f32_avx512, backward_f32_avx512, activation_avx512};
    case AVX2: return (Implementation){forward_f32_avx2, backward_f32_avx2, activation_avx2};
#endif
    default: return (Implementation){forward_f32_plain, backward_f32_plain, activation_plain};
    }
}

/* The clamped SwiGLU of `count` pairs in gate_up, or its gradient if d_out is not NULL. Returns 0. */
int gptoss_swiglu(int which, int half, const void *gate_up, const void *d_out, void *to, long count, double alpha,
                  double limit, fork_join parallel, int num_threads) {
    const Team team = {parallel, num_threads};
    const Activation a = {gate_up, d_out, to, count, half, (float)alpha, (float)limit};
    Job job = {.unit = implementation(which).activation,
               .arguments = &a,
               .num_units = (count + ACTIVATED - 1) / ACTIVATED};
    return run(&team, &job);
}

typedef struct {
    const uint16_t *x;
    uint16_t *to;
    long num_rows, in;
} Permutation;

enum { PERMUTED_ROWS = 32 };

#if X86
static void permute_rows(const void *arguments, long index, void *scratch) {
    (void)scratch;
    const Permutation *p = arguments;
    const long first = index * PERMUTED_ROWS, last = first + PERMUTED_ROWS;
    for (long n = first; n < last && n < p->num_rows; n++) permute_row(p->x + n * p->in, p->to + n * p->in, p->in);
}
#endif

/* The product of every expert that has rows; `ends` [E] are the cumulative ends of their rows. Rows of y that belong to
 * no expert are not touched. x and y are bfloat16 if `which` is AVX512_BF16, else float32; `bias` likewise, or NULL.
 * `room` holds a copy of x for the bfloat16 forward. Returns 0, or -1 if there is no memory. */
int gptoss_product(int which, int backward, const void *x, void *y, const int32_t *ends, const uint8_t *blocks,
                   const uint8_t *scales, const void *bias, void *room, long num_experts, long in, long out,
                   fork_join parallel, int num_threads) {
    const Team team = {parallel, num_threads};
    const size_t item = which == AVX512_BF16 ? 2 : 4;
    Expert *experts = malloc((size_t)num_experts * sizeof *experts);
    if (!experts) return -1;
    long active = 0;
    for (long e = 0, begin = 0; e < num_experts; begin = ends[e++])
        if (ends[e] > begin)
            experts[active++] = (Expert){begin, ends[e], blocks + (size_t)e * out * (in / 2),
                                         scales + (size_t)e * out * (in / BLOCK),
                                         bias ? (const char *)bias + e * out * item : NULL};
    int status = 0;
#if X86
    if (which == AVX512_BF16 && !backward && active) {
        const Permutation p = {x, room, ends[num_experts - 1], in};
        Job job = {.unit = permute_rows, .arguments = &p, .num_units = (p.num_rows + PERMUTED_ROWS - 1) / PERMUTED_ROWS};
        status = run(&team, &job);
        x = room;
    }
#else
    (void)room;
#endif
    const Implementation chosen = implementation(which);
    const long wide = which == AVX512_BF16 ? PANEL : 1;
    const Product p = {x, y, in, out,
                       backward ? (in / BLOCK + wide - 1) / wide : (out + GROUP_ROWS - 1) / GROUP_ROWS, experts};
    Job job = {.unit = backward ? chosen.backward : chosen.forward,
               .arguments = &p,
               .num_units = active * p.units_each,
               .scratch_bytes = (backward ? (size_t)(out + 1) * wide * BLOCK : (size_t)ROWS * in) * item};
    if (!status) status = run(&team, &job);
    free(experts);
    return status;
}
