/* PyTorch binding of the CUDA kernels: checks tensors and passes their pointers. */
#include <torch/csrc/stable/accelerator.h>

#include "../torch-ext/torch_binding.h"
#include "ms_deform_attn.h"

// Weak, so that the library also loads with a PyTorch without CUDA, which lacks this function.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace {

using torch::headeronly::ScalarType;

cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "This PyTorch has no CUDA.");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

msda::Dtype dtype_of(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Float: return msda::Dtype::kFloat32;
    case ScalarType::Half: return msda::Dtype::kFloat16;
    case ScalarType::BFloat16: return msda::Dtype::kBFloat16;
    default: STD_TORCH_CHECK(false, "value must be float32, float16 or bfloat16."); return msda::Dtype::kFloat32;
  }
}

/* Make a tensor contiguous and 16-byte aligned; a slice of another tensor may start at any address. */
Tensor packed(const Tensor& tensor) {
  const Tensor result = torch::stable::contiguous(tensor);
  const bool aligned = reinterpret_cast<uintptr_t>(result.const_data_ptr()) % 16 == 0;
  return aligned ? result : torch::stable::clone(result);
}

msda::Problem make_problem(const Tensor& value, const std::vector<int64_t>& spatial_shapes, const Tensor& locations,
                           const Tensor& weights) {
  const Sizes sizes = check_shapes(value, spatial_shapes, locations, weights);
  STD_TORCH_CHECK(sizes.L <= msda::kMaxLevels, "At most ", msda::kMaxLevels, " levels, got ", sizes.L, ".");
  STD_TORCH_CHECK(sizes.S <= INT32_MAX, "At most 2^31 - 1 tokens per item, got ", sizes.S, ".");
  for (const Tensor* other : {&locations, &weights})
    STD_TORCH_CHECK(other->is_cuda() && other->get_device() == value.get_device(),
                    "value, sampling_locations and attention_weights must be on one device.");
  msda::Problem problem = {sizes.B, sizes.S, sizes.M, sizes.D, sizes.Q, static_cast<int>(sizes.L),
                           static_cast<int>(sizes.K)};
  int start = 0;
  for (int level = 0; level < problem.L; level++) {
    problem.height[level] = static_cast<int>(spatial_shapes[2 * level]);
    problem.width[level] = static_cast<int>(spatial_shapes[2 * level + 1]);
    problem.start[level] = start;
    start += problem.height[level] * problem.width[level];
  }
  return problem;
}

void check_launch(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "Deformable attention did not start: ", cudaGetErrorString(status), ".");
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

float* floats_out(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

}  // namespace

Tensor ms_deform_attn_forward(Tensor value, std::vector<int64_t> spatial_shapes, Tensor sampling_locations,
                              Tensor attention_weights) {
  const msda::Problem problem = make_problem(value, spatial_shapes, sampling_locations, attention_weights);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device());
  const Tensor v = packed(value), l = packed(sampling_locations), w = packed(attention_weights);
  const Tensor out = torch::stable::new_empty(value, {problem.B, problem.Q, problem.M * problem.D});
  check_launch(msda::forward(problem, dtype_of(value), v.const_data_ptr(), floats(l), floats(w), out.mutable_data_ptr(),
                             current_stream(value)));
  return out;
}

Gradients ms_deform_attn_backward(Tensor grad_output, Tensor value, std::vector<int64_t> spatial_shapes,
                                  Tensor sampling_locations, Tensor attention_weights) {
  const msda::Problem problem = make_problem(value, spatial_shapes, sampling_locations, attention_weights);
  check_gradient(grad_output, value, {problem.B, problem.S, problem.M, problem.D, problem.Q, problem.L, problem.K});
  const torch::stable::accelerator::DeviceGuard guard(value.get_device());
  const Tensor g = packed(grad_output), v = packed(value), l = packed(sampling_locations),
               w = packed(attention_weights);
  // Accumulated in float32 whatever the dtype, since thousands of samples may read one cell.
  const Tensor grad_value =
      torch::stable::new_zeros(value, {problem.B, problem.S, problem.M, problem.D}, ScalarType::Float);
  const Tensor grad_locations =
      torch::stable::new_empty(l, {problem.B, problem.Q, problem.M, problem.L, problem.K, 2});
  const Tensor grad_weights = torch::stable::new_empty(w, {problem.B, problem.Q, problem.M, problem.L, problem.K});
  check_launch(msda::backward(problem, dtype_of(value), g.const_data_ptr(), v.const_data_ptr(), floats(l), floats(w),
                              floats_out(grad_value), floats_out(grad_locations), floats_out(grad_weights),
                              current_stream(value)));
  return {torch::stable::to(grad_value, value.scalar_type()), grad_locations, grad_weights};
}
