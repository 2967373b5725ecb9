/* The layers of float_linear.h for one width of vectors; included at the end of float_products.h. */

#define allocate NAME(allocate)

/* Zeroed, since rows that are never stored are computed from what is there. */
static float *allocate(size_t floats)
{
    void *memory = NULL;
    if (posix_memalign(&memory, 64, sizeof(float) * floats))
        return NULL;
    return memset(memory, 0, sizeof(float) * floats);
}

TARGET static int NAME(linear)(int64_t rows, const float *x, const float *addend, int64_t addend_rows,
                               const float_layer *layer, int32_t activation, int32_t threads, float *out)
{
    const int64_t width = layer->inputs, blocks = (rows + BLOCK - 1) / BLOCK;
    int failed = 0;
    if (threads > blocks)
        threads = (int32_t)blocks;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *const spare = allocate((TILE + (addend ? BLOCK : 0)) * width), *const wide = spare + TILE * width;
        if (!spare) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = block * BLOCK, count = rows - first < BLOCK ? rows - first : BLOCK;
            if (!spare)
                continue;
            const float *from = x + first * width;
            for (int64_t i = 0; addend && i < count; i++)
                NAME(add_rows)(from + i * width, addend + (first + i) % addend_rows * width, wide + i * width, width);
            NAME(apply)(layer, count, addend ? wide : from, activation, NULL, out + first * layer->columns, spare);
        }
        free(spare);
    }
    return failed ? FLOAT_NO_MEMORY : FLOAT_OK;
}

TARGET static int NAME(feed_forward)(int64_t rows, const float *x, const float *y, const float_layer *project,
                                     const float_norm *before, const float_layer *first, int32_t activation,
                                     const float_layer *second, const float_norm *after, int32_t post,
                                     int32_t threads, float *out)
{
    const int64_t width = first->inputs, hidden = first->columns, blocks = (rows + BLOCK - 1) / BLOCK;
    const int projects = project->weight != NULL;
    int failed = 0;
    if (threads > blocks)
        threads = (int32_t)blocks;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *const wide = allocate(BLOCK * (2 * width + CHUNK) + TILE * (width > CHUNK ? width : CHUNK));
        float *const normed = wide + BLOCK * width, *const part = normed + BLOCK * width;
        float *const spare = part + BLOCK * CHUNK;
        if (!wide) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t at = block * BLOCK * width;
            const int64_t count = rows - block * BLOCK < BLOCK ? rows - block * BLOCK : BLOCK;
            if (!wide)
                continue;
            const float *input = x + at;
            if (projects) {
                NAME(apply)(project, count, y + at, FLOAT_NONE, input, wide, spare);
                input = wide;
            }
            const float *ready = input;
            if (before->scale) {
                for (int64_t i = 0; i < count; i++)
                    NAME(normalize)(before, input + i * width, normed + i * width, width);
                ready = normed;
            }
            /* A chunk of the hidden layer at a time: it is computed, then multiplied while it is in the cache. */
            for (int64_t h = 0; h < hidden; h += CHUNK) {
                const int64_t columns = hidden - h < CHUNK ? hidden - h : CHUNK;
                const NAME(task) up = {ready, width, count, 0, width, h, h + columns, 1, 1, activation, NULL, part, CHUNK, 0.0f};
                const NAME(task) down = {part, CHUNK, count, h, columns, 0, second->columns, h == 0, h + columns == hidden,
                                         FLOAT_NONE, post ? ready : input, out + at, width, 0.0f};
                NAME(product)(first, &up, spare);
                NAME(product)(second, &down, spare);
            }
            for (int64_t i = 0; after->scale && i < count; i++)
                NAME(normalize)(after, out + at + i * width, out + at + i * width, width);
        }
        free(wide);
    }
    return failed ? FLOAT_NO_MEMORY : FLOAT_OK;
}

/* Replace a row by e^(score / sqrt(HEAD) + bias - maximum); return the reciprocal of its sum. */
TARGET static float NAME(softmax)(float *row, const float *bias, const int64_t *regions, int64_t place, int64_t area)
{
    vec most = NAME(splat)(-INFINITY), total = {0};
    for (int64_t j = 0; regions && j < area; j++)
        row[j] += regions[j] == regions[place] ? 0.0f : -100.0f / 0.17677669f;
    for (int64_t j = 0; j < area; j += LANES) {
        vec s = NAME(load)(row + j) * 0.17677669f + NAME(load_some)(bias + j, area - j);
        if (area - j < LANES)
            UNROLL for (int i = 0; i < LANES; i++) s[i] = i < area - j ? s[i] : -INFINITY;
        most = NAME(choose)(s > most, s, most);
        NAME(store)(row + j, s);
    }
    float highest = most[0];
    UNROLL for (int i = 1; i < LANES; i++) highest = most[i] > highest ? most[i] : highest;
    for (int64_t j = 0; j < area; j += LANES) {
        vec e = NAME(exponential)(NAME(load)(row + j) - highest);
        if (area - j < LANES)
            UNROLL for (int i = 0; i < LANES; i++) e[i] = i < area - j ? e[i] : 0.0f;
        total += e;
        NAME(store)(row + j, e);
    }
    return 1.0f / NAME(sum)(total);
}

/* One head of one window; in qkv (area, 3 * width), its q, k and v start at 0, width and 2 * width. `out` has room for
   whole tiles of rows. */
TARGET static void NAME(attend)(const float *qkv, int64_t width, int64_t area, const float *bias,
                                const int64_t *regions, float *keys, float *scores, float *out)
{
    const int64_t stride = 3 * width, padded = (area + PANEL - 1) / PANEL * PANEL;
    for (int64_t j = 0; j < area; j++)
        for (int d = 0; d < HEAD; d++) keys[d * padded + j] = qkv[j * stride + width + d];
    for (int64_t row = 0; row < area; row += TILE) {
        const int64_t count = area - row < TILE ? area - row : TILE;
        for (int64_t j = 0; j < padded; j += PANEL) {
            vec acc[TILE][2] = {0};
            NAME(multiply)(qkv + row * stride, stride, keys + j, padded, HEAD, acc);
            UNROLL for (int i = 0; i < TILE; i++)
                for (int v = 0; v < 2; v++) NAME(store)(scores + i * padded + j + v * LANES, acc[i][v]);
        }
        float share[TILE];
        for (int64_t i = 0; i < count; i++)
            share[i] = NAME(softmax)(scores + i * padded, bias + (row + i) * area, regions, row + i, area);
        for (int64_t d = 0; d < HEAD; d += PANEL) {
            vec acc[TILE][2] = {0};
            NAME(multiply)(scores, padded, qkv + 2 * width + d, stride, area, acc);
            UNROLL for (int i = 0; i < TILE; i++)
            {
                if (i >= count)
                    break;
                for (int v = 0; v < 2; v++) NAME(store)(out + (row + i) * width + d + v * LANES, acc[i][v] * share[i]);
            }
        }
    }
}

TARGET static int NAME(window_attention)(int64_t images, int64_t tokens, int64_t windows, int64_t area, int64_t heads,
                                         const int64_t *index, const int64_t *regions, const float *x,
                                         const float_norm *before, const float_layer *qkv, const float *bias,
                                         const float_layer *project, int32_t threads, float *out)
{
    const int64_t width = heads * HEAD, padded = (area + PANEL - 1) / PANEL * PANEL;
    /* Several small windows fill whole tiles of rows better than one. */
    int64_t group = GROUP / (area * width);
    group = group < 1 ? 1 : group > 4 ? 4 : group;
    const int64_t groups = (windows + group - 1) / group, most = group * area;
    int failed = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        /* `projected` is read in whole tiles of rows, hence TILE rows more. */
        float *const taken = allocate((5 * most + 4 * TILE) * width + padded * (HEAD + TILE));
        float *const normed = taken + most * width, *const projected = normed + most * width;
        float *const spare = projected + 3 * (most + TILE) * width, *const keys = spare + TILE * width;
        float *const scores = keys + HEAD * padded;
        if (!taken) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < images * groups; number++) {
            if (!taken)
                continue;
            const int64_t first = number % groups * group, at = number / groups * tokens * width;
            const int64_t count = windows - first < group ? windows - first : group, rows = count * area;
            const int64_t *places = index + first * area;
            for (int64_t i = 0; i < rows; i++) {
                if (places[i] >= 0 && places[i] < tokens) {
                    memcpy(taken + i * width, x + at + places[i] * width, sizeof(float) * width);
                    NAME(normalize)(before, taken + i * width, normed + i * width, width);
                } else {
                    memset(taken + i * width, 0, sizeof(float) * width);
                    memset(normed + i * width, 0, sizeof(float) * width);
                }
            }
            NAME(apply)(qkv, rows, normed, FLOAT_NONE, NULL, projected, spare);
            for (int64_t w = 0; w < count; w++)
                for (int64_t h = 0; h < heads; h++)
                    NAME(attend)(projected + w * area * 3 * width + h * HEAD, width, area, bias + h * area * area,
                                 regions ? regions + (first + w) * area : NULL, keys, scores,
                                 normed + w * area * width + h * HEAD);
            NAME(apply)(project, rows, normed, FLOAT_NONE, taken, projected, spare);
            for (int64_t i = 0; i < rows; i++)
                if (places[i] >= 0 && places[i] < tokens)
                    memcpy(out + at + places[i] * width, projected + i * width, sizeof(float) * width);
        }
        free(taken);
    }
    return failed ? FLOAT_NO_MEMORY : FLOAT_OK;
}

/* Copy the pixels that kernel rows [top, bottom) of one output pixel see; zeros stand for those outside the image. */
INLINE void NAME(gather)(const float *x, const float_image *from, const float_kernel *kernel, int64_t row,
                         int64_t column, int64_t top, int64_t bottom, float *to)
{
    const int64_t channels = from->channels, left = column * kernel->step - kernel->padding;
    const int inside = left >= 0 && left + kernel->side <= from->width && from->stride == channels;
    for (int64_t i = top; i < bottom; i++) {
        const int64_t y = row * kernel->step - kernel->padding + i;
        const float *const line = x + y * from->width * from->stride;
        if (y >= 0 && y < from->height && inside) {
            memcpy(to, line + left * channels, sizeof(float) * kernel->side * channels);
            to += kernel->side * channels;
            continue;
        }
        for (int64_t j = 0; j < kernel->side; j++, to += channels) {
            const int64_t at = left + j;
            if (y >= 0 && y < from->height && at >= 0 && at < from->width)
                memcpy(to, line + at * from->stride, sizeof(float) * channels);
            else
                memset(to, 0, sizeof(float) * channels);
        }
    }
}

/* Some of the kernel's rows are multiplied at a time, so that the copied pixels stay in the cache. */
INLINE int64_t NAME(kernel_rows)(const float_convolution *c)
{
    const int64_t rows = GATHERED / (c->kernel.side * c->from.channels);
    return rows < 1 ? 1 : rows > c->kernel.side ? c->kernel.side : rows;
}

/* Floats of the buffer of NAME(rows_of). */
INLINE int64_t NAME(rows_buffer)(const float_convolution *c)
{
    return (BLOCK + TILE) * NAME(kernel_rows)(c) * c->kernel.side * c->from.channels;
}

/* Compute rows [first, last) and columns from `column` on of one image. */
TARGET static void NAME(rows_of)(const float_convolution *c, const float *x, int64_t first, int64_t last,
                                 int64_t column, float *out, float *buffer)
{
    const int64_t line = c->kernel.side * c->from.channels, lines = NAME(kernel_rows)(c), width = c->to.width;
    float *const pixels = buffer, *const spare = pixels + BLOCK * lines * line;
    for (int64_t block = first * width; block < last * width; block += BLOCK) {
        const int64_t end = last * width, count = end - block < BLOCK ? end - block : BLOCK;
        for (int64_t top = 0; top < c->kernel.side; top += lines) {
            const int64_t bottom = top + lines < c->kernel.side ? top + lines : c->kernel.side;
            const int64_t depth = (bottom - top) * line;
            for (int64_t i = 0; i < count; i++)
                NAME(gather)(x, &c->from, &c->kernel, (block + i) / width, (block + i) % width, top, bottom,
                             pixels + i * depth);
            const int64_t left = c->layer.columns - column, columns = left < c->columns ? left : c->columns;
            const NAME(task) t = {pixels, depth, count, top * line, depth, column, column + columns, top == 0,
                                  bottom == c->kernel.side, c->activation, NULL, out + block * c->to.stride + column,
                                  c->to.stride, c->slope};
            NAME(product)(&c->layer, &t, spare);
        }
    }
}

#include "float_winograd.h"

TARGET static int NAME(convolve)(const float_convolution *c, const float *x, float *out, int64_t *next)
{
    const int64_t from = c->from.height * c->from.width * c->from.stride, to = c->to.height * c->to.width * c->to.stride;
    const int64_t across = (c->layer.columns + c->columns - 1) / c->columns;
    const int64_t parts = (c->to.height + c->rows - 1) / c->rows * across;
    float *const buffer = allocate(c->transformed ? NAME(tiles_buffer)(c) : NAME(rows_buffer)(c));
    if (!buffer)
        return FLOAT_NO_MEMORY;
    for (;;) {
        const int64_t block = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED), image = block / parts;
        if (image >= c->images)
            break;
        const int64_t first = block % parts / across * c->rows, end = first + c->rows;
        (c->transformed ? NAME(tiles_of) : NAME(rows_of))(c, x + image * from, first,
                                                          end < c->to.height ? end : c->to.height,
                                                          block % across * c->columns, out + image * to, buffer);
    }
    free(buffer);
    return FLOAT_OK;
}

#include "float_fusion.h"
#include "float_relu.h"

#undef allocate
