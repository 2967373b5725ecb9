/* The fusion of image and text of float_linear.h for one width of vectors; included at the end of float_layers.h. */

/* Softmax of `from` over the places where the mask is 1; the others become 0. All three are read or written in whole
   vectors, so up to LANES - 1 floats beyond their end; the mask is 0 there. */
INLINE void NAME(masked_softmax)(const float *from, const float *mask, int64_t length, float *to)
{
    vec most = NAME(splat)(-FLT_MAX), total = {0};
    for (int64_t j = 0; j < length; j += LANES) {
        const vec s = NAME(load)(from + j), here = NAME(load)(mask + j);
        most = NAME(choose)((here > 0.0f) & (s > most), s, most);
    }
    float highest = most[0];
    UNROLL for (int i = 1; i < LANES; i++) highest = most[i] > highest ? most[i] : highest;
    for (int64_t j = 0; j < length; j += LANES) {
        const vec e = NAME(exponential)(NAME(load)(from + j) - highest);
        const vec kept = NAME(choose)(NAME(load)(mask + j) > 0.0f, e, (vec){0});
        total += kept;
        NAME(store)(to + j, kept);
    }
    const float share = 1.0f / NAME(sum)(total);
    for (int64_t j = 0; j < length; j += LANES) NAME(store)(to + j, NAME(load)(to + j) * share);
}

/* Raise the peaks to those of these scores, and write e^(score - peak) to rows of `step` floats of `weights`; `kept` is
   what is left of the earlier sums. The scores are read in whole vectors. */
INLINE void NAME(weigh)(const float *scores, int64_t count, int64_t columns, const uint8_t *real, float *peaks,
                        float *sums, float *kept, float *weights, int64_t step)
{
    for (int64_t c = 0; c < columns; c += LANES) {
        const int64_t left = columns - c;
        const vec before = NAME(load_some)(peaks + c, left);
        vec top = before;
        for (int64_t r = 0; r < count; r++) {
            const vec s = NAME(load)(scores + r * columns + c);
            if (!real || real[r])
                top = NAME(choose)(s > top, s, top);
        }
        const vec share = NAME(exponential)(before - top);
        vec total = NAME(load_some)(sums + c, left) * share;
        for (int64_t r = 0; r < count; r++) {
            vec e = NAME(exponential)(NAME(load)(scores + r * columns + c) - top);
            if (real && !real[r])
                e = (vec){0};
            total += e;
            NAME(store)(weights + r * step + c, e);
        }
        NAME(store_some)(peaks + c, top, left);
        NAME(store_some)(sums + c, total, left);
        NAME(store_some)(kept + c, share, left);
    }
}

/* pooled (columns, width) = pooled * kept + the transpose of weights (count, columns) times rows (count, width).
   Up to TILE - 1 weights beyond a row's columns are read. */
INLINE void NAME(pool)(const float *weights, int64_t step, const float *rows, int64_t count, int64_t columns,
                       int64_t width, const float *kept, float *pooled)
{
    for (int64_t c = 0; c < columns; c++)
        for (int64_t d = 0; kept[c] != 1.0f && d < width; d++) pooled[c * width + d] *= kept[c];
    for (int64_t d = 0; d < width; d += PANEL)
        for (int64_t c = 0; c < columns; c += TILE) {
            const int64_t height = columns - c < TILE ? columns - c : TILE;
            const int64_t across = width - d < PANEL ? width - d : PANEL;
            float part[TILE * PANEL];
            vec acc[TILE][2] = {0};
            const float *a = weights + c, *b = rows + d;
            for (int64_t r = 0; r < count; r++, a += step, b += width) {
                const vec low = NAME(load)(b), high = NAME(load)(b + LANES);
                UNROLL for (int i = 0; i < TILE; i++)
                {
                    const vec x = NAME(splat)(a[i]);
                    acc[i][0] += x * low;
                    acc[i][1] += x * high;
                }
            }
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
    const int64_t step = (columns + LANES - 1) / LANES * LANES, widest = width > columns ? width : columns;
    /* PANEL floats more where whole vectors are read or written: of `normed`, the scores, the weights and the mask. */
    float *const normed = allocate(BLOCK * (width + columns + step) + 3 * PANEL + columns + TILE * widest + text + PANEL);
    if (!normed)
        return FLOAT_NO_MEMORY;
    float *const scores = normed + BLOCK * width + PANEL, *const weights = scores + BLOCK * columns + PANEL;
    float *const kept = weights + BLOCK * step + PANEL, *const spare = kept + columns;
    float *const mask = spare + TILE * widest;
    memset(mask, 0, sizeof(float) * (text + PANEL));
    memcpy(mask, text_mask, sizeof(float) * text);
    for (int64_t c = 0; c < columns; c++) peaks[c] = -FLT_MAX, sums[c] = 0.0f;
    memset(pooled, 0, sizeof(float) * columns * width);
    for (int64_t first = 0; first < rows; first += BLOCK) {
        const int64_t count = rows - first < BLOCK ? rows - first : BLOCK;
        for (int64_t i = 0; i < count; i++)
            NAME(normalize)(norm, vision + (first + i) * width, normed + i * width, width);
        NAME(apply)(directions, count, normed, FLOAT_NONE, NULL, scores, spare);
        NAME(weigh)(scores, count, columns, real ? real + first : NULL, peaks, sums, kept, weights, step);
        NAME(pool)(weights, step, normed, count, columns, width, kept, pooled);
        /* Pooled weights are not needed any more. What a softmax writes beyond its end is written anew by the next. */
        for (int64_t k = 0; k < count * heads; k++)
            NAME(masked_softmax)(scores + k * text, mask, text, weights + k * text);
        NAME(apply)(brought, count, weights, FLOAT_NONE, normed, out + first * width, spare);
    }
    free(normed);
    return FLOAT_OK;
}
