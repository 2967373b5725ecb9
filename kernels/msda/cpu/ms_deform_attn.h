/* Multi-scale deformable attention on a CPU: plain C entry points, no torch headers. */
#ifndef MS_DEFORM_ATTN_H
#define MS_DEFORM_ATTN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Element type of value, out, grad_output and grad_value; all other arrays are float32. */
enum { MSDA_FLOAT32 = 0, MSDA_BFLOAT16 = 1 };

/* Return codes. */
enum { MSDA_OK = 0, MSDA_BAD_ARGUMENT = 1, MSDA_NO_MEMORY = 2 };

/* Sizes of one call: B batch, S image tokens over all levels, M heads, D channels per head, Q queries, L levels,
   K points. D <= 256 and L * K <= 256. */
typedef struct {
    int64_t B, S, M, D, Q, L, K;
    int32_t dtype;
    int32_t threads;
} msda_shape;

/* out[b,q,m,:] = sum over l,k of attention_weights[b,q,m,l,k] * bilinear(value_l[b,:,m,:], locations[b,q,m,l,k]).
   value (B,S,M,D), spatial_shapes (L,2) as h,w, locations (B,Q,M,L,K,2) as x,y in [0, 1] of the level,
   attention_weights (B,Q,M,L,K), out (B,Q,M,D). All arrays are contiguous. Pixel centres lie at (i + 0.5) / size, and
   everything outside a level is zero. A location that is NaN or infinite contributes zero. */
int msda_forward(const msda_shape *shape, const int64_t *spatial_shapes, const void *value, const float *locations,
                 const float *attention_weights, void *out);

/* msda_forward computed from the outputs of the module's two linear layers, so that locations and weights are never in
   memory. projected (B,Q,3*M*L*K) holds each query's offsets (M,L,K,2), then its logits (M,L,K); the softmax of a head's
   L * K logits gives the weights. reference (reference_batch,Q,L,axes), with reference_batch 1 or B, is in [0, 1] of the
   level: a point x,y if axes = 2, with offsets in cells, or a box x,y,w,h if axes = 4, with offsets in units of
   w / (2 K) and h / (2 K). There is no backward pass. */
int msda_forward_projected(const msda_shape *shape, const int64_t *spatial_shapes, const void *value,
                           const float *projected, const float *reference, int64_t axes, int64_t reference_batch,
                           void *out);

/* Gradients of msda_forward. Every element of the three outputs is written. Sums have one fixed order, so results do
   not depend on the number of threads. */
int msda_backward(const msda_shape *shape, const int64_t *spatial_shapes, const void *value, const float *locations,
                  const float *attention_weights, const void *grad_output, void *grad_value, float *grad_locations,
                  float *grad_weights);

/* msda_isa returns the instruction set of the next call: "avx512", "avx2" or "baseline". msda_limit_isa restricts it for
   tests and benchmarks: 0 allows baseline only, 1 up to avx2, 2 all. */
const char *msda_isa(void);
void msda_limit_isa(int level);

/* Return 1 if compiled with OpenMP; otherwise every call runs on the calling thread. */
int msda_has_threads(void);

#ifdef __cplusplus
}
#endif
#endif
