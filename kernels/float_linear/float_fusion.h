/* The fusion of image and text of float_linear.h for one width of vectors; included at the end of float_layers.h. */

/* Softmax of a row over the places where the mask is 1; the others become 0. */
INLINE void NAME(masked_softmax)(float *row, const float *mask, int64_t length)
{
    vec most = NAME(splat)(-FLT_MAX), total = {0};
    for (int64_t j = 0; j < length; j += LANES) {
        const vec s = NAME(load_some)(row + j, length - j), here = NAME(load_some)(mask + j, length - j);
        most = NAME(choose)((here > 0.0f) & (s > most), s, most);
    }
    float highest = most[0];
    UNROLL for (int i = 1; i < LANES; i++) highest = most[i] > highest ? most[i] : highest;
    for (int64_t j = 0; j < length; j += LANES) {
        const vec here = NAME(load_some)(mask + j, length - j);
        const vec e = NAME(exponential)(NAME(load_some)(row + j, length - j) - highest);
        const vec kept = NAME(choose)(here > 0.0f, e, (vec){0});
        total += kept;
        NAME(store_some)(row + j, kept, length - j);
    }
    const float share = 1.0f / NAME(sum)(total);
    for (int64_t j = 0; j < length; j += LANES)
        NAME(store_some)(row + j, NAME(load_some)(row + j, length - j) * share, length - j);
}

/* Raise the peaks to those of these scores, and write e^(score - peak), transposed, to `turned`; `kept` is what is left
   of the earlier sums. */
INLINE void NAME(weigh)(const float *scores, int64_t count, int64_t columns, const uint8_t *real, float *peaks,
                        float *sums, float *kept, float *turned)
{
    for (int64_t c = 0; c < columns; c += LANES) {
        const int64_t left = columns - c;
        const vec before = NAME(load_some)(peaks + c, left);
        vec top = before;
        for (int64_t r = 0; r < count; r++) {
            const vec s = NAME(load_some)(scores + r * columns + c, left);
            if (!real || real[r])
                top = NAME(choose)(s > top, s, top);
        }
        const vec share = NAME(exponential)(before - top);
        vec total = NAME(load_some)(sums + c, left) * share;
        for (int64_t r = 0; r < count; r++) {
            vec e = NAME(exponential)(NAME(load_some)(scores + r * columns + c, left) - top);
            if (real && !real[r])
                e = (vec){0};
            total += e;
            for (int64_t i = 0; i < LANES && i < left; i++) turned[(c + i) * BLOCK + r] = e[i];
        }
        NAME(store_some)(peaks + c, top, left);
        NAME(store_some)(sums + c, total, left);
        NAME(store_some)(kept + c, share, left);
    }
}

/* pooled (columns, width) = pooled * kept + turned (columns, count) times rows (count, width). */
INLINE void NAME(pool)(const float *turned, const float *rows, int64_t count, int64_t columns, int64_t width,
                       const float *kept, float *pooled)
{
    for (int64_t c = 0; c < columns; c++)
        for (int64_t d = 0; kept[c] != 1.0f && d < width; d++) pooled[c * width + d] *= kept[c];
    for (int64_t d = 0; d < width; d += PANEL)
        for (int64_t c = 0; c < columns; c += TILE) {
            const int64_t height = columns - c < TILE ? columns - c : TILE;
            const int64_t across = width - d < PANEL ? width - d : PANEL;
            float part[TILE * PANEL];
            vec acc[TILE][2] = {0};
            NAME(multiply)(turned + c * BLOCK, BLOCK, rows + d, width, count, acc);
            UNROLL for (int i = 0; i < TILE; i++)
                for (int v = 0; v < 2; v++) NAME(store)(part + i * PANEL + v * LANES, acc[i][v]);
            for (int64_t i = 0; i < height; i++)
                for (int64_t j = 0; j < across; j++) pooled[(c + i) * width + d + j] += part[i * PANEL + j];
        }
}

TARGET static int NAME(fuse)(int64_t rows, int64_t heads, const float *vision, const float_norm *norm,
                             const float_layer *directions, const float *text_mask, const float_layer *brought,
                             const uint8_t *real, float *out, float *peaks, float *sums, float *pooled)
{
    const int64_t width = directions->inputs, columns = directions->columns, text = columns / heads;
    const int64_t tiles = (columns + TILE - 1) / TILE * TILE, widest = width > columns ? width : columns;
    /* A product reads whole panels of `normed`, hence PANEL floats more. */
    float *const normed = allocate(BLOCK * (width + columns + tiles) + PANEL + columns + TILE * widest);
    if (!normed)
        return FLOAT_NO_MEMORY;
    float *const scores = normed + BLOCK * width + PANEL, *const turned = scores + BLOCK * columns;
    float *const kept = turned + BLOCK * tiles, *const spare = kept + columns;
    for (int64_t c = 0; c < columns; c++) peaks[c] = -FLT_MAX, sums[c] = 0.0f;
    memset(pooled, 0, sizeof(float) * columns * width);
    for (int64_t first = 0; first < rows; first += BLOCK) {
        const int64_t count = rows - first < BLOCK ? rows - first : BLOCK;
        for (int64_t i = 0; i < count; i++)
            NAME(normalize)(norm, vision + (first + i) * width, normed + i * width, width);
        NAME(apply)(directions, count, normed, FLOAT_NONE, NULL, scores, spare);
        NAME(weigh)(scores, count, columns, real ? real + first : NULL, peaks, sums, kept, turned);
        NAME(pool)(turned, normed, count, columns, width, kept, pooled);
        for (int64_t i = 0; i < count; i++)
            for (int64_t h = 0; h < heads; h++)
                NAME(masked_softmax)(scores + i * columns + h * text, text_mask, text);
        NAME(apply)(brought, count, scores, FLOAT_NONE, normed, out + first * width, spare);
    }
    free(normed);
    return FLOAT_OK;
}
