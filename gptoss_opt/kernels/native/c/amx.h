/* Products of bfloat16 with packed or dense weights on AMX: tiles of 16 rows of 64 bytes, sums in float32.
 *
 * With PLAY_TILES the tile instructions are played in plain C, so that the numbers can be tested on any processor that has
 * AVX-512 BF16. */
#pragma once
#include "bfloat16.h"

enum { TILE = LANES }; /* rows of a tile; also the least rows of x of an expert that are worth tiles */

#if defined(PLAY_TILES)
#define AMX_TARGET BF16_TARGET
static _Thread_local float PLAYED[8][TILE][16];
static int tiles_permitted(void) { return 1; }
#define tile_begin() memset(PLAYED, 0, sizeof PLAYED)
#define tile_end() ((void)0)
#define tile_zero(to) memset(PLAYED[to], 0, sizeof PLAYED[to])
#define tile_load(to, from, stride) \
    for (int i_ = 0; i_ < TILE; i_++) memcpy(PLAYED[to][i_], (const char *)(from) + i_ * (stride), 64)
#define tile_store(from, to, stride) \
    for (int i_ = 0; i_ < TILE; i_++) memcpy((char *)(to) + i_ * (stride), PLAYED[from][i_], 64)
static void tile_add(int to, int a, int b) {
    for (int m = 0; m < TILE; m++)
        for (int k = 0; k < TILE; k++)
            for (int n = 0; n < TILE; n++)
                for (int h = 0; h < 2; h++)
                    PLAYED[to][m][n] += load(PLAYED[a][m], 2 * k + h, 1) * load(PLAYED[b][k], 2 * n + h, 1);
}
#elif X86 && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define AMX_TARGET \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")))
/* Whether the processor has the instructions, and Linux lets this process use them. Tile data has to be asked for. */
static int tiles_permitted(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 }; /* arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) */
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return 0;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
/* All eight tiles have 16 rows of 64 bytes. */
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileConfig;
static const TileConfig TILES = {.palette = 1,
                                 .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                 .rows = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE}};
#define tile_begin() _tile_loadconfig(&TILES)
#define tile_end() _tile_release()
#define tile_zero(to) _tile_zero(to)
#define tile_load(to, from, stride) _tile_loadd(to, from, stride)
#define tile_store(from, to, stride) _tile_stored(from, to, stride)
#define tile_add(to, a, b) _tile_dpbf16ps(to, a, b)
#endif

#if defined(AMX_TARGET)
#define AMX_INLINE INLINE AMX_TARGET
/* Not every compiler knows that loading a tile reads memory: what was written there is written before this. */
#define WRITTEN() __asm__ volatile("" ::: "memory")

/* Where tile `k` of some rows begins: the last one overlaps the one before, so that all are whole. */
INLINE long tile_at(long k, long rows) { return (k + 1) * TILE <= rows ? k * TILE : rows - TILE; }

/* ---- dot: weights and x in tiles --------------------------------------------------------------- */

/* A tile of rows of x for each block of columns: its pairs of values, in the order of `decode`, side by side by row. */
AMX_TARGET static void tile_rows(const Gathering *g, long first, uint16_t *to) {
    for (long at = 0; at < g->length; at += BLOCK, to += TILE * BLOCK) {
        __m512i rows[TILE];
        for (int i = 0; i < TILE; i++) rows[i] = ordered((const uint16_t *)g->x + row_of(g, first + i) * g->length + at);
        transpose_words(rows);
        for (int i = 0; i < TILE; i++) _mm512_storeu_si512(to + i * BLOCK, rows[i]);
    }
}

/* 2 TILE rows of weights: for each block of columns two tiles, one row of the block after the other. Past the last, 0. */
AMX_INLINE void weight_tiles(const Expert *e, long first, long count, long length, uint16_t *to) {
    const long blocks = length / BLOCK;
    for (long i = 0; i < 2 * TILE; i++)
        for (long b = 0; b < blocks; b++) {
            __m512i values = _mm512_setzero_si512();
            if (i < count) {
                const long at = (first + i) * blocks + b;
                _mm_prefetch((const char *)e->weights + (at + 2 * TILE * blocks) * (e->scales ? BYTES : 2 * BLOCK), _MM_HINT_T1);
                values = weights_at(e, at);
            }
            _mm512_store_si512(to + (b * 2 * TILE + i) * BLOCK, values);
        }
}

/* y[n, r..r + count] of the TILE rows from n on, from sums [count][TILE], with the bias added. */
AMX_INLINE void store_tile(const Product *p, const Expert *e, long n, long r, long count, const float *sums) {
    const __mmask16 some = (__mmask16)((1u << (count < TILE ? count : TILE)) - 1);
    __m512i columns[TILE];
    __m512 start = _mm512_setzero_ps();
    if (e->bias) {
        const __m256i bias = _mm256_maskz_loadu_epi16(some, (const uint16_t *)e->bias + r);
        start = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bias), 16));
    }
    for (int i = 0; i < TILE; i++) columns[i] = _mm512_loadu_si512(sums + i * TILE);
    transpose_words(columns);
    for (int i = 0; i < TILE; i++) {
        const __m512 row = _mm512_add_ps(start, _mm512_castsi512_ps(columns[i]));
        _mm256_mask_storeu_epi16((uint16_t *)p->y + (n + i) * p->rows + r, some, (__m256i)_mm512_cvtneps_pbh(row));
    }
}

/* As dot_bf16; an expert with TILE rows of x or more has them in tiles. */
AMX_TARGET static void dot_amx(const void *arguments, long index, void *scratch) {
    const Product *p = arguments;
    const Expert *e = &p->experts[index / p->units_each];
    const long tokens = e->end - e->begin, length = p->length, first = index % p->units_each * GROUP_ROWS;
    if (tokens < TILE) {
        dot_bf16(arguments, index, scratch);
        return;
    }
    const long last = first + GROUP_ROWS < p->rows ? first + GROUP_ROWS : p->rows, tiles = (tokens + TILE - 1) / TILE;
    const uint16_t *x = (const uint16_t *)p->x + e->at * length;
    uint16_t *const weights = scratch;
    float sums[4][TILE * TILE] __attribute__((aligned(64)));
    tile_begin();
    for (long r = first; r < last; r += 2 * TILE) {
        const long count = last - r < 2 * TILE ? last - r : 2 * TILE;
        weight_tiles(e, r, count, length, weights);
        WRITTEN();
        for (long k = 0; k < tiles; k += 2) {
            const long next = k + 1 < tiles ? k + 1 : k;
            const uint16_t *w = weights, *one = x + k * TILE * length, *other = x + next * TILE * length;
            tile_zero(0);
            tile_zero(1);
            tile_zero(2);
            tile_zero(3);
            for (long at = 0; at < length; at += BLOCK, w += 2 * TILE * BLOCK, one += TILE * BLOCK, other += TILE * BLOCK) {
                tile_load(4, w, 64);
                tile_load(5, w + TILE * BLOCK, 64);
                tile_load(6, one, 64);
                tile_load(7, other, 64);
                tile_add(0, 4, 6);
                tile_add(1, 5, 6);
                tile_add(2, 4, 7);
                tile_add(3, 5, 7);
            }
            tile_store(0, sums[0], 64);
            tile_store(1, sums[1], 64);
            tile_store(2, sums[2], 64);
            tile_store(3, sums[3], 64);
            for (int t = 0; t < 2; t++) {
                const long n = e->begin + tile_at(t ? next : k, tokens);
                store_tile(p, e, n, r, count, sums[2 * t]);
                if (count > TILE) store_tile(p, e, n, r + TILE, count - TILE, sums[2 * t + 1]);
            }
        }
    }
    tile_end();
}

/* ---- columns: x as it is, weights in panels --------------------------------------------------------------------- */

/* As columns_bf16. */
AMX_TARGET static void columns_amx(const void *arguments, long index, void *scratch) {
    const Product *p = arguments;
    const Expert *e = &p->experts[index / p->units_each];
    const long rows = p->rows, length = p->length, first = index % p->units_each * GROUP_BLOCKS;
    const long last = first + GROUP_BLOCKS < length / BLOCK ? first + GROUP_BLOCKS : length / BLOCK;
    const long tokens = e->end - e->begin, tiles = (tokens + TILE - 1) / TILE;
    if (tokens < TILE || rows % BLOCK) {
        columns_bf16(arguments, index, scratch);
        return;
    }
    const uint16_t *x = (const uint16_t *)p->x + e->begin * rows, *panel = scratch;
    float sums[2][TILE][PANEL_WIDTH] __attribute__((aligned(64)));
    tile_begin();
    for (long block = first, blocks; block < last; block += blocks) {
        blocks = last - block >= PANEL ? PANEL : 1;
        fill_panel(e, block, blocks, rows, length, scratch);
        WRITTEN();
        const uint16_t *bias = e->bias ? (const uint16_t *)e->bias + block * BLOCK : NULL;
        for (long k = 0; k < tiles; k += 2) {
            const long n[2] = {tile_at(k, tokens), tile_at(k + 1 < tiles ? k + 1 : k, tokens)};
            for (int half = 0; half < blocks; half++) {
                tile_zero(0);
                tile_zero(1);
                tile_zero(2);
                tile_zero(3);
                for (long r = 0; r < rows; r += BLOCK) {
                    const uint16_t *w = panel + (r / 2 * PANEL + half) * 2 * BLOCK;
                    tile_load(4, x + n[0] * rows + r, 2 * rows);
                    tile_load(5, x + n[1] * rows + r, 2 * rows);
                    tile_load(6, w, 2 * 2 * PANEL * BLOCK);
                    tile_load(7, w + BLOCK, 2 * 2 * PANEL * BLOCK);
                    tile_add(0, 4, 6);
                    tile_add(1, 4, 7);
                    tile_add(2, 5, 6);
                    tile_add(3, 5, 7);
                }
                tile_store(0, &sums[0][0][2 * half * TILE], sizeof sums[0][0]);
                tile_store(1, &sums[0][0][(2 * half + 1) * TILE], sizeof sums[0][0]);
                tile_store(2, &sums[1][0][2 * half * TILE], sizeof sums[0][0]);
                tile_store(3, &sums[1][0][(2 * half + 1) * TILE], sizeof sums[0][0]);
            }
            for (int t = 0; t < 2; t++)
                for (int i = 0; i < TILE; i++) {
                    __m512 sum[2 * PANEL];
                    uint16_t *y = (uint16_t *)p->y + (e->begin + n[t] + i) * length + block * BLOCK;
                    UNROLL for (int v = 0; v < 2 * PANEL; v++) sum[v] = _mm512_load_ps(&sums[t][i][v * TILE]);
                    store_columns(2 * PANEL, sum, bias, y, blocks * BLOCK);
                }
        }
    }
    tile_end();
}
#endif
