/* AVX-512 building blocks of int8_linear.c: exponential, GELU, normalization, quantization and the integer product.
   Included by that file only, after round_up and the sizes TILE, PANEL and LANES. */

#ifndef INT8_VECTORS_H
#define INT8_VECTORS_H

#include "int8_linear.h"

#include <float.h>
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
#define INLINE TARGET static inline __attribute__((always_inline))

/* Mask of the first `left` lanes; all lanes if `left` is larger. */
INLINE __mmask16 lanes(int64_t left) { return left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1); }

/* e^x for x <= 0 with a relative error of 2e-7: e^x = 2^n e^r with |r| <= ln(2) / 2. */
INLINE __m512 exponential(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x); /* this operand order preserves NaN */
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.0f / 720);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 120));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 24));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 6));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.5f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, n);
}

/* x Phi(x), with erf from Abramowitz and Stegun 7.1.26 (error 1.5e-7). */
INLINE __m512 gelu(__m512 x)
{
    const __m512 one = _mm512_set1_ps(1.0f), z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(_mm512_set1_ps(0.3275911f), z, one));
    __m512 y = _mm512_set1_ps(1.061405429f);
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-1.453152027f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(1.421413741f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-0.284496736f));
    y = _mm512_mul_ps(_mm512_fmadd_ps(y, t, _mm512_set1_ps(0.254829592f)), t);
    /* tail is erfc(|x| / sqrt 2), which is twice Phi(-|x|) */
    const __m512 tail = _mm512_mul_ps(y, exponential(_mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), z), z)));
    const __m512 half = _mm512_mul_ps(_mm512_set1_ps(0.5f), tail);
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mul_ps(x, _mm512_mask_mov_ps(_mm512_sub_ps(one, half), negative, half));
}

INLINE __m512 activate(__m512 x, int32_t activation)
{
    if (activation == INT8_RELU) /* this operand order preserves NaN */
        return _mm512_max_ps(_mm512_setzero_ps(), x);
    return activation == INT8_GELU ? gelu(x) : x;
}

/* One row of (x - mean) / sqrt(variance + epsilon) * scale + shift; `to` may equal `from`. */
TARGET static void normalize(const int8_norm *norm, const float *from, float *to, int64_t width)
{
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < width; k += LANES)
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(width - k), from + k));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)width);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t k = 0; k < width; k += LANES) {
        const __mmask16 here = lanes(width - k);
        const __m512 away = _mm512_maskz_sub_ps(here, _mm512_maskz_loadu_ps(here, from + k), mean);
        squares = _mm512_fmadd_ps(away, away, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / (float)width;
    const __m512 inverse =
        _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(_mm512_set1_ps(variance + norm->epsilon)));
    for (int64_t k = 0; k < width; k += LANES) {
        const __mmask16 here = lanes(width - k);
        const __m512 away = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(here, from + k), mean), inverse);
        const __m512 scale = _mm512_maskz_loadu_ps(here, norm->scale + k);
        const __m512 shift = norm->shift ? _mm512_maskz_loadu_ps(here, norm->shift + k) : _mm512_setzero_ps();
        _mm512_mask_storeu_ps(to + k, here, _mm512_fmadd_ps(away, scale, shift));
    }
}

/* Quantize a row to bytes centred at 128, padded to a multiple of four; return the step size. */
TARGET static float quantize(const float *row, uint8_t *to, int64_t width)
{
    /* As integers, the bits of |x| sort like |x|, followed by infinity and NaN. */
    __m512i most = _mm512_setzero_si512();
    const __m512i sign = _mm512_set1_epi32(0x7fffffff);
    for (int64_t k = 0; k < width; k += LANES) {
        const __m512i bits = _mm512_maskz_loadu_epi32(lanes(width - k), row + k);
        most = _mm512_max_epi32(most, _mm512_and_si512(bits, sign));
    }
    const int32_t bits = _mm512_reduce_max_epi32(most);
    float size;
    memcpy(&size, &bits, sizeof size);
    if (!(size > 0 && size <= FLT_MAX)) { /* all zero, or not finite */
        memset(to, 128, round_up(width, 4));
        return size > 0 || size != size ? size - size : 0.0f;
    }
    const __m512 inverse = _mm512_set1_ps(127.0f / size);
    for (int64_t k = 0; k < width; k += LANES) {
        const int64_t left = round_up(width - k, 4);
        const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(width - k), row + k), inverse);
        const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(128));
        _mm512_mask_cvtepi32_storeu_epi8(to + k, lanes(left), q);
    }
    return size / 127.0f;
}

/* Six rows times the first `vectors` vectors of a panel, in integers. */
#define MULTIPLY(vectors)                                                                                             \
    TARGET static void multiply_##vectors(const uint8_t *rows, int64_t inputs, const int8_t *panel,                   \
                                          const int32_t *offset, __m512i sums[TILE][4])                               \
    {                                                                                                                 \
        __m512i acc[TILE][vectors];                                                                                   \
        _Pragma("GCC unroll 6") for (int i = 0; i < TILE; i++)                                                        \
            _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++)                                                 \
                acc[i][v] = _mm512_loadu_si512(offset + v * LANES);                                                   \
        for (int64_t k = 0; k < inputs; k += 4) {                                                                     \
            __m512i weight[vectors];                                                                                  \
            _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++)                                                 \
                weight[v] = _mm512_loadu_si512(panel + k * PANEL + v * LANES * 4);                                    \
            _Pragma("GCC unroll 6") for (int i = 0; i < TILE; i++) {                                                  \
                int32_t four;                                                                                         \
                memcpy(&four, rows + i * inputs + k, 4);                                                              \
                const __m512i x = _mm512_set1_epi32(four);                                                            \
                _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++)                                             \
                    acc[i][v] = _mm512_dpbusd_epi32(acc[i][v], x, weight[v]);                                         \
            }                                                                                                         \
        }                                                                                                             \
        _Pragma("GCC unroll 6") for (int i = 0; i < TILE; i++)                                                        \
            _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++)                                                 \
                sums[i][v] = acc[i][v];                                                                               \
    }
MULTIPLY(1)
MULTIPLY(2)
MULTIPLY(3)
MULTIPLY(4)

/* activation(layer(rows)) + residual for `count` quantized rows; rows of `out` are `stride` floats apart. */
TARGET static void apply(const int8_layer *layer, int64_t count, const uint8_t *rows, const float *row_scale,
                         int32_t activation, const float *residual, int64_t residual_stride, float *out, int64_t stride)
{
    const int64_t inputs = round_up(layer->inputs, 4);
    for (int64_t first = 0; first < layer->columns; first += PANEL) {
        const int64_t left = layer->columns - first;
        const int8_t *panel = layer->weight + first * inputs;
        const int32_t *offset = layer->offset + first;
        const int vectors = left >= PANEL ? 4 : (int)((left + LANES - 1) / LANES);
        for (int64_t row = 0; row < count; row += TILE) {
            __m512i sums[TILE][4];
            const uint8_t *tile = rows + row * inputs;
            if (vectors == 4)
                multiply_4(tile, inputs, panel, offset, sums);
            else if (vectors == 3)
                multiply_3(tile, inputs, panel, offset, sums);
            else if (vectors == 2)
                multiply_2(tile, inputs, panel, offset, sums);
            else
                multiply_1(tile, inputs, panel, offset, sums);
            const int64_t last = count - row < TILE ? count - row : TILE;
            for (int v = 0; v < vectors; v++) {
                const int64_t n = first + v * LANES;
                const __mmask16 here = lanes(layer->columns - n);
                const __m512 scale = _mm512_loadu_ps(layer->scale + n);
                const __m512 bias = layer->bias ? _mm512_maskz_loadu_ps(here, layer->bias + n) : _mm512_setzero_ps();
                for (int64_t i = 0; i < last; i++) {
                    const __m512 step = _mm512_mul_ps(scale, _mm512_set1_ps(row_scale[row + i]));
                    __m512 y = activate(_mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i][v]), step, bias), activation);
                    if (residual)
                        y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(here, residual + (row + i) * residual_stride + n));
                    _mm512_mask_storeu_ps(out + (row + i) * stride + n, here, y);
                }
            }
        }
    }
}

TARGET static void add_rows(const float *a, const float *b, float *to, int64_t width)
{
    for (int64_t k = 0; k < width; k += LANES) {
        const __mmask16 here = lanes(width - k);
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(here, a + k), _mm512_maskz_loadu_ps(here, b + k));
        _mm512_mask_storeu_ps(to + k, here, sum);
    }
}

#endif
