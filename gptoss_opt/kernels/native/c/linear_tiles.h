/* Linear layers in vectors of WIDTH floats: included by widths.h. */
#if WIDTH > 4
typedef uint32_t NAMED(Words) __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint16_t NAMED(Halves) __attribute__((vector_size(2 * WIDTH), aligned(2)));
#endif

INLINE void NAMED(load_vector)(NAMED(Floats) *to, const char *from, const int half) {
    if (half)
#if WIDTH == 4
        *to = widened_4((const uint16_t *)from);
#else
        *to = (NAMED(Floats))(__builtin_convertvector(*(const NAMED(Halves) *)from, NAMED(Words)) << 16);
#endif
    else
        *to = *(const NAMED(Floats) *)from;
}

/* `tokens` rows of x, from the n-th on, times ROWS rows of weights from r on. */
INLINE void NAMED(linear_tile)(const int tokens, const int half, const Linear *p, long n, long r) {
    const int item = half ? 2 : 4;
    const long row = p->length * item, whole = p->length / WIDTH * WIDTH;
    const char *x = (const char *)p->x + n * row, *w[ROWS];
    linear_rows(p, r, w);
    NAMED(Floats) sum[TOKENS_AT_A_TIME][ROWS];
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int i = 0; i < ROWS; i++) sum[t][i] = (NAMED(Floats)){0};
    for (long at = 0; at < whole * item; at += WIDTH * item) UNROLL for (int i = 0; i < ROWS; i++) {
        __builtin_prefetch(w[i] + ROWS * row + at);
        NAMED(Floats) weights, values;
        NAMED(load_vector)(&weights, w[i] + at, half);
        UNROLL for (int t = 0; t < tokens; t++) {
            NAMED(load_vector)(&values, x + t * row + at, half);
            sum[t][i] += weights * values;
        }
    }
    for (int t = 0; t < tokens; t++) {
        float sums[ROWS] = {0};
        for (int i = 0; i < ROWS; i++)
            for (int lane = 0; lane < WIDTH; lane++) sums[i] += sum[t][i][lane];
        linear_store(p, half, n + t, r, whole, sums);
    }
}

INLINE void NAMED(linear_strip)(const int half, const Linear *p, long r) {
    const long tiles = (p->num_rows + TOKENS_AT_A_TIME - 1) / TOKENS_AT_A_TIME;
    for (long tile = 0, n = 0, tokens; tile < tiles; tile++, n += tokens) {
        tokens = (p->num_rows - n + tiles - tile - 1) / (tiles - tile);
#define LINEAR_TILE(T) NAMED(linear_tile)(T, half, p, n, r)
        CASES(tokens, LINEAR_TILE)
#undef LINEAR_TILE
    }
}

INLINE void NAMED(linear_unit)(const Linear *p, long index) {
    const long each = linear_each(p), first = index * each, last = first + each < p->rows ? first + each : p->rows;
    for (long r = first; r < last; r += ROWS)
        p->half ? NAMED(linear_strip)(1, p, r) : NAMED(linear_strip)(0, p, r);
}
