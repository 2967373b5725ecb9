/* Multi-scale deformable attention on a CPU (Deformable DETR, Zhu et al. 2021, equation 3), forward and backward.

   Work is divided into slices, one per batch item and head. A slice's values are first copied next to each other, so
   that a point's four corners are four short runs in a block that fits the cache. The backward pass accumulates a
   slice's value gradients in its own block in one fixed order: it needs no atomics, and results are bit-equal on every
   run and for any number of threads. */

#include "ms_deform_attn.h"

#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

enum { MSDA_MAX_POINTS = 256, MSDA_MAX_WIDTH = 256, MSDA_PAD = 16 };

#define MSDA_UNLIKELY(x) __builtin_expect(!!(x), 0)
#if defined(__clang__)
#define MSDA_SHUFFLE(index, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MSDA_SHUFFLE(index, a, b, ...) __builtin_shuffle(a, b, (index){__VA_ARGS__})
#endif

typedef struct {
    int64_t B, S, M, D, Q, L, K, P, Dp, total_points;
    int half;
    const void *value, *grad_output;
    const float *locations, *weights;
    /* Used instead of locations and weights: each query's offsets of all heads followed by their logits. */
    const float *projected, *reference;
    int64_t axes, reference_batch;
    void *out, *grad_value;
    float *grad_locations, *grad_weights;
    int32_t level_start[MSDA_MAX_POINTS + 1];
    /* Sizes and start of each level, repeated for each of its points, so that a vector of points needs no look-up. */
    float width[MSDA_MAX_POINTS + MSDA_PAD], height[MSDA_MAX_POINTS + MSDA_PAD];
    int32_t iwidth[MSDA_MAX_POINTS + MSDA_PAD], iheight[MSDA_MAX_POINTS + MSDA_PAD], start[MSDA_MAX_POINTS + MSDA_PAD];
} msda_job;

typedef struct {
    void (*pack)(const msda_job *, int64_t b, int64_t m, int64_t first, int64_t last, float *rows);
    void (*unpack)(const msda_job *, int64_t b, int64_t m, int64_t first, int64_t last, const float *rows);
    void (*forward)(const msda_job *, const void *rows, int half, int64_t stride, int64_t b, int64_t m, int64_t first,
                    int64_t last);
    void (*backward)(const msda_job *, const float *rows, float *grads, int64_t b, int64_t m, int64_t first_level,
                     int64_t last_level);
} msda_kernels;

/* Zeros that a corner outside its level reads. */
static const float msda_zeros[MSDA_MAX_WIDTH] __attribute__((aligned(64)));

static inline float msda_from_half(uint16_t x)
{
    const uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint16_t msda_to_half(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if (f != f)
        return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#define MSDA_VW 4
#define MSDA_TARGET
#define MSDA_FN(name) name##_baseline
#include "ms_deform_attn_kernel.h"
#undef MSDA_VW
#undef MSDA_TARGET
#undef MSDA_FN

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define MSDA_X86 1
#define MSDA_VW 8
#define MSDA_TARGET __attribute__((target("avx2,fma")))
#define MSDA_FN(name) name##_avx2
#include "ms_deform_attn_kernel.h"
#undef MSDA_VW
#undef MSDA_TARGET
#undef MSDA_FN

#define MSDA_VW 16
#define MSDA_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#define MSDA_FN(name) name##_avx512
#include "ms_deform_attn_kernel.h"
#undef MSDA_VW
#undef MSDA_TARGET
#undef MSDA_FN
#endif

static int msda_limit = 2;

static const msda_kernels *msda_choose(const char **name)
{
#ifdef MSDA_X86
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (msda_limit >= 2 && avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        *name = "avx512";
        return &kernels_avx512;
    }
    if (msda_limit >= 1 && avx2) {
        *name = "avx2";
        return &kernels_avx2;
    }
#endif
    *name = "baseline";
    return &kernels_baseline;
}

const char *msda_isa(void)
{
    const char *name;
    msda_choose(&name);
    return name;
}

void msda_limit_isa(int level) { msda_limit = level; }

int msda_has_threads(void)
{
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

static int msda_prepare(msda_job *job, const msda_shape *shape, const int64_t *spatial_shapes)
{
    memset(job, 0, sizeof *job);
    if (shape->B < 0 || shape->S < 0 || shape->M < 0 || shape->Q < 0 || shape->D < 1 || shape->L < 1 || shape->K < 1)
        return MSDA_BAD_ARGUMENT;
    if (shape->D > MSDA_MAX_WIDTH || shape->L > MSDA_MAX_POINTS || shape->K > MSDA_MAX_POINTS ||
        shape->L * shape->K > MSDA_MAX_POINTS)
        return MSDA_BAD_ARGUMENT;
    job->B = shape->B, job->S = shape->S, job->M = shape->M, job->D = shape->D;
    job->Q = shape->Q, job->L = shape->L, job->K = shape->K;
    job->P = job->L * job->K;
    job->Dp = (job->D + 15) / 16 * 16;
    job->total_points = job->B * job->Q * job->M * job->P;
    job->half = shape->dtype == MSDA_BFLOAT16;
    /* Offsets inside a slice are 32-bit. */
    if (job->S > INT32_MAX / job->Dp)
        return MSDA_BAD_ARGUMENT;
    int64_t start = 0;
    for (int64_t l = 0; l < job->L; l++) {
        const int64_t h = spatial_shapes[2 * l], w = spatial_shapes[2 * l + 1];
        if (h < 0 || w < 0 || (w && h > job->S / w) || start + h * w > job->S)
            return MSDA_BAD_ARGUMENT;
        job->level_start[l] = (int32_t)start;
        for (int64_t p = l * job->K; p < (l + 1) * job->K; p++) {
            job->width[p] = (float)w, job->height[p] = (float)h;
            job->iwidth[p] = (int32_t)w, job->iheight[p] = (int32_t)h;
            job->start[p] = (int32_t)start;
        }
        start += h * w;
    }
    job->level_start[job->L] = (int32_t)start;
    return start == job->S ? MSDA_OK : MSDA_BAD_ARGUMENT;
}

static void *msda_alloc(size_t bytes)
{
    void *p = NULL;
    return posix_memalign(&p, 64, bytes ? bytes : 64) ? NULL : p;
}

static int msda_run_forward(const msda_job *job, const msda_shape *shape)
{
    if (!job->total_points)
        return MSDA_OK;
    const char *name;
    const msda_kernels *kernels = msda_choose(&name);

    const int64_t row = job->M * job->D, slices = job->B * job->M;
    int threads = shape->threads > 1 ? shape->threads : 1;
    /* Copying a slice pays off if its rows are read several times. */
    const int packed = job->D != job->Dp || job->S > INT32_MAX / row || job->Q * job->P * 4 > 8 * job->S;
    int64_t chunks = 1;
    if (slices < 4 * threads && threads > 1)
        chunks = slices % threads ? (4 * threads + slices - 1) / slices : 1;
    if (chunks > job->Q)
        chunks = job->Q;
    int failed = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *rows = packed ? msda_alloc(sizeof(float) * job->S * job->Dp) : NULL;
        int64_t ready = -1;
        if (packed && !rows) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < slices * chunks; task++) {
            const int64_t slice = task / chunks, chunk = task % chunks, b = slice / job->M, m = slice % job->M;
            const int64_t first = job->Q * chunk / chunks, last = job->Q * (chunk + 1) / chunks;
            if (!packed) {
                const int64_t at = b * job->S * row + m * job->D;
                const void *direct = job->half ? (const void *)((const uint16_t *)job->value + at)
                                              : (const void *)((const float *)job->value + at);
                kernels->forward(job, direct, job->half, row, b, m, first, last);
            } else if (rows) {
                if (ready != slice)
                    kernels->pack(job, b, m, 0, job->S, rows);
                ready = slice;
                kernels->forward(job, rows, 0, job->Dp, b, m, first, last);
            }
        }
        free(rows);
    }
    return failed ? MSDA_NO_MEMORY : MSDA_OK;
}

int msda_forward(const msda_shape *shape, const int64_t *spatial_shapes, const void *value, const float *locations,
                 const float *attention_weights, void *out)
{
    msda_job job;
    const int status = msda_prepare(&job, shape, spatial_shapes);
    if (status)
        return status;
    job.value = value, job.locations = locations, job.weights = attention_weights, job.out = out;
    return msda_run_forward(&job, shape);
}

int msda_forward_projected(const msda_shape *shape, const int64_t *spatial_shapes, const void *value,
                           const float *projected, const float *reference, int64_t axes, int64_t reference_batch,
                           void *out)
{
    msda_job job;
    const int status = msda_prepare(&job, shape, spatial_shapes);
    if (status)
        return status;
    if ((axes != 2 && axes != 4) || (reference_batch != 1 && reference_batch != job.B))
        return MSDA_BAD_ARGUMENT;
    job.value = value, job.projected = projected, job.reference = reference, job.out = out;
    job.axes = axes, job.reference_batch = reference_batch;
    return msda_run_forward(&job, shape);
}

int msda_backward(const msda_shape *shape, const int64_t *spatial_shapes, const void *value, const float *locations,
                  const float *attention_weights, const void *grad_output, void *grad_value, float *grad_locations,
                  float *grad_weights)
{
    msda_job job;
    const char *name;
    const msda_kernels *kernels = msda_choose(&name);
    const int status = msda_prepare(&job, shape, spatial_shapes);
    if (status)
        return status;
    job.value = value, job.locations = locations, job.weights = attention_weights, job.grad_output = grad_output;
    job.grad_value = grad_value, job.grad_locations = grad_locations, job.grad_weights = grad_weights;

    const int64_t slices = job.B * job.M;
    int threads = shape->threads > 1 ? shape->threads : 1;
    /* A slice can be divided by level: a level's value gradients come from its own points only, in the same order. */
    const int64_t cuts = slices < 2 * threads && slices % threads ? job.L : 1, levels = job.L / cuts;
    int64_t most = 0;
    for (int64_t l = 0; l < job.L; l += levels) {
        const int64_t size = job.level_start[l + levels] - job.level_start[l];
        most = size > most ? size : most;
    }
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *rows = msda_alloc(sizeof(float) * 2 * most * job.Dp), *grads = rows + most * job.Dp;
        if (!rows) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < slices * cuts; task++) {
            const int64_t slice = task / cuts, level = task % cuts * levels, b = slice / job.M, m = slice % job.M;
            const int64_t first = job.level_start[level], last = job.level_start[level + levels];
            if (!rows)
                continue;
            kernels->pack(&job, b, m, first, last, rows);
            memset(grads, 0, sizeof(float) * (last - first) * job.Dp);
            kernels->backward(&job, rows, grads, b, m, level, level + levels);
            kernels->unpack(&job, b, m, first, last, grads);
        }
        free(rows);
    }
    return failed ? MSDA_NO_MEMORY : MSDA_OK;
}
