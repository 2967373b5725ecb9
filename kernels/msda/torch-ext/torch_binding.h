/* Signatures of the operators, and the shape checks that every backend makes before it uses a pointer. */
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

using torch::stable::Tensor;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Tensor ms_deform_attn_forward(Tensor value, std::vector<int64_t> spatial_shapes, Tensor sampling_locations,
                              Tensor attention_weights);
Gradients ms_deform_attn_backward(Tensor grad_output, Tensor value, std::vector<int64_t> spatial_shapes,
                                  Tensor sampling_locations, Tensor attention_weights);

/* B batch, S tokens, M heads, D channels per head, Q queries, L levels, K points. */
struct Sizes {
  int64_t B, S, M, D, Q, L, K;
};

inline Sizes check_shapes(const Tensor& value, const std::vector<int64_t>& spatial_shapes, const Tensor& locations,
                          const Tensor& weights) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(value.dim() == 4, "value must be (B, S, M, D), it has ", value.dim(), " dimensions.");
  STD_TORCH_CHECK(locations.dim() == 6 && locations.size(5) == 2,
                  "sampling_locations must be (B, Q, M, L, K, 2), it has ", locations.dim(), " dimensions.");
  STD_TORCH_CHECK(locations.scalar_type() == ScalarType::Float && weights.scalar_type() == ScalarType::Float,
                  "sampling_locations and attention_weights must be float32: half precision would misplace samples.");
  const Sizes sizes = {value.size(0),     value.size(1),     value.size(2),    value.size(3),
                       locations.size(1), locations.size(3), locations.size(4)};
  STD_TORCH_CHECK(locations.size(0) == sizes.B && locations.size(2) == sizes.M,
                  "sampling_locations is for ", locations.size(0), " items of ", locations.size(2),
                  " heads, but value has ", sizes.B, " of ", sizes.M, ".");
  STD_TORCH_CHECK(weights.dim() == 5, "attention_weights must be (B, Q, M, L, K), it has ", weights.dim(),
                  " dimensions.");
  for (int64_t i = 0; i < 5; i++)
    STD_TORCH_CHECK(weights.size(i) == locations.size(i), "attention_weights and sampling_locations differ in size ", i,
                    ": ", weights.size(i), " and ", locations.size(i), ".");
  int64_t area = 0;
  for (size_t i = 0; i + 1 < spatial_shapes.size(); i += 2) {
    STD_TORCH_CHECK(spatial_shapes[i] >= 0 && spatial_shapes[i + 1] >= 0, "spatial_shapes has a negative side.");
    area += spatial_shapes[i] * spatial_shapes[i + 1];
  }
  STD_TORCH_CHECK(spatial_shapes.size() == static_cast<size_t>(2 * sizes.L) && area == sizes.S,
                  "spatial_shapes covers ", area, " tokens, but value has ", sizes.S, " on ", sizes.L,
                  " levels: give h and w of each level.");
  return sizes;
}

inline void check_gradient(const Tensor& grad_output, const Tensor& value, const Sizes& sizes) {
  STD_TORCH_CHECK(grad_output.dim() == 3 && grad_output.size(0) == sizes.B && grad_output.size(1) == sizes.Q &&
                      grad_output.size(2) == sizes.M * sizes.D && grad_output.scalar_type() == value.scalar_type(),
                  "grad_output must have the output's shape (", sizes.B, ", ", sizes.Q, ", ", sizes.M * sizes.D,
                  ") and the dtype of value.");
}
