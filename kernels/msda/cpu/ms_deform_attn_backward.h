/* The backward loops of multi-scale deformable attention, included by ms_deform_attn_kernel.h for each instruction set. */

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

/* Sums over the lanes of a, b, c and d. */
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

/* Gradients of levels [first_level, last_level) of batch item b and head m, over all queries in order. `rows` holds those
   levels' values, and `grads` accumulates the values' gradients. */
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

#undef quad
#undef quad_parts
