/* Rows to `rank` values each, in vectors of WIDTH floats: included by widths.h. */

/* hidden[n, r] = sum_l rows[n, l] factor[r, l], for up to TOKENS_AT_A_TIME rows of one expert. */
TARGET INLINE void NAMED(low_rank_in)(const LowRank *p, const float *factor, long n, long count, int half,
                                      float *scratch) {
    const long length = p->length;
    const float *x = (const float *)p->rows + n * length;
    if (half) {
        for (long i = 0; i < count * length; i++) scratch[i] = load(p->rows, n * length + i, 1);
        x = scratch;
    }
    for (long r = 0, many; r < p->rank; r += many) {
        many = p->rank - r < ROWS ? p->rank - r : ROWS;
        const Strip w = {(const uint8_t *)(factor + r * length), NULL, 4 * length, 0};
        float *y = p->hidden + n * p->rank + r;
#define LOW_RANK_TILE(T) NAMED(tile_dot)(T, 0, w, x, length, NULL, y, p->rank, many)
        CASES(count, LOW_RANK_TILE)
#undef LOW_RANK_TILE
    }
}

TARGET INLINE void NAMED(low_rank_in_rows)(const LowRank *p, long index, int half, float *scratch) {
    const long end = low_rank_end(p, index);
    for (long n = index * LOW_RANK_ROWS, e = 0, count; n < end; n += count) {
        count = low_rank_some(p, n, end, TOKENS_AT_A_TIME, &e);
        NAMED(low_rank_in)(p, p->factor + e * p->rank * p->length, n, count, half, scratch);
    }
}

/* One unit: some rows, of whichever experts. */
TARGET INLINE void NAMED(low_rank_in_unit)(const LowRank *p, long index, float *scratch) {
    p->half ? NAMED(low_rank_in_rows)(p, index, 1, scratch) : NAMED(low_rank_in_rows)(p, index, 0, scratch);
}
