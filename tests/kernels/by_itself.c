/* The native library beside plain loops, without Python: for processors that are emulated. With an argument, one weight is
 * off, and the program must fail. */
#include "native.c"
#include <stdio.h>

static uint32_t state = 1;
static uint32_t draw(void) { return state = state * 1664525u + 1013904223u; }
static float number(void) { return (float)(int32_t)draw() / 2147483648.0f; }

static double worst;
static void compare(const char *what, double found, double exact, double scale, double bound) {
    const double error = fabs(found - exact) / scale;
    if (!(error <= bound)) {
        printf("%s: %g, should be %g\n", what, found, exact);
        exit(1);
    }
    if (error > worst) worst = error;
}

/* Experts of no rows to many, which takes all sizes of tiles; weights beyond one unit of work, not in whole strips. */
enum { EXPERTS = 8, LENGTH = 160, ROWS_OF_W = 134, MOST = 56 };
static const int32_t OFFSETS[EXPERTS] = {1, 3, 3, 6, 10, 15, 23, MOST};
static uint8_t blocks[EXPERTS * ROWS_OF_W * LENGTH / 2], scales[EXPERTS * ROWS_OF_W * LENGTH / BLOCK];
static float bias[EXPERTS * LENGTH], x[MOST * LENGTH], y[MOST * LENGTH], dense[EXPERTS][ROWS_OF_W][LENGTH];

static void products(int which, int off) {
    for (size_t i = 0; i < sizeof blocks; i++) blocks[i] = (uint8_t)(draw() >> 24);
    for (size_t i = 0; i < sizeof scales; i++) scales[i] = (uint8_t)(125 + draw() % 5);
    for (int e = 0; e < EXPERTS; e++)
        for (int r = 0; r < ROWS_OF_W; r++)
            for (int l = 0; l < LENGTH; l++) {
                const long at = (e * ROWS_OF_W + r) * LENGTH + l;
                dense[e][r][l] = HALVES[blocks[at / 2] >> 4 * (at % 2) & 15] * SCALE[scales[at / BLOCK]];
            }
    if (off) scales[sizeof scales - 1] += 3;
    for (int i = 0; i < EXPERTS * LENGTH; i++) bias[i] = number();
    for (int i = 0; i < MOST * LENGTH; i++) x[i] = number();
    for (int columns = 0; columns < 2; columns++) { /* columns are for gradients, which have no bias */
        const Matrices m = {blocks, scales, columns ? NULL : bias, ROWS_OF_W, LENGTH};
        const int in = columns ? ROWS_OF_W : LENGTH, out = columns ? LENGTH : ROWS_OF_W;
        if (gptoss_product(which, columns, x, y, OFFSETS, &m, NULL, EXPERTS, NULL, 2)) exit(2);
        for (int n = 0, e = 0; n < MOST; n++) {
            while (n >= OFFSETS[e]) e++;
            for (int o = 0; o < out; o++) {
                double exact = columns ? 0 : bias[e * out + o];
                for (int i = 0; i < in; i++)
                    exact += (double)x[n * in + i] * (columns ? dense[e][i][o] : dense[e][o][i]);
                compare(columns ? "columns" : "dot", y[n * out + o], exact, 10, 1e-5);
            }
        }
    }
}

/* The same in bfloat16, with packed weights and dense ones. */
static void halves(int which, int off) {
    enum { ROOM = MOST + 16 * EXPERTS };
    static uint16_t x16[MOST * LENGTH], y16[MOST * LENGTH], bias16[EXPERTS * LENGTH], room[ROOM * LENGTH];
    static uint16_t dense16[EXPERTS][ROWS_OF_W][LENGTH] __attribute__((aligned(64)));
    for (int i = 0; i < EXPERTS * LENGTH; i++) bias[i] = from_bf16(bias16[i] = to_bf16(number()));
    for (int i = 0; i < MOST * LENGTH; i++) x[i] = from_bf16(x16[i] = to_bf16(number()));
    for (int e = 0; e < EXPERTS; e++)
        for (int r = 0; r < ROWS_OF_W; r++)
            for (int l = 0; l < LENGTH; l++) dense16[e][r][l] = to_bf16(dense[e][r][l]);
    if (off) dense16[EXPERTS - 1][0][0] = to_bf16(9);
    for (int columns = 0; columns < 2; columns++)
        for (int packed = 0; packed < 2; packed++) {
            const uint8_t *weights = packed ? blocks : (const uint8_t *)dense16;
            const Matrices m = {weights, packed ? scales : NULL, bias16, ROWS_OF_W, LENGTH};
            const int in = columns ? ROWS_OF_W : LENGTH, out = columns ? LENGTH : ROWS_OF_W;
            if (gptoss_product(which, columns, x16, y16, OFFSETS, &m, room, EXPERTS, NULL, 2)) exit(2);
            for (int n = 0, e = 0; n < MOST; n++) {
                while (n >= OFFSETS[e]) e++;
                for (int o = 0; o < out; o++) {
                    double exact = from_bf16(bias16[e * out + o]);
                    for (int i = 0; i < in; i++)
                        exact += (double)x[n * in + i] * (columns ? dense[e][i][o] : dense[e][o][i]);
                    compare(columns ? "columns of bfloat16" : "dot of bfloat16", from_bf16(y16[n * out + o]), exact,
                            fabs(exact) + 1, 5e-3);
                }
            }
        }
}

static void linears(int which, int half) {
    enum { OUT = 13, IN = 77, N = 8 };
    static float w[OUT * IN], b[OUT];
    static uint16_t w16[OUT * IN], b16[OUT], x16[N * IN], y16[N * OUT];
    for (int i = 0; i < OUT * IN; i++) w[i] = from_bf16(w16[i] = to_bf16(number()));
    for (int i = 0; i < OUT; i++) b[i] = from_bf16(b16[i] = to_bf16(number()));
    for (int i = 0; i < N * IN; i++) x[i] = from_bf16(x16[i] = to_bf16(number()));
    const Linear p = half ? (Linear){x16, w16, b16, y16, N, OUT, IN, 1} : (Linear){x, w, b, y, N, OUT, IN, 0};
    if (gptoss_linear(which, &p, NULL, 2)) exit(2);
    for (int n = 0; n < N; n++)
        for (int o = 0; o < OUT; o++) {
            double exact = b[o];
            for (int i = 0; i < IN; i++) exact += (double)x[n * IN + i] * w[o * IN + i];
            compare("linear", half ? from_bf16(y16[n * OUT + o]) : y[n * OUT + o], exact, 10, half ? 4e-3 : 1e-5);
        }
}

static void low_rank(int which, int half) {
    enum { RANK = 7, WIDE = 48 };
    static float factor[EXPERTS * RANK * WIDE], hidden[MOST * RANK];
    static uint16_t x16[MOST * WIDE];
    for (int i = 0; i < EXPERTS * RANK * WIDE; i++) factor[i] = number();
    for (int i = 0; i < MOST * WIDE; i++) x[i] = from_bf16(x16[i] = to_bf16(number()));
    const LowRank p = {OFFSETS, EXPERTS, RANK, WIDE, factor, hidden, half ? (void *)x16 : x, NULL, half};
    if (gptoss_low_rank(which, RANK_IN, &p, NULL, 2)) exit(2);
    for (int n = 0, e = 0; n < MOST; n++) {
        while (n >= OFFSETS[e]) e++;
        for (int r = 0; r < RANK; r++) {
            double exact = 0;
            for (int i = 0; i < WIDE; i++) exact += (double)x[n * WIDE + i] * factor[(e * RANK + r) * WIDE + i];
            compare("low rank", hidden[n * RANK + r], exact, 10, 1e-5);
        }
    }
}

static void packing(int which) {
    enum { IN = 64, OUT = 70 };
    static float from[IN * OUT], row[IN];
    static uint8_t to[OUT * IN / 2], to_scales[OUT * IN / BLOCK], one[IN / 2], one_scale[IN / BLOCK];
    static double sums[2 * ((OUT + STRIP - 1) / STRIP)];
    for (int i = 0; i < IN * OUT; i++) from[i] = number() * powf(2, (float)(int)(draw() % 40) - 20);
    if (gptoss_pack_columns(which, 0, from, to, to_scales, sums, IN, OUT, NULL, 2)) exit(2);
    for (int o = 0; o < OUT; o++) {
        for (int i = 0; i < IN; i++) row[i] = from[i * OUT + o];
        if (gptoss_pack(which, 0, row, one, one_scale, IN / BLOCK, NULL, 1)) exit(2);
        for (int i = 0; i < IN / 2; i++) compare("blocks", to[o * IN / 2 + i], one[i], 1, 0);
        for (int i = 0; i < IN / BLOCK; i++) compare("scales", to_scales[o * IN / BLOCK + i], one_scale[i], 1, 0);
    }
}

int main(int argc, char **argv) {
    (void)argv;
    const int best = gptoss_init();
    for (int which = 0; which <= best; which++) {
        if (which < BF16) products(which, argc > 1);
        if (which >= BF16) halves(which, 0);
        linears(which, 0);
        linears(which, 1);
        low_rank(which, 0);
        low_rank(which, 1);
        packing(which);
    }
    printf("best %d, worst %g\n", best, worst);
    return 0;
}
