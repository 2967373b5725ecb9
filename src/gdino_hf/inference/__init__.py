"""Faster inference: `model.optimize_for_inference()` and the layers it puts into a model.

Reading order:

1. optimize: the method itself, and which layer is replaced by what. arithmetic: which numbers are multiplied, measured
   on this CPU.
2. workers: row blocks on a queue, the one way in which these layers use several threads.
3. onednn, packed_linear, packed_convolution: layers whose weights lie in oneDNN's own layout.
4. compiled_layers, float_linear, float_convolution, int8_linear: layers in C, in float32 and with 8-bit
   products.
5. packed_swin, packed_fusion, packed_attention, packed_encoder, packed_decoder: the parts of the model, block by block.
6. prompt_cache: text features of recent prompts.
7. graphed_stages, graph_cache, watched_modules, cuda_graphs: the forward pass on a GPU, recorded and replayed.

model/ imports nothing from here, because it travels to the Hub without this folder. It offers five attributes:
`optimize_for_inference` sets `backbone.fast_forward`, `model.fast_stages`, `model.text_feature_cache` and
`model._optimized`, and `install` sets `token_blocks.run`.
"""
