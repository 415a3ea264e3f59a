/* Products with packed weights in vectors of WIDTH floats: included by widths.h. */

/* `tokens` rows of x times `count` rows of a strip, packed or in float32. */
TARGET INLINE void NAMED(tile_dot)(const int tokens, const int packed, Strip w, const float *x, long length,
                                   const float *bias, float *y, long y_stride, long count) {
    NAMED(Floats) sum[TOKENS_AT_A_TIME][ROWS];
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int r = 0; r < ROWS; r++) sum[t][r] = (NAMED(Floats)){0};
    const int vectors = packed ? BLOCK / WIDTH : 1;
    for (long l = 0; l < length; l += vectors * WIDTH) {
        if (packed) prefetch_strip(w, l);
        UNROLL for (int r = 0; r < ROWS; r++) {
            NAMED(Floats) row[BLOCK / WIDTH];
            const long at = r < count ? r : 0;
            if (packed)
                NAMED(decode)(w.weights + at * w.stride + l / 2, w.scales[at * w.scale_stride + l / BLOCK], row);
            else
                row[0] = *(const NAMED(Floats) *)(w.weights + at * w.stride + 4 * l);
            UNROLL for (int v = 0; v < vectors; v++) UNROLL for (int t = 0; t < tokens; t++)
                sum[t][r] += row[v] * *(const NAMED(Floats) *)(x + t * length + l + v * WIDTH);
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int r = 0; r < ROWS; r++) if (r < count) {
        float total = bias ? bias[r] : 0;
        UNROLL for (int lane = 0; lane < WIDTH; lane++) total += sum[t][r][lane];
        y[t * y_stride + r] = total;
    }
}

/* One unit: GROUP_ROWS rows of one expert's weights, times all its rows of x. */
TARGET INLINE void NAMED(dot)(const Product *p, long index, float *room) {
    const Expert *e = &p->experts[index / p->units_each];
    const long length = p->length, first = index % p->units_each * GROUP_ROWS;
    const long last = first + GROUP_ROWS < p->rows ? first + GROUP_ROWS : p->rows;
    const long tiles = (e->end - e->begin + TOKENS_AT_A_TIME - 1) / TOKENS_AT_A_TIME;
    /* For few rows of x the weights are decoded on the way, if need be twice, for more only once. */
    const int on_the_way = tiles <= (WIDTH < 8 ? 1 : 2);
    for (long r = first, count; r < last; r += count) {
        count = last - r < ROWS ? last - r : ROWS;
        const long at = r * length / BLOCK;
        const Strip packed = {e->weights + at * BYTES, e->scales + at, length / 2, length / BLOCK};
        const Strip decoded = {(const uint8_t *)room, NULL, length * 4, 0};
        for (long i = 0; !on_the_way && i < count * length / BLOCK; i++)
            NAMED(decode)(packed.weights + i * BYTES, packed.scales[i], (NAMED(Floats) *)(room + i * BLOCK));
        const float *bias = e->bias ? (const float *)e->bias + r : NULL;
        for (long tile = 0, n = e->begin, tokens; tile < tiles; tile++, n += tokens) {
            tokens = (e->end - n + tiles - tile - 1) / (tiles - tile);
            const float *x = (const float *)p->x + n * length;
            float *y = (float *)p->y + n * p->rows + r;
#define TILE_PACKED(T) NAMED(tile_dot)(T, 1, packed, x, length, bias, y, p->rows, count)
#define TILE_DECODED(T) NAMED(tile_dot)(T, 0, decoded, x, length, bias, y, p->rows, count)
            if (on_the_way)
                CASES(tokens, TILE_PACKED)
            else
                CASES(tokens, TILE_DECODED)
#undef TILE_PACKED
#undef TILE_DECODED
        }
    }
}

/* `tokens` rows of x times columns of a panel: some vectors of a block. */
TARGET INLINE void NAMED(tile_columns)(const int tokens, const float *panel, const float *x, long rows, float *y,
                                       long length) {
    enum { VECTORS = BLOCK / WIDTH < 4 ? BLOCK / WIDTH : 4 };
    NAMED(Floats) sum[TOKENS_AT_A_TIME][VECTORS];
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int v = 0; v < VECTORS; v++) sum[t][v] = (NAMED(Floats)){0};
    for (long r = 0; r < rows; r++, panel += BLOCK)
        UNROLL for (int v = 0; v < VECTORS; v++) UNROLL for (int t = 0; t < tokens; t++)
            sum[t][v] += x[t * rows + r] * *(const NAMED(Floats) *)(panel + v * WIDTH);
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int v = 0; v < VECTORS; v++)
        *(NAMED(Floats) *)(y + t * length + v * WIDTH) = sum[t][v];
}

/* One unit: a block of columns of one expert's weights, for all its rows of x. */
TARGET INLINE void NAMED(columns)(const Product *p, long index, float *panel) {
    const Expert *e = &p->experts[index / p->units_each];
    const long rows = p->rows, length = p->length, block = index % p->units_each;
    const long tiles = (e->end - e->begin + TOKENS_AT_A_TIME - 1) / TOKENS_AT_A_TIME;
    for (long r = 0; r < rows; r++) {
        const long at = r * length / BLOCK + block;
        NAMED(decode)(e->weights + at * BYTES, e->scales[at], (NAMED(Floats) *)(panel + r * BLOCK));
    }
    for (long tile = 0, n = e->begin, tokens; tile < tiles; tile++, n += tokens) {
        tokens = (e->end - n + tiles - tile - 1) / (tiles - tile);
        const float *x = (const float *)p->x + n * rows;
        for (long c = 0; c < BLOCK; c += WIDTH < 8 ? 4 * WIDTH : BLOCK) {
            float *y = (float *)p->y + n * length + block * BLOCK + c;
#define TILE_COLUMNS(T) NAMED(tile_columns)(T, panel + c, x, rows, y, length)
            CASES(tokens, TILE_COLUMNS)
#undef TILE_COLUMNS
        }
    }
}
