/* Vectors, products and row-wise functions of float_linear.c for one width of vectors. That file includes this one once
   for each width, after defining LANES, TILE, NAME(x) and TARGET.

   A packed weight is a row of panels of 2 * LANES columns. Within a panel, the values that belong to one input are
   adjacent. A tile of TILE rows and one panel of columns is accumulated in registers. */

#define vec NAME(vec)
#define ints NAME(ints)
#define INLINE TARGET static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
enum { NAME(PANEL) = 2 * LANES };
#define PANEL NAME(PANEL)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

INLINE vec NAME(load)(const float *from)
{
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void NAME(store)(float *to, vec x) { memcpy(to, &x, sizeof x); }

INLINE vec NAME(splat)(float x) { return x - (vec){0}; }

/* The first `left` values, then zeros. */
INLINE vec NAME(load_some)(const float *from, int64_t left)
{
    if (left >= LANES)
        return NAME(load)(from);
    vec x = {0};
    memcpy(&x, from, sizeof(float) * left);
    return x;
}

INLINE void NAME(store_some)(float *to, vec x, int64_t left)
{
    if (left >= LANES)
        NAME(store)(to, x);
    else
        memcpy(to, &x, sizeof(float) * left);
}

INLINE vec NAME(choose)(ints where, vec yes, vec no) { return (vec)((where & (ints)yes) | (~where & (ints)no)); }

INLINE float NAME(sum)(vec x)
{
    float total = 0;
    UNROLL for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

/* e^x for x <= 0 with a relative error of 2e-7: e^x = 2^n e^r with |r| <= ln(2) / 2. */
INLINE vec NAME(exponential)(vec x)
{
    x = NAME(choose)(x < -87.0f, NAME(splat)(-87.0f), x); /* NaN compares false and stays */
    const vec magic = NAME(splat)(12582912.0f);           /* 1.5 * 2^23: adding it rounds to a whole number */
    const vec n = (x * 1.44269504f + magic) - magic;
    vec r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec y = NAME(splat)(1.0f / 720);
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    return y * (vec)((__builtin_convertvector(n, ints) + 127) << 23);
}

/* x Phi(x), with erf from Abramowitz and Stegun 7.1.26 (error 1.5e-7). */
INLINE vec NAME(gelu)(vec x)
{
    const vec z = (vec)((ints)x & 0x7fffffff) * 0.70710678f, t = 1.0f / (z * 0.3275911f + 1.0f);
    vec y = t * 1.061405429f - 1.453152027f;
    y = y * t + 1.421413741f;
    y = y * t - 0.284496736f;
    y = (y * t + 0.254829592f) * t;
    /* half of erfc(|x| / sqrt 2) is Phi(-|x|) */
    const vec half = y * NAME(exponential)(-z * z) * 0.5f;
    return x * NAME(choose)(x < 0.0f, half, 1.0f - half);
}

INLINE vec NAME(activate)(vec x, int32_t activation, float slope)
{
    if (activation == FLOAT_LEAKY)
        return NAME(choose)(x < 0.0f, x * slope, x);
    if (activation == FLOAT_RELU)
        return (vec)((ints)x & ~(x <= 0.0f)); /* NaN compares false and stays */
    return activation == FLOAT_GELU ? NAME(gelu)(x) : x;
}

/* One row of (x - mean) / sqrt(variance + epsilon) * scale + shift; `to` may equal `from`. */
TARGET static void NAME(normalize)(const float_norm *norm, const float *from, float *to, int64_t width)
{
    vec total = {0}, squares = {0};
    for (int64_t k = 0; k < width; k += LANES)
        total += NAME(load_some)(from + k, width - k);
    const float mean = NAME(sum)(total) / (float)width;
    for (int64_t k = 0; k < width; k += LANES) {
        vec away = NAME(load_some)(from + k, width - k) - mean;
        if (width - k < LANES)
            UNROLL for (int i = 0; i < LANES; i++) away[i] = i < width - k ? away[i] : 0.0f;
        squares += away * away;
    }
    const float inverse = 1.0f / sqrtf(NAME(sum)(squares) / (float)width + norm->epsilon);
    for (int64_t k = 0; k < width; k += LANES) {
        const int64_t left = width - k;
        vec y = (NAME(load_some)(from + k, left) - mean) * inverse * NAME(load_some)(norm->scale + k, left);
        if (norm->shift)
            y += NAME(load_some)(norm->shift + k, left);
        NAME(store_some)(to + k, y, left);
    }
}

TARGET static void NAME(add_rows)(const float *a, const float *b, float *to, int64_t width)
{
    for (int64_t k = 0; k < width; k += LANES)
        NAME(store_some)(to + k, NAME(load_some)(a + k, width - k) + NAME(load_some)(b + k, width - k), width - k);
}

/* Add TILE rows times `depth` inputs of two vectors of columns; the inputs of `b` are `step` floats apart. */
INLINE void NAME(multiply)(const float *a, int64_t stride, const float *b, int64_t step, int64_t depth,
                           vec acc[TILE][2])
{
    /* One pointer for three rows leaves enough registers for addresses. */
    const float *rows[TILE / 3];
    UNROLL for (int i = 0; i < TILE / 3; i++) rows[i] = a + 3 * i * stride;
    for (int64_t k = 0; k < depth; k++, b += step) {
        const vec low = NAME(load)(b), high = NAME(load)(b + LANES);
        UNROLL for (int i = 0; i < TILE / 3; i++)
        {
            UNROLL for (int j = 0; j < 3; j++)
            {
                const vec x = NAME(splat)(rows[i][j * stride]);
                acc[3 * i + j][0] += x * low;
                acc[3 * i + j][1] += x * high;
            }
            rows[i]++;
        }
    }
}

/* A product's inputs and outputs: `count` rows of a times inputs [from, from + depth) of columns [first, last).
   `opens` starts from the bias instead of what `out` holds; `closes` applies the activation and adds the residual. */
typedef struct {
    const float *a;
    int64_t a_stride, count, from, depth, first, last;
    int opens, closes;
    int32_t activation;
    const float *residual;
    float *out;
    int64_t stride; /* of out and residual */
    float slope;
} NAME(task);

TARGET static void NAME(tile)(const NAME(task) *t, const float *bias, const float *panel, const float *a,
                              int64_t a_stride, int64_t depth, int opens, int closes, const float *residual,
                              float *out, int64_t stride)
{
    vec acc[TILE][2];
    if (opens) {
        const vec low = bias ? NAME(load)(bias) : (vec){0}, high = bias ? NAME(load)(bias + LANES) : (vec){0};
        UNROLL for (int i = 0; i < TILE; i++) acc[i][0] = low, acc[i][1] = high;
    } else {
        UNROLL for (int i = 0; i < TILE; i++)
            acc[i][0] = NAME(load)(out + i * stride), acc[i][1] = NAME(load)(out + i * stride + LANES);
    }
    NAME(multiply)(a, a_stride, panel, PANEL, depth, acc);
    if (closes && t->activation != FLOAT_NONE) {
        UNROLL for (int i = 0; i < TILE; i++)
            for (int v = 0; v < 2; v++) NAME(store)(out + i * stride + v * LANES, acc[i][v]);
        for (int i = 0; i < TILE; i++)
            for (int v = 0; v < 2; v++) {
                float *const at = out + i * stride + v * LANES;
                vec y = NAME(activate)(NAME(load)(at), t->activation, t->slope);
                if (residual)
                    y += NAME(load)(residual + i * stride + v * LANES);
                NAME(store)(at, y);
            }
        return;
    }
    if (closes && residual)
        UNROLL for (int i = 0; i < TILE; i++)
        {
            acc[i][0] += NAME(load)(residual + i * stride);
            acc[i][1] += NAME(load)(residual + i * stride + LANES);
        }
    UNROLL for (int i = 0; i < TILE; i++)
    {
        NAME(store)(out + i * stride, acc[i][0]);
        NAME(store)(out + i * stride + LANES, acc[i][1]);
    }
}

INLINE void NAME(copy)(const float *from, int64_t from_stride, float *to, int64_t to_stride, int64_t rows,
                       int64_t columns)
{
    for (int64_t i = 0; i < rows; i++)
        memcpy(to + i * to_stride, from + i * from_stride, sizeof(float) * columns);
}

/* Compute a task. `spare` has room for TILE rows of `depth` floats. */
TARGET static void NAME(product)(const float_layer *layer, const NAME(task) *t, float *spare)
{
    const int64_t whole = t->count - t->count % TILE;
    /* The last rows are copied, so that a full tile of rows can be read. */
    if (whole < t->count)
        NAME(copy)(t->a + whole * t->a_stride, t->a_stride, spare, t->depth, t->count - whole, t->depth);
    for (int64_t k = 0; k < t->depth; k += DEPTH) {
        const int64_t depth = t->depth - k < DEPTH ? t->depth - k : DEPTH;
        const int opens = t->opens && k == 0, closes = t->closes && k + depth == t->depth;
        for (int64_t column = t->first; column < t->last; column += PANEL) {
            const float *const panel = layer->weight + column * layer->inputs + (t->from + k) * PANEL;
            const float *const bias = layer->bias ? layer->bias + column : NULL;
            const int64_t columns = t->last - column < PANEL ? t->last - column : PANEL;
            for (int64_t row = 0; row < t->count; row += TILE) {
                float *const out = t->out + row * t->stride + column - t->first;
                const float *const residual = t->residual ? t->residual + row * t->stride + column - t->first : NULL;
                const int64_t rows = t->count - row < TILE ? t->count - row : TILE;
                const float *const a = row < whole ? t->a + row * t->a_stride + k : spare + k;
                const int64_t a_stride = row < whole ? t->a_stride : t->depth;
                if (rows == TILE && columns == PANEL) {
                    NAME(tile)(t, bias, panel, a, a_stride, depth, opens, closes, residual, out, t->stride);
                    continue;
                }
                float result[TILE * PANEL] = {0}, added[TILE * PANEL] = {0};
                if (!opens)
                    NAME(copy)(out, t->stride, result, PANEL, rows, columns);
                if (residual)
                    NAME(copy)(residual, t->stride, added, PANEL, rows, columns);
                NAME(tile)(t, bias, panel, a, a_stride, depth, opens, closes, residual ? added : NULL, result, PANEL);
                NAME(copy)(result, PANEL, out, t->stride, rows, columns);
            }
        }
    }
}

/* out = activation(layer(a)) + residual for `count` rows. */
INLINE void NAME(apply)(const float_layer *layer, int64_t count, const float *a, int32_t activation,
                        const float *residual, float *out, float *spare)
{
    const NAME(task) t = {a, layer->inputs, count, 0, layer->inputs, 0, layer->columns, 1, 1, activation, residual,
                          out, layer->columns, 0.0f};
    NAME(product)(layer, &t, spare);
}

#include "float_layers.h"

#undef vec
#undef ints
#undef INLINE
#undef PANEL
#undef UNROLL
