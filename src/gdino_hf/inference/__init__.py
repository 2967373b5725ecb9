"""Faster inference on a CPU: `model.optimize_for_inference()` and the layers it puts into a model.

Reading order:

1. optimize: the method itself, and which layer is replaced by what.
2. onednn, packed_linear: linear layers whose weights lie in oneDNN's own layout.
3. packed_attention: deformable attention inside one C call.
4. packed_swin: the Swin backbone, a few windows at a time.
5. int8_linear, int8_encoder: the layers with 8-bit products, for CPUs with AVX-512 VNNI.
6. prompt_cache: text features of recent prompts.

model/ imports nothing from here, because it travels to the Hub without this folder. It offers three attributes that
`optimize_for_inference` sets: `backbone.fast_forward`, `model.text_feature_cache` and `model._optimized`.
"""
