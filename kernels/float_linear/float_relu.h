/* Feed-forward blocks with a ReLU for training, for one width of vectors; included at the end of float_layers.h.

   After the ReLU, half of the hidden values or more are zero, and so are their gradients. Only the first layer is
   multiplied as a whole. Of the other products, four add up rows of a matrix for the values that are not zero: a bit
   mask says which ones, and the sums stay in registers. One, the gradient of the hidden values, is computed where they
   are not zero. Matrices are cut into slabs of columns that fit the fastest cache.

   Hidden values are kept for the backward pass in groups of GROUPED rows, and within them by units of UNITS columns:
   [group][unit][row of the group][column of the unit]. */

#define WIDEST (LANES == 8 ? 12 : 8)
/* Call a macro for each slab of `height` rows, with the number of its vectors as a constant. */
#define EACH_SLAB(height, what)                                                                                       \
    for (int64_t column = 0, columns; column < width; column += columns) {                                            \
        const float *const slab = slabs + column * (height);                                                          \
        columns = NAME(slab_columns)(width - column);                                                                 \
        switch (columns / LANES) { what(12) what(8) what(4) what(2) what(1) }                                         \
    }

/* Add value[b * step] * row b to `to` for each bit b of the mask, for a number of vectors known to the compiler. */
INLINE void NAME(add_rows_of)(uint64_t mask, const float *value, const int step, const float *rows, const int vectors,
                              float *to)
{
    if (!mask)
        return;
    vec acc[12];
    UNROLL for (int v = 0; v < vectors; v++) acc[v] = NAME(load)(to + v * LANES);
    do {
        const int64_t b = __builtin_ctzll(mask);
        const vec x = NAME(splat)(value[b * step]);
        const float *const row = rows + b * vectors * LANES;
        UNROLL for (int v = 0; v < vectors; v++) acc[v] += x * NAME(load)(row + v * LANES);
    } while (mask &= mask - 1);
    UNROLL for (int v = 0; v < vectors; v++) NAME(store)(to + v * LANES, acc[v]);
}

/* `count` sums of rows of a slab: sum i takes the bits masks[i] and the values from values + i * next on. */
INLINE void NAME(sums_of)(int64_t count, const uint64_t *masks, const float *values, int64_t next, const int step,
                          const float *slab, const int vectors, float *to, int64_t stride)
{
    for (int64_t i = 0; i < count; i++) {
        for (int v = 0; v < vectors * LANES; v += 16) __builtin_prefetch(to + (i + 1) * stride + v);
        NAME(add_rows_of)(masks[i], values + i * next, step, slab, vectors, to + i * stride);
    }
}

/* Columns of the slab that starts at a column: as many vectors as leave registers for the sums. */
INLINE int64_t NAME(slab_columns)(int64_t left)
{
    const int64_t vectors = left / LANES;
    return LANES * (vectors >= WIDEST ? WIDEST : vectors >= 8 ? 8 : vectors >= 4 ? 4 : vectors >= 2 ? 2 : 1);
}

/* The sums for all slabs of `height` rows; `to` has `width` columns. */
TARGET static void NAME(sparse_product)(int64_t count, const uint64_t *masks, const float *values, int64_t next,
                                        const int by_row, const float *slabs, int64_t height, int64_t width, float *to)
{
#define SUMS(vectors)                                                                                                 \
    case vectors:                                                                                                     \
        if (by_row)                                                                                                   \
            NAME(sums_of)(count, masks, values, next, 1, slab, vectors, to + column, width);                          \
        else                                                                                                          \
            NAME(sums_of)(count, masks, values, next, UNITS, slab, vectors, to + column, width);                      \
        break;
    EACH_SLAB(height, SUMS)
#undef SUMS
}

/* Cut `height` rows of a matrix, which are `stride` floats apart, into slabs. */
INLINE void NAME(cut)(const float *from, int64_t stride, int64_t height, int64_t width, float *slabs)
{
    for (int64_t column = 0, columns; column < width; column += columns) {
        columns = NAME(slab_columns)(width - column);
        NAME(copy)(from + column, stride, slabs + column * height, columns, height, columns);
    }
}

/* The same of `height` columns of a matrix with `width` rows. */
INLINE void NAME(cut_columns)(const float *from, int64_t stride, int64_t height, int64_t width, float *slabs)
{
    for (int64_t column = 0, columns; column < width; column += columns) {
        columns = NAME(slab_columns)(width - column);
        for (int64_t j = 0; j < columns; j++)
            for (int64_t i = 0; i < height; i++)
                slabs[column * height + i * columns + j] = from[(column + j) * stride + i];
    }
}

/* Bit b of a row's mask says whether its value b of a unit is not zero. NaN counts as such. */
INLINE void NAME(find)(const float *unit, int64_t count, uint64_t *masks)
{
    for (int64_t i = 0; i < count; i++) {
        uint64_t mask = 0;
        for (int j = 0; j < UNITS; j += 8) {
            const __m256 x = _mm256_loadu_ps(unit + i * UNITS + j);
            mask |= (uint64_t)_mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ)) << j;
        }
        masks[i] = mask;
    }
}

TARGET static int NAME(relu_forward)(int64_t rows, int64_t width, int64_t hidden, const float *x, const float *first,
                                     const float *first_bias, const float *second, const float *second_bias,
                                     int32_t threads, float *kept, float *out)
{
    const int64_t groups = (rows + GROUPED - 1) / GROUPED, size = width * hidden;
    threads = threads < 1 ? 1 : threads > groups ? (int32_t)(groups ? groups : 1) : threads;
    float *const packed = allocate(2 * size + threads * TILE * width), *const slabs = packed + size;
    if (!packed)
        return FLOAT_NO_MEMORY;
    float_pack(width, hidden, first, packed);
    const float_layer layer = {width, hidden, packed, first_bias};
    for (int64_t h = 0; h < hidden; h += UNITS) NAME(cut_columns)(second + h, hidden, UNITS, width, slabs + h * width);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int32_t i = 0; i < threads; i++)
        for (int64_t group = groups * i / threads; group < groups * (i + 1) / threads; group++) {
            const int64_t row = group * GROUPED, count = rows - row < GROUPED ? rows - row : GROUPED;
            const float *const from = x + row * width;
            float *const to = out + row * width, *const spare = slabs + size + i * TILE * width;
            uint64_t masks[GROUPED];
            for (int64_t r = 0; r < count; r++) memcpy(to + r * width, second_bias, sizeof(float) * width);
            for (int64_t h = 0; h < hidden; h += UNITS) {
                float *const unit = kept + row * hidden + h * count;
                const NAME(task) t = {from, width, count, 0, width, h, h + UNITS, 1, 1, FLOAT_RELU, NULL, unit, UNITS, 0.0f};
                NAME(product)(&layer, &t, spare);
                NAME(find)(unit, count, masks);
                NAME(sparse_product)(count, masks, unit, UNITS, 1, slabs + h * width, UNITS, width, to);
            }
        }
    free(packed);
    return FLOAT_OK;
}

/* The sums of the lanes of eight vectors. */
INLINE __m256 NAME(sum_lanes)(const vec acc[8])
{
    __m256 x[8];
    UNROLL for (int i = 0; i < 8; i++)
    {
        memcpy(x + i, (const float *)(acc + i), sizeof x[i]);
        if (LANES > 8)
            x[i] += _mm256_loadu_ps((const float *)(acc + i) + LANES - 8);
    }
    UNROLL for (int i = 0; i < 8; i += 2)
        x[i] = _mm256_unpacklo_ps(x[i], x[i + 1]) + _mm256_unpackhi_ps(x[i], x[i + 1]);
    UNROLL for (int i = 0; i < 8; i += 4)
        x[i] = _mm256_shuffle_ps(x[i], x[i + 2], 0x44) + _mm256_shuffle_ps(x[i], x[i + 2], 0xee);
    return _mm256_permute2f128_ps(x[0], x[4], 0x20) + _mm256_permute2f128_ps(x[0], x[4], 0x31);
}

/* Add the products of a row with `count` rows of a slab to `sums`. places holds the slab's rows, in groups of eight. */
INLINE void NAME(dots)(int64_t count, const uint8_t *places, const float *row, const float *slab, const int vectors,
                       float *sums)
{
    for (int64_t first = 0; first < count; first += 8) {
        const float *rows[8];
        vec acc[8] = {0};
        UNROLL for (int i = 0; i < 8; i++) rows[i] = slab + places[first + i] * (int64_t)(vectors * LANES);
        UNROLL for (int v = 0; v < vectors; v++)
        {
            const vec x = NAME(load)(row + v * LANES);
            UNROLL for (int i = 0; i < 8; i++) acc[i] += x * NAME(load)(rows[i] + v * LANES);
        }
        _mm256_storeu_ps(sums + first, _mm256_loadu_ps(sums + first) + NAME(sum_lanes)(acc));
    }
}

/* unit (count, UNITS) = rows (count, width) times the columns of a unit, where a mask has a bit, and zero elsewhere.
   `slabs` are those of the columns; `sums` has room for count * UNITS floats. */
TARGET static void NAME(masked_product)(int64_t count, const uint64_t *masks, const float *rows, const float *slabs,
                                        int64_t width, float *sums, float *unit)
{
    uint8_t places[GROUPED][UNITS];
    int64_t found[GROUPED];
    for (int64_t i = 0; i < count; i++) {
        int64_t n = 0;
        for (uint64_t mask = masks[i]; mask; mask &= mask - 1) places[i][n++] = (uint8_t)__builtin_ctzll(mask);
        found[i] = n;
        for (; n % 8; n++) places[i][n] = 0;
    }
    memset(sums, 0, sizeof(float) * count * UNITS);
#define DOTS(vectors)                                                                                                 \
    case vectors:                                                                                                     \
        for (int64_t i = 0; i < count; i++)                                                                           \
            NAME(dots)(found[i], places[i], rows + i * width + column, slab, vectors, sums + i * UNITS);              \
        break;
    EACH_SLAB(UNITS, DOTS)
#undef DOTS
    memset(unit, 0, sizeof(float) * count * UNITS);
    for (int64_t i = 0; i < count; i++)
        for (int64_t n = 0; n < found[i]; n++) unit[i * UNITS + places[i][n]] = sums[i * UNITS + n];
}

/* The backward pass of some groups of rows. Gradients of weights are added to (hidden, width) matrices, where NULL stands
   for a frozen weight. */
TARGET static void NAME(relu_backward_of)(int64_t first_group, int64_t last_group, int64_t rows, int64_t hidden,
                                          int64_t width, const float *grad, const float *x, const float *kept,
                                          const float *first, const float *second, float *work, float *grad_x,
                                          float *grad_first, float *grad_first_bias, float *grad_second,
                                          float *grad_second_bias)
{
    float *const grad_slabs = work, *const x_slabs = grad_slabs + GROUPED * width;
    float *const unit = x_slabs + GROUPED * width, *const sums = unit + GROUPED * UNITS;
    for (int64_t group = first_group; group < last_group; group++) {
        const int64_t row = group * GROUPED, count = rows - row < GROUPED ? rows - row : GROUPED;
        const float *const from = grad + row * width;
        float *const to = grad_x + row * width;
        uint64_t masks[UNITS] = {0}, turned[UNITS];
        NAME(cut)(from, width, count, width, grad_slabs);
        NAME(cut)(x + row * width, width, count, width, x_slabs);
        memset(to, 0, sizeof(float) * count * width);
        for (int64_t i = 0; i < count; i++)
            NAME(add_rows)(grad_second_bias, from + i * width, grad_second_bias, width);
        for (int64_t h = 0; h < hidden; h += UNITS) {
            const float *const values = kept + row * hidden + h * count;
            NAME(find)(values, count, masks);
            memcpy(turned, masks, sizeof masks);
            turn(turned);
            NAME(masked_product)(count, masks, from, second + h * width, width, sums, unit);
            for (int64_t i = 0; i < count; i++)
                NAME(add_rows)(grad_first_bias + h, unit + i * UNITS, grad_first_bias + h, UNITS);
            NAME(sparse_product)(count, masks, unit, UNITS, 1, first + h * width, UNITS, width, to);
            if (grad_second)
                NAME(sparse_product)(UNITS, turned, values, 1, 0, grad_slabs, count, width, grad_second + h * width);
            if (grad_first)
                NAME(sparse_product)(UNITS, turned, unit, 1, 0, x_slabs, count, width, grad_first + h * width);
        }
    }
}

TARGET static int NAME(relu_backward)(int64_t rows, int64_t width, int64_t hidden, const float *grad, const float *x,
                                      const float *kept, const float *first, const float *second, int32_t threads,
                                      float *grad_x, float *grad_first, float *grad_first_bias, float *grad_second,
                                      float *grad_second_bias)
{
    const int64_t groups = (rows + GROUPED - 1) / GROUPED, size = hidden * width;
    threads = threads < 1 ? 1 : threads > groups ? (int32_t)(groups ? groups : 1) : threads;
    /* Sums of each thread: both weights, both biases, and room to work in. */
    const int64_t room = GROUPED * 2 * (width + UNITS), own = 2 * size + hidden + width + room;
    float *const first_slabs = allocate(2 * size + threads * own), *const second_slabs = first_slabs + size;
    float *const sums = second_slabs + size;
    if (!first_slabs)
        return FLOAT_NO_MEMORY;
    for (int64_t h = 0; h < hidden; h += UNITS) {
        NAME(cut)(first + h * width, width, UNITS, width, first_slabs + h * width);
        NAME(cut_columns)(second + h, hidden, UNITS, width, second_slabs + h * width);
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int32_t i = 0; i < threads; i++) {
        float *const mine = sums + i * own;
        NAME(relu_backward_of)(groups * i / threads, groups * (i + 1) / threads, rows, hidden, width, grad, x, kept,
                               first_slabs, second_slabs, mine + own - room, grad_x, grad_first ? mine : NULL,
                               mine + 2 * size, grad_second ? mine + size : NULL, mine + 2 * size + hidden);
    }
    for (int32_t i = 1; i < threads; i++) NAME(add_rows)(sums, sums + i * own, sums, own - room);
    if (grad_first)
        memcpy(grad_first, sums, sizeof(float) * size);
    /* A line of the cache is written at a time. */
    for (int64_t n = 0; grad_second && n < hidden; n += 16)
        for (int64_t k = 0; k < width; k++)
            for (int64_t j = 0; j < 16; j++) grad_second[k * hidden + n + j] = sums[size + (n + j) * width + k];
    if (grad_first_bias)
        memcpy(grad_first_bias, sums + 2 * size, sizeof(float) * hidden);
    if (grad_second_bias)
        memcpy(grad_second_bias, sums + 2 * size + hidden, sizeof(float) * width);
    free(first_slabs);
    return FLOAT_OK;
}

#undef WIDEST
#undef EACH_SLAB
