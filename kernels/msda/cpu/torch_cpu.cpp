/* PyTorch binding of the CPU kernels: checks tensors and passes their pointers. */
#include "../torch-ext/torch_binding.h"
#include "ms_deform_attn.h"

namespace {

using torch::headeronly::ScalarType;

msda_shape make_shape(const Tensor& value, const Sizes& sizes) {
  const ScalarType dtype = value.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "value must be float32 or bfloat16 on a CPU.");
  return {sizes.B,
          sizes.S,
          sizes.M,
          sizes.D,
          sizes.Q,
          sizes.L,
          sizes.K,
          dtype == ScalarType::Float ? MSDA_FLOAT32 : MSDA_BFLOAT16,
          static_cast<int32_t>(torch::stable::get_num_threads())};
}

void check_status(int status) {
  STD_TORCH_CHECK(status != MSDA_NO_MEMORY, "Deformable attention ran out of memory: use a smaller batch or image.");
  STD_TORCH_CHECK(status == MSDA_OK, "Deformable attention takes at most 256 channels per head and 256 samples per query.");
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

float* floats_out(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

}  // namespace

Tensor ms_deform_attn_forward(Tensor value, std::vector<int64_t> spatial_shapes, Tensor sampling_locations,
                              Tensor attention_weights) {
  const Sizes sizes = check_shapes(value, spatial_shapes, sampling_locations, attention_weights);
  const msda_shape shape = make_shape(value, sizes);
  const Tensor v = torch::stable::contiguous(value), l = torch::stable::contiguous(sampling_locations),
               w = torch::stable::contiguous(attention_weights);
  const Tensor out = torch::stable::new_empty(value, {sizes.B, sizes.Q, sizes.M * sizes.D});
  check_status(msda_forward(&shape, spatial_shapes.data(), v.const_data_ptr(), floats(l), floats(w),
                            out.mutable_data_ptr()));
  return out;
}

Gradients ms_deform_attn_backward(Tensor grad_output, Tensor value, std::vector<int64_t> spatial_shapes,
                                  Tensor sampling_locations, Tensor attention_weights) {
  const Sizes sizes = check_shapes(value, spatial_shapes, sampling_locations, attention_weights);
  check_gradient(grad_output, value, sizes);
  const msda_shape shape = make_shape(value, sizes);
  const Tensor g = torch::stable::contiguous(grad_output), v = torch::stable::contiguous(value),
               l = torch::stable::contiguous(sampling_locations), w = torch::stable::contiguous(attention_weights);
  const Tensor grad_value = torch::stable::new_empty(v, {sizes.B, sizes.S, sizes.M, sizes.D});
  const Tensor grad_locations = torch::stable::new_empty(l, {sizes.B, sizes.Q, sizes.M, sizes.L, sizes.K, 2});
  const Tensor grad_weights = torch::stable::new_empty(w, {sizes.B, sizes.Q, sizes.M, sizes.L, sizes.K});
  check_status(msda_backward(&shape, spatial_shapes.data(), v.const_data_ptr(), floats(l), floats(w),
                             g.const_data_ptr(), grad_value.mutable_data_ptr(), floats_out(grad_locations),
                             floats_out(grad_weights)));
  return {grad_value, grad_locations, grad_weights};
}
