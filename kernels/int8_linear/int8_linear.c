/* Implementation of int8_linear.h for AVX-512 VNNI; on other CPUs int8_supported returns 0.

   A packed weight is a row of panels of 64 columns. Within a panel, four successive inputs of each column are adjacent,
   as the VNNI instruction reads them. It multiplies unsigned by signed bytes, so 128 is added to the inputs, and the
   offsets (-128 times the column sums of the weight) subtract it again.

   Rows are processed in blocks small enough for all of a block's data, the hidden layer included, to stay in a core's
   cache. */

#include "int8_linear.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define INT8_HERE 1
#else
#define INT8_HERE 0
#endif

enum { BLOCK = 48, TILE = 6, PANEL = 64, LANES = 16, HEAD = 32 };

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t int8_padded_columns(int64_t columns) { return round_up(columns, PANEL); }

int64_t int8_packed_bytes(int64_t inputs, int64_t columns) { return round_up(inputs, 4) * int8_padded_columns(columns); }

int int8_pack(int64_t inputs, int64_t columns, const float *weight, int8_t *packed, float *scale, int32_t *offset)
{
    if (inputs < 1 || columns < 1 || inputs > 1 << 16)
        return INT8_BAD_ARGUMENT;
    const int64_t padded = round_up(inputs, 4);
    memset(packed, 0, int8_packed_bytes(inputs, columns));
    for (int64_t n = 0; n < int8_padded_columns(columns); n++) {
        float most = 0;
        for (int64_t k = 0; n < columns && k < inputs; k++) {
            const float size = weight[n * inputs + k] < 0 ? -weight[n * inputs + k] : weight[n * inputs + k];
            /* A NaN weight makes its whole column NaN. */
            most = size > most || size != size ? size : most;
        }
        scale[n] = most / 127.0f;
        int32_t sum = 0;
        int8_t *panel = packed + n / PANEL * PANEL * padded + n % PANEL * 4;
        for (int64_t k = 0; most > 1e-36f && most <= FLT_MAX && k < inputs; k++) {
            const float q = weight[n * inputs + k] * (127.0f / most);
            const int8_t rounded = (int8_t)(q < 0 ? q - 0.5f : q + 0.5f);
            panel[k / 4 * PANEL * 4 + k % 4] = rounded;
            sum += rounded;
        }
        offset[n] = -128 * sum;
    }
    return INT8_OK;
}

#if INT8_HERE

#include "int8_vectors.h"

int int8_supported(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

/* Working memory of one block. The byte rows are a whole number of tiles; unused last rows hold old data. */
typedef struct {
    float *wide, *normed, *hidden, scale[BLOCK];
    uint8_t *bytes;
} scratch;

static float *allocate(size_t floats)
{
    void *memory = NULL;
    return posix_memalign(&memory, 64, sizeof(float) * floats) ? NULL : memory;
}

static int reserve(scratch *s, int64_t width, int64_t hidden)
{
    const int64_t most = round_up(width > hidden ? width : hidden, LANES), floats = round_up(width, LANES);
    s->wide = allocate(BLOCK * (2 * floats + round_up(hidden, LANES) + most / 4));
    if (!s->wide)
        return 0;
    s->normed = s->wide + BLOCK * floats;
    s->hidden = s->normed + BLOCK * floats;
    s->bytes = (uint8_t *)(s->hidden + BLOCK * round_up(hidden, LANES));
    memset(s->bytes, 128, BLOCK * most);
    return 1;
}

static void quantize_rows(scratch *s, const float *rows, int64_t count, int64_t width)
{
    for (int64_t i = 0; i < count; i++)
        s->scale[i] = quantize(rows + i * width, s->bytes + i * round_up(width, 4), width);
}

static int usable(const int8_layer *layer)
{
    return layer && layer->weight && layer->inputs >= 1 && layer->inputs <= 1 << 16 && layer->columns >= 1;
}

int int8_linear(int64_t rows, const float *x, const float *addend, int64_t addend_rows,
                const int8_layer *layer, int32_t activation, int32_t threads, float *out)
{
    if (rows < 0 || !usable(layer) || (addend && addend_rows < 1))
        return INT8_BAD_ARGUMENT;
    if (!int8_supported())
        return INT8_UNSUPPORTED;
    const int64_t width = layer->inputs, blocks = (rows + BLOCK - 1) / BLOCK;
    int failed = 0;
    if (threads > blocks)
        threads = (int32_t)blocks;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        scratch s;
        const int ready = reserve(&s, width, 0);
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = block * BLOCK, count = rows - first < BLOCK ? rows - first : BLOCK;
            if (!ready)
                continue;
            const float *from = x + first * width;
            for (int64_t i = 0; addend && i < count; i++)
                add_rows(from + i * width, addend + (first + i) % addend_rows * width, s.wide + i * width, width);
            quantize_rows(&s, addend ? s.wide : from, count, width);
            apply(layer, count, s.bytes, s.scale, activation, NULL, 0, out + first * layer->columns, layer->columns);
        }
        if (ready)
            free(s.wide);
    }
    return failed ? INT8_NO_MEMORY : INT8_OK;
}

int int8_feed_forward(int64_t rows, const float *x, const float *y, const int8_layer *project, const int8_norm *before,
                      const int8_layer *first_layer, int32_t activation, const int8_layer *second,
                      const int8_norm *after, int32_t post, int32_t threads, float *out)
{
    if (rows < 0 || !usable(first_layer) || !usable(second) || second->inputs != first_layer->columns ||
        second->columns != first_layer->inputs)
        return INT8_BAD_ARGUMENT;
    const int64_t width = first_layer->inputs, hidden = first_layer->columns, blocks = (rows + BLOCK - 1) / BLOCK;
    const int projects = project->weight != NULL;
    if (projects && (!usable(project) || project->inputs != width || project->columns != width))
        return INT8_BAD_ARGUMENT;
    if (!int8_supported())
        return INT8_UNSUPPORTED;
    int failed = 0;
    if (threads > blocks)
        threads = (int32_t)blocks;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        scratch s;
        const int ready = reserve(&s, width, hidden);
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t at = block * BLOCK * width, count = rows - block * BLOCK < BLOCK ? rows - block * BLOCK : BLOCK;
            if (!ready)
                continue;
            const float *wide = x + at;
            if (projects) {
                quantize_rows(&s, y + at, count, width);
                apply(project, count, s.bytes, s.scale, INT8_NONE, wide, width, s.wide, width);
                wide = s.wide;
            }
            const float *normed = wide;
            if (before->scale) {
                for (int64_t i = 0; i < count; i++)
                    normalize(before, wide + i * width, s.normed + i * width, width);
                normed = s.normed;
            }
            quantize_rows(&s, normed, count, width);
            apply(first_layer, count, s.bytes, s.scale, activation, NULL, 0, s.hidden, hidden);
            quantize_rows(&s, s.hidden, count, hidden);
            apply(second, count, s.bytes, s.scale, INT8_NONE, post ? normed : wide, width, out + at, width);
            for (int64_t i = 0; after->scale && i < count; i++)
                normalize(after, out + at + i * width, out + at + i * width, width);
        }
        if (ready)
            free(s.wide);
    }
    return failed ? INT8_NO_MEMORY : INT8_OK;
}

/* Attention scores of six queries with `vectors` vectors of keys, which are stored transposed. */
#define SCORE(vectors)                                                                                                \
    TARGET static void score_##vectors(const float *q[TILE], const float *keys, int64_t padded, float *to)            \
    {                                                                                                                 \
        __m512 acc[TILE][vectors];                                                                                    \
        _Pragma("GCC unroll 6") for (int i = 0; i < TILE; i++)                                                        \
            _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++) acc[i][v] = _mm512_setzero_ps();                \
        for (int d = 0; d < HEAD; d++) {                                                                              \
            __m512 key[vectors];                                                                                      \
            _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++)                                                 \
                key[v] = _mm512_loadu_ps(keys + d * padded + v * LANES);                                              \
            _Pragma("GCC unroll 6") for (int i = 0; i < TILE; i++) {                                                  \
                const __m512 x = _mm512_set1_ps(q[i][d]);                                                             \
                _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++)                                             \
                    acc[i][v] = _mm512_fmadd_ps(x, key[v], acc[i][v]);                                                \
            }                                                                                                         \
        }                                                                                                             \
        _Pragma("GCC unroll 6") for (int i = 0; i < TILE; i++)                                                        \
            _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++)                                                 \
                _mm512_storeu_ps(to + i * padded + v * LANES, acc[i][v]);                                             \
    }
SCORE(1)
SCORE(2)
SCORE(3)
SCORE(4)

/* Replace a row by e^(score / sqrt(HEAD) + bias - maximum); return the reciprocal of its sum. */
TARGET static float softmax(float *row, const float *bias, const int64_t *regions, int64_t place, int64_t area)
{
    const __m512 scale = _mm512_set1_ps(0.17677669f), apart = _mm512_set1_ps(-100.0f);
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j < area; j += LANES) {
        const __mmask16 here = lanes(area - j);
        __m512 s = _mm512_fmadd_ps(_mm512_loadu_ps(row + j), scale, _mm512_maskz_loadu_ps(here, bias + j));
        if (regions) {
            const __m512i own = _mm512_set1_epi64(regions[place]);
            const __m512i low = _mm512_maskz_loadu_epi64((__mmask8)here, regions + j);
            const __m512i high = _mm512_maskz_loadu_epi64((__mmask8)(here >> 8), regions + j + 8);
            const int differ = _mm512_cmpneq_epi64_mask(low, own) | _mm512_cmpneq_epi64_mask(high, own) << 8;
            s = _mm512_mask_add_ps(s, (__mmask16)differ, s, apart);
        }
        most = _mm512_mask_max_ps(most, here, most, s);
        _mm512_storeu_ps(row + j, s);
    }
    const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < area; j += LANES) {
        const __m512 e = exponential(_mm512_sub_ps(_mm512_loadu_ps(row + j), highest));
        sum = _mm512_mask_add_ps(sum, lanes(area - j), sum, e);
        _mm512_storeu_ps(row + j, e);
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

/* One head of one window; in qkv (area, 3 * width), its q, k and v start at 0, width and 2 * width. */
TARGET static void attend(const float *qkv, int64_t width, int64_t area, const float *bias, const int64_t *regions,
                          float *keys, float *scores, float *out)
{
    const int64_t stride = 3 * width, padded = round_up(area, LANES);
    for (int64_t j = 0; j < area; j++)
        for (int d = 0; d < HEAD; d++)
            keys[d * padded + j] = qkv[j * stride + width + d];
    for (int64_t row = 0; row < area; row += TILE) {
        const int64_t count = area - row < TILE ? area - row : TILE;
        const float *q[TILE];
        float share[TILE];
        for (int64_t i = 0; i < TILE; i++) /* the last tile repeats its last row */
            q[i] = qkv + (row + (i < count ? i : count - 1)) * stride;
        for (int64_t j = 0; j < padded; j += 4 * LANES) {
            const int64_t vectors = (padded - j) / LANES;
            (vectors >= 4 ? score_4 : vectors == 3 ? score_3 : vectors == 2 ? score_2 : score_1)(q, keys + j, padded,
                                                                                               scores + j);
        }
        for (int64_t i = 0; i < TILE; i++) {
            const int64_t place = row + (i < count ? i : count - 1);
            share[i] = softmax(scores + i * padded, bias + place * area, regions, place, area);
        }
        __m512 acc[TILE][2];
        _Pragma("GCC unroll 6") for (int i = 0; i < TILE; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
        for (int64_t j = 0; j < area; j++) {
            const float *v = qkv + j * stride + 2 * width;
            const __m512 low = _mm512_loadu_ps(v), high = _mm512_loadu_ps(v + LANES);
            _Pragma("GCC unroll 6") for (int i = 0; i < TILE; i++) {
                const __m512 p = _mm512_set1_ps(scores[i * padded + j]);
                acc[i][0] = _mm512_fmadd_ps(p, low, acc[i][0]);
                acc[i][1] = _mm512_fmadd_ps(p, high, acc[i][1]);
            }
        }
        _Pragma("GCC unroll 6") for (int i = 0; i < TILE; i++)
        {
            if (i >= count)
                break;
            const __m512 each = _mm512_set1_ps(share[i]);
            _mm512_storeu_ps(out + (row + i) * width, _mm512_mul_ps(acc[i][0], each));
            _mm512_storeu_ps(out + (row + i) * width + LANES, _mm512_mul_ps(acc[i][1], each));
        }
    }
}

int int8_window_attention(int64_t images, int64_t tokens, int64_t windows, int64_t area, int64_t heads,
                          const int64_t *index, const int64_t *regions, const float *x, const int8_norm *before,
                          const int8_layer *qkv, const float *bias, const int8_layer *project, int32_t threads,
                          float *out)
{
    const int64_t width = heads * HEAD;
    if (images < 0 || tokens < 1 || windows < 1 || area < 1 || heads < 1 || !usable(qkv) || !usable(project) ||
        qkv->inputs != width || qkv->columns != 3 * width || project->inputs != width || project->columns != width)
        return INT8_BAD_ARGUMENT;
    if (!int8_supported())
        return INT8_UNSUPPORTED;
    const int64_t rows = round_up(area, TILE), padded = round_up(area, LANES);
    int failed = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *const taken = allocate(area * width * 5 + padded * (HEAD + TILE) + rows + rows * width / 4);
        float *const normed = taken + area * width, *const projected = normed + area * width;
        float *const keys = projected + 3 * area * width, *const scores = keys + HEAD * padded;
        float *const scale = scores + TILE * padded;
        uint8_t *const bytes = (uint8_t *)(scale + rows);
        if (!taken) {
#pragma omp atomic write
            failed = 1;
        } else {
            memset(keys, 0, sizeof(float) * HEAD * padded);
            memset(bytes, 128, rows * width);
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < images * windows; task++) {
            if (!taken)
                continue;
            const int64_t window = task % windows, at = task / windows * tokens * width;
            const int64_t *places = index + window * area;
            for (int64_t i = 0; i < area; i++) {
                const int real = places[i] >= 0 && places[i] < tokens;
                if (real) {
                    memcpy(taken + i * width, x + at + places[i] * width, sizeof(float) * width);
                    normalize(before, taken + i * width, normed + i * width, width);
                } else {
                    memset(taken + i * width, 0, sizeof(float) * width);
                    memset(normed + i * width, 0, sizeof(float) * width);
                }
                scale[i] = quantize(normed + i * width, bytes + i * width, width);
            }
            apply(qkv, area, bytes, scale, INT8_NONE, NULL, 0, projected, 3 * width);
            for (int64_t h = 0; h < heads; h++)
                attend(projected + h * HEAD, width, area, bias + h * area * area,
                       regions ? regions + window * area : NULL, keys, scores, normed + h * HEAD);
            for (int64_t i = 0; i < area; i++)
                scale[i] = quantize(normed + i * width, bytes + i * width, width);
            apply(project, area, bytes, scale, INT8_NONE, taken, width, projected, width);
            for (int64_t i = 0; i < area; i++)
                if (places[i] >= 0 && places[i] < tokens)
                    memcpy(out + at + places[i] * width, projected + i * width, sizeof(float) * width);
        }
        free(taken);
    }
    return failed ? INT8_NO_MEMORY : INT8_OK;
}

#else

int int8_supported(void) { return 0; }

int int8_linear(int64_t rows, const float *x, const float *addend, int64_t addend_rows,
                const int8_layer *layer, int32_t activation, int32_t threads, float *out)
{
    (void)rows, (void)x, (void)addend, (void)addend_rows, (void)layer, (void)activation, (void)threads, (void)out;
    return INT8_UNSUPPORTED;
}

int int8_feed_forward(int64_t rows, const float *x, const float *y, const int8_layer *project, const int8_norm *before,
                      const int8_layer *first, int32_t activation, const int8_layer *second, const int8_norm *after,
                      int32_t post, int32_t threads, float *out)
{
    (void)rows, (void)x, (void)y, (void)project, (void)before, (void)first, (void)activation, (void)second;
    (void)after, (void)post, (void)threads, (void)out;
    return INT8_UNSUPPORTED;
}

int int8_window_attention(int64_t images, int64_t tokens, int64_t windows, int64_t area, int64_t heads,
                          const int64_t *index, const int64_t *regions, const float *x, const int8_norm *before,
                          const int8_layer *qkv, const float *bias, const int8_layer *project, int32_t threads,
                          float *out)
{
    (void)images, (void)tokens, (void)windows, (void)area, (void)heads, (void)index, (void)regions, (void)x;
    (void)before, (void)qkv, (void)bias, (void)project, (void)threads, (void)out;
    return INT8_UNSUPPORTED;
}

#endif
