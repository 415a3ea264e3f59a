/* Matrix products with expert weights on CPUs, packed as MXFP4 or dense, and the activation. Loaded with ctypes.
 *
 * Packed weights are as in the released checkpoints: 32 values of a row share a scale 2^(s - 127) and take 16 bytes, the
 * first of each two in the low four bits (OCP Microscaling Formats v1.0). Sums are in float32.
 */
#include "activation.h"
#include "common.h"
#include "format.h"
#include "layer.h"
#include "linear.h"
#include "low_rank.h"
#include "neon.h"
#include "norm.h"
#include "paged.h"
#include "rotary.h"
#include "routes.h"
#include "threads.h"
#include "widths.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if X86
#include "amx.h"
#include "bfloat16.h"
#include "paged_bf16.h"
#endif

/* Fill the tables. Call once, before anything else. Returns the best implementation that this CPU runs. */
int gptoss_init(void) {
    create_scratch_key();
    for (int s = 0; s < 256; s++) {
        SCALE[s] = s == 255 ? NAN : ldexpf(1.0f, s - 128);
        for (int code = 0; code < 16; code++) {
            TABLE[s][code] = to_bf16(HALVES[code] * SCALE[s]);
            SPLIT[s][0][code] = (uint8_t)TABLE[s][code];
            SPLIT[s][1][code] = (uint8_t)(TABLE[s][code] >> 8);
        }
    }
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")) {
#if defined(AMX_TARGET)
            if (tiles_permitted()) return AMX;
#endif
            return BF16;
        }
        return AVX512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
#if defined(NEON_BF16)
    if (has_neon_bf16()) return BF16;
#endif
    return PLAIN;
}

#define FOR_TARGET(name, width, target)                                                                             \
    target static void dot_##name(const void *p, long index, void *scratch) {                                \
        dot_##width(p, index, scratch);                                                                      \
    }                                                                                                        \
    target static void columns_##name(const void *p, long index, void *scratch) {                            \
        columns_##width(p, index, scratch);                                                                  \
    }                                                                                                        \
    target static void activation_##name(const void *a, long index, void *scratch) {                         \
        (void)scratch;                                                                                       \
        activation_unit(a, index);                                                                           \
    }                                                                                                        \
    target static void pack_##name(const void *f, long index, void *scratch) {                               \
        (void)scratch;                                                                                       \
        pack_unit(f, index);                                                                                 \
    }                                                                                                        \
    target static void pack_columns_##name(const void *p, long index, void *scratch) {                       \
        (void)scratch;                                                                                       \
        pack_columns_unit(p, index);                                                                         \
    }                                                                                                        \
    target static void combine_##name(const void *c, long index, void *scratch) {                            \
        (void)scratch;                                                                                       \
        combine_unit(c, index);                                                                              \
    }                                                                                                        \
    target static void rank_in_##name(const void *p, long index, void *scratch) {                            \
        low_rank_in_unit_##width(p, index, scratch);                                                                 \
    }                                                                                                        \
    target static void rank_out_##name(const void *p, long index, void *scratch) {                           \
        (void)scratch;                                                                                       \
        low_rank_out_unit(p, index);                                                                         \
    }                                                                                                        \
    target static void rank_sums_##name(const void *p, long index, void *scratch) {                          \
        (void)scratch;                                                                                       \
        low_rank_sums_unit(p, index);                                                                        \
    }                                                                                                        \
    target static void linear_##name(const void *p, long index, void *scratch) {                             \
        (void)scratch;                                                                                       \
        linear_unit_##width(p, index);                                                                       \
    }                                                                                                        \
    target static void rotary_##name(const void *p, long index, void *scratch) {                             \
        (void)scratch;                                                                                       \
        rotary_unit(p, index);                                                                               \
    }                                                                                                        \
    target static void add_##name(const void *p, long index, void *scratch) {                                \
        (void)scratch;                                                                                       \
        add_unit(p, index);                                                                                  \
    }                                                                                                        \
    target static void norm_##name(const void *p, long index, void *scratch) {                               \
        (void)scratch;                                                                                       \
        norm_unit(p, index);                                                                                 \
    }                                                                                                        \
    target static void paged_##name(const void *p, long index, void *scratch) { paged_unit(p, index, scratch); }

FOR_TARGET(plain, 4, )
#if X86
FOR_TARGET(avx2, 8, AVX2_TARGET)
FOR_TARGET(avx512, 16, AVX512_TARGET)
#endif

enum { HUGE = 1 << 21 }; /* bytes of a huge page */

typedef void (*unit_fn)(const void *, long, void *);

typedef struct {
    unit_fn dot, columns, linear, activation, pack, pack_columns, combine, paged, rank_in, rank_out, rank_sums, norm, rotary, add;
} Implementation;

#define IMPLEMENTATION(dot, columns, linear, name)                                                                   \
    (Implementation) {                                                                                               \
        dot, columns, linear, activation_##name, pack_##name, pack_columns_##name, combine_##name, paged_##name,      \
            rank_in_##name, rank_out_##name, rank_sums_##name, norm_##name, rotary_##name, add_##name                                           \
    }

#if X86
/* Attention: several queries of a unit in bfloat16 by their products; one, whose keys are read but once, in float32. */
BF16_TARGET static void paged_bf16(const void *arguments, long index, void *scratch) {
    const PagedArguments *p = arguments;
    if (p->half && p->head_dim % PANEL_WIDTH == 0 && p->blocks[index / p->kv_heads * 4 + 2] > 1)
        paged_block_bf16(p, index, scratch);
    else
        paged_avx512(arguments, index, scratch);
}

static Implementation with_products(Implementation all) {
    all.paged = paged_bf16;
    return all;
}
#endif

static Implementation implementation(int which) {
    switch (which) {
#if X86
#if defined(AMX_TARGET)
    case AMX: return with_products(IMPLEMENTATION(dot_amx, columns_amx, linear_bf16, avx512));
#endif
    case BF16: return with_products(IMPLEMENTATION(dot_bf16, columns_bf16, linear_bf16, avx512));
    case AVX512: return IMPLEMENTATION(dot_avx512, columns_avx512, linear_avx512, avx512);
    case AVX2: return IMPLEMENTATION(dot_avx2, columns_avx2, linear_avx2, avx2);
#elif defined(NEON_BF16)
    case BF16: return IMPLEMENTATION(dot_neon, columns_neon, linear_neon, plain);
#endif
    default: return IMPLEMENTATION(dot_plain, columns_plain, linear_plain, plain);
    }
}

static size_t item_of(int which) { return which >= BF16 ? 2 : 4; }

/* Work that takes no scratch memory. Returns 0. */
static int run_units(const Team *team, unit_fn unit, const void *arguments, long num_units) {
    Job job = {.unit = unit, .arguments = arguments, .num_units = num_units};
    return run(team, &job);
}

/* The clamped SwiGLU of `count` pairs in gate_up, or its gradient if d_out is not NULL. Returns 0. */
int gptoss_swiglu(int which, int half, const void *gate_up, const void *d_out, void *to, long count, double alpha,
                  double limit, fork_join parallel, int num_threads) {
    const Team team = {parallel, num_threads};
    const Activation a = {gate_up, d_out, to, count, half, (float)alpha, (float)limit};
    return run_units(&team, implementation(which).activation, &a, (count + ACTIVATED - 1) / ACTIVATED);
}

/* `num_blocks` blocks of values, bfloat16 (`half`) or float32. Returns 0. */
int gptoss_unpack(int half, const uint8_t *blocks, const uint8_t *scales, void *to, long num_blocks, fork_join parallel,
                  int num_threads) {
    const Team team = {parallel, num_threads};
    const Formatting f = {.to = to, .blocks = blocks, .scales = scales, .num_blocks = num_blocks, .half = half};
    return run_units(&team, unpack_unit, &f, (num_blocks + FORMATTED - 1) / FORMATTED);
}

/* The other way. Returns 0, or 1 if a value is not finite. */
int gptoss_pack(int which, int half, const void *from, uint8_t *blocks, uint8_t *scales, long num_blocks,
                fork_join parallel, int num_threads) {
    const Team team = {parallel, num_threads};
    atomic_int not_finite = 0;
    const Formatting f = {.from = from, .to_blocks = blocks, .to_scales = scales, .num_blocks = num_blocks, .half = half,
                          .not_finite = &not_finite};
    const int status = run_units(&team, implementation(which).pack, &f, (num_blocks + FORMATTED - 1) / FORMATTED);
    return status ? status : atomic_load(&not_finite);
}

/* Dense weights [rows, length] packed along their rows: blocks [length, rows / 32, 16]. `sums` gets two numbers for each
 * STRIP columns: the sums of the squares of the values and of their errors. Returns 0, or 1 if a value is not finite. */
int gptoss_pack_columns(int which, int half, const void *from, uint8_t *blocks, uint8_t *scales, double *sums, long rows,
                        long length, fork_join parallel, int num_threads) {
    const Team team = {parallel, num_threads};
    atomic_int not_finite = 0;
    const Packing p = {from, blocks, scales, sums, rows, length, half, &not_finite};
    const int status = run_units(&team, implementation(which).pack_columns, &p, (length + STRIP - 1) / STRIP);
    return status ? status : atomic_load(&not_finite);
}

/* Whether a product takes its rows of x otherwise than they are: in the order of `decode` where weights are packed, and on
 * AMX, of experts that have enough of them, in tiles. */
static int takes_order(int which, int columns, const Matrices *m) {
    return X86 && !columns && (which == AMX || (which == BF16 && m->scales));
}

/* Rows of x that an expert has, and of the room that they take in that order, where tiles overlap. */
static long room_of(int which, long count) {
#if defined(AMX_TARGET)
    if (which == AMX && count >= TILE) return (count + TILE - 1) / TILE * TILE;
#else
    (void)which;
#endif
    return count;
}

/* The products (see Product) of all experts that have rows, `columns` or dot. Returns 0, -1 if there is no memory, or -2
 * for dense weights where they cannot be. */
static int product(const Team *team, int which, int columns, const void *x, void *y, const int32_t *offsets,
                   const Matrices *m, long num_experts) {
    if (!m->scales && which < BF16) return -2;
    const size_t item = item_of(which), values = (size_t)m->rows * m->length;
    const long out = columns ? m->length : m->rows;
    Expert *experts = malloc((size_t)(num_experts ? num_experts : 1) * sizeof *experts);
    if (!experts) return -1;
    long active = 0;
    for (long e = 0, begin = 0, at = 0; e < num_experts; at += room_of(which, offsets[e] - begin), begin = offsets[e++])
        if (offsets[e] > begin)
            experts[active++] = (Expert){begin, offsets[e], at, m->weights + e * (m->scales ? values / 2 : values * 2),
                                         m->scales ? m->scales + e * values / BLOCK : NULL,
                                         m->bias ? (const char *)m->bias + e * out * item : NULL};
    long unit = columns ? 1 : GROUP_ROWS, panel = 1, strip = ROWS;
    if (which >= BF16 && columns) unit = GROUP_BLOCKS;
#if X86
    if (which >= BF16) {
        panel = PANEL;
        strip = PANEL_WIDTH;
    }
#endif
    const Product p = {x, y, m->rows, m->length, ((columns ? m->length / BLOCK : m->rows) + unit - 1) / unit, experts};
    Job job = {.unit = columns ? implementation(which).columns : implementation(which).dot,
               .arguments = &p,
               .num_units = active * p.units_each,
               .scratch_bytes = (columns ? (size_t)(m->rows + 1) * panel * BLOCK : (size_t)strip * m->length) * item};
    const int status = run(team, &job);
    free(experts);
    return status;
}

static int gather(const Team *team, const Gathering *g) {
    return run_units(team, gather_rows, g, (g->num_rows + GATHERED_ROWS - 1) / GATHERED_ROWS);
}

#if X86
/* Rows of one expert that are brought into the order of `decode` together. */
typedef struct {
    long first, count, to;
    int tile;
} Some;

typedef struct {
    const Gathering *g;
    const Some *all;
    int packed; /* whether the weights are: then few rows take the order of `decode` too */
} Ordering;

static void order_unit(const void *arguments, long index, void *scratch) {
    (void)scratch;
    const Ordering *o = arguments;
    const Some *some = &o->all[index];
    const long length = o->g->length;
    uint16_t *to = (uint16_t *)o->g->to + some->to * length;
#if defined(AMX_TARGET)
    if (some->tile) {
        tile_rows(o->g, some->first, to);
        return;
    }
#endif
    if (o->packed)
        order_rows(o->g, some->first, some->count, to);
    else
        for (long i = 0; i < some->count; i++)
            memcpy(to + i * length, (const uint16_t *)o->g->x + row_of(o->g, some->first + i) * length, 2 * length);
}

/* Gather rows into the order of `decode`: see takes_order. */
static int order(const Team *team, int which, int packed, const Gathering *g, const int32_t *offsets, long num_experts) {
    Some *all = malloc((size_t)(num_experts + g->num_rows / 16 + 1) * sizeof *all);
    if (!all) return -1;
    long count = 0;
    for (long e = 0, begin = 0, at = 0; e < num_experts; begin = offsets[e++]) {
        const long rows = offsets[e] - begin, room = room_of(which, rows);
#if defined(AMX_TARGET)
        if (which == AMX && rows >= TILE) {
            for (long k = 0; k < room / TILE; k++)
                all[count++] = (Some){begin + tile_at(k, rows), TILE, at + k * TILE, 1};
            at += room;
            continue;
        }
#endif
        for (long n = 0; n < rows; n += 16)
            all[count++] = (Some){begin + n, rows - n < 16 ? rows - n : 16, at + n, 0};
        at += room;
    }
    const Ordering ordering = {g, all, packed};
    const int status = run_units(team, order_unit, &ordering, count);
    free(all);
    return status;
}
#endif

/* Gather rows, in the order that a product takes. */
static int gather_for(const Team *team, int which, int in_order, int packed, const Gathering *g, const int32_t *offsets,
                      long num_experts) {
#if X86
    if (in_order) return order(team, which, packed, g, offsets, num_experts);
#else
    (void)which, (void)in_order, (void)packed, (void)offsets, (void)num_experts;
#endif
    return gather(team, g);
}

/* One product. `offsets` [E] say where the rows of each expert end in x; rows of y that belong to no expert are not
 * touched. x, y and bias are bfloat16 from BF16 on, else float32. `room` holds a copy of x where one in
 * another order is needed, on AMX with 16 rows more for each expert. Returns what `product` does. */
int gptoss_product(int which, int columns, const void *x, void *y, const int32_t *offsets, const Matrices *weights,
                   void *room, long num_experts, fork_join parallel, int num_threads) {
    const Team team = {parallel, num_threads};
    if (takes_order(which, columns, weights) && num_experts) {
        const long num_rows = offsets[num_experts - 1];
        const Gathering g = {.x = x, .to = room, .num_rows = num_rows, .length = weights->length, .item = 2};
        if (gather_for(&team, which, 1, weights->scales != NULL, &g, offsets, num_experts)) return -1;
        x = room;
    }
    return product(&team, which, columns, x, y, offsets, weights, num_experts);
}

/* Memory that one call leaves to the next, as fresh pages cost more than small calls take, and in a virtual machine more
 * than large ones. It is nobody's while it lies here. Its first bytes tell its size. */
static _Atomic(char *) kept_room;

enum { ROOM_HEAD = 64, ROOM_KEPT = 1 << 28 }; /* bytes; larger rooms are given back */

/* Memory of at least `bytes` bytes, in whole lines; on huge pages where they are worth it and Linux gives them. */
static char *room_for(size_t bytes) {
    char *room = atomic_exchange(&kept_room, NULL);
    if (room && *(size_t *)room >= bytes) return room + ROOM_HEAD;
    free(room);
    const size_t page = bytes < HUGE ? 64 : HUGE, whole = (bytes + ROOM_HEAD + page) / page * page;
    room = aligned_alloc(page, whole);
    if (!room) return NULL;
#if defined(MADV_HUGEPAGE)
    if (page == HUGE) madvise(room, whole, MADV_HUGEPAGE);
#endif
    *(size_t *)room = whole - ROOM_HEAD;
    return room + ROOM_HEAD;
}

static void leave_room(char *memory) {
    char *room = memory - ROOM_HEAD;
    free(*(size_t *)room > ROOM_KEPT ? room : atomic_exchange(&kept_room, room));
}

/* A whole layer, forward: x [T, H] to out [T, H] by the experts `indices` [T, K], weighted by `routing_weights` [T, K].
 * Dtypes are as in gptoss_product. Returns what `product` does. */
int gptoss_experts(int which, const void *x, const int64_t *indices, const float *routing_weights,
                   const Matrices *gate_up, const Matrices *down, void *out, long num_tokens, long top_k,
                   long num_experts, double alpha, double limit, fork_join parallel, int num_threads) {
    const Team team = {parallel, num_threads};
    const int columns = !gate_up->scales, half = which >= BF16;
    const long num_routes = num_tokens * top_k, hidden = columns ? gate_up->rows : gate_up->length;
    const long inner = columns ? down->rows : down->length;
    const size_t item = item_of(which);
    /* The rows of x, then what is activated in order; gate and up, then what the experts give; what is activated. */
    const size_t tiled = (size_t)num_routes + (which == AMX ? 16 * (size_t)num_experts : 0);
    const size_t first = tiled * (hidden > inner ? hidden : inner) * item;
    const size_t second = (size_t)num_routes * (hidden > 2 * inner ? hidden : 2 * inner) * item;
    const size_t third = (size_t)num_routes * inner * item;
    const size_t integers = 2 * (size_t)num_routes * sizeof(long) + (size_t)num_experts * sizeof(int32_t);
    char *rows = room_for(first + second + third + integers);
    if (!rows) return -1;
    char *pairs = rows + first, *activated = pairs + second;
    long *order = (long *)(activated + third), *inverse = order + num_routes;
    const Routes routes = {num_tokens, top_k, num_experts, order, inverse, (int32_t *)(inverse + num_routes)};
    sort_routes(&routes, indices);
    const long used = num_experts ? routes.offsets[num_experts - 1] : 0;
    const int in_order = takes_order(which, columns, gate_up);

    const Gathering g = {x, rows, order, top_k, used, hidden, item};
    int status = gather_for(&team, which, in_order, gate_up->scales != NULL, &g, routes.offsets, num_experts);
    if (!status) status = product(&team, which, columns, rows, pairs, routes.offsets, gate_up, num_experts);
    if (!status)
        status = gptoss_swiglu(which, half, pairs, NULL, activated, used * inner, alpha, limit, parallel, num_threads);
    if (!status && in_order) {
        const Gathering h = {.x = activated, .to = rows, .num_rows = used, .length = inner, .item = item};
        status = gather_for(&team, which, 1, down->scales != NULL, &h, routes.offsets, num_experts);
    }
    if (!status)
        status = product(&team, which, columns, in_order ? rows : activated, pairs, routes.offsets, down, num_experts);
    const Combining c = {&routes, pairs, routing_weights, out, hidden, half};
    if (!status) status = run_units(&team, implementation(which).combine, &c, num_tokens);
    leave_room(rows);
    return status;
}

/* A linear layer; bfloat16 (`half`) is multiplied as such on BF16. Returns 0. */
int gptoss_linear(int which, const Linear *linear, fork_join parallel, int num_threads) {
    const Team team = {parallel, num_threads};
    const long each = linear_each(linear);
    const unit_fn unit = implementation(linear->half || which < BF16 ? which : AVX512).linear;
    return run_units(&team, unit, linear, (linear->rows + each - 1) / each);
}

/* RMS norms of all rows. Returns 0. */
int gptoss_norm(int which, const Norm *norm, fork_join parallel, int num_threads) {
    const Team team = {parallel, num_threads};
    return run_units(&team, implementation(which).norm, norm, (norm->num_rows + NORMED - 1) / NORMED);
}

/* Rotary position embeddings of `num_rows` rows of tokens. Returns 0. */
int gptoss_rotary(int which, const Rotary *rotary, long num_rows, fork_join parallel, int num_threads) {
    const Team team = {parallel, num_threads};
    return run_units(&team, implementation(which).rotary, rotary, num_rows * rotary->num_tokens);
}

enum { RANK_IN, RANK_OUT, RANK_SUMS };

/* One of the three products of low_rank.h. Returns 0, or -1 if there is no memory. */
int gptoss_low_rank(int which, int kind, const LowRank *low_rank, fork_join parallel, int num_threads) {
    const Team team = {parallel, num_threads};
    const Implementation best = implementation(which);
    const long length = low_rank->length, experts = low_rank->num_experts;
    const long num_rows = experts ? low_rank->offsets[experts - 1] : 0;
    const long blocks = (num_rows + LOW_RANK_ROWS - 1) / LOW_RANK_ROWS;
    Job job = {.unit = kind == RANK_IN ? best.rank_in : kind == RANK_OUT ? best.rank_out : best.rank_sums,
               .arguments = low_rank,
               .num_units = kind == RANK_SUMS ? experts * ((length + LOW_RANK_STRIP - 1) / LOW_RANK_STRIP) : blocks,
               .scratch_bytes = kind == RANK_IN ? 6 * (size_t)length * sizeof(float) : 0};
    return run(&team, &job);
}

/* Attention of `num_blocks` blocks of queries on keys and values in pages. head_dim is a multiple of 16. Returns 0, or
 * -1 if there is no memory. */
int gptoss_paged_attention(int which, const PagedArguments *paged, long num_blocks, fork_join parallel,
                           int num_threads) {
    const Team team = {parallel, num_threads};
    Job job = {.unit = implementation(which).paged,
               .arguments = paged,
               .num_units = num_blocks * paged->kv_heads,
               .scratch_bytes = paged_scratch(paged)};
    return run(&team, &job);
}

static int add(const Team *team, int which, const Adding *a) {
    return run_units(team, implementation(which).add, a, (a->count + ADDED - 1) / ADDED);
}

/* Queries, keys and values [num_rows, heads, head_dim] of x [num_rows, hidden], rotated by cos and sin, of which a row is
 * `angles` after the one before. Returns 0, or -1 if there is no memory. */
int gptoss_layer_before(int which, const Layer *l, const void *x, const void *cos, const void *sin, void *q, void *k,
                        void *v, long num_rows, long angles, fork_join parallel, int num_threads) {
    const long heads = l->heads * l->head_dim, kv_heads = l->kv_heads * l->head_dim;
    void *normed = malloc((size_t)(num_rows * l->hidden) * (l->half ? 2 : 4));
    if (!normed) return -1;
    const Norm norm = {x, l->input_norm, normed, num_rows, l->hidden, l->input_eps, l->half};
    gptoss_norm(which, &norm, parallel, num_threads);
    const Linear to_q = {normed, l->q, l->q_bias, q, num_rows, heads, l->hidden, l->half};
    const Linear to_k = {normed, l->k, l->k_bias, k, num_rows, kv_heads, l->hidden, l->half};
    const Linear to_v = {normed, l->v, l->v_bias, v, num_rows, kv_heads, l->hidden, l->half};
    gptoss_linear(which, &to_q, parallel, num_threads);
    gptoss_linear(which, &to_k, parallel, num_threads);
    gptoss_linear(which, &to_v, parallel, num_threads);
    free(normed);
    const long dim = l->head_dim;
    const Rotary of_q = {q, cos, sin, q, l->heads, 1, dim, heads, dim, dim, angles, l->half};
    const Rotary of_k = {k, cos, sin, k, l->kv_heads, 1, dim, kv_heads, dim, dim, angles, l->half};
    gptoss_rotary(which, &of_q, num_rows, parallel, num_threads);
    gptoss_rotary(which, &of_k, num_rows, parallel, num_threads);
    return 0;
}

/* Attention of q on keys and values [num_rows, kv_heads, num_keys, head_dim], projected and added to x: `sum`; that,
 * normed; and the router's logits [num_rows, num_experts]. Returns 0, or -1 if there is no memory. */
int gptoss_layer_between(int which, const Layer *l, const void *x, const void *q, const void *keys, const void *values,
                         void *sum, void *normed, void *logits, long num_rows, long num_keys, fork_join parallel,
                         int num_threads) {
    const Team team = {parallel, num_threads};
    const long heads = l->heads * l->head_dim;
    const size_t item = l->half ? 2 : 4;
    char *room = malloc((size_t)num_rows * ((size_t)(heads + l->hidden) * item + 6 * sizeof(int32_t)) +
                        (size_t)l->heads * sizeof(float));
    if (!room) return -1;
    float *sinks = (float *)room;
    int32_t *table = (int32_t *)(sinks + l->heads), *starts = table + num_rows, *blocks = starts + num_rows;
    char *attended = (char *)(blocks + 4 * num_rows), *projected = attended + (size_t)(num_rows * heads) * item;
    for (long h = 0; h < l->heads; h++) sinks[h] = load(l->sinks, h, l->half);
    for (long n = 0; n < num_rows; n++) {
        const int32_t block[4] = {(int32_t)n, (int32_t)n, 1, (int32_t)num_keys - 1};
        table[n] = (int32_t)n, starts[n] = 0;
        memcpy(blocks + 4 * n, block, sizeof block);
    }
    const PagedArguments paged = {q, keys, values, sinks, table, starts, blocks, attended, NULL, l->heads, l->kv_heads,
                                  l->head_dim, 1, num_keys, l->window, l->heads / l->kv_heads, l->scale, l->half};
    const int status = gptoss_paged_attention(which, &paged, num_rows, parallel, num_threads);
    if (!status) {
        const Linear to_o = {attended, l->o, l->o_bias, projected, num_rows, l->hidden, heads, l->half};
        const Adding adding = {x, projected, sum, num_rows * l->hidden, l->half};
        const Norm norm = {sum, l->post_norm, normed, num_rows, l->hidden, l->post_eps, l->half};
        const Linear to_logits = {normed, l->router, l->router_bias, logits, num_rows, l->num_experts, l->hidden, l->half};
        gptoss_linear(which, &to_o, parallel, num_threads);
        add(&team, which, &adding);
        gptoss_norm(which, &norm, parallel, num_threads);
        gptoss_linear(which, &to_logits, parallel, num_threads);
    }
    free(room);
    return status;
}

/* `sum` and what the experts give for `normed`: out. Returns 0, or -1 if there is no memory. */
int gptoss_layer_after(int which, const Layer *l, const void *sum, const void *normed, const int64_t *indices,
                       const void *routing_weights, void *out, long num_rows, fork_join parallel, int num_threads) {
    const Team team = {parallel, num_threads};
    const long routes = num_rows * l->top_k;
    const size_t item = l->half ? 2 : 4;
    char *room = malloc((size_t)routes * sizeof(float) + (size_t)(num_rows * l->hidden) * item);
    if (!room) return -1;
    float *weights = (float *)room;
    char *mixed = room + (size_t)routes * sizeof(float);
    for (long i = 0; i < routes; i++) weights[i] = load(routing_weights, i, l->half);
    const int status = gptoss_experts(l->half ? which : which < BF16 ? which : AVX512, normed, indices, weights,
                                      &l->gate_up, &l->down, mixed, num_rows, l->top_k, l->num_experts, l->alpha,
                                      l->limit, parallel, num_threads);
    const Adding adding = {sum, mixed, out, num_rows * l->hidden, l->half};
    if (!status) add(&team, which, &adding);
    free(room);
    return status;
}
