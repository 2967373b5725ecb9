/* Multi-scale deformable attention on CUDA devices: plain entry points, no torch headers. */
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace msda {

constexpr int kMaxLevels = 16;

/* Element type of value, out and grad_output; all other arrays are float32. */
enum class Dtype { kFloat32, kFloat16, kBFloat16 };

/* Sizes of one call: B batch, S image tokens over all levels, M heads, D channels per head, Q queries, L levels,
   K points. The levels follow each other in S. */
struct Problem {
  int64_t B, S, M, D, Q;
  int L, K;
  int height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];
};

/* out[b,q,m,:] = sum over l,k of weights[b,q,m,l,k] * bilinear(value_l[b,:,m,:], locations[b,q,m,l,k]).
   value (B,S,M,D), locations (B,Q,M,L,K,2) as x,y in [0, 1] of the level, weights (B,Q,M,L,K), out (B,Q,M,D). All
   arrays are contiguous and 16-byte aligned. Cell centres lie at (i + 0.5) / size, and everything outside a level is
   zero. A location that is NaN or infinite contributes zero. The call does not wait for the device. */
cudaError_t forward(const Problem& problem, Dtype dtype, const void* value, const float* locations,
                    const float* weights, void* out, cudaStream_t stream);

/* Gradients of forward. grad_value (B,S,M,D) is float32 whatever the dtype and must be zero at first: rows are added to
   it in no fixed order. The other two outputs are overwritten. */
cudaError_t backward(const Problem& problem, Dtype dtype, const void* grad_output, const void* value,
                     const float* locations, const float* weights, float* grad_value, float* grad_locations,
                     float* grad_weights, cudaStream_t stream);

}  // namespace msda
