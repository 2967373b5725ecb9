r"""Convert checkpoints of other projects to this package's layout, and back.

A layout is one project's way of naming the tensors of a Grounding DINO. Three places describe it, and the code around
them needs no change when a layout is added:

    layouts.py       how a checkpoint of the layout is recognized: one `Layout` each
    keys/NAME.txt    which of its tensors is which of ours, line by line; keys/original.txt explains the notation
    rules.py         what happens to the values of a tensor on the way: nothing, split, permuted, ...

From these, infer.py reads the configuration off the tensors, plan.py decides what to write before anything is written,
engine.py runs the conversion, and record.py keeps a report that makes converting back exact.

How to add a layout
-------------------
The example adds "toy": our own names with `net.` for `model.` and `boxes.` for `bbox_embed.`, and one fused tensor for
query, key and value of the decoder's self-attention. tests/conversion/test_add_a_layout.py runs exactly these steps.

1. Write keys/toy.txt. The first line that fits a key wins, so special cases stand above general ones::

       net.decoder.layers.{i}.self_attn.qkv.* | model.decoder.layers.{i}.self_attn.{qkv}.* | fused
       net.*                                  | model.*
       boxes.*                                | bbox_embed.*

   Our names are the keys of `model.safetensors` in any converted folder. A tensor the detector does not need goes to
   "-" with the rule `keep` (stored beside the model for converting back) or `drop`, followed by the reason.

2. Add the layout to layouts.py and to `LAYOUTS` there::

       TOY = Layout(
           name="toy",
           title="Toy",
           signs=("net.text_backbone.",),
           wrapper="model",
           presets=("tiny",),
           decoder_layer=r"net\.decoder\.layers\.(\d+)\..+",
           backbone_level=r"net\.backbone\.conv_encoder\.model\.hidden_states_norms\.stage(\d+)\..+",
           box_head=r"boxes\.(\d+)\.(.+)",
           class_bias=r"classes\.(\d+)\.bias",
           source_url="https://example.org/toy",
       )

   `gdino convert` now recognizes toy checkpoints and offers `--to-toy`.

3. Only if values change in a way that no rule covers: add a `Rule` to `RULES` in rules.py.

4. Copy tests/conversion/test_add_a_layout.py and compare with a forward pass of the other project's code if you can.
   A key without a line, or a shape that does not fit, stops the conversion with a message that names the key.

5. Copy the script conversion/convert_original.py if the layout should have one of its own.
"""
