/* Matrix products with expert weights on CPUs, packed as MXFP4 or dense, and the activation. Loaded with ctypes.
 *
 * Packed weights are as in the released checkpoints: 32 values of a row share a scale 2^(s - 127) and take 16 bytes, the
 * first of each two in the low four bits (OCP Microscaling Formats v1.0). Sums are in float32.
 */
#include "activation.h"
#include "common.h"
#include "float32.h"
#include "format.h"
#include "threads.h"
#if X86
#include "bfloat16.h"
#endif

/* Fill the tables. Call once, before anything else. Returns the best implementation that this CPU runs. */
int gptoss_init(void) {
    for (int s = 0; s < 256; s++) {
        SCALE[s] = s == 255 ? NAN : ldexpf(1.0f, s - 128);
        for (int code = 0; code < 16; code++)
            TABLE[s][code] = to_bf16(HALVES[code] * SCALE[s]);
    }
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") ? AVX512_BF16 : AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PLAIN;
}

#define FOR_TARGET(name, target)                                                                             \
    target static void dot_##name(const void *p, long index, void *scratch) { dot_f32(p, index, scratch); }  \
    target static void columns_##name(const void *p, long index, void *scratch) {                            \
        columns_f32(p, index, scratch);                                                                      \
    }                                                                                                        \
    target static void activation_##name(const void *a, long index, void *scratch) {                         \
        (void)scratch;                                                                                       \
        activation_unit(a, index);                                                                           \
    }                                                                                                        \
    target static void pack_##name(const void *f, long index, void *scratch) {                               \
        (void)scratch;                                                                                       \
        pack_unit(f, index);                                                                                 \
    }

FOR_TARGET(plain, )
#if X86
FOR_TARGET(avx2, __attribute__((target("avx2,fma"))))
FOR_TARGET(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"))))
#endif

typedef void (*unit_fn)(const void *, long, void *);

typedef struct {
    unit_fn dot, columns, activation, pack;
} Implementation;

static Implementation implementation(int which) {
    switch (which) {
#if X86
    case AVX512_BF16: return (Implementation){dot_bf16, columns_bf16, activation_avx512, pack_avx512};
    case AVX512: return (Implementation){dot_avx512, columns_avx512, activation_avx512, pack_avx512};
    case AVX2: return (Implementation){dot_avx2, columns_avx2, activation_avx2, pack_avx2};
#endif
    default: return (Implementation){dot_plain, columns_plain, activation_plain, pack_plain};
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

/* `num_blocks` blocks of values, bfloat16 (`half`) or float32. Returns 0. */
int gptoss_unpack(int half, const uint8_t *blocks, const uint8_t *scales, void *to, long num_blocks, fork_join parallel,
                  int num_threads) {
    const Team team = {parallel, num_threads};
    const Formatting f = {.to = to, .blocks = blocks, .scales = scales, .num_blocks = num_blocks, .half = half};
    Job job = {.unit = unpack_unit, .arguments = &f, .num_units = (num_blocks + FORMATTED - 1) / FORMATTED};
    return run(&team, &job);
}

/* The other way. Returns 0, or 1 if a value is not finite. */
int gptoss_pack(int which, int half, const void *from, uint8_t *blocks, uint8_t *scales, long num_blocks,
                fork_join parallel, int num_threads) {
    const Team team = {parallel, num_threads};
    atomic_int not_finite = 0;
    const Formatting f = {.from = from, .to_blocks = blocks, .to_scales = scales, .num_blocks = num_blocks, .half = half,
                          .not_finite = &not_finite};
    Job job = {.unit = implementation(which).pack,
               .arguments = &f,
               .num_units = (num_blocks + FORMATTED - 1) / FORMATTED};
    const int status = run(&team, &job);
    return status ? status : atomic_load(&not_finite);
}

/* The products (see Product) of all experts that have rows, `columns` or dot. `weights` [E, rows, length] are packed if
 * there are `scales`, else dense bfloat16, which takes AVX512_BF16; `ends` [E] are the cumulative ends of the experts'
 * rows of x. Rows of y that belong to no expert are not touched. x, y and `bias` [E, .] or NULL are bfloat16 if `which`
 * is AVX512_BF16, else float32. `room` holds a copy of x where a packed dot is in bfloat16. Returns 0, or -1 if there is
 * no memory. */
int gptoss_product(int which, int columns, const void *x, void *y, const int32_t *ends, const uint8_t *weights,
                   const uint8_t *scales, const void *bias, void *room, long num_experts, long rows, long length,
                   fork_join parallel, int num_threads) {
    const Team team = {parallel, num_threads};
    const size_t item = which == AVX512_BF16 ? 2 : 4, values = (size_t)rows * length;
    Expert *experts = malloc((size_t)(num_experts ? num_experts : 1) * sizeof *experts);
    if (!experts) return -1;
    long active = 0;
    for (long e = 0, begin = 0; e < num_experts; begin = ends[e++])
        if (ends[e] > begin)
            experts[active++] = (Expert){begin, ends[e], weights + e * (scales ? values / 2 : values * 2),
                                         scales ? scales + e * values / BLOCK : NULL,
                                         bias ? (const char *)bias + e * (columns ? length : rows) * item : NULL};
    int status = 0;
    long unit = columns ? 1 : GROUP_ROWS, panel = 1;
#if X86
    if (which == AVX512_BF16) {
        unit = columns ? GROUP_BLOCKS : GROUP_ROWS;
        panel = PANEL;
        if (!columns && scales && active) {
            const Ordering o = {x, room, ends[num_experts - 1], length};
            Job job = {.unit = order_rows,
                       .arguments = &o,
                       .num_units = (o.num_rows + ORDERED_ROWS - 1) / ORDERED_ROWS};
            status = run(&team, &job);
            x = room;
        }
    }
#else
    (void)room;
#endif
    const Product p = {x, y, rows, length, ((columns ? length / BLOCK : rows) + unit - 1) / unit, experts};
    Job job = {.unit = columns ? implementation(which).columns : implementation(which).dot,
               .arguments = &p,
               .num_units = active * p.units_each,
               .scratch_bytes = (columns ? (size_t)(rows + 1) * panel * BLOCK : (size_t)ROWS * length) * item};
    if (!status) status = run(&team, &job);
    free(experts);
    return status;
}
