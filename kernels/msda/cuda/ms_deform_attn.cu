/* Selection of the kernel for a dtype and head width, and its launch. */
#include "ms_deform_attn.cuh"

namespace msda {
namespace {

/* Number of threads per row: one per packet, rounded up to a power of two, at most a warp. */
int lanes_for(int64_t packets) {
  int lanes = 1;
  while (lanes < packets && lanes < 32) lanes *= 2;
  return lanes;
}

template <typename Launch>
cudaError_t over_rows(const Problem& problem, int lanes, const Launch& launch) {
  const int64_t rows = problem.B * problem.Q * problem.M;
  if (rows == 0 || problem.D == 0) return cudaSuccess;
  const int64_t blocks = (rows * lanes + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  launch(static_cast<unsigned>(blocks));
  return cudaGetLastError();
}

template <typename T, int kVector>
cudaError_t forward_packed(const Problem& problem, const void* value, const float* locations, const float* weights,
                           void* out, cudaStream_t stream) {
  const int lanes = lanes_for((problem.D + kVector - 1) / kVector);
  return over_rows(problem, lanes, [&](unsigned blocks) {
    forward_kernel<T, kVector><<<blocks, kThreads, 0, stream>>>(problem, lanes, static_cast<const T*>(value), locations,
                                                                weights, static_cast<T*>(out));
  });
}

template <typename T, int kVector>
cudaError_t backward_packed(const Problem& problem, const void* grad_output, const void* value, const float* locations,
                            const float* weights, float* grad_value, float* grad_locations, float* grad_weights,
                            cudaStream_t stream) {
  const int64_t packets = (problem.D + kVector - 1) / kVector;
  const int lanes = lanes_for(packets);
  const auto kernel = packets > lanes ? backward_kernel<T, kVector, true> : backward_kernel<T, kVector, false>;
  return over_rows(problem, lanes, [&](unsigned blocks) {
    kernel<<<blocks, kThreads, 0, stream>>>(problem, lanes, static_cast<const T*>(grad_output),
                                            static_cast<const T*>(value), locations, weights, grad_value,
                                            grad_locations, grad_weights);
  });
}

template <typename T, typename... Arguments>
cudaError_t forward_typed(const Problem& problem, Arguments... arguments) {
  constexpr int kVector = 16 / sizeof(T);
  return problem.D % kVector == 0 ? forward_packed<T, kVector>(problem, arguments...)
                                  : forward_packed<T, 1>(problem, arguments...);
}

template <typename T, typename... Arguments>
cudaError_t backward_typed(const Problem& problem, Arguments... arguments) {
  constexpr int kVector = 16 / sizeof(T);
  return problem.D % kVector == 0 ? backward_packed<T, kVector>(problem, arguments...)
                                  : backward_packed<T, 1>(problem, arguments...);
}

}  // namespace

cudaError_t forward(const Problem& problem, Dtype dtype, const void* value, const float* locations,
                    const float* weights, void* out, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kFloat32: return forward_typed<float>(problem, value, locations, weights, out, stream);
    case Dtype::kFloat16: return forward_typed<__half>(problem, value, locations, weights, out, stream);
    case Dtype::kBFloat16: return forward_typed<__nv_bfloat16>(problem, value, locations, weights, out, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t backward(const Problem& problem, Dtype dtype, const void* grad_output, const void* value,
                     const float* locations, const float* weights, float* grad_value, float* grad_locations,
                     float* grad_weights, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kFloat32:
      return backward_typed<float>(problem, grad_output, value, locations, weights, grad_value, grad_locations,
                                   grad_weights, stream);
    case Dtype::kFloat16:
      return backward_typed<__half>(problem, grad_output, value, locations, weights, grad_value, grad_locations,
                                    grad_weights, stream);
    case Dtype::kBFloat16:
      return backward_typed<__nv_bfloat16>(problem, grad_output, value, locations, weights, grad_value, grad_locations,
                                           grad_weights, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace msda
