/* The loops of multi-scale deformable attention, included once per instruction set.
   The including file defines MSDA_VW (float32 lanes of a vector register), MSDA_FN(name) and MSDA_TARGET.
   Vector types are the compiler's extension at exactly the register's width: the compiler would split a wider type
   before it considers the target attribute. */

#define VW MSDA_VW
#define INLINE MSDA_TARGET static inline __attribute__((always_inline))
#define vf MSDA_FN(vf)
#define vi MSDA_FN(vi)
#define vu MSDA_FN(vu)
#define vh MSDA_FN(vh)
#define vf_any MSDA_FN(vf_any)
#define vi_any MSDA_FN(vi_any)
#define vh_any MSDA_FN(vh_any)
typedef float vf __attribute__((vector_size(4 * VW)));
typedef int32_t vi __attribute__((vector_size(4 * VW)));
typedef uint32_t vu __attribute__((vector_size(4 * VW)));
typedef uint16_t vh __attribute__((vector_size(2 * VW)));
typedef float vf_any __attribute__((vector_size(4 * VW), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(4 * VW), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * VW), aligned(2), may_alias));

#if VW == 16
#define EVEN(a, b) MSDA_SHUFFLE(vi, a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(a, b) MSDA_SHUFFLE(vi, a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#define ZIP_LOW(a, b) MSDA_SHUFFLE(vi, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) MSDA_SHUFFLE(vi, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif VW == 8
#define EVEN(a, b) MSDA_SHUFFLE(vi, a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODD(a, b) MSDA_SHUFFLE(vi, a, b, 1, 3, 5, 7, 9, 11, 13, 15)
#define ZIP_LOW(a, b) MSDA_SHUFFLE(vi, a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) MSDA_SHUFFLE(vi, a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define EVEN(a, b) MSDA_SHUFFLE(vi, a, b, 0, 2, 4, 6)
#define ODD(a, b) MSDA_SHUFFLE(vi, a, b, 1, 3, 5, 7)
#define ZIP_LOW(a, b) MSDA_SHUFFLE(vi, a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) MSDA_SHUFFLE(vi, a, b, 2, 6, 3, 7)
#endif

INLINE vf MSDA_FN(load)(const float *p) { return *(const vf_any *)p; }
INLINE void MSDA_FN(store)(float *p, vf v) { *(vf_any *)p = v; }
INLINE vf MSDA_FN(splat)(float x) { return x - (vf){0}; }

INLINE vf MSDA_FN(load_half)(const uint16_t *p)
{
    return (vf)(__builtin_convertvector(*(const vh_any *)p, vu) << 16);
}

/* Round to nearest even. A NaN stays a NaN with its sign and top bits. */
INLINE void MSDA_FN(store_half)(uint16_t *p, vf v)
{
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(v != v);
    rounded = (rounded & ~nan) | (((bits >> 16) | 0x40) & nan);
    *(vh_any *)p = __builtin_convertvector(rounded, vh);
}

/* Convert a row of `width` values to float32 and fill up with zeros to `padded`. */
INLINE void MSDA_FN(widen_row)(float *to, const uint16_t *from, int64_t width, int64_t padded)
{
    int64_t i = 0;
    for (; i + VW <= width; i += VW)
        MSDA_FN(store)(to + i, MSDA_FN(load_half)(from + i));
    for (; i < width; i++)
        to[i] = msda_from_half(from[i]);
    for (; i < padded; i++)
        to[i] = 0;
}

INLINE void MSDA_FN(narrow_row)(uint16_t *to, const float *from, int64_t width)
{
    int64_t i = 0;
    for (; i + VW <= width; i += VW)
        MSDA_FN(store_half)(to + i, MSDA_FN(load)(from + i));
    for (; i < width; i++)
        to[i] = msda_to_half(from[i]);
}

INLINE void MSDA_FN(copy_row)(float *to, const float *from, int64_t width, int64_t padded)
{
    int64_t i = 0;
    for (; i + VW <= width; i += VW)
        MSDA_FN(store)(to + i, MSDA_FN(load)(from + i));
    for (; i < width; i++)
        to[i] = from[i];
    for (; i < padded; i++)
        to[i] = 0;
}

/* Copy rows [first, last) of one head to contiguous float32 rows of a padded width. In memory, a head's rows are M * D
   elements apart, so reading them in place would use only a fraction of the cache's sets. */
MSDA_TARGET static void MSDA_FN(pack)(const msda_job *job, int64_t b, int64_t m, int64_t first, int64_t last, float *rows)
{
    const int64_t D = job->D, Dp = job->Dp, step = job->M * D;
    const int64_t at = ((b * job->S + first) * job->M + m) * D;
    for (int64_t s = 0; s < last - first; s++) {
        if (job->half)
            MSDA_FN(widen_row)(rows + s * Dp, (const uint16_t *)job->value + at + s * step, D, Dp);
        else
            MSDA_FN(copy_row)(rows + s * Dp, (const float *)job->value + at + s * step, D, Dp);
    }
}

/* Inverse of pack, for the gradient of the value. */
MSDA_TARGET static void MSDA_FN(unpack)(const msda_job *job, int64_t b, int64_t m, int64_t first, int64_t last,
                                        const float *rows)
{
    const int64_t D = job->D, Dp = job->Dp, step = job->M * D;
    const int64_t at = ((b * job->S + first) * job->M + m) * D;
    for (int64_t s = 0; s < last - first; s++) {
        if (job->half)
            MSDA_FN(narrow_row)((uint16_t *)job->grad_value + at + s * step, rows + s * Dp, D);
        else
            MSDA_FN(copy_row)((float *)job->grad_value + at + s * step, rows + s * Dp, D, D);
    }
}

/* Corner offsets and bilinear weights of up to MSDA_MAX_POINTS points of one query and head. The corners are in the
   order (y0,x0) (y0,x1) (y1,x0) (y1,x1). Offset -1 marks a corner outside its level, whose weight is 0. */
#define corners MSDA_FN(corners)
typedef struct {
    int32_t offset[4][MSDA_MAX_POINTS + VW] __attribute__((aligned(64)));
    float weight[4][MSDA_MAX_POINTS + VW] __attribute__((aligned(64)));
    float fx[MSDA_MAX_POINTS + VW] __attribute__((aligned(64)));
    float fy[MSDA_MAX_POINTS + VW] __attribute__((aligned(64)));
} corners;

/* Corners of the points [p, p + VW) of one query and head, at x, y in cells of their levels, with attention weights a. */
INLINE void MSDA_FN(place)(const msda_job *job, vf x, vf y, vf a, int64_t p, int32_t stride, int32_t shift, corners *c)
{
    const vf width = MSDA_FN(load)(job->width + p), height = MSDA_FN(load)(job->height + p);
    const vi iwidth = *(const vi_any *)(job->iwidth + p), iheight = *(const vi_any *)(job->iheight + p);
    const vi start = *(const vi_any *)(job->start + p) - shift;
    /* False for NaN and infinities too, so the conversion below only meets small numbers. */
    const vi inside = (x > -1.0f) & (x < width) & (y > -1.0f) & (y < height);
    x = (vf)((vi)x & inside);
    y = (vf)((vi)y & inside);
    vi x0 = __builtin_convertvector(x, vi), y0 = __builtin_convertvector(y, vi);
    x0 += x < __builtin_convertvector(x0, vf);
    y0 += y < __builtin_convertvector(y0, vf);
    const vf fx = x - __builtin_convertvector(x0, vf), fy = y - __builtin_convertvector(y0, vf);
    const vf gx = 1.0f - fx, gy = 1.0f - fy;
    const vi left = inside & (x0 >= 0), right = inside & (x0 + 1 < iwidth);
    const vi top = y0 >= 0, bottom = y0 + 1 < iheight;
    const vi at = (start + y0 * iwidth + x0) * stride, below = iwidth * stride;
    const vi m0 = top & left, m1 = top & right, m2 = bottom & left, m3 = bottom & right;
    *(vi_any *)(c->offset[0] + p) = at | ~m0;
    *(vi_any *)(c->offset[1] + p) = (at + stride) | ~m1;
    *(vi_any *)(c->offset[2] + p) = (at + below) | ~m2;
    *(vi_any *)(c->offset[3] + p) = (at + below + stride) | ~m3;
    *(vf_any *)(c->weight[0] + p) = (vf)((vi)(a * gy * gx) & m0);
    *(vf_any *)(c->weight[1] + p) = (vf)((vi)(a * gy * fx) & m1);
    *(vf_any *)(c->weight[2] + p) = (vf)((vi)(a * fy * gx) & m2);
    *(vf_any *)(c->weight[3] + p) = (vf)((vi)(a * fy * fx) & m3);
    *(vf_any *)(c->fx + p) = fx;
    *(vf_any *)(c->fy + p) = fy;
}

/* Corners of the points [p, p + VW) from stored locations and weights. `index` is the flat index of point p. The last
   points of the whole tensor are read through a padded copy; all others may read past their own query. */
INLINE void MSDA_FN(locate)(const msda_job *job, int64_t index, int64_t p, int64_t n, int32_t stride, int32_t shift,
                            corners *c)
{
    float last_xy[2 * VW], last_w[VW];
    const float *xy = job->locations + 2 * index, *w = job->weights + index;
    if (MSDA_UNLIKELY(index + VW > job->total_points)) {
        for (int i = 0; i < VW; i++) {
            last_xy[2 * i] = i < n ? xy[2 * i] : 0;
            last_xy[2 * i + 1] = i < n ? xy[2 * i + 1] : 0;
            last_w[i] = i < n ? w[i] : 0;
        }
        xy = last_xy;
        w = last_w;
    }
    const vf low = MSDA_FN(load)(xy), high = MSDA_FN(load)(xy + VW), a = MSDA_FN(load)(w);
    const vf width = MSDA_FN(load)(job->width + p), height = MSDA_FN(load)(job->height + p);
    MSDA_FN(place)(job, EVEN(low, high) * width - 0.5f, ODD(low, high) * height - 0.5f, a, p, stride, shift, c);
}

/* e^x for x <= 0 with an error of two units in the last place: 2^n times the Taylor polynomial of e^r, where
   |r| <= ln(2) / 2. */
INLINE vf MSDA_FN(exp_negative)(vf x)
{
    const vi enough = x > -87.0f;
    x = (vf)((vi)x & enough);
    const vi n = __builtin_convertvector(x * 1.44269504f - 0.5f, vi);
    const vf whole = __builtin_convertvector(n, vf), r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vf sum = r * (1.0f / 720) + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    return (vf)((vi)(sum * (vf)((n + 127) << 23)) & enough);
}

/* Corners of all points of one query and head, from the outputs of the two linear layers: the weights are the softmax
   of the logits, and the locations are the reference plus the offsets, in the units that ms_deform_attn.h gives. */
INLINE void MSDA_FN(locate_projected)(const msda_job *job, int64_t b, int64_t q, int64_t m, int32_t stride, corners *c)
{
    const int64_t P = job->P, K = job->K, axes = job->axes;
    const float *row = job->projected + (b * job->Q + q) * job->M * P * 3;
    const float *offsets = row + m * P * 2, *logits = row + job->M * P * 2 + m * P;
    const float *reference = job->reference + ((b % job->reference_batch) * job->Q + q) * job->L * axes;
    float base_x[MSDA_MAX_POINTS + VW], base_y[MSDA_MAX_POINTS + VW];
    float scale_x[MSDA_MAX_POINTS + VW], scale_y[MSDA_MAX_POINTS + VW];
    float xy[2 * (MSDA_MAX_POINTS + VW)], a[MSDA_MAX_POINTS + VW];
    float largest = -__builtin_inff(), total = 0;
    for (int64_t l = 0; l < job->L; l++, reference += axes) {
        const float w = job->width[l * K], h = job->height[l * K];
        const float x = reference[0] * w - 0.5f, y = reference[1] * h - 0.5f;
        const float sx = axes == 4 ? reference[2] * w * 0.5f / (float)K : 1.0f;
        const float sy = axes == 4 ? reference[3] * h * 0.5f / (float)K : 1.0f;
        for (int64_t p = l * K; p < (l + 1) * K; p++) {
            base_x[p] = x, base_y[p] = y;
            scale_x[p] = sx, scale_y[p] = sy;
        }
    }
    for (int64_t p = 0; p < P; p++) {
        xy[2 * p] = offsets[2 * p], xy[2 * p + 1] = offsets[2 * p + 1];
        a[p] = logits[p];
        largest = a[p] > largest ? a[p] : largest;
    }
    for (int64_t p = P; p < P + VW; p++) {
        xy[2 * p] = xy[2 * p + 1] = base_x[p] = base_y[p] = scale_x[p] = scale_y[p] = 0;
        a[p] = -__builtin_inff();
    }
    vf sum = (vf){0};
    for (int64_t p = 0; p < P; p += VW) {
        const vf e = MSDA_FN(exp_negative)(MSDA_FN(load)(a + p) - largest);
        MSDA_FN(store)(a + p, e);
        sum += e;
    }
    for (int i = 0; i < VW; i++)
        total += sum[i];
    for (int64_t p = 0; p < P; p += VW) {
        const vf low = MSDA_FN(load)(xy + 2 * p), high = MSDA_FN(load)(xy + 2 * p + VW);
        const vf x = MSDA_FN(load)(base_x + p) + EVEN(low, high) * MSDA_FN(load)(scale_x + p);
        const vf y = MSDA_FN(load)(base_y + p) + ODD(low, high) * MSDA_FN(load)(scale_y + p);
        MSDA_FN(place)(job, x, y, MSDA_FN(load)(a + p) / total, p, stride, 0, c);
    }
}

/* Weighted sum of one query and head over `width` channels, starting at `channel`. Several partial sums keep each
   addition from waiting for the one before it. */
INLINE void MSDA_FN(gather)(const corners *c, int64_t points, const void *rows, int half, int64_t channel, float *to,
                            const int width)
{
    enum { MAX = 64 / VW };
    const int vectors = width / VW, sums = vectors >= 8 ? 1 : vectors >= 4 ? 2 : 4;
    vf sum[4][MAX];
    for (int s = 0; s < sums; s++)
        for (int v = 0; v < vectors; v++)
            sum[s][v] = (vf){0};
    for (int64_t p = 0; p < points; p++) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            const int32_t offset = c->offset[k][p];
            const vf w = MSDA_FN(splat)(c->weight[k][p]);
            if (half) {
                const uint16_t *row = offset < 0 ? (const uint16_t *)msda_zeros : (const uint16_t *)rows + offset + channel;
#pragma GCC unroll 16
                for (int v = 0; v < vectors; v++)
                    sum[k % sums][v] += w * MSDA_FN(load_half)(row + v * VW);
            } else {
                const float *row = offset < 0 ? msda_zeros : (const float *)rows + offset + channel;
#pragma GCC unroll 16
                for (int v = 0; v < vectors; v++)
                    sum[k % sums][v] += w * MSDA_FN(load)(row + v * VW);
            }
        }
    }
#pragma GCC unroll 16
    for (int v = 0; v < vectors; v++) {
        vf total = sum[0][v];
        if (sums == 2)
            total += sum[1][v];
        if (sums == 4)
            total = (total + sum[1][v]) + (sum[2][v] + sum[3][v]);
        MSDA_FN(store)(to + v * VW, total);
    }
}

INLINE void MSDA_FN(forward_range)(const msda_job *job, const void *rows, const int half, int64_t stride, int64_t b,
                                   int64_t m, int64_t first, int64_t last, const int width)
{
    const int64_t D = job->D, Dp = job->Dp, P = job->P;
    float result[MSDA_MAX_WIDTH] __attribute__((aligned(64)));
    corners c;
    for (int64_t q = first; q < last; q++) {
        const int64_t item = (b * job->Q + q) * job->M + m;
        if (job->projected) {
            __builtin_prefetch(job->projected + ((b * job->Q + q + 4) * job->M * 3 + m * 2) * P);
            __builtin_prefetch(job->projected + ((b * job->Q + q + 4) * job->M * 3 + m * 2) * P + 16);
            __builtin_prefetch(job->projected + ((b * job->Q + q + 4) * job->M * 3 + job->M * 2 + m) * P);
            MSDA_FN(locate_projected)(job, b, q, m, (int32_t)stride, &c);
        } else {
            __builtin_prefetch(job->locations + 2 * P * (item + 4 * job->M));
            __builtin_prefetch(job->locations + 2 * P * (item + 4 * job->M) + 16);
            __builtin_prefetch(job->weights + P * (item + 4 * job->M));
            for (int64_t p = 0; p < P; p += VW)
                MSDA_FN(locate)(job, item * P + p, p, P - p, (int32_t)stride, 0, &c);
        }
        float *to = !job->half && D == Dp ? (float *)job->out + item * D : result;
        if (width)
            MSDA_FN(gather)(&c, P, rows, half, 0, to, width);
        else
            for (int64_t d = 0; d < Dp;) {
                if (VW > 4 && Dp - d >= 64) {
                    MSDA_FN(gather)(&c, P, rows, half, d, to + d, 64);
                    d += 64;
                } else if (Dp - d >= 32) {
                    MSDA_FN(gather)(&c, P, rows, half, d, to + d, 32);
                    d += 32;
                } else {
                    MSDA_FN(gather)(&c, P, rows, half, d, to + d, 16);
                    d += 16;
                }
            }
        if (job->half)
            MSDA_FN(narrow_row)((uint16_t *)job->out + item * D, result, D);
        else if (D != Dp)
            MSDA_FN(copy_row)((float *)job->out + item * D, result, D, D);
    }
}

/* Queries [first, last) of batch b, head m. `rows` holds the head's values, `stride` elements apart. */
MSDA_TARGET static void MSDA_FN(forward)(const msda_job *job, const void *rows, int half, int64_t stride, int64_t b,
                                         int64_t m, int64_t first, int64_t last)
{
    if (half && job->Dp == 16)
        MSDA_FN(forward_range)(job, rows, 1, stride, b, m, first, last, 16);
    else if (half && job->Dp == 32)
        MSDA_FN(forward_range)(job, rows, 1, stride, b, m, first, last, 32);
    else if (half)
        MSDA_FN(forward_range)(job, rows, 1, stride, b, m, first, last, 0);
    else if (job->Dp == 16)
        MSDA_FN(forward_range)(job, rows, 0, stride, b, m, first, last, 16);
    else if (job->Dp == 32)
        MSDA_FN(forward_range)(job, rows, 0, stride, b, m, first, last, 32);
    else
        MSDA_FN(forward_range)(job, rows, 0, stride, b, m, first, last, 0);
}

#include "ms_deform_attn_backward.h"

static const msda_kernels MSDA_FN(kernels) = {MSDA_FN(pack), MSDA_FN(unpack), MSDA_FN(forward), MSDA_FN(backward)};

#undef VW
#undef INLINE
#undef vf
#undef vi
#undef vu
#undef vh
#undef vf_any
#undef vh_any
#undef vi_any
#undef corners
#undef EVEN
#undef ODD
#undef ZIP_LOW
#undef ZIP_HIGH
