/* Registration of the operators through PyTorch's stable ABI, so that one binary works with later versions too. */
#include "torch_binding.h"

#include "registration.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def("forward(Tensor value, int[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights) -> Tensor");
  ops.def(
      "backward(Tensor grad_output, Tensor value, int[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
}

#if defined(CUDA_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
#else
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
#endif
  ops.impl("forward", TORCH_BOX(&ms_deform_attn_forward));
  ops.impl("backward", TORCH_BOX(&ms_deform_attn_backward));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
