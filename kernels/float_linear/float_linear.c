/* Implementation of float_linear.h for AVX2 with FMA and for AVX-512; on other CPUs float_supported returns 0.

   float_products.h and float_layers.h are written in the compiler's vector types and compiled once for each width. */

#include "float_linear.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FLOAT_HERE 1
#else
#define FLOAT_HERE 0
#endif

/* Rows, inputs and hidden columns that are computed at a time: a block of rows and a panel of weights fit a core's
   caches. GROUP is the number of floats in the windows that are computed together, GATHERED the number of inputs of a
   convolution, TRANSFORMED the number of floats of the tiles of one. */
enum { BLOCK = 96, DEPTH = 256, CHUNK = 256, GROUP = 65536, GATHERED = 384, TRANSFORMED = 65536, HEAD = 32 };

/* Rows and hidden columns of a feed-forward block in training whose zeros are found together; UNITS is the number of bits
   in a mask. */
enum { GROUPED = 60, UNITS = 64 };

static int usable(const float_layer *layer)
{
    return layer && layer->weight && layer->inputs >= 1 && layer->columns >= 1;
}

#if FLOAT_HERE

/* Transpose a matrix of 64 x 64 bits (Warren, Hacker's Delight, section 7-3). */
static void turn(uint64_t rows[64])
{
    uint64_t mask = 0x00000000ffffffff;
    for (int half = 32; half; half >>= 1, mask ^= mask << half)
        for (int i = 0; i < 64; i = ((i | half) + 1) & ~half) {
            const uint64_t moved = ((rows[i] >> half) ^ rows[i | half]) & mask;
            rows[i] ^= moved << half;
            rows[i | half] ^= moved;
        }
}

#define LANES 8
#define TILE 6
#define NAME(x) x##_8
#define TARGET __attribute__((target("avx2,fma")))
#include "float_products.h"
#undef LANES
#undef TILE
#undef NAME
#undef TARGET

#define LANES 16
#define TILE 12
#define NAME(x) x##_16
/* FLOAT_WIDE_ON_AVX2 compiles the wide code for CPUs without AVX-512, so that it can be tested there. */
#ifdef FLOAT_WIDE_ON_AVX2
#define TARGET __attribute__((target("avx2,fma")))
#else
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#endif
#include "float_products.h"
#undef LANES
#undef TILE
#undef NAME
#undef TARGET

int float_supported(void)
{
    __builtin_cpu_init();
    const int narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef FLOAT_WIDE_ON_AVX2
    return narrow ? 16 : 0;
#else
    const int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return wide ? 16 : narrow ? 8 : 0;
#endif
}

#define RUN(function, ...)                                                                                            \
    switch (float_supported()) {                                                                                      \
    case 16:                                                                                                          \
        return function##_16(__VA_ARGS__);                                                                            \
    case 8:                                                                                                           \
        return function##_8(__VA_ARGS__);                                                                             \
    default:                                                                                                          \
        return FLOAT_UNSUPPORTED;                                                                                     \
    }

#else

int float_supported(void) { return 0; }

#define RUN(function, ...) return FLOAT_UNSUPPORTED;

#endif

static int64_t panel_columns(void) { return float_supported() > 0 ? 2 * float_supported() : 1; }

int64_t float_padded_columns(int64_t columns) { return (columns + panel_columns() - 1) / panel_columns() * panel_columns(); }

int64_t float_packed_bytes(int64_t inputs, int64_t columns)
{
    return (int64_t)sizeof(float) * inputs * float_padded_columns(columns);
}

int float_pack(int64_t inputs, int64_t columns, const float *weight, float *packed)
{
    if (inputs < 1 || columns < 1)
        return FLOAT_BAD_ARGUMENT;
    const int64_t panel = panel_columns();
    for (int64_t n = 0; n < columns; n += panel, packed += panel * inputs) {
        const int64_t here = columns - n < panel ? columns - n : panel;
        if (here < panel)
            memset(packed, 0, sizeof(float) * panel * inputs);
        for (int64_t k = 0; k < inputs; k++)
            for (int64_t j = 0; j < here; j++) packed[k * panel + j] = weight[(n + j) * inputs + k];
    }
    return FLOAT_OK;
}

int float_linear(int64_t rows, const float *x, const float *addend, int64_t addend_rows, const float_layer *layer,
                 int32_t activation, int32_t threads, float *out)
{
    if (rows < 0 || !usable(layer) || (addend && addend_rows < 1))
        return FLOAT_BAD_ARGUMENT;
    RUN(linear, rows, x, addend, addend_rows, layer, activation, threads, out)
}

int float_feed_forward(int64_t rows, const float *x, const float *y, const float_layer *project,
                       const float_norm *before, const float_layer *first, int32_t activation,
                       const float_layer *second, const float_norm *after, int32_t post, int32_t threads, float *out)
{
    if (rows < 0 || !usable(first) || !usable(second) || second->inputs != first->columns ||
        second->columns != first->inputs)
        return FLOAT_BAD_ARGUMENT;
    if (project->weight && (!usable(project) || project->inputs != first->inputs || project->columns != first->inputs))
        return FLOAT_BAD_ARGUMENT;
    RUN(feed_forward, rows, x, y, project, before, first, activation, second, after, post, threads, out)
}

int float_window_attention(int64_t images, int64_t tokens, int64_t windows, int64_t area, int64_t heads,
                           const int64_t *index, const int64_t *regions, const float *x, const float_norm *before,
                           const float_layer *qkv, const float *bias, const float_layer *project, int32_t threads,
                           float *out)
{
    const int64_t width = heads * HEAD;
    if (images < 0 || tokens < 1 || windows < 1 || area < 1 || heads < 1 || !usable(qkv) || !usable(project) ||
        qkv->inputs != width || qkv->columns != 3 * width || project->inputs != width || project->columns != width)
        return FLOAT_BAD_ARGUMENT;
    RUN(window_attention, images, tokens, windows, area, heads, index, regions, x, before, qkv, bias, project, threads,
        out)
}

int float_convolve(const float_convolution *c, const float *x, float *out, int64_t *next)
{
    const float_layer *const layer = &c->layer;
    const int64_t side = c->kernel.side, pixels = c->transformed ? 1 : side * side;
    if (!usable(layer) || side < 1 || c->kernel.step < 1 || c->kernel.padding < 0 || c->from.channels < 1 ||
        c->from.stride < c->from.channels || c->to.stride < c->to.channels || c->to.channels != layer->columns ||
        layer->inputs != pixels * c->from.channels || c->images < 0 || c->rows < 1 || c->columns < 1 ||
        c->columns % panel_columns() || c->to.height < 1 || c->to.width < 1)
        return FLOAT_BAD_ARGUMENT;
    if (c->transformed && (side != 3 || c->kernel.step != 1 || c->rows % 2))
        return FLOAT_BAD_ARGUMENT;
    RUN(convolve, c, x, out, next)
}

int float_fuse(int64_t rows, int64_t heads, const float *vision, const float_norm *norm,
               const float_layer *directions, const float *text_mask, const float_layer *brought, const uint8_t *real,
               float *out, float *peaks, float *sums, float *pooled)
{
    if (rows < 0 || heads < 1 || !usable(directions) || !usable(brought) || directions->columns % heads ||
        brought->inputs != directions->columns || brought->columns != directions->inputs)
        return FLOAT_BAD_ARGUMENT;
    RUN(fuse, rows, heads, vision, norm, directions, text_mask, brought, real, out, peaks, sums, pooled)
}

static int fits_relu(int64_t rows, int64_t width, int64_t hidden)
{
    return rows >= 0 && width >= 1 && hidden >= 1 && float_supported() > 0 && width % float_supported() == 0 &&
           hidden % UNITS == 0;
}

int float_relu_forward(int64_t rows, int64_t width, int64_t hidden, const float *x, const float *first,
                       const float *first_bias, const float *second, const float *second_bias, int32_t threads,
                       float *kept, float *out)
{
    if (!fits_relu(rows, width, hidden))
        return FLOAT_BAD_ARGUMENT;
    RUN(relu_forward, rows, width, hidden, x, first, first_bias, second, second_bias, threads, kept, out)
}

int float_relu_backward(int64_t rows, int64_t width, int64_t hidden, const float *grad, const float *x,
                        const float *kept, const float *first, const float *second, int32_t threads, float *grad_x,
                        float *grad_first, float *grad_first_bias, float *grad_second, float *grad_second_bias)
{
    if (!fits_relu(rows, width, hidden))
        return FLOAT_BAD_ARGUMENT;
    RUN(relu_backward, rows, width, hidden, grad, x, kept, first, second, threads, grad_x, grad_first, grad_first_bias,
        grad_second, grad_second_bias)
}
