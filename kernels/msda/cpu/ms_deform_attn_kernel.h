/* The loops of multi-scale deformable attention, written once and included once per instruction set.
   The includer defines MSDA_VW (float32 lanes of a vector register), MSDA_FN(name) and MSDA_TARGET.
   Vector types are the compiler's own extension at the register's true width: a wider type would be taken apart
   before the target attribute has its say. */

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

/* Round to nearest even; a NaN keeps its sign and top bits and stays a NaN. */
INLINE void MSDA_FN(store_half)(uint16_t *p, vf v)
{
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(v != v);
    rounded = (rounded & ~nan) | (((bits >> 16) | 0x40) & nan);
    *(vh_any *)p = __builtin_convertvector(rounded, vh);
}

/* One row of `width` values to float32, zeros up to `padded`. */
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

/* Rows [first, last) of one head, strided in memory, to contiguous float32 rows of a padded width. A head's rows lie
   M * D apart: read in place they would fall on a fraction of the cache's sets. */
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

/* The way back for the gradient of the value. */
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

/* Corner offsets and bilinear weights of up to MSDA_MAX_POINTS points of one query and head. Corners in the order
   (y0,x0) (y0,x1) (y1,x0) (y1,x1); offset -1 marks a corner outside its level, with weight 0. */
#define corners MSDA_FN(corners)
typedef struct {
    int32_t offset[4][MSDA_MAX_POINTS + VW] __attribute__((aligned(64)));
    float weight[4][MSDA_MAX_POINTS + VW] __attribute__((aligned(64)));
    float fx[MSDA_MAX_POINTS + VW] __attribute__((aligned(64)));
    float fy[MSDA_MAX_POINTS + VW] __attribute__((aligned(64)));
} corners;

/* Points [p, p + VW) of one query and head, at x, y in cells of their levels, with attention weights a. */
INLINE void MSDA_FN(place)(const msda_job *job, vf x, vf y, vf a, int64_t p, int32_t stride, int32_t shift, corners *c)
{
    const vf width = MSDA_FN(load)(job->width + p), height = MSDA_FN(load)(job->height + p);
    const vi iwidth = *(const vi_any *)(job->iwidth + p), iheight = *(const vi_any *)(job->iheight + p);
    const vi start = *(const vi_any *)(job->start + p) - shift;
    /* False for NaN and infinities too, so the conversion below only ever sees small numbers. */
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

/* Points [p, p + VW) from stored locations and weights. `index` is the flat index of point p; the last points of the
   whole tensor are read through a padded copy, all others may read past their own query. */
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

/* e^x of x <= 0 to two units in the last place: 2^n times the Taylor polynomial of what is left, |r| <= ln(2) / 2. */
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

/* All points of one query and head from what the two linear layers gave: the softmax of its logits, and its reference
   moved by its offsets, in cells for a point and in shares of half the sides for a box. */
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

/* One query and head, `width` channels from `rows` on: several partial sums, or each addition would wait for the one
   before it. */
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

#define quad MSDA_FN(quad)
#define quad_parts MSDA_FN(quad_parts)
typedef float quad __attribute__((vector_size(16)));
typedef int32_t MSDA_FN(quad_index) __attribute__((vector_size(16)));
typedef union {
    vf whole;
    quad part[VW / 4];
} quad_parts;

INLINE quad MSDA_FN(fold)(vf v)
{
    quad_parts u;
    u.whole = v;
#if VW == 16
    return (u.part[0] + u.part[1]) + (u.part[2] + u.part[3]);
#elif VW == 8
    return u.part[0] + u.part[1];
#else
    return u.part[0];
#endif
}

/* The four sums over lanes of a, b, c, d. */
INLINE quad MSDA_FN(sum4)(vf va, vf vb, vf vc, vf vd)
{
    const quad a = MSDA_FN(fold)(va), b = MSDA_FN(fold)(vb), c = MSDA_FN(fold)(vc), d = MSDA_FN(fold)(vd);
#define SHUFFLE4(x, y, ...) MSDA_SHUFFLE(MSDA_FN(quad_index), x, y, __VA_ARGS__)
    const quad ab = SHUFFLE4(a, b, 0, 4, 1, 5) + SHUFFLE4(a, b, 2, 6, 3, 7);
    const quad cd = SHUFFLE4(c, d, 0, 4, 1, 5) + SHUFFLE4(c, d, 2, 6, 3, 7);
    return SHUFFLE4(ab, cd, 0, 1, 4, 5) + SHUFFLE4(ab, cd, 2, 3, 6, 7);
#undef SHUFFLE4
}

INLINE void MSDA_FN(backward_range)(const msda_job *job, const float *rows, float *grads, int64_t b, int64_t m,
                                    int64_t first_level, int64_t last_level, const int width)
{
    const int64_t D = job->D, Dp = width ? width : job->Dp, P = job->P;
    const int64_t first = first_level * job->K, last = last_level * job->K;
    const int32_t shift = job->start[first];
    const int vectors = (int)(Dp / VW);
    float g[MSDA_MAX_WIDTH] __attribute__((aligned(64)));
    float sink[MSDA_MAX_WIDTH] __attribute__((aligned(64)));
    float dots[4 * (MSDA_MAX_POINTS + VW)] __attribute__((aligned(64)));
    corners c;
    for (int64_t d = 0; d < Dp; d++)
        sink[d] = 0;
    for (int64_t q = 0; q < job->Q; q++) {
        const int64_t item = (b * job->Q + q) * job->M + m;
        __builtin_prefetch(job->locations + 2 * P * (item + 4 * job->M));
        __builtin_prefetch(job->locations + 2 * P * (item + 4 * job->M) + 16);
        __builtin_prefetch(job->weights + P * (item + 4 * job->M));
        if (job->half)
            MSDA_FN(widen_row)(g, (const uint16_t *)job->grad_output + item * D, D, Dp);
        else
            MSDA_FN(copy_row)(g, (const float *)job->grad_output + item * D, D, Dp);
        for (int64_t p = first; p < last; p += VW) {
            const int64_t n = last - p < VW ? last - p : VW;
            MSDA_FN(locate)(job, item * P + p, p, n, (int32_t)Dp, shift, &c);
        }
        for (int64_t p = first; p < last; p++) {
            const float *row[4];
            float *grad[4];
            vf dot[4], w[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                const int32_t offset = c.offset[k][p];
                row[k] = offset < 0 ? msda_zeros : rows + offset;
                grad[k] = offset < 0 ? sink : grads + offset;
                w[k] = MSDA_FN(splat)(c.weight[k][p]);
                dot[k] = (vf){0};
            }
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) {
                const vf gv = *(const vf *)(g + v * VW);
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) {
                    dot[k] += gv * MSDA_FN(load)(row[k] + v * VW);
                    MSDA_FN(store)(grad[k] + v * VW, MSDA_FN(load)(grad[k] + v * VW) + w[k] * gv);
                }
            }
            *(quad *)(dots + 4 * p) = MSDA_FN(sum4)(dot[0], dot[1], dot[2], dot[3]);
        }
        for (int64_t p = first; p < last; p += VW) {
            const int64_t at = item * P + p;
            const vf d0 = MSDA_FN(load)(dots + 4 * p), d1 = MSDA_FN(load)(dots + 4 * p + VW);
            const vf d2 = MSDA_FN(load)(dots + 4 * p + 2 * VW), d3 = MSDA_FN(load)(dots + 4 * p + 3 * VW);
            const vf even01 = EVEN(d0, d1), even23 = EVEN(d2, d3), odd01 = ODD(d0, d1), odd23 = ODD(d2, d3);
            const vf top_left = EVEN(even01, even23), top_right = EVEN(odd01, odd23);
            const vf bottom_left = ODD(even01, even23), bottom_right = ODD(odd01, odd23);
            const vf fx = MSDA_FN(load)(c.fx + p), fy = MSDA_FN(load)(c.fy + p), gx = 1.0f - fx, gy = 1.0f - fy;
            float a[VW] __attribute__((aligned(64)));
            for (int i = 0; i < VW; i++)
                a[i] = p + i < last ? job->weights[at + i] : 0;
            const vf aw = *(const vf *)a;
            const vf gw = gy * (gx * top_left + fx * top_right) + fy * (gx * bottom_left + fx * bottom_right);
            const vf dx = aw * MSDA_FN(load)(job->width + p) *
                          (gy * (top_right - top_left) + fy * (bottom_right - bottom_left));
            const vf dy = aw * MSDA_FN(load)(job->height + p) *
                          (gx * (bottom_left - top_left) + fx * (bottom_right - top_right));
            if (p + VW <= last) {
                MSDA_FN(store)(job->grad_weights + at, gw);
                MSDA_FN(store)(job->grad_locations + 2 * at, ZIP_LOW(dx, dy));
                MSDA_FN(store)(job->grad_locations + 2 * at + VW, ZIP_HIGH(dx, dy));
            } else
                for (int i = 0; i < last - p; i++) {
                    job->grad_weights[at + i] = gw[i];
                    job->grad_locations[2 * (at + i)] = dx[i];
                    job->grad_locations[2 * (at + i) + 1] = dy[i];
                }
        }
    }
}

/* Levels [first_level, last_level) of batch b, head m: all queries, in order. `rows` and `grads` hold those levels'
   values and the sums of their gradients. */
MSDA_TARGET static void MSDA_FN(backward)(const msda_job *job, const float *rows, float *grads, int64_t b, int64_t m,
                                          int64_t first_level, int64_t last_level)
{
    if (job->Dp == 16)
        MSDA_FN(backward_range)(job, rows, grads, b, m, first_level, last_level, 16);
    else if (job->Dp == 32)
        MSDA_FN(backward_range)(job, rows, grads, b, m, first_level, last_level, 32);
    else
        MSDA_FN(backward_range)(job, rows, grads, b, m, first_level, last_level, 0);
}

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
#undef quad
#undef quad_parts
#undef EVEN
#undef ODD
#undef ZIP_LOW
#undef ZIP_HIGH
